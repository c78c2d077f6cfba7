"""The folder of a source's images, local or behind a URL: listing files, looking up sizes, reading bytes."""

from __future__ import annotations

import io
import os
import stat
from array import array
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NoReturn

import numpy as np
import numpy.typing as npt

from paco_ds.data.names import is_hidden, same_path
from paco_ds.data.pack.image_bytes import Encoded
from paco_ds.data.pack.samples import MISSING, Names
from paco_ds.data.storage import MissingFile, Storage, as_storage
from paco_ds.errors import DataError

_STAT_THREADS, _STAT_BLOCK = 8, 256  # a network file system answers many requests at once
_RANGE = 8 << 20  # bytes of one request for a file behind a URL
# Signature of `map` as `Root.sizes` calls it; results keep the order of the arguments.
MapOver = Callable[[Callable[[Names], npt.NDArray[np.int64]], Iterable[Names]], Iterable[npt.NDArray[np.int64]]]


class Root:
    """The folder that holds a source: a local path or any fsspec URL.

    Args:
        without: a folder in it that is no part of the source, since shards are written there.
    """

    def __init__(self, place: str | Path | Storage, without: Storage | None = None) -> None:
        self.storage = as_storage(place)
        self._prefix = f"{self.storage.url.rstrip('/')}/"
        self._without = ""
        if without is not None and self.storage.is_local and without.is_local:
            self._without = os.path.relpath(os.path.realpath(without.url), os.path.realpath(self.storage.url))
        elif without is not None and without.url.startswith(self._prefix):
            self._without = same_path(without.url.removeprefix(self._prefix))

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
        """Bytes and `Storage.stamp` of files, int64 [N] each; MISSING and 0 where there is no file."""
        if not self.storage.is_local:
            found = self.storage.find("")
            both = np.array([found.get(name, (MISSING, 0)) for name in names], np.int64).reshape(-1, 2)
            return both[:, 0].copy(), both[:, 1].copy()
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

    def folders(self, folder: str, hint: str = "") -> list[str]:
        """As `folders_in`; DataError if there is none, with a `hint`, or if one is a link that leads nowhere."""
        if not (found := self.folders_in(folder)):
            raise DataError(
                f"{self.storage.place(folder)} has no folder: images must lie in one folder per class{hint}"
            )
        for name in found:
            self.refuse_dangling(f"{folder}/{name}")
        return found

    def refuse_dangling(self, name: str) -> None:
        """Raise DataError if a local file or folder is a link that leads nowhere: a disk may not be mounted."""
        if not self.storage.is_local:
            return
        place = self.storage.place(name)
        if os.path.islink(place) and not os.path.exists(place):
            raise DataError(
                f"{place} is a link to {os.readlink(place)}, which is missing: mount or copy it, or remove the link"
            )

    def folders_in(self, folder: str) -> list[str]:
        """Names of the folders in a folder, sorted, without hidden ones and that of the shards.

        A link that leads nowhere counts as one: a class whose disk is not mounted would else be gone without a word.

        Raises:
            DataError: there is no such folder, or it cannot be read.
        """
        if self.storage.is_local:
            place = self.path / folder
            if not place.is_dir():
                raise DataError(f"there is no folder {place}")
            try:
                names = {entry.name for entry in os.scandir(place) if entry.is_dir() or _leads_nowhere(entry)}
            except OSError as error:
                unreadable(error)
        else:
            names = {name.partition("/")[0] for name in self._find(folder) if "/" in name}
        return sorted(n for n in names if not is_hidden(n) and same_path(f"{folder}/{n}") != self._without)

    def files(self, folder: str, walk: Walk | None = None) -> Iterator[str]:
        """Names, relative to the root, of all files below a folder, without hidden ones.

        Args:
            walk: which folders are entered, if several listings belong together; links to folders are followed once.

        Raises:
            DataError: a folder cannot be read.
        """
        walk = Walk() if walk is None else walk
        if not self.storage.is_local:
            yield from (str(PurePosixPath(folder, name)) for name in self._find(folder) if walk.takes(name))
            return
        start = str(self.path / folder)
        for parent, inner, files in os.walk(start, followlinks=True, onerror=unreadable):
            inner[:] = [name for name in sorted(inner) if walk.enters(os.path.join(parent, name))]
            inside = str(PurePosixPath(folder, os.path.relpath(parent, start)))
            taken = filter(walk.takes, files)
            yield from taken if inside == "." else (f"{inside}/{file}" for file in taken)

    def hidden_in(self, folder: str) -> int:
        """Number of hidden files and folders directly in a folder."""
        if self.storage.is_local:
            return sum(is_hidden(entry.name) for entry in os.scandir(self.path / folder))
        return len({first for name in self._find(folder) if is_hidden(first := name.partition("/")[0])})

    def _find(self, folder: str) -> Iterable[str]:
        """Names that `Storage.find` gives, of a URL, where `.` is the root, and `./a` is `a`."""
        return self.storage.find("" if folder == "." else same_path(folder))

    def files_in(self, folder: str) -> list[str]:
        """Names of the files directly in a folder, without hidden ones."""
        if self.storage.is_local:
            names = [entry.name for entry in os.scandir(self.path / folder) if not entry.is_dir()]
        else:
            names = [name for name in self._find(folder) if "/" not in name]
        return sorted(name for name in names if not is_hidden(name))


class Walk:
    """Which folders listings enter: each once, by device and inode, none that is hidden, and no link that leads back.

    Args:
        start: a local folder whose own folders are listed one by one; a link to anything in it, or to a folder above
            it, is not followed, since its images are found where they are.

    Attributes:
        hidden: number of hidden files and folders that were left out.
        left_out: folders that were left out because their images are listed elsewhere.
    """

    def __init__(self, start: Path | None = None) -> None:
        self._start = None if start is None else start.resolve()
        self._known: set[tuple[int, int]] = set()
        self.hidden, self.left_out = 0, list[str]()

    def takes(self, name: str) -> bool:
        """Whether a file is none of the hidden ones; counts those."""
        hidden = is_hidden(name)
        self.hidden += hidden
        return not hidden

    def enters(self, folder: str, class_folder: bool = False) -> bool:
        """Whether to list what lies in a folder, which is remembered; a class folder may be a link within `start`."""
        if not self.takes(os.path.basename(folder)):
            return False
        back = False
        if self._start is not None and not class_folder and os.path.islink(folder):
            to = Path(folder).resolve()
            back = to.is_relative_to(self._start) or self._start.is_relative_to(to)
        about = os.stat(folder)
        identity = about.st_dev, about.st_ino
        if back or identity in self._known:
            self.left_out.append(folder)
            return False
        self._known.add(identity)
        return True


def _leads_nowhere(entry: os.DirEntry[str]) -> bool:
    return entry.is_symlink() and not os.path.exists(entry.path)


def unreadable(error: OSError) -> NoReturn:
    """Raise DataError for a folder that cannot be read."""
    raise DataError(f"folder {error.filename} cannot be read: {error.strerror}") from error


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
