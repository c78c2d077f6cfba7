"""Owns the reading of source images, as a card describes them: a module for each kind of source."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from paco_ds.data.card import (
    Card,
    CifarCard,
    CsvCard,
    FolderCard,
    IdxCard,
    INaturalistCard,
    ListCard,
    WebdatasetCard,
)
from paco_ds.data.pack.sources import cifar, folder, idx, inaturalist, listing, repack
from paco_ds.data.pack.sources.idx import read_idx
from paco_ds.data.pack.sources.source import MapOver, Root, Source, some
from paco_ds.errors import DataError

__all__ = ["Root", "Source", "class_counts", "list_source", "read_idx", "read_source", "require_training_images"]


def read_source(card: Card, root: str | Path | Root, look_up: MapOver = map) -> Source:
    """List every image of the card's splits under ``root``, in an order that depends on nothing else, with its size.

    Images that are listed but missing, empty or listed twice are left out and stand in ``Source.bad``.

    Args:
        look_up: `map`, or one that spreads its work over processes.

    Raises:
        DataError: a file is missing or malformed, the splits do not agree on the classes, a split or a class of
            train has no image.
    """
    source = list_source(card, root)
    repeated = [name for name, count in Counter(source.classes).items() if count > 1]
    if repeated:
        raise DataError(f"{some(repeated)} of {card.name} is the name of more than one class: give them other names")
    require_training_images(source)
    source = source.checked(look_up)
    for name, samples in source.splits.items():
        if not len(samples) and not source.bad:
            raise DataError(f"split {name} of {card.name} has no image under {root}")
    return source


def require_training_images(source: Source) -> None:
    """Raise DataError unless every class has a training image: a loss cannot learn a class that it never sees."""
    if "train" in source.splits:
        counts = source.splits["train"].counts(len(source.classes))
        empty = [source.classes[label] for label in np.flatnonzero(counts == 0)]
        if empty:
            raise DataError(f"no training image of {some(empty)}: add some, or take the class out")


def list_source(card: Card, root: str | Path | Root) -> Source:
    """The same without looking at the image files: sizes are MISSING where the source does not state them."""
    root = root if isinstance(root, Root) else Root(root)
    if not root.exists():
        raise DataError(f"there is no folder {root} with the images of {card.name}; give it as --root")
    match card:
        case IdxCard():
            return idx.read(card, root)
        case CifarCard():
            return cifar.read(card, root)
        case FolderCard():
            return folder.read(card, root)
        case INaturalistCard():
            return inaturalist.read(card, root)
        case ListCard():
            return listing.read_lists(card, root)
        case CsvCard():
            return listing.read_csv(card, root)
        case WebdatasetCard():
            return repack.read(card, root)


def class_counts(card: Card, root: str | Path | Root, split: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Class names, and how many images each class has in a split of the card, of what lists it: JSON, CSV and list
    files are enough, the images may be elsewhere.

    Raises:
        DataError: as :func:`read_source`.
    """
    source = list_source(card.model_copy(update={"splits": {split: card.splits[split]}}), root)
    return source.classes, tuple(source.splits[split].counts(len(source.classes)).tolist())
