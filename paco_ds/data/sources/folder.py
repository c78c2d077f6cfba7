"""Owns the source `folder`: images in one folder per class, folders inside it included."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path, PurePosixPath

from paco_ds.data.card import FolderCard
from paco_ds.data.samples import SamplesBuilder
from paco_ds.data.sources.source import ENDINGS, Files, Root, Source, ending, some
from paco_ds.errors import DataError


def read(card: FolderCard, root: Root) -> Source:
    """List the images of class folders; DataError if the splits' folders differ."""
    found = {name: class_folders(root.path / split.folder) for name, split in card.splits.items()}
    first = next(iter(found))
    classes = card.classes or tuple(found[first])
    origin = "the card" if card.classes else f"split {first}"
    for name, folders in found.items():
        missing, extra = set(classes) - set(folders), set(folders) - set(classes)
        if missing or extra:
            raise DataError(
                f"split {name} ({root.path / card.splits[name].folder}) does not have the classes of {origin}: "
                f"missing {some(sorted(missing))}; not known {some(sorted(extra))}"
            )
    ignored: Counter[str] = Counter()
    splits = {}
    for name, split in card.splits.items():
        rows = SamplesBuilder()
        for label, folder in enumerate(classes):
            add_images(rows, root, PurePosixPath(split.folder, folder), label, ignored)
        splits[name] = rows.build()
    return Source(classes, splits, Files(root), ignored)


def class_folders(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted; DataError if there is none."""
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}")
    names = sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith("."))
    if not names:
        raise DataError(f"{folder} has no folder: images must lie in one folder per class")
    return names


def add_images(rows: SamplesBuilder, root: Root, folder: PurePosixPath, label: int, ignored: Counter[str]) -> None:
    """A row for each image file anywhere below a folder, in the order of their names."""
    names = []
    for parent, _, files in os.walk(root.path / folder, followlinks=True):
        inside = PurePosixPath(Path(parent).relative_to(root.path))
        for file in files:
            if ending(file) in ENDINGS:
                names.append(str(inside / file))
            else:
                ignored[f".{ending(file)}" if ending(file) else "(no ending)"] += 1
    for name in sorted(names):
        rows.add(name, label)
