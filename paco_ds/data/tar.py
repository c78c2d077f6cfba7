"""Owns the writing of tars: headers in bulk, digest, CRC-32 and index in the same pass, nothing read back.

The bytes are those of Python's tarfile (format ustar) and of webdataset's TarWriter with a fixed owner and time.
"""

from __future__ import annotations

import hashlib
import tarfile
import zlib
from collections.abc import Iterable
from typing import BinaryIO

import numpy as np

from paco_ds.data.shard import INDEX_DTYPE

OWNER = "paco_ds"  # fixed, so that the same input gives the same bytes for every user
BLOCK = tarfile.BLOCKSIZE
MAX_NAME = 100  # bytes of a member's name in a ustar header
_MAX_SIZE = 8**11 - 1  # eleven octal digits
_FLUSH = 4 << 20  # bytes handed to digest and file at a time
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
    """Writes samples, an image and its JSON each, to an open file.

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
        members = sorted(((f"{key}.{ending}", image), (f"{key}.json", about)))  # as TarWriter lays them out
        pieces = [
            piece
            for name, data in members
            for piece in (header(name.encode("ascii"), len(data)), data, _PADDING[: -len(data) % BLOCK])
        ]
        image_offset = BLOCK if members[0][1] is image else 2 * BLOCK + len(about) + -len(about) % BLOCK
        crc = size = 0
        for piece in pieces:
            crc = zlib.crc32(piece, crc)
            size += len(piece)
        self._rows.append((self.bytes, size, image_offset, len(image), label, crc))
        self._put(pieces, size)

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
        self._pieces += pieces
        self._waiting += size
        self.bytes += size
        if self._waiting >= _FLUSH:
            self._flush()

    def _flush(self) -> None:
        data = b"".join(self._pieces)
        self._digest.update(data)
        self._file.write(data)
        self._pieces, self._waiting = [], 0
