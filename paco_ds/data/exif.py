"""How EXIF turns an image; EXIF that cannot be read says nothing."""

from __future__ import annotations

import warnings

from PIL import ExifTags, Image

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def orientation_of(segment: bytes) -> int:
    """The orientation in the bytes of an EXIF segment, 1 to 8; 1 (upright) where there is none or it is damaged."""
    exif = Image.Exif()
    try:
        with warnings.catch_warnings(action="ignore"):
            exif.load(segment)
            value = exif.get(ExifTags.Base.Orientation, 1)
    except MemoryError:
        raise
    except Exception:  # Pillow's reader raises errors of any kind for damage
        return 1
    return value if value in range(1, 9) else 1


def upright(image: Image.Image) -> Image.Image:
    """The image as it is to be shown, as stored where its EXIF is damaged; raises only for damage of its pixels.

    An orientation that XMP alone gives is ignored, unlike by Pillow: the faster decoders of training do not see it.
    """
    image.load()
    turn = _TURNS.get(orientation_of(image.info.get("exif", b"")))
    return image if turn is None else image.transpose(turn)
