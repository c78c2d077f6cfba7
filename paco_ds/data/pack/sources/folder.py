"""The source `folder`: one folder of images per class, searched to any depth."""

from __future__ import annotations

from collections import Counter
from pathlib import PurePosixPath
from typing import Any, ClassVar, Literal

from pydantic import Field

from paco_ds.data.manifest import Name, StrictModel
from paco_ds.data.names import same_name, split_called
from paco_ds.data.pack.card import SPLIT_NAMES, Card
from paco_ds.data.pack.class_folders import list_folders
from paco_ds.data.pack.nested_folders import refuse_nested
from paco_ds.data.pack.root import Root
from paco_ds.data.pack.source import Files, Source, some
from paco_ds.errors import DataError

_CALLED_LIKE_A_SPLIT = (
    "; by its name it is taken for a split: if it is a class, write a card that names all `classes`, and gives "
    "train `folder: .`"
)


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
        """The root's folders with usual names of splits, in any case; without one, the root itself is train."""
        place, found = Root(root), dict[str, str]()
        for folder in place.folders_in(".") if place.exists() else ():
            if (split := split_called(folder)) is None:
                continue
            if split in found:
                raise DataError(
                    f"{root} has {found[split]} and {folder}, both called like {split}: name the folders of the splits "
                    "with --train, --val and --test"
                )
            found[split] = folder
        if found and "train" not in found:
            raise DataError(
                f"{root} has {some(found.values())} and no folder of training images: name it with --train, or give as "
                "--root the folder above; a class of that name has to stand in a card's `classes`"
            )
        found = {name: found[name] for name in SPLIT_NAMES if name in found} or {"train": "."}
        return {"splits": {name: {"folder": folder} for name, folder in found.items()}}

    def list_images(self, root: Root) -> Source:
        """List the images of class folders; DataError if a split has a class folder that train has not."""
        found = {name: self._class_folders(root, split.folder) for name, split in self.splits.items()}
        first = "train" if "train" in found else next(iter(found))
        notes = [] if self.classes else refuse_nested(root, self.splits[first].folder, list(found[first].values()))
        classes = tuple(map(same_name, self.classes or found[first]))
        origin = "the card" if self.classes else f"split {first}"
        for name, folders in found.items():
            missing, extra = set(classes) - set(folders), set(folders) - set(classes)
            if extra or (missing and name == first):
                raise DataError(
                    f"split {name} ({root}/{self.splits[name].folder}) does not have the classes of {origin}: "
                    f"missing {some(sorted(missing))}; not known {some(sorted(extra))}"
                )
            if missing:
                notes.append(f"split {name} has no folder of {some(sorted(missing))}, and so no image of them")
        ignored: Counter[str] = Counter()
        splits = {}
        for name, split in self.splits.items():
            own = found[name]
            places = [(label, f"{split.folder}/{own[each]}") for label, each in enumerate(classes) if each in own]
            splits[name] = list_folders(root, split.folder, places, ignored, notes)
        return Source(classes, splits, Files(root), ignored, notes=notes + self._beside(root))

    def _class_folders(self, root: Root, folder: str) -> dict[str, str]:
        """The class folders of a split by the names of their classes, sorted; DataError if called like splits."""
        found: dict[str, str] = {}
        for name in root.folders(folder, _CALLED_LIKE_A_SPLIT if split_called(folder) else ""):
            if same_name(name) in found:
                raise DataError(f"{root}/{folder} has two folders called {name!r}, in two Unicode forms: rename one")
            found[same_name(name)] = name
        if self.classes is None and (called := [name for name in found if split_called(name)]):
            raise DataError(
                f"{root}/{folder} holds {some(called)}, called like splits and not like classes: give them as "
                "--train, --val and --test, or name the classes in a card"
            )
        return dict(sorted(found.items()))

    def _beside(self, root: Root) -> list[str]:
        """A line on folders that lie beside those of the splits, if there are any."""
        used = [PurePosixPath(split.folder) for split in self.splits.values()]
        if any(len(folder.parts) != 1 for folder in used):
            return []
        others = [name for name in root.folders_in(".") if PurePosixPath(name) not in used]
        return [f"left out, folders beside those of the splits: {some(others)}"] if others else []
