"""The images of class folders, for the sources `folder` and `inaturalist`: each folder once, the rest is said."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from paco_ds.data.pack.root import Root, Walk
from paco_ds.data.pack.samples import Samples, SamplesBuilder
from paco_ds.data.pack.source import ENDINGS, ending, some
from paco_ds.errors import DataError


def list_folders(
    root: Root, split: str, places: Iterable[tuple[int, str]], ignored: Counter[str], notes: list[str]
) -> Samples:
    """The images of a split, class by class.

    Args:
        split: the folder that holds the class folders.
        places: label and folder of each class.
        ignored: counts other files, by ending.
        notes: takes a line on each kind of thing that is left out.

    Raises:
        DataError: a folder is that of two classes, or cannot be read; a link leads nowhere.
    """
    rows, walk = SamplesBuilder(), Walk(root.path / split if root.storage.is_local else None)
    for label, place in places:
        if root.storage.is_local and not walk.enters(str(root.path / place), class_folder=True):
            raise DataError(f"{root}/{place} is the folder of another class too: remove one of the two")
        for name in sorted(_images(root, root.files(place, walk), ignored)):
            rows.add(name, label)
    if loose := _images(root, (f"{split}/{name}" for name in root.files_in(split)), ignored):
        notes.append(f"left out, images directly in {split} and in no class folder: {len(loose)}")
    if hidden := walk.hidden + root.hidden_in(split):
        notes.append(f"left out, hidden files and folders in {split}: {hidden}")
    if walk.left_out:
        notes.append(f"left out, since their images are listed elsewhere: {some(walk.left_out)}")
    return rows.build()


def _images(root: Root, names: Iterable[str], ignored: Counter[str]) -> list[str]:
    """The names of images, by their ending; the others are counted in `ignored`.

    A link that leads nowhere may be a folder that is not mounted; one with an image's ending is found missing later.
    """
    images = []
    for name in names:
        if ending(name) in ENDINGS:
            images.append(name)
        else:
            root.refuse_dangling(name)
            ignored[f".{ending(name)}" if ending(name) else "(no ending)"] += 1
    return images
