"""Atomic writing of files, and digests."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

PARTIAL = ".partial"  # ending of a file that is being written


def is_url(place: str) -> bool:
    """Whether a place is a URL (`s3://...`, `pipe:...`) and not a path; a single letter is a drive."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", place) is not None


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that is renamed to `path` once all its bytes are on disk."""
    partial = path.with_name(f".{path.name}{PARTIAL}")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    fsync(path.parent)


def replace_text(path: Path, text: str) -> Path:
    """Write a UTF-8 text file atomically: a reader sees the old content or the new. Returns the path."""
    with whole_file(path) as file:
        file.write(text.encode())
    return path


def fsync(path: Path) -> None:
    """Flush a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
