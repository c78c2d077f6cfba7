"""What a file is by its first bytes, where another kind was expected."""

from __future__ import annotations

_PACKED = (
    (b"\x1f\x8b", "compressed by gzip", "unpack it with gunzip"),
    (b"BZh", "compressed by bzip2", "unpack it with bunzip2"),
    (b"\xfd7zXZ", "compressed by xz", "unpack it with unxz"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", "unpack it with unzstd"),
    (b"PK\x03\x04", "a zip archive", "unpack it"),
)
LONGEST_MAGIC = 6
_ARCHIVES = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip")


def packed_as(begin: bytes) -> tuple[str, str] | None:
    """(what a file is, how to unpack it) if it is compressed or an archive by its first bytes."""
    return next(((kind, remedy) for magic, kind, remedy in _PACKED if begin.startswith(magic)), None)


def is_utf16(begin: bytes) -> bool:
    """Whether text that begins so is UTF-16: by its byte order mark, or a zero beside its first letter."""
    return begin.startswith((b"\xff\xfe", b"\xfe\xff")) or (len(begin) > 1 and 0 in begin[:2])


def is_archive(name: str) -> bool:
    """Whether a file of this name is an archive, or a compressed one."""
    return name.lower().endswith(_ARCHIVES)
