"""Owns the source `webdataset`: samples of other tars, to be packed again in another size, order or selection.

Tars are scanned once for where each image and label lies; nothing but JSON and numbers is decoded.
"""

from __future__ import annotations

import fnmatch
import json
import os
import tarfile
from dataclasses import dataclass, field

import braceexpand

from paco_ds.data.card import WebdatasetCard
from paco_ds.data.image_bytes import BadImage
from paco_ds.data.samples import Samples, SamplesBuilder
from paco_ds.data.sources.source import ENDINGS, Root, Source, class_names, ending
from paco_ds.errors import DataError

_MAX_OPEN = 64


@dataclass
class Members:
    """Images that are members of tars; one tar stays open, since rows are read in any order from a few of them."""

    root: Root
    _open: dict[str, int] = field(default_factory=dict, repr=False)

    def __getstate__(self) -> Root:
        return self.root

    def __setstate__(self, root: Root) -> None:
        self.root, self._open = root, {}

    def read(self, samples: Samples, row: int) -> bytes:
        name = samples.names[row]
        tar = name.partition("#")[0]
        size = int(samples.sizes[row])
        try:
            if tar not in self._open:
                if len(self._open) >= _MAX_OPEN:
                    os.close(self._open.pop(next(iter(self._open))))
                self._open[tar] = os.open(self.root.path / tar, os.O_RDONLY)
            data = os.pread(self._open[tar], size, int(samples.places[row]))
        except OSError as error:
            raise BadImage("unreadable", name, error.strerror or str(error)) from error
        if len(data) != size:
            raise DataError(f"{self.root}/{tar} changed while the shards were built: start again")
        return data


def read(card: WebdatasetCard, root: Root) -> Source:
    """List the samples of tars; labels are the numbers in them, class names those beside them or the card's."""
    names: dict[int, str] = {}
    splits = {}
    bad: list[BadImage] = []
    for split, tars in card.splits.items():
        rows = SamplesBuilder()
        for tar in _expanded(root, tars.tars):
            _scan(card, root, tar, rows, names, bad)
        splits[split] = rows.build()
    given = class_names(card.classes, root)
    largest = max((int(s.labels.max()) for s in splits.values() if len(s)), default=-1)
    if given is not None and largest >= len(given):
        raise DataError(f"label {largest} of the tars is out of range, the labels are 0 to {len(given) - 1}")
    classes = given or tuple(names.get(label, str(label)) for label in range(largest + 1))
    return Source(classes, splits, Members(root), bad=bad)


def _expanded(root: Root, pattern: str) -> list[str]:
    """The tars of a pattern with braces and stars, in the order of their names."""
    tars: list[str] = []
    for name in braceexpand.braceexpand(pattern):
        if "*" not in name and "?" not in name:
            tars.append(name)
            continue
        folder, _, last = name.rpartition("/")
        try:
            found = sorted(n for n in os.listdir(root.path / folder) if fnmatch.fnmatchcase(n, last))
        except OSError:
            found = []
        tars += [f"{folder}/{n}" if folder else n for n in found]
    if not tars:
        raise DataError(f"no tar under {root} is called {pattern}")
    missing = [tar for tar in tars if not (root.path / tar).is_file()]
    if missing:
        raise DataError(f"tar {root}/{missing[0]} is missing ({len(missing)} of {len(tars)})")
    return tars


def _scan(
    card: WebdatasetCard, root: Root, tar: str, rows: SamplesBuilder, names: dict[int, str], bad: list[BadImage]
) -> None:
    path = root.path / tar
    key, sample = None, {}
    end = 0
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                end = member.offset_data + member.size
                archive.members = []  # type: ignore[attr-defined]  # it would keep every member
                if not member.isreg():
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                if f"{folder}/{stem}" != key:
                    _take(card, root, tar, key, sample, rows, names, bad)
                    key, sample = f"{folder}/{stem}", {}
                last = ending(base) or suffix.lower()
                if last in ENDINGS:
                    sample["image"] = (member.name, member.offset_data, member.size)
                elif suffix.lower() in ("json", "cls"):
                    if member.size > 1 << 20:
                        raise DataError(f"{path}: {member.name} has {member.size} bytes, too many for a label")
                    sample[suffix.lower()] = archive.extractfile(member).read()  # type: ignore[union-attr]
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{path} is damaged or no tar ({error}): copy it again") from error
    _take(card, root, tar, key, sample, rows, names, bad)
    _require_whole(path, end)


def _require_whole(path: os.PathLike[str], end: int) -> None:
    """tarfile, like webdataset, ends silently at a damaged header: what follows the last member must be zeros."""
    with open(path, "rb") as file:
        file.seek(-(-end // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE)
        tail = file.read(2 * tarfile.BLOCKSIZE)
    if len(tail) < 2 * tarfile.BLOCKSIZE or any(tail):
        raise DataError(f"{path} is damaged after byte {end}: no end of a tar there; copy it again")


def _take(
    card: WebdatasetCard,
    root: Root,
    tar: str,
    key: str | None,
    sample: dict,
    rows: SamplesBuilder,
    names: dict[int, str],
    bad: list[BadImage],
) -> None:
    """One sample into the table, or among the bad ones."""
    if key is None or not sample:
        return
    where = f"{tar}#{key.lstrip('/')}"
    if "image" not in sample:
        bad.append(BadImage("no_image", where))
        return
    member, offset, size = sample["image"]
    label, name = _label(card, sample, f"{root}/{where}")
    if name is not None and names.setdefault(label, name) != name:
        raise DataError(f"{root}/{where}: label {label} is called {name!r}, and {names[label]!r} before it")
    rows.add(f"{tar}#{member}", label, place=offset, size=size)


def _label(card: WebdatasetCard, sample: dict, where: str) -> tuple[int, str | None]:
    name = None
    try:
        if "json" in sample:
            about = json.loads(sample["json"])
            label, name = about[card.label_key], about.get(card.class_key)
        else:
            label = int(sample["cls"])
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise DataError(
            f"{where} has no label: neither .json with {card.label_key!r} (label_key) nor .cls ({error!r})"
        ) from error
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < 2**31:
        raise DataError(f"{where}: label {label!r} is no number from 0")
    return label, None if name is None else str(name)
