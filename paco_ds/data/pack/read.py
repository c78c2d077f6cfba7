"""Listing the images of a card: names, labels and sizes, before any image is opened."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

from paco_ds.data.names import same_name
from paco_ds.data.pack.card import Card
from paco_ds.data.pack.overlap import overlaps
from paco_ds.data.pack.root import MapOver, Root
from paco_ds.data.pack.source import Source, some
from paco_ds.errors import DataError


def read_source(card: Card, root: str | Path | Root, look_up: MapOver = map) -> Source:
    """List all images of the card's splits under ``root`` with their sizes. The order depends on nothing else.

    Images that are listed but missing, empty or listed twice are moved to ``Source.bad``.

    Args:
        look_up: `map`, or a version of it that uses several processes.

    Raises:
        DataError: a file is missing or malformed, the splits do not agree on the classes, a split or a class of
            train has no image.
    """
    source = list_source(card, root)
    repeated = [name for name, count in Counter(source.classes).items() if count > 1]
    if repeated:
        raise DataError(f"{some(repeated)} of {card.name} is the name of more than one class: give them other names")
    if "" in source.classes:
        raise DataError(f"the class of label {source.classes.index('')} of {card.name} has an empty name: give it one")
    source.require_training_images()
    source = source.checked(look_up)
    source.notes.extend(overlaps(source))
    for name, samples in source.splits.items():
        if not len(samples) and not source.bad:
            raise DataError(f"split {name} of {card.name} has no image under {root}")
    return source


def list_source(card: Card, root: str | Path | Root) -> Source:
    """As `read_source`, without looking up sizes; class names that are not UTF-8 get escapes.

    Raises:
        DataError: the root does not exist, or as `Card.list_images`.
    """
    root = root if isinstance(root, Root) else Root(root)
    if not root.exists():
        raise DataError(f"there is no folder {root} with the images of {card.name}; give it as --root")
    source = card.list_images(root)
    # a folder's name may be bytes of another encoding, a JSON's text half a surrogate pair: neither can be written
    names = tuple(same_name(name.encode("utf-8", "backslashreplace").decode()) for name in source.classes)
    return replace(source, classes=names)


def class_counts(card: Card, root: str | Path | Root, split: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Class names, and the number of images of each class in a split. JSON, CSV and list files are enough: the
    images themselves need not be present.

    Raises:
        DataError: as `read_source`.
    """
    source = list_source(card.model_copy(update={"splits": {split: card.splits[split]}}), root)
    return source.classes, tuple(source.splits[split].counts(len(source.classes)).tolist())
