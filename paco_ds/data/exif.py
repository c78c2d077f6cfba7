"""Turns images of Pillow as their EXIF says; EXIF that cannot be read says nothing."""

from __future__ import annotations

from PIL import Image, ImageOps


def upright(image: Image.Image) -> Image.Image:
    """The image as it is to be shown, as stored where its EXIF is damaged; raises only for damage of its pixels."""
    image.load()
    try:
        return ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception:  # Pillow's reader raises errors of any kind for damage
        return image
