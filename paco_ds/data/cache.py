"""Cache of whole remote files on a local disk, limited in bytes and shared by many processes.

A copy is renamed to its final name when complete. The name is a digest of URL, size and version, so data sets and
versions are never mixed. The least recently used copies are removed first. A process that reads a removed copy can
continue to read it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock

from paco_ds.errors import DataError

_COPY, _UNFINISHED = ".copy", ".unfinished"
_LOCKS = 64  # lock files for single copies; two copies that share one wait for each other


@dataclass(frozen=True)
class FileCache:
    """Copies in `directory`, together at most `limit` bytes."""

    directory: Path
    limit: int

    def open(self, key: str, size: int, fetch: Callable[[BinaryIO], None]) -> BinaryIO:
        """Open the copy of `key`; if there is none, `fetch` writes its `size` bytes.

        Raises:
            DataError: the file is larger than the cache, or the disk refuses it.
        """
        name = hashlib.sha256(key.encode()).hexdigest()[:40]
        path = self.directory / (name + _COPY)
        try:
            if found := _open_used(path):
                return found
            if size > self.limit:
                raise DataError(f"a file of {size} bytes does not fit data.cache.bytes = {self.limit}; raise it")
            self.directory.mkdir(parents=True, exist_ok=True)
            with FileLock(self.directory / f"lock-{int(name[:8], 16) % _LOCKS}"):
                return _open_used(path) or self._copy(path, size, fetch)  # another process may have written it
        except OSError as error:
            raise DataError(f"data.cache.directory {self.directory} cannot be used: {error}") from error

    def _copy(self, path: Path, size: int, fetch: Callable[[BinaryIO], None]) -> BinaryIO:
        unfinished = path.with_suffix(_UNFINISHED)
        try:
            with FileLock(self.directory / "lock-room"):
                self._make_room(size)
                target = unfinished.open("wb")
                fcntl.flock(target, fcntl.LOCK_EX)  # until it has its final name, or this process ends
                target.truncate(size)  # counted by other processes while it is being written
            with target:
                fetch(target)
                target.flush()
                os.fsync(target.fileno())
                copy = unfinished.open("rb", buffering=0)  # opened before it can be removed
                unfinished.rename(path)
            return copy
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise

    def _make_room(self, size: int) -> None:
        """Remove what killed processes left unfinished, and copies, least recently used first, until `size` more
        bytes fit."""
        copies, held = [], 0
        for path in self.directory.iterdir():
            if path.suffix not in (_COPY, _UNFINISHED):
                continue
            with suppress(FileNotFoundError):
                if path.suffix == _UNFINISHED and _is_abandoned(path):
                    path.unlink()
                    continue
                about = path.stat()
                held += about.st_size
                if path.suffix == _COPY:
                    copies.append((about.st_mtime, about.st_size, path))
        for _, freed, path in sorted(copies):
            if held + size <= self.limit:
                return
            path.unlink(missing_ok=True)
            held -= freed
        if held + size > self.limit:
            raise DataError(
                f"{self.directory} has {held} bytes of unfinished files and cannot take {size} more within "
                f"data.cache.bytes = {self.limit}; raise it"
            )


def _is_abandoned(unfinished: Path) -> bool:
    """Whether no process is writing it."""
    with unfinished.open("r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def _open_used(path: Path) -> BinaryIO | None:
    """Open the copy and mark it as used; None if there is none."""
    try:
        file = path.open("rb", buffering=0)
    except FileNotFoundError:
        return None
    with suppress(FileNotFoundError):
        os.utime(path)
    return file
