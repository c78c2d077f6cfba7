"""Atomic writing of files, digests, and errors of storage in words."""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import IO, BinaryIO

from paco_ds.errors import StorageError

PARTIAL = ".partial"  # ending of a file that is being written
_PIECE = 2**20  # bytes read at a time

_IN_THE_WAY = "a file is in the way: move it, or choose another folder"
_REMEDIES = {
    errno.ENOSPC: "make room there, of space or of inodes (df -h, df -i)",
    errno.EDQUOT: "make room there, or have the quota raised",
    errno.EFBIG: "have the limit of file sizes raised (ulimit -f)",
    errno.EROFS: "have it mounted for writing, or choose another folder",
    errno.EACCES: "make it writable, or choose another folder",
    errno.EPERM: "make it writable, or choose another folder",
    errno.EEXIST: _IN_THE_WAY,
    errno.EISDIR: _IN_THE_WAY,
    errno.ENOTDIR: _IN_THE_WAY,
    errno.ENOENT: "its folder is gone or cannot be made: restore it, or choose another",
    errno.ESTALE: "its folder is gone or cannot be made: restore it, or choose another",
}


def is_url(place: str) -> bool:
    """Whether a place is a URL (`s3://...`, `pipe:...`) and not a path; a single letter is a drive."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", place) is not None


def read_at_most(file: IO[bytes], most: int) -> bytes:
    """The bytes of a file from where it is, but no more than one beyond `most`, and no memory for more than it has."""
    parts, left = [], most + 1
    while left > 0 and (part := file.read(min(left, _PIECE))):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Name the path and the remedy where the block cannot write it.

    An error of a connection, or one that names a file elsewhere, passes through: it is of what was read.

    Raises:
        StorageError: the disk is full or read-only, the folder is gone, and the like.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, ConnectionError | TimeoutError):
            raise
        names = [Path(os.fsdecode(name)) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
        if names and not any(name.is_relative_to(path.parent) or path.is_relative_to(name) for name in names):
            raise
        reason = error.strerror or str(error)
        remedy = _REMEDIES.get(error.errno or 0, "the kernel log of this host tells more")
        raise StorageError(f"{path} cannot be written: {reason}; {remedy}") from error


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that is renamed to `path` once all its bytes are on disk.

    Raises:
        StorageError: it cannot be written. What was there before stays.
    """
    # a name of its own: of two writers of one file each writes it whole, and the later one's stays
    partial = path.with_name(f".{path.name}.{token_hex(4)}{PARTIAL}")
    with storage_errors(path):
        try:
            with partial.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            with suppress(OSError):  # it was renamed, or could not be made
                partial.unlink()
        fsync(path.parent)


def replace_text(path: Path, text: str) -> Path:
    """Write a UTF-8 text file atomically: a reader sees the old content or the new. Returns the path.

    Raises:
        StorageError: as `whole_file`.
    """
    with whole_file(path) as file:
        file.write(text.encode())
    return path


def remove_partial(folder: Path) -> None:
    """Remove what a killed writer left directly in a folder under the name of an unfinished file."""
    for path in folder.glob(f".*{PARTIAL}"):
        with suppress(OSError):
            path.unlink()


def fsync(path: Path) -> None:
    """Flush a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def utf8_path(path: Path) -> Iterator[str]:
    """A path of a file for libraries that take UTF-8 alone: its own, or that of an open descriptor in /proc."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        with open(path, "rb") as file:
            yield f"/proc/self/fd/{file.fileno()}"
    else:
        yield str(path)


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
