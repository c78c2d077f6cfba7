"""What decoding an image costs, read from its markers before memory is allocated: a small file may ask for a lot.

A progressive JPEG passes over all its pixels in each of its scans. A PNG inflates texts and what follows its pixels.
A WebP's canvas is allocated when the file is opened. Pillow decodes a run-length BMP in Python.
"""

from __future__ import annotations

import re
import struct
import zlib

from isal import isal_zlib

MOST_SCANS = 100  # of a JPEG; encoders write 10 (libjpeg) to about 20 (mozjpeg)
MOST_SCANNED = 2**30  # pixels times scans, about 2 s: 10 scans of 107 megapixels
_RLE_PIXELS = 2**22  # of a BMP, at 250 ns each
_LONGEST_TEXT = 2**20  # bytes of an inflated text or color profile; Pillow refuses the image above it
_ALL_TEXTS = 2**25
_SURPLUS = 2**28  # bytes inflated after the pixels, about a second
_INFLATED = 1032  # at most this many bytes from one, by deflate's format
_PIECE = 2**20
_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of a PNG by its color type
# a marker other than a restart, and not a byte 255 of the pixels, which a zero follows
_MARKER = re.compile(b"\xff+([^\x00\x01\xff\xd0-\xd8])", re.DOTALL)


def too_costly(data: bytes, height: int, width: int, max_pixels: int) -> str | None:
    """Why an image of these sides must not be decoded: `too_many_pixels`, `too_many_scans`; None if it may."""
    pixels = height * width
    if pixels > max_pixels or (data[:2] == b"BM" and data[30:31] in (b"\x01", b"\x02") and pixels > _RLE_PIXELS):
        return "too_many_pixels"
    if data[:2] == b"\xff\xd8" and not _is_one_scan(data):
        most = min(MOST_SCANS, MOST_SCANNED // max(pixels, 1))
        # the count also has what only looks like a scan, such as that of a thumbnail
        if data.count(b"\xff\xda") > most and _scans(data, most) > most:
            return "too_many_scans"
    return None


def webp_sides(data: bytes) -> tuple[int, int] | None:
    """(height, width) of a WebP by its header; None where it has none that is known."""
    kind = data[12:16]
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(data) < 30:
        return None
    if kind == b"VP8X":
        return 1 + int.from_bytes(data[27:30], "little"), 1 + int.from_bytes(data[24:27], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits >> 14 & 0x3FFF), 1 + (bits & 0x3FFF)
    width, height = struct.unpack("<HH", data[26:30])
    return height & 0x3FFF, width & 0x3FFF


def without_texts(png: bytes, longest: int = _LONGEST_TEXT) -> bytes:
    """The PNG without texts and color profiles that are longer when inflated, or come after 32 MiB of others.

    Pixels are the same. Orientation, which a text may give, is kept with the default, at which Pillow takes the rest.
    """
    kept, at, start, room = [], 8, 0, _ALL_TEXTS
    while at + 12 <= len(png):
        kind, end = png[at + 4 : at + 8], at + 12 + int.from_bytes(png[at : at + 4], "big")
        if kind in _TEXTS:
            size = _text_bytes(kind, png[at + 8 : end - 4], longest) if room > 0 else longest + 1
            room -= size
            if size > longest:
                kept.append(png[start:at])
                start = end
        at = end
    return b"".join((*kept, png[start:])) if kept else png


def has_surplus(png: bytes) -> bool:
    """Whether a PNG whose chunks are whole goes on inflating for long after its pixels, which OpenCV would do."""
    parts, at = [], 8
    while at + 12 <= len(png):
        end = at + 8 + int.from_bytes(png[at : at + 4], "big")
        if png[at + 4 : at + 8] == b"IDAT":
            parts.append(memoryview(png)[at + 8 : end])
        at = end + 4
    width, height, depth, color = struct.unpack(">IIBB", png[16:26])
    row = 1 + -(-width * depth * _CHANNELS.get(color, 4) // 8)
    left = 2 * row * height + _SURPLUS  # twice: interlaced rows have more filter bytes
    if _INFLATED * sum(map(len, parts)) <= left:
        return False
    inflate = isal_zlib.decompressobj()
    try:
        for part in parts:
            rest: bytes | memoryview = part
            while rest and not inflate.eof:
                left -= len(inflate.decompress(rest, _PIECE))
                rest = inflate.unconsumed_tail
                if left < 0:
                    return True
    except isal_zlib.error:  # type: ignore[misc]  # its stubs call it a value
        return False  # the decoder finds the damage as soon
    return False


def _is_one_scan(data: bytes) -> bool:
    """Whether a JPEG is sequential and its first scan has all components: decoders then read no other."""
    at, frame = 2, b""
    while data[at : at + 1] == b"\xff":
        marker, end = data[at + 1 : at + 2], at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker in (b"\xc0", b"\xc1"):
            frame = data[at + 9 : at + 10]
        elif marker == b"\xda":
            return frame == data[at + 4 : at + 5] != b""
        elif b"\xc2" <= marker <= b"\xcf" and marker not in (b"\xc4", b"\xc8", b"\xcc"):
            return False
        at = end
    return False


def _scans(data: bytes, most: int) -> int:
    """Scans of a JPEG, by walking its markers as a decoder does, until there are more than `most`."""
    at, scans = 2, 0
    while scans <= most and (found := _MARKER.search(data, at)) and found[1] != b"\xd9":
        scans += found[1] == b"\xda"
        at = found.end() + max(int.from_bytes(data[found.end() : found.end() + 2], "big"), 2)
    return scans


def _text_bytes(kind: bytes, body: bytes, longest: int) -> int:
    """Bytes of a text or profile once inflated, counted to just above `longest`."""
    text = body.partition(b"\0")[2]
    if kind == b"tEXt" or (kind == b"iTXt" and text[:1] != b"\1"):
        return len(body)
    packed = text[2:].split(b"\0", 2)[-1] if kind == b"iTXt" else text[1:]
    try:
        return len(zlib.decompressobj().decompress(packed, longest + 1))
    except zlib.error:
        return len(body)
