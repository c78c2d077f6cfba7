"""Files that appear whole or not at all, and their digests."""

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
    """Whether a place is a URL (`s3://...`, `pipe:...`), not a path; a single letter is a drive, not a scheme."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", place) is not None


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file for writing that gets its name only after all its bytes are on disk."""
    partial = path.with_name(f".{path.name}{PARTIAL}")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def replace_text(path: Path, text: str) -> Path:
    """Write a text file under a temporary name and rename it; a reader sees the old one or the new one."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    return part.replace(path)


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
