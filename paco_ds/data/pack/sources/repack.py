"""The source `webdataset`: samples of other tars, repacked with another shard size, order or selection.

Tars are scanned once for where each image and label lies; only JSON and numbers are decoded.
"""

from __future__ import annotations

import fnmatch
import os
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import braceexpand
from pydantic import Field, StrictStr

from paco_ds.data.manifest import Name, StrictModel
from paco_ds.data.names import is_hidden, same_path
from paco_ds.data.pack.card import CLASSES_FILE, Card, Option
from paco_ds.data.pack.class_list import class_names, refuse_swapped
from paco_ds.data.pack.image_bytes import BadImage, Encoded
from paco_ds.data.pack.root import Root
from paco_ds.data.pack.samples import Samples
from paco_ds.data.pack.source import Source, refuse_labels_from_one, some
from paco_ds.data.pack.tar_scan import TarScan
from paco_ds.data.storage import MissingFile
from paco_ds.errors import DataError

_MAX_OPEN = 64


@dataclass
class Members:
    """Images that are members of tars. Tars stay open, since rows come in any order from a few of them.

    Attributes:
        marked: tars with a # in their path, which else ends where the member begins.
    """

    root: Root
    marked: tuple[str, ...] = ()
    _open: dict[str, int] = field(default_factory=dict, repr=False)

    def __getstate__(self) -> tuple[Root, tuple[str, ...]]:
        return self.root, self.marked

    def __setstate__(self, state: tuple[Root, tuple[str, ...]]) -> None:
        (self.root, self.marked), self._open = state, {}

    def file_of(self, name: str) -> str:
        return next((tar for tar in self.marked if name.startswith(f"{tar}#")), name.partition("#")[0])

    def read(self, samples: Samples, row: int, room: memoryview) -> Encoded:
        name = samples.names[row]
        tar = self.file_of(name)
        if not self.root.storage.is_local:
            return self._read_range(tar, int(samples.places[row]), len(room) - 1)
        try:
            if tar not in self._open:
                if len(self._open) >= _MAX_OPEN:
                    os.close(self._open.pop(next(iter(self._open))))
                self._open[tar] = os.open(self.root.path / tar, os.O_RDONLY)
            size = os.preadv(self._open[tar], (room[:-1],), int(samples.places[row]))
        except OSError as error:
            raise BadImage("unreadable", name, error.strerror or str(error)) from error
        if size != len(room) - 1:
            raise self._changed(tar)
        return room[:-1]

    def _read_range(self, tar: str, place: int, size: int) -> bytes:
        try:
            return self.root.storage.read_range(tar, place, size)
        except MissingFile:
            raise self._changed(tar) from None

    def _changed(self, tar: str) -> DataError:
        return DataError(f"{self.root.storage.place(tar)} changed while the shards were built: start again")


class WebdatasetSplit(StrictModel):
    """Tars of another build: a pattern such as `train-*.tar` or `train-{000..107}.tar`."""

    tars: str


class WebdatasetCard(Card):
    """Samples of other webdataset shards: an image and `.json` with ``label_key`` and ``class_key``, or `.cls`.

    Where a sample has several images, ``image_ending`` tells which: what follows the first dot, as `jpg` or `seg.png`.
    """

    page: ClassVar[str] = "the tars, as a pattern such as 'train-*.tar'"
    options: ClassVar[dict[str, Option]] = {
        "classes": CLASSES_FILE,
        "image_ending": Option("ENDING", "of the image to take where a sample has several, as jpg or seg.png"),
    }

    source: Literal["webdataset"]
    image_ending: str | None = None
    label_key: str = "label"
    class_key: str = "class"
    classes: tuple[StrictStr, ...] | StrictStr | None = None
    splits: dict[Name, WebdatasetSplit] = Field(min_length=1)

    @classmethod
    def split_of(cls, page: str) -> dict[str, Any]:
        return {"tars": page}

    def list_images(self, root: Root) -> Source:
        """List the samples of tars. Labels are the numbers in them, class names those beside them or the card's."""
        names: dict[int, str] = {}
        splits = {}
        bad: list[BadImage] = []
        notes: list[str] = []
        places: list[str] = []
        marked: set[str] = set()
        for split, tars in self.splits.items():
            scan = TarScan(root, self.label_key, self.class_key, self.image_ending, names, bad)
            for tar in _expanded(root, tars.tars):
                scan.tar(tar)
                marked |= {same_path(tar)} if "#" in tar else set()
                places.append(str(root.path / tar) if root.storage.is_local else root.storage.place(tar))
            splits[split] = scan.rows.build()
            if scan.hidden:
                notes.append(
                    f"left out, hidden members of the tars of {split} (such as macOS's ._ files): {scan.hidden}"
                )
            if scan.hidden and not len(scan.rows) and not bad:
                raise DataError(
                    f"all members of the tars of {split} are hidden, or lie below a hidden folder, the first "
                    f"{scan.first_hidden}: pack them again from the folder that holds them"
                )
            if scan.archives:
                notes.append(
                    f"left out, archives in the tars of {split}, whose images are not read: {some(scan.archives)}; "
                    "unpack them, or name those tars with the others"
                )
        given = class_names(self.classes, root, notes)
        largest = max((int(s.labels.max()) for s in splits.values() if len(s)), default=-1)
        if given is not None and largest >= len(given):
            raise DataError(f"label {largest} of the tars is out of range, the labels are 0 to {len(given) - 1}")
        if given is None:
            refuse_labels_from_one(splits, f"the tars of {root}")
        else:
            where = f"{root}/{self.classes}" if isinstance(self.classes, str) else "the card's list of classes"
            refuse_swapped(dict(enumerate(given)), names, where, "the tars")
        classes = given or tuple(names.get(label, str(label)) for label in range(largest + 1))
        return Source(
            classes, splits, Members(root, tuple(sorted(marked, reverse=True))), bad=bad, notes=notes, tars=places
        )


def _expanded(root: Root, pattern: str) -> list[str]:
    """The tars of a pattern with braces, stars and brackets, in the order of their names; hidden ones by name only."""
    tars: list[str] = []
    try:
        names = list(braceexpand.braceexpand(pattern))
    except ValueError:
        raise DataError(f"the pattern {pattern} has half a pair of braces: write it as x-{{000..107}}.tar") from None
    for name in names:
        if set("*?[").isdisjoint(name) or root.storage.exists(name):
            tars.append(name)
            continue
        folder, _, last = name.rpartition("/")
        found = sorted(n for n in _names(root, folder) if fnmatch.fnmatchcase(n, last) and not is_hidden(n))
        tars += [f"{folder}/{n}" if folder else n for n in found]
    if not tars:
        raise DataError(f"no tar under {root} is called {pattern}")
    missing = [tar for tar in tars if not root.storage.exists(tar)]
    if missing:
        raise DataError(f"tar {root}/{missing[0]} is missing ({len(missing)} of {len(tars)})")
    return tars


def _names(root: Root, folder: str) -> list[str]:
    """Names of the files directly in a folder; none where there is no such folder."""
    if root.storage.is_local:
        place = root.path / folder
        return [entry.name for entry in os.scandir(place) if entry.is_file()] if place.is_dir() else []
    return [name for name in root.storage.find(folder) if "/" not in name]
