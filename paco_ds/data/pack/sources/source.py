"""Owns what all sources share: the root they lie under, the table of their images, and how an image is read."""

from __future__ import annotations

import io
import os
import stat
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Protocol

import numpy as np
import numpy.typing as npt

from paco_ds.data.pack.image_bytes import BadImage, Encoded
from paco_ds.data.pack.samples import MISSING, Names, Samples
from paco_ds.data.storage import MissingFile, Storage, as_storage
from paco_ds.errors import DataError

# How image files may end; others are left out of folders. What they are is decided by their bytes.
ENDINGS = frozenset(("jpg", "jpeg", "png", "webp"))
_SHOWN = 5
_STAT_THREADS, _STAT_BLOCK = 8, 256  # a network file system answers many questions at once
# As `map`: a function, and what it is called with in turn; results in that order.
MapOver = Callable[[Callable[[Names], npt.NDArray[np.int64]], Iterable[Names]], Iterable[npt.NDArray[np.int64]]]
_RANGE = 8 << 20  # of a page behind a URL


class Root:
    """The folder that holds a source: a local path or any fsspec URL."""

    def __init__(self, place: str | Path | Storage) -> None:
        self.storage = as_storage(place)
        self._prefix = f"{self.storage.url.rstrip('/')}/"

    def __str__(self) -> str:
        return self.storage.url

    @property
    def path(self) -> Path:
        """The local folder; DataError for a URL."""
        return self.storage.local_directory

    def exists(self) -> bool:
        """Whether a local folder is there; a URL shows when it is read."""
        return not self.storage.is_local or self.path.is_dir()

    def open(self, name: str, what: str) -> BinaryIO:
        """A file for reading from its start; DataError calling it ``what`` if it is missing."""
        try:
            if not self.storage.is_local:
                return io.BufferedReader(_Ranges(self.storage, name), _RANGE)
            return open(self.path / name, "rb")
        except (FileNotFoundError, MissingFile):
            raise DataError(f"{what} {self.storage.place(name)} is missing") from None
        except OSError as error:
            raise DataError(f"{what} {self.path / name} cannot be read: {error.strerror}") from error

    def read(self, name: str, room: memoryview) -> Encoded:
        """The bytes of an image file, put into `room` if they are local; all of it is filled if the file is longer than
        one byte less, which is what is expected. OSError as the system gives it, or MissingFile."""
        expected = len(room) - 1
        if not self.storage.is_local:
            return self.storage.read(name, expected)
        descriptor = os.open(name if name.startswith("/") else self._prefix + name, os.O_RDONLY)
        try:
            size = os.readv(descriptor, (room,))
            # Another size than it had, or a file system in no hurry.
            while size < expected and (more := os.readv(descriptor, (room[size:],))):
                size += more
            return room[:size]
        finally:
            os.close(descriptor)

    def sizes(self, names: Names, look_up: MapOver = map) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Bytes and mtime (ns, 0 for a URL) of files, int64 [N] each; MISSING for what is no file."""
        if not self.storage.is_local:
            found = self.storage.find("")
            sizes = np.array([found.get(name, MISSING) for name in names], np.int64)
            return sizes, np.zeros(len(names), np.int64)
        sizes, stamps = np.concatenate((np.zeros((2, 0), np.int64), *look_up(self._sizes, names.blocks())), axis=1)
        return sizes, stamps

    def _sizes(self, names: Names) -> npt.NDArray[np.int64]:
        """As `sizes`, of local files: int64 [2, N]."""
        with ThreadPoolExecutor(_STAT_THREADS) as pool:
            return np.concatenate(list(pool.map(self._stats, names.blocks(_STAT_BLOCK))), axis=1)

    def _stats(self, names: Names) -> npt.NDArray[np.int64]:
        sizes, stamps = array("q"), array("q")
        for name in names:
            size, stamp = MISSING, 0
            try:
                about = os.stat(name if name.startswith("/") else self._prefix + name)
                if stat.S_ISREG(about.st_mode):
                    size, stamp = about.st_size, about.st_mtime_ns
            except (OSError, ValueError):  # ValueError: a name with a zero byte in it
                pass
            sizes.append(size)
            stamps.append(stamp)
        return np.stack((np.array(sizes, np.int64), np.array(stamps, np.int64)))

    def folders(self, folder: str) -> list[str]:
        """Names of the folders in a folder, sorted; DataError if there is none."""
        if self.storage.is_local:
            place = self.path / folder
            if not place.is_dir():
                raise DataError(f"there is no folder {place}")
            names = {entry.name for entry in os.scandir(place) if entry.is_dir()}
        else:
            names = {name.partition("/")[0] for name in self.storage.find(folder) if "/" in name}
        found = sorted(name for name in names if not name.startswith("."))
        if not found:
            raise DataError(f"{self.storage.place(folder)} has no folder: images must lie in one folder per class")
        return found

    def files(self, folder: str) -> Iterator[str]:
        """Names, relative to the root, of all files below a folder; links to folders are followed."""
        if not self.storage.is_local:
            yield from (str(PurePosixPath(folder, name)) for name in self.storage.find(folder))
            return
        start = str(self.path / folder)
        for parent, _, files in os.walk(start, followlinks=True):
            inside = str(PurePosixPath(folder, os.path.relpath(parent, start)))
            yield from files if inside == "." else (f"{inside}/{file}" for file in files)


class _Ranges(io.RawIOBase):
    """A file of a storage as a stream, read range by range."""

    def __init__(self, storage: Storage, name: str) -> None:
        self._storage, self._name, self._at = storage, name, 0
        self._size = storage.size(name)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._storage.read_range(self._name, self._at, min(len(buffer), self._size - self._at))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


class Images(Protocol):
    """Reads the images of a source by the rows of their table; it is sent to worker processes."""

    def read(self, samples: Samples, row: int, room: memoryview) -> Encoded:
        """The encoded image; BadImage if it cannot be had, DataError if the source changed under the build.

        Args:
            room: a byte more than the table's size of the image. It may be put there, which spares a copy.
        """


@dataclass(frozen=True)
class Files:
    """Images that are files of their own, kept byte for byte."""

    root: Root

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


@dataclass
class Source:
    """What a card's source holds.

    Attributes:
        classes: names; a label is a position in it.
        splits: the images of each split.
        images: reads them.
        ignored: files left out, by ending.
        bad: images that are listed and cannot be taken, each with its reason.
    """

    classes: tuple[str, ...]
    splits: dict[str, Samples]
    images: Images
    ignored: Counter[str] = field(default_factory=Counter)
    bad: list[BadImage] = field(default_factory=list)

    def checked(self, look_up: MapOver = map) -> Source:
        """The source with the sizes of its files looked up, and without what is missing, empty or listed twice."""
        splits, bad = {}, list(self.bad)
        for name, samples in self.splits.items():
            if isinstance(self.images, Files):
                samples = samples.sized(*self.images.root.sizes(samples.names, look_up))
            reasons = {
                "missing": np.flatnonzero(samples.sizes == MISSING),
                "empty": np.flatnonzero(samples.sizes == 0),
                "listed_twice": samples.names.repeated(),
            }
            keep = np.ones(len(samples), bool)
            for reason, rows in reasons.items():
                bad += [BadImage(reason, samples.names[row]) for row in rows.tolist() if keep[row]]
                keep[rows] = False
            splits[name] = samples if keep.all() else samples.take(np.flatnonzero(keep))
        return replace(self, splits=splits, bad=bad)


def class_names(given: tuple[str, ...] | str | None, root: Root) -> tuple[str, ...] | None:
    """The classes that a card names, itself or by a text file with a name on each line."""
    if not isinstance(given, str):
        return given
    with root.open(given, "the file of class names") as file:
        names = tuple(line.strip() for line in file.read().decode("utf-8").splitlines())
    if not names or "" in names:
        raise DataError(f"{root}/{given} must have a class name on each line and no empty line")
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise DataError(f"{root}/{given} names {some(repeated)} more than once")
    return names


def require_inside(where: str, name: str) -> None:
    """Raise DataError if a published list names a file outside the root."""
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise DataError(f"{where}: image {name} does not lie under the root")


def ending(name: str) -> str:
    """A file name's ending, in small letters, without the dot, as `os.path.splitext` finds it in twice the time."""
    _, dot, last = name.rpartition("/")[2].lstrip(".").rpartition(".")
    return last.lower() if dot else ""


def some(names: Iterable[str]) -> str:
    """The first few of names, and how many more there are."""
    listed: Sequence[str] = list(names)
    more = len(listed) - _SHOWN
    return (", ".join(listed[:_SHOWN]) or "none") + (f" and {more} more" if more > 0 else "")
