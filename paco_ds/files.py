"""Files that appear whole or not at all, and their digests."""

from __future__ import annotations

import hashlib
from pathlib import Path


def replace_text(path: Path, text: str) -> Path:
    """Write a text file under a temporary name and rename it; a reader sees the old one or the new one."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    return part.replace(path)


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
