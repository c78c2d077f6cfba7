"""A listed source: its classes, a table of images for each split, and the reader of their bytes."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Protocol

import cv2
import numpy as np
import numpy.typing as npt

from paco_ds.data.names import notes_on
from paco_ds.data.pack.image_bytes import BadImage, Encoded
from paco_ds.data.pack.root import MapOver, Root
from paco_ds.data.pack.samples import MISSING, Names, Samples, SamplesBuilder
from paco_ds.data.pack.spelling import Spellings
from paco_ds.data.storage import MissingFile
from paco_ds.errors import DataError

# Endings of image files; other files in folders are left out. The format itself is decided by content.
ENDINGS = frozenset(("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp"))
LARGEST_LABEL = 10_000_000  # a larger label is a mistake, not a class
DIGITS = 18  # of a number that is looked at: Python refuses to read thousands
_SHOWN = 5
_TOGETHER = 1024  # images
Pixels = npt.NDArray[np.uint8]


class Images(Protocol):
    """Reads the images of a source by table row. It is pickled for the worker processes."""

    @property
    def root(self) -> Root:
        """What names are relative to."""
        ...

    def file_of(self, name: str) -> str:
        """The file under the root that holds the image of this name."""
        ...

    def read(self, samples: Samples, row: int, room: memoryview) -> Encoded:
        """The encoded image; BadImage if it cannot be had, DataError if the source changed under the build.

        Args:
            room: a buffer of the listed size and one byte; reading into it saves a copy.
        """


@dataclass(frozen=True)
class Files:
    """Images that are single files, kept byte for byte."""

    root: Root

    def file_of(self, name: str) -> str:
        return name

    def read(self, samples: Samples, row: int, room: memoryview) -> Encoded:
        name = samples.names[row]
        try:
            data = self.root.read(name, room)
        except MissingFile as error:
            raise BadImage("missing", name) from error
        except OSError as error:
            raise BadImage("unreadable", name, error.strerror or str(error)) from error
        if len(data) != len(room) - 1:
            raise DataError(f"image {self.root}/{name} changed while the shards were built: start again")
        return data


@dataclass(frozen=True)
class Arrays:
    """Images stored as pixels in files of many images each; they become PNG.

    Attributes:
        load: a module-level function from the root and a file's name to uint8 [N, H, W] or [N, H, W, 3] (RGB).
    """

    root: Root
    load: Callable[[Root, str], Pixels]

    def file_of(self, name: str) -> str:
        return name.rpartition("#")[0]

    def read(self, samples: Samples, row: int, room: memoryview) -> bytes:
        """One image as PNG; each process loads its file once."""
        file = self.file_of(samples.names[row])
        pixels = _loaded(self.load, self.root, file)[samples.places[row]]
        if pixels.ndim == 3:
            pixels = pixels[..., ::-1]  # OpenCV writes blue, green, red
        return bytes(cv2.imencode(".png", np.ascontiguousarray(pixels))[1])


@lru_cache(maxsize=8)
def _loaded(load: Callable[[Root, str], Pixels], root: Root, file: str) -> Pixels:
    return load(root, file)


def add_array(rows: SamplesBuilder, file: str, labels: npt.NDArray[np.integer], images: Pixels) -> None:
    """Add a row for each image of a file of many, given their pixels [N, ...]."""
    digest = hashlib.blake2b(digest_size=8)
    for start in range(0, len(images), _TOGETHER):
        digest.update(np.ascontiguousarray(images[start : start + _TOGETHER]).data)
    size, stamp = images[:1].nbytes, int.from_bytes(digest.digest(), signed=True)
    for place, label in enumerate(labels.tolist()):
        rows.add(f"{file}#{place}", label, place=place, size=size, stamp=stamp)


@dataclass
class Source:
    """The images of a card, listed.

    Attributes:
        classes: names; a label is a position in it.
        splits: the images of each split.
        images: reads them.
        ignored: number of files left out, by ending.
        notes: what else a user should know of the listing, a line each.
        bad: listed images that cannot be used, each with its reason.
        tars: paths or URLs of the tars that images are read from while shards are written.
    """

    classes: tuple[str, ...]
    splits: dict[str, Samples]
    images: Images
    ignored: Counter[str] = field(default_factory=Counter)
    bad: list[BadImage] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tars: list[str] = field(default_factory=list)

    def require_training_images(self) -> None:
        """Raise DataError unless every class has a training image: a loss cannot learn a class that it never sees."""
        if "train" in self.splits:
            counts = self.splits["train"].counts(len(self.classes))
            empty = [self.classes[label] for label in np.flatnonzero(counts == 0)]
            if empty:
                others = f" (left out, not images by their ending: {self.ignored_files()})" if self.ignored else ""
                raise DataError(
                    f"no training image of {some(empty)}{others}: add some, as JPEG or PNG, or take the class out"
                )

    def ignored_files(self) -> str:
        """How many files were left out, by ending: `3 .tiff, 1 .txt`."""
        return by_ending(self.ignored)

    def checked(self, look_up: MapOver = map) -> Source:
        """The source with file sizes looked up; missing, empty and repeated images move to `bad`.

        Raises:
            DataError: all images of a split are missing.
        """
        splits, bad, notes = {}, list(self.bad), [*self.notes, *notes_on(self.classes)]
        for name, samples in self.splits.items():
            several: list[int] = []
            if isinstance(self.images, Files):
                samples = samples.sized(*self.images.root.sizes(samples.names, look_up))
                samples, respelled, several = _as_on_disk(samples, self.images.root)
                if len(samples) and (samples.sizes == MISSING).all():
                    first = samples.names.text(0)
                    raise DataError(
                        f"none of the {len(samples):,} images of {name} is there, such as {first}: give as --root the "
                        f"folder to which these paths are relative, instead of {self.images.root}"
                    )
                if respelled:
                    notes.append(
                        f"{name}: {len(respelled)} names have another Unicode form on disk (NFC, NFD) and were "
                        f"matched, the first: {respelled[0]}"
                    )
            twice, doubtful = _repeated(samples)
            reasons = {
                "several_files_of_this_name": np.array(several, np.int64),
                "two_labels": doubtful,
                "missing": np.flatnonzero(samples.sizes == MISSING),
                "empty": np.flatnonzero(samples.sizes == 0),
                "listed_twice": twice,
            }
            keep = np.ones(len(samples), bool)
            for reason, rows in reasons.items():
                bad += [BadImage(reason, samples.names[row]) for row in rows.tolist() if keep[row]]
                keep[rows] = False
            splits[name] = samples if keep.all() else samples.take(np.flatnonzero(keep))
        return replace(self, splits=splits, bad=bad, notes=notes)


def _repeated(samples: Samples) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(rows whose name an earlier row has, all rows of a name that has two labels)."""
    twice = samples.names.repeated()
    if not len(twice):
        return twice, twice
    names = {samples.names[row] for row in twice.tolist()}
    rows = [(row, name) for row, name in enumerate(samples.names) if name in names]
    labels = defaultdict(set)
    for row, name in rows:
        labels[name].add(int(samples.labels[row]))
    return twice, np.array([row for row, name in rows if len(labels[name]) > 1], np.int64)


def _as_on_disk(samples: Samples, root: Root) -> tuple[Samples, list[str], list[int]]:
    """(rows with the names that the disk has, names that were written otherwise, rows of more than one such file)."""
    missing = [(row, samples.names[row]) for row in np.flatnonzero(samples.sizes == MISSING).tolist()]
    spellings = Spellings(root)
    found = {row: spellings.of(name) for row, name in missing if not name.isascii()}
    renamed = {row: names[0] for row, names in found.items() if len(names) == 1}
    several = [row for row, names in found.items() if len(names) > 1]
    if not renamed:
        return samples, [], several
    names = Names.of(renamed.get(row, name) for row, name in enumerate(samples.names))
    rows, sizes, stamps = list(renamed), samples.sizes.copy(), samples.stamps.copy()
    sizes[rows], stamps[rows] = root.sizes(Names.of(renamed.values()))
    return replace(samples, names=names, sizes=sizes, stamps=stamps), [samples.names[row] for row in rows], several


def refuse_labels_from_one(splits: Mapping[str, Samples], place: str) -> None:
    """Raise DataError if labels without a list of classes count from 1: class 0 would have no training image."""
    if "train" in splits and min((int(s.labels.min()) for s in splits.values() if len(s)), default=0) == 1:
        raise DataError(f"the labels of {place} count from 1, and here from 0: subtract 1 from each")


def label_in(text: str, limit: int, where: str) -> int:
    """The label that a text is, a number from 0 in decimal digits; DataError if it is none, or not below `limit`."""
    if not text.isdecimal():
        raise DataError(f"{where}: {text!r:.60} is no number from 0")
    label = int(text) if len(text) <= DIGITS else limit
    if label >= limit:
        raise DataError(f"{where}: label {text:.20} is out of range, the labels are 0 to {limit - 1}")
    return label


def ending(name: str) -> str:
    """A file name's ending, lower case, without the dot: as `os.path.splitext`, in half the time."""
    _, dot, last = name.rpartition("/")[2].lstrip(".").rpartition(".")
    return last.lower() if dot else ""


def by_ending(files: Mapping[str, int]) -> str:
    """Numbers of files by ending, as text: `3 .tiff, 1 .txt`."""
    return ", ".join(f"{count} {ending}" for ending, count in sorted(files.items()))


def some(names: Iterable[str]) -> str:
    """The first few of names, and how many more there are."""
    listed: Sequence[str] = list(names)
    more = len(listed) - _SHOWN
    return (", ".join(listed[:_SHOWN]).replace("\n", "\\n") or "none") + (f" and {more} more" if more > 0 else "")
