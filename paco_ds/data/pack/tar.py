"""Write tars: digest, CRC-32 and index in the same pass, without reading back.

The bytes equal those of Python's tarfile (format ustar) and of webdataset's TarWriter with a fixed owner and time.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from typing import BinaryIO

import numpy as np
from isal.isal_zlib import crc32  # as zlib's, ten times faster

from paco_ds.data.pack.image_bytes import Encoded
from paco_ds.data.shard import INDEX_DTYPE

OWNER = "paco_ds"  # the same for every user, so that the same input gives the same bytes
BLOCK = tarfile.BLOCKSIZE
MAX_NAME = 100  # bytes of a member's name in a ustar header
_MAX_SIZE = 8**11 - 1  # eleven octal digits
_BUFFER = 256 << 10  # bytes hashed and written at a time: they stay in a core's cache
_ABOUT = 8 << 10  # bytes beyond its image that a sample rarely exceeds
_PADDING = bytes(BLOCK)


def _header_parts() -> tuple[bytes, bytes, bytes]:
    """The constant parts of our headers: between name and size, between size and checksum, after the checksum."""
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
    """Writes samples, each an image and its JSON, to an open file.

    Attributes:
        bytes: number written so far.
        sha256: of the whole file, once closed.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._buffer = memoryview(bytearray(_BUFFER))  # one for all samples: new memory costs a page fault per page
        self._filled = 0
        self._digest = hashlib.sha256()
        self._rows: list[tuple[int, int, int, int, int, int]] = []
        self.bytes = 0

    def room(self, size: int) -> memoryview:
        """`size` bytes of the buffer, valid until `add`, which does not copy a JPEG that was read into them."""
        self._make_room(BLOCK + size + _ABOUT)
        start = self._filled + BLOCK
        return self._buffer[start : start + size]

    def add(self, key: str, ending: str, image: Encoded, about: bytes, label: int) -> None:
        """Add a sample; ValueError for a key or an image that a ustar header cannot hold."""
        if len(image) > _MAX_SIZE:
            raise ValueError(f"an image of {len(image)} bytes does not fit a tar member")
        image_header = header(f"{key}.{ending}".encode(), len(image))
        about_member = b"%b%b%b" % (header(f"{key}.json".encode(), len(about)), about, _PADDING[: -len(about) % BLOCK])
        image_padding = _PADDING[: -len(image) % BLOCK]
        # members are sorted by name, as TarWriter does
        if ending < "json":
            before, after = image_header, image_padding + about_member
        else:
            before, after = about_member + image_header, image_padding
        size = len(before) + len(image) + len(after)
        if self._filled + size > len(self._buffer):
            image = bytes(image)  # a copy, since the buffer may be overwritten
            self._make_room(size)
        start, end = self._filled + len(before), self._filled + len(before) + len(image)
        if len(before) > BLOCK or not (isinstance(image, memoryview) and image.obj is self._buffer.obj):
            self._buffer[start:end] = image
        self._buffer[self._filled : start] = before  # after the image, which may have been here
        self._buffer[end : self._filled + size] = after
        stretch = self._buffer[self._filled : self._filled + size]
        self._rows.append((self.bytes, size, len(before), len(image), label, crc32(stretch)))
        self._filled += size
        self.bytes += size

    def close(self) -> None:
        """End the tar; the file stays open."""
        size = 2 * BLOCK
        size += -(self.bytes + size) % tarfile.RECORDSIZE
        self._make_room(size)
        self._buffer[self._filled : self._filled + size] = bytes(size)
        self._filled += size
        self.bytes += size
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

    def _make_room(self, size: int) -> None:
        if self._filled + size > len(self._buffer):
            self._flush()
            if size > len(self._buffer):
                self._buffer = memoryview(bytearray(size))

    def _flush(self) -> None:
        rest = self._buffer[: self._filled]
        self._digest.update(rest)
        while rest:  # a nearly full disk writes only a part
            rest = rest[os.write(self._file.fileno(), rest) :]
        self._filled = 0
