"""The source `folder`: one folder of images per class, searched to any depth."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from paco_ds.data.manifest import Name, StrictModel
from paco_ds.data.pack.card import SPLIT_NAMES, Card
from paco_ds.data.pack.root import Root
from paco_ds.data.pack.samples import SamplesBuilder
from paco_ds.data.pack.source import Files, Source, add_images, some
from paco_ds.errors import DataError


class FolderSplit(StrictModel):
    """A folder with one folder of images per class."""

    folder: str


class FolderCard(Card):
    """Images in a folder per class; ``classes`` fixes the order of labels, else folders are sorted by name."""

    page: ClassVar[str] = "a folder of class folders"

    source: Literal["folder"]
    classes: tuple[str, ...] | None = None
    splits: dict[Name, FolderSplit] = Field(min_length=1)

    @classmethod
    def split_of(cls, page: str) -> dict[str, Any]:
        return {"folder": page}

    @classmethod
    def keys_of_root(cls, root: str) -> dict[str, Any]:
        """The root's folders train, val and test as splits; without a train, the root itself is train."""
        found = [name for name in SPLIT_NAMES if Path(root, name).is_dir()]
        return {
            "splits": {name: {"folder": name} for name in found} if "train" in found else {"train": {"folder": "."}}
        }

    def list_images(self, root: Root) -> Source:
        """List the images of class folders; DataError if the splits do not have the same class folders."""
        found = {name: root.folders(split.folder) for name, split in self.splits.items()}
        first = next(iter(found))
        classes = self.classes or tuple(found[first])
        origin = "the card" if self.classes else f"split {first}"
        for name, folders in found.items():
            missing, extra = set(classes) - set(folders), set(folders) - set(classes)
            if missing or extra:
                raise DataError(
                    f"split {name} ({root}/{self.splits[name].folder}) does not have the classes of {origin}: "
                    f"missing {some(sorted(missing))}; not known {some(sorted(extra))}"
                )
        ignored: Counter[str] = Counter()
        splits = {}
        for name, split in self.splits.items():
            rows = SamplesBuilder()
            for label, folder in enumerate(classes):
                add_images(rows, root, f"{split.folder}/{folder}", label, ignored)
            splits[name] = rows.build()
        return Source(classes, splits, Files(root), ignored)
