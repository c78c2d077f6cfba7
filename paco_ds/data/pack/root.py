"""The folder of a source's images, local or behind a URL: listing files, looking up sizes, reading bytes."""

from __future__ import annotations

import io
import os
import stat
from array import array
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from paco_ds.data.pack.image_bytes import Encoded
from paco_ds.data.pack.samples import MISSING, Names
from paco_ds.data.storage import MissingFile, Storage, as_storage
from paco_ds.errors import DataError

_STAT_THREADS, _STAT_BLOCK = 8, 256  # a network file system answers many requests at once
_RANGE = 8 << 20  # bytes of one request for a file behind a URL
# Signature of `map` as `Root.sizes` calls it; results keep the order of the arguments.
MapOver = Callable[[Callable[[Names], npt.NDArray[np.int64]], Iterable[Names]], Iterable[npt.NDArray[np.int64]]]


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
        """Whether a local folder exists; for a URL always True, a read tells."""
        return not self.storage.is_local or self.path.is_dir()

    def open(self, name: str, what: str) -> BinaryIO:
        """Open a file for reading; DataError if it is missing, with ``what`` as its name in the message."""
        try:
            if not self.storage.is_local:
                return io.BufferedReader(_Ranges(self.storage, name), _RANGE)
            return open(self.path / name, "rb")
        except (FileNotFoundError, MissingFile):
            raise DataError(f"{what} {self.storage.place(name)} is missing") from None
        except OSError as error:
            raise DataError(f"{what} {self.path / name} cannot be read: {error.strerror}") from error

    def read(self, name: str, room: memoryview) -> Encoded:
        """The bytes of an image file, read into `room` if local. `room` has one byte more than the expected size, so
        that a longer file is noticed. Raises OSError as the system gives it, or MissingFile."""
        expected = len(room) - 1
        if not self.storage.is_local:
            return self.storage.read(name, expected)
        descriptor = os.open(name if name.startswith("/") else self._prefix + name, os.O_RDONLY)
        try:
            size = os.readv(descriptor, (room,))
            # a short read: the file has shrunk, or the file system returns less at a time
            while size < expected and (more := os.readv(descriptor, (room[size:],))):
                size += more
            return room[:size]
        finally:
            os.close(descriptor)

    def sizes(self, names: Names, look_up: MapOver = map) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Bytes and mtime (ns, 0 for a URL) of files, int64 [N] each; MISSING where there is no file."""
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


def require_inside(where: str, name: str) -> None:
    """Raise DataError if a published list names a file outside the root."""
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise DataError(f"{where}: image {name} does not lie under the root")
