"""Small image files that ask a decoder for far more than they are worth."""

import io
import struct
import zlib

from PIL import Image


def jpeg_of_scans(side: int, scans: int) -> bytes:
    """A valid progressive JPEG, gray, of that many scans: each coefficient comes in three, of a few bytes each."""

    def segment(marker: int, body: bytes) -> bytes:
        return bytes((0xFF, marker)) + struct.pack(">H", len(body) + 2) + body

    def scan(first: int, last: int, approximation: int, data: bytes) -> bytes:
        return segment(0xDA, bytes((1, 1, 0, first, last, approximation))) + data

    def table(kind: int, symbol: int) -> bytes:
        return segment(0xC4, bytes((kind, 1, *[0] * 15, symbol)))

    blocks = (-(-side // 8)) ** 2
    runs, rest = divmod(blocks, 2**15 - 1)  # of blocks without a coefficient: a bit, then 14 of the run's length
    bits = "011111111111111" * runs + "0" * 15 * (rest > 0)
    bits += "1" * (-len(bits) % 8)
    empty = bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)).replace(b"\xff", b"\xff\0")
    orders = [(k, a) for k in range(1, 64) for a in (0x02, 0x21, 0x10)][: scans - 1]
    return b"".join(
        (
            b"\xff\xd8",
            segment(0xDB, bytes((0, *[1] * 64))),
            segment(0xC2, struct.pack(">BHHB", 8, side, side, 1) + b"\x01\x11\x00"),
            table(0x00, 0x00),
            table(0x10, 0xE0),
            scan(0, 0, 0, bytes(-(-blocks // 8))),
            *(scan(k, k, a, empty) for k, a in orders),
            b"\xff\xd9",
        )
    )


def chunk(kind: bytes, body: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(*before: bytes, side: int = 40, surplus: bytes = b"") -> bytes:
    """A gray-blue PNG with chunks before its pixels, and what else its pixels' stream inflates to."""
    rows = (b"\0" + bytes((90, 90, 120)) * side) * side
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    pixels = zlib.compress(rows + surplus) if surplus else zlib.compress(rows)
    return b"".join((b"\x89PNG\r\n\x1a\n", header, *before, chunk(b"IDAT", pixels), chunk(b"IEND", b"")))


def ztxt(size: int, keyword: bytes = b"parameters") -> bytes:
    """A compressed text of that many bytes."""
    return chunk(b"zTXt", keyword + b"\0\0" + zlib.compress(b"y" * size, 9))


def iccp(size: int) -> bytes:
    """A color profile of that many bytes."""
    return chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(size), 9))


def webp_canvas(side: int) -> bytes:
    """An animated WebP whose canvas has that side."""
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "WEBP", save_all=True, append_images=[Image.new("RGB", (8, 8), "red")])
    data = out.getvalue()
    canvas = data.index(b"VP8X") + 12
    return data[:canvas] + (side - 1).to_bytes(3, "little") * 2 + data[canvas + 6 :]


def bmp_of_runs(side: int) -> bytes:
    """A run-length BMP whose lines end after one pixel."""
    head = b"BM" + struct.pack("<IHHI", 54 + 1024, 0, 0, 54 + 1024)
    about = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, 0, 0, 0, 256, 0)
    return head + about + bytes(1024) + b"\x01\x01\x00\x00" * side + b"\0\1"
