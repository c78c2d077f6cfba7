"""Owns the source `folder`: images in one folder per class, folders inside it included."""

from __future__ import annotations

from collections import Counter

from paco_ds.data.card import FolderCard
from paco_ds.data.pack.samples import SamplesBuilder
from paco_ds.data.pack.sources.source import ENDINGS, Files, Root, Source, ending, some
from paco_ds.errors import DataError


def read(card: FolderCard, root: Root) -> Source:
    """List the images of class folders; DataError if the splits' folders differ."""
    found = {name: root.folders(split.folder) for name, split in card.splits.items()}
    first = next(iter(found))
    classes = card.classes or tuple(found[first])
    origin = "the card" if card.classes else f"split {first}"
    for name, folders in found.items():
        missing, extra = set(classes) - set(folders), set(folders) - set(classes)
        if missing or extra:
            raise DataError(
                f"split {name} ({root}/{card.splits[name].folder}) does not have the classes of {origin}: "
                f"missing {some(sorted(missing))}; not known {some(sorted(extra))}"
            )
    ignored: Counter[str] = Counter()
    splits = {}
    for name, split in card.splits.items():
        rows = SamplesBuilder()
        for label, folder in enumerate(classes):
            add_images(rows, root, f"{split.folder}/{folder}", label, ignored)
        splits[name] = rows.build()
    return Source(classes, splits, Files(root), ignored)


def add_images(rows: SamplesBuilder, root: Root, folder: str, label: int, ignored: Counter[str]) -> None:
    """A row for each image file anywhere below a folder, in the order of their names."""
    names = []
    for name in root.files(folder):
        if ending(name) in ENDINGS:
            names.append(name)
        else:
            ignored[f".{ending(name)}" if ending(name) else "(no ending)"] += 1
    for name in sorted(names):
        rows.add(name, label)
