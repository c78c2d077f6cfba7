"""Encoded images in the builder: detect the format by content, verify, resize, fill transparent parts."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from paco_ds.data.exif import upright
from paco_ds.data.image_costs import MOST_SCANNED, MOST_SCANS, too_costly, webp_sides, without_texts
from paco_ds.errors import printable

# Largest image that is decoded, in pixels: a decompression bomb is a small file that fills memory.
MAX_PIXELS = 178_956_970
_LONGEST_JPEG = 65_500  # pixels of a side, by libjpeg
Encoded = bytes | memoryview
_PIL_FORMAT = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP"}
_BMP_HEADERS = (12, 16, 40, 52, 56, 64, 108, 124)  # their bytes: two letters alone begin other files too
Color = tuple[int, int, int]  # red, green, blue, of 255
_HEARD: ContextVar[list[str] | None] = ContextVar("heard of Pillow", default=None)


class BadImage(Exception):  # noqa: N818 (the builder counts and lists them; only too many are an error)
    """One image cannot be used: ``reason`` is a short slug, ``where`` names it at its source."""

    def __init__(self, reason: str, where: str = "", detail: str = "") -> None:
        super().__init__(reason, where, detail)
        self.reason, self.where, self.detail = reason, where, detail

    def __str__(self) -> str:
        """One line, whatever the file is called."""
        text = f"{self.where}: {self.reason}" + (f" ({self.detail})" if self.detail else "")
        return printable(text).replace("\n", "\\n")


def ending_of(data: Encoded) -> str:
    """jpg, png, webp, gif or bmp, by the first bytes and not by the file's name.

    Raises:
        BadImage: `empty`, or `unknown_format`.
    """
    if data[:3] == b"\xff\xd8\xff":
        return "jpg"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return "gif"
    if data[:2] == b"BM" and int.from_bytes(data[14:18], "little") in _BMP_HEADERS:
        return "bmp"
    if not data:
        raise BadImage("empty")
    raise BadImage("unknown_format", detail=f"begins with {data[:8].hex(' ')}, no JPEG, PNG, WebP, GIF or BMP")


def verify(data: Encoded, ending: str) -> None:
    """Decode every pixel.

    Raises:
        BadImage: `too_many_pixels`, `too_many_scans`, or `undecodable`, as a truncated file is.
    """
    if ending == "jpg":
        try:
            height, width, *_ = simplejpeg.decode_jpeg_header(data)
            _refuse_costly(bytes(data), height, width)
            simplejpeg.decode_jpeg(data, colorspace="GRAY", fastdct=True)
            return
        except ValueError:
            pass  # also for CMYK and harmless oddities: Pillow decides
    image = opened(data, ending)
    with _as_bad_image():
        image.load()


def size_of(data: Encoded) -> tuple[int, int]:
    """Width and height by the header; BadImage as `verify`."""
    image = opened(data, ending_of(data))
    return image.width, image.height


def colors_of(data: Encoded) -> np.ndarray:
    """Pixels of an image made small, uint8 [h, w, 3], at most 64 a side; BadImage as `verify`."""
    image = opened(data, ending_of(data))
    with _as_bad_image():
        image.draft("RGB", (64, 64))
        small = eight_bits(image)
        small.thumbnail((64, 64), Image.Resampling.BOX)
    return np.asarray(small)


def resized(data: Encoded, ending: str, short: int, quality: int) -> tuple[Encoded, str]:
    """Shrink the shorter side to ``short`` pixels, as upright JPEG; the same bytes if it is not longer, or if the other
    side is too long for a JPEG after shrinking.

    Returns the bytes and their ending. Raises BadImage as `verify`.
    """
    image = opened(data, ending)
    if min(image.size) <= short:
        return data, ending
    scale = short / min(image.size)
    size = (max(short, round(image.width * scale)), max(short, round(image.height * scale)))
    if max(size) > _LONGEST_JPEG:
        return data, ending
    with _as_bad_image():
        image.draft("RGB", (2 * size[0], 2 * size[1]))  # JPEG decodes at a reduced scale, at least twice the target
        small = eight_bits(image).resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)
        out = io.BytesIO()
        upright(small).save(out, "JPEG", quality=quality)  # the new file has no EXIF orientation
    return out.getvalue(), "jpg"


def on_background(data: Encoded, ending: str, color: Color) -> tuple[Encoded, str]:
    """An image with transparent parts on a background of that color, as upright PNG; the same bytes if it has none.

    Returns the bytes and their ending. Raises BadImage as `verify`.
    """
    image = opened(data, ending)
    if not _may_be_transparent(image):
        return data, ending
    with _as_bad_image():
        whole = filled(upright(image), color)
        if whole is None:
            return data, ending
        out = io.BytesIO()
        whole.save(out, "PNG")
    return out.getvalue(), "png"


def filled(image: Image.Image, color: Color) -> Image.Image | None:
    """The image as RGB with a color under its transparent parts; None if it has none."""
    if not _may_be_transparent(image):
        return None
    picture = _with_alpha(image)
    if picture.getchannel("A").getextrema()[0] == 255:
        return None
    whole = Image.new("RGBA", picture.size, (*color, 255))
    whole.alpha_composite(picture)
    return whole.convert("RGB")


def _may_be_transparent(image: Image.Image) -> bool:
    return image.mode.endswith(("A", "a")) or "transparency" in image.info


def _with_alpha(image: Image.Image) -> Image.Image:
    """8-bit RGBA; the one value of 16-bit gray that a PNG calls transparent is compared before it is cut to 8 bits."""
    if not image.mode.startswith("I"):
        return image.convert("RGBA")
    picture = eight_bits(image)
    seen = np.where(np.asarray(image) == image.info["transparency"], 0, 255)
    picture.putalpha(Image.fromarray(seen.astype(np.uint8)))
    return picture


def eight_bits(image: Image.Image) -> Image.Image:
    """8-bit RGB; of 16-bit gray the upper byte is kept, where Pillow would clip to white."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def opened(data: Encoded, ending: str) -> Image.Image:
    """Open with Pillow, by the decoder of this ending alone, and check the costs before any pixel is decoded.

    Raises:
        BadImage: as `verify`.
    """
    data = without_texts(bytes(data)) if ending == "png" else bytes(data)
    if sides := webp_sides(data):
        _refuse_costly(data, *sides)
    with _as_bad_image():
        image = Image.open(io.BytesIO(data), formats=(_PIL_FORMAT[ending],))
    _refuse_costly(data, image.height, image.width)
    return image


def _refuse_costly(data: bytes, height: int, width: int) -> None:
    reason = too_costly(data, height, width, MAX_PIXELS)
    if reason == "too_many_pixels":
        raise BadImage(reason, detail=f"{width} x {height}, at most {MAX_PIXELS}")
    if reason is not None:
        most = f"at most {MOST_SCANS}, and {MOST_SCANNED:,} pixels in all of them"
        raise BadImage(reason, detail=f"{width} x {height} in each; {most}")


@contextmanager
def pillow_warnings() -> Iterator[list[str]]:
    """Collects what Pillow warns of in the block, as of palettes, EXIF and color profiles; it is not shown."""
    heard: list[str] = []
    before = _HEARD.set(heard)
    try:
        yield heard
    finally:
        _HEARD.reset(before)


@contextmanager
def _kept(caught: list[warnings.WarningMessage]) -> Iterator[None]:
    try:
        yield
    finally:
        if (heard := _HEARD.get()) is not None:
            heard += (" ".join(str(each.message).split()) for each in caught)


@contextmanager
def _as_bad_image() -> Iterator[None]:
    """Turn any error that Pillow raises for damaged bytes into BadImage; it raises more than it documents."""
    try:
        with warnings.catch_warnings(record=True) as caught, _kept(caught):
            warnings.simplefilter("always")
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS decides
            yield
    except Image.DecompressionBombError as error:
        raise BadImage("too_many_pixels", detail=str(error)) from error
    except UnidentifiedImageError:  # its text is the address of a buffer
        raise BadImage("undecodable", detail="damaged header") from None
    except MemoryError:
        raise
    except Exception as error:
        raise BadImage("undecodable", detail=" ".join(str(error).split())) from error
