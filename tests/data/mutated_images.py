"""Images to damage, and damage to them: for the fuzz tests of decoding."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
from PIL import Image

KINDS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")


def whole_image(kind: str, height: int = 32, width: int = 48) -> bytes:
    """A smooth picture, turned by EXIF where the format has it."""
    x, y = np.meshgrid(np.linspace(0, 240, width), np.linspace(0, 220, height))
    pixels = np.dstack([x, y, np.full_like(x, 90)]).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **({} if kind in ("BMP", "GIF") else {"exif": exif}))
    return file.getvalue()


def mutations(source: bytes, count: int, rng: np.random.Generator) -> Iterator[bytes]:
    """1 to 5 changes each, most in the header: a byte replaced, a bit flipped, a stretch cut out, a stretch doubled."""
    for _ in range(count):
        data = bytearray(source)
        for _ in range(rng.integers(1, 6)):
            at = int(rng.integers(min(len(data), 700) if rng.random() < 0.7 else len(data)))
            stretch = int(rng.integers(1, 40))
            action = rng.integers(4)
            if action == 0:
                data[at] = int(rng.integers(256))
            elif action == 1:
                data[at] ^= 1 << int(rng.integers(8))
            elif action == 2:
                del data[at : at + stretch]
            else:
                data[at:at] = data[at : at + stretch]
            if not data:
                break
        yield bytes(data)
