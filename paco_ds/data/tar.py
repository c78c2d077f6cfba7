"""Owns the writing of tars: headers in bulk, digest, CRC-32 and index in the same pass, nothing read back.

The bytes are those of Python's tarfile (format ustar) and of webdataset's TarWriter with a fixed owner and time.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Iterable
from typing import BinaryIO

import numpy as np
from isal.isal_zlib import crc32  # zlib's, in a tenth of its time

from paco_ds.data.shard import INDEX_DTYPE

OWNER = "paco_ds"  # fixed, so that the same input gives the same bytes for every user
BLOCK = tarfile.BLOCKSIZE
MAX_NAME = 100  # bytes of a member's name in a ustar header
_MAX_SIZE = 8**11 - 1  # eleven octal digits
_FLUSH = 1 << 20  # bytes handed to the file at a time
_MOST_PIECES = 900  # of one call; the kernel takes 1024
_PADDING = bytes(BLOCK)


def _header_parts() -> tuple[bytes, bytes, bytes]:
    """What lies between name, size and checksum in every header of ours, and what follows."""
    info = tarfile.TarInfo("x")
    info.mode, info.uname, info.gname = 0o444, OWNER, OWNER
    raw = info.tobuf(tarfile.USTAR_FORMAT)
    return raw[100:124], raw[136:148], raw[156:]


_MODE_AND_OWNER, _TIME, _REST = _header_parts()
_FIXED_SUM = sum(_MODE_AND_OWNER) + sum(_TIME) + sum(_REST) + 8 * ord(" ")  # the checksum counts as spaces


def header(name: bytes, size: int) -> bytes:
    """The 512 bytes before a member; name in ASCII, at most 100 bytes."""
    octal = b"%011o\0" % size
    total = _FIXED_SUM + sum(name) + sum(octal)
    return b"%b%b%b%b%06o\0 %b" % (name.ljust(MAX_NAME, b"\0"), _MODE_AND_OWNER, octal, _TIME, total, _REST)


class SampleTar:
    """Writes samples, an image and its JSON each, to an open file that nobody else writes to.

    Attributes:
        bytes: written so far.
        sha256: of these bytes, once closed.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._pieces: list[bytes] = []
        self._waiting = 0
        self._digest = hashlib.sha256()
        self._rows: list[tuple[int, int, int, int, int, int]] = []
        self.bytes = 0

    def add(self, key: str, ending: str, image: bytes, about: bytes, label: int) -> None:
        """One sample; ValueError for a key or an image that a ustar header cannot hold."""
        if len(image) > _MAX_SIZE:
            raise ValueError(f"an image of {len(image)} bytes does not fit a tar member")
        # As TarWriter lays them out, by name. The two long runs of bytes are not copied together.
        image_header, about_header = (
            header(f"{key}.{ending}".encode(), len(image)),
            header(f"{key}.json".encode(), len(about)),
        )
        image_padding, about_padding = _PADDING[: -len(image) % BLOCK], _PADDING[: -len(about) % BLOCK]
        if ending < "json":
            before, after = image_header, image_padding + about_header + about + about_padding
        else:
            before, after = about_header + about + about_padding + image_header, image_padding
        crc = crc32(after, crc32(image, crc32(before)))
        size = len(before) + len(image) + len(after)
        self._rows.append((self.bytes, size, len(before), len(image), label, crc))
        self._put((before, image, after), size)

    def close(self) -> None:
        """End the tar; the file stays open."""
        size = 2 * BLOCK
        size += -(self.bytes + size) % tarfile.RECORDSIZE
        self._put((bytes(size),), size)
        self._flush()

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def index(self) -> np.ndarray:
        """INDEX_DTYPE [samples], as `shard.index_shard` would read it back."""
        return np.array(self._rows, INDEX_DTYPE)

    def energon_index(self) -> bytes:
        """The content of `SHARD.tar.idx` as Megatron-Energon writes it: uint64 offsets of samples, then of the end."""
        offsets = [row[0] for row in self._rows]
        offsets.append(self._rows[-1][0] + self._rows[-1][1] if self._rows else 0)
        return np.array(offsets, "<u8").tobytes()

    def _put(self, pieces: Iterable[bytes], size: int) -> None:
        for piece in pieces:
            self._digest.update(piece)  # at once, while the processor's cache has it
            self._pieces.append(piece)
        self._waiting += size
        self.bytes += size
        if self._waiting >= _FLUSH or len(self._pieces) > _MOST_PIECES:
            self._flush()

    def _flush(self) -> None:
        descriptor = self._file.fileno()
        written = os.writev(descriptor, self._pieces)
        if written < self._waiting:  # a nearly full disk takes a part, and refuses the rest
            rest = memoryview(b"".join(self._pieces))[written:]
            while rest:
                rest = rest[os.write(descriptor, rest) :]
        self._pieces, self._waiting = [], 0
