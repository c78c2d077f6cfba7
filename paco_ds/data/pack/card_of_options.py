"""Owns the card that the command line stands for when none is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from paco_ds.data.card import SPLIT_NAMES, Card, folder_splits, make_card, name_of
from paco_ds.data.pack.sources import cifar
from paco_ds.errors import DataError

# Options that a kind of source has a use for, by name of the card's key.
_KEYS = {
    "csv": ("classes", "path_column", "label_column", "group_column", "delimiter"),
    "list": ("classes",),
    "webdataset": ("classes",),
    "idx": ("classes",),
}


def card_of_options(options: Mapping[str, str | None]) -> Card:
    """The card for `source`, `root`, a page per split, `name`, `license`, and the keys of the source.

    Raises:
        DataError: an option is missing, or says nothing for this source.
    """
    source, root = str(options["source"]), str(options["root"])
    pages = {split: page for split in SPLIT_NAMES if (page := options.get(split)) is not None}
    card: dict[str, Any] = {
        "source": source,
        "name": options.get("name") or name_of(root),
        "license": options.get("license") or "not stated",
    }
    known = {"source", "root", "name", "license", *SPLIT_NAMES, *_KEYS.get(source, ())}
    for key, value in options.items():
        if value is not None and key not in known:
            raise DataError(f"--{key.replace('_', '-')} says nothing for --source {source}")
        if value is not None and key in _KEYS.get(source, ()):
            card[key] = value
    if source == "idx" and "classes" in card:
        card["classes"] = _lines(Path(root, str(card["classes"])))
    if pages:
        card["splits"] = {split: _SPLITS[source](page) for split, page in pages.items()}
        if source == "cifar":
            card["meta"] = cifar.find_splits(root)["meta"]
    elif source == "folder":
        card["splits"] = folder_splits(root)
    elif source == "cifar":
        card |= cifar.find_splits(root)
    else:
        raise DataError(f"--source {source} needs --train: {_WHAT[source]}")
    return make_card(card, f"--source {source}")


def _idx(page: str) -> dict[str, Any]:
    images, comma, labels = page.partition(",")
    if not comma:
        raise DataError(f"{page!r}: an IDX split is given as IMAGES,LABELS")
    return {"images": images, "labels": labels}


def _inaturalist(page: str) -> dict[str, Any]:
    return {"annotations": page} if page.endswith(".json") else {"folder": page}


_SPLITS: dict[str, Callable[[str], dict[str, Any]]] = {
    "idx": _idx,
    "cifar": lambda page: {"files": page.split(",")},
    "folder": lambda page: {"folder": page},
    "inaturalist": _inaturalist,
    "list": lambda page: {"list": page},
    "csv": lambda page: {"file": page},
    "webdataset": lambda page: {"tars": page},
}
_WHAT = {
    "idx": "IMAGES,LABELS under --root, and --classes",
    "inaturalist": "the JSON file, or the folder of torchvision's layout, under --root",
    "list": "the list file under --root",
    "csv": "the CSV file under --root",
    "webdataset": "the tars under --root, as a pattern such as 'train-*.tar'",
}


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise DataError(f"the file of class names {path} cannot be read: {error.strerror}") from error
