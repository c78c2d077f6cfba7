"""Decode the bytes of an image file to uint8 RGB, or raise BadSample with a reason.

JPEG is decoded by libjpeg-turbo, at 1/2, 1/4 or 1/8 of its side where the caller needs no more; intact PNG by OpenCV;
other files, and those that these two refuse, by PIL with a fixed list of formats. Nothing is printed. EXIF's
orientation is applied, which the published code does not do. Transparency is dropped, as by PIL's convert("RGB"); of
16 bits the upper 8 are kept.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Callable

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, UnidentifiedImageError

from paco_ds.data.exif import orientation_of, upright
from paco_ds.data.image_costs import has_surplus, too_costly, webp_sides, without_texts
from paco_ds.data.shard import BadSample, RawSample

Pixels = npt.NDArray[np.uint8]  # [height, width, 3], RGB

# no format whose PIL decoder runs another program (EPS: Ghostscript)
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
_JPEG, _PNG = b"\xff\xd8", b"\x89PNG\r\n\x1a\n"
_SIGNATURES = (_JPEG, _PNG, b"RIFF", b"GIF8", b"BM")


class EncodedImage:
    """An image whose header was read: `height` and `width` in pixels, after EXIF's rotation."""

    def __init__(self, height: int, width: int, decode: Callable[[int], Pixels]) -> None:
        self.height, self.width = height, width
        self._decode = decode

    def decode(self, reduction: int = 1) -> Pixels:
        """uint8 [H, W, 3]; `reduction` 1, 2, 4 or 8 allows sides of ceil(side / reduction), which saves time.

        Raises:
            BadSample: the bytes after the header are damaged.
        """
        return self._decode(reduction)


def open_image(sample: RawSample, max_pixels: int, *, quick: bool = False) -> EncodedImage:
    """Read the header of an image.

    Args:
        quick: of a JPEG whose colors have half the resolution, repeat them instead of interpolating between them.

    Raises:
        BadSample: `empty`, `unknown_format`, `too_many_pixels`, `too_many_scans`, `truncated` or `undecodable`.
    """
    data = sample.image
    if not data:
        raise BadSample("empty", sample.key, sample.shard)
    try:
        if data.startswith(_JPEG):
            return _open_jpeg(sample, max_pixels, quick)
        if data.startswith(_PNG):
            return _open_png(sample, max_pixels)
    except (ValueError, struct.error, cv2.error):
        pass  # these decoders refuse the header; PIL decides
    return _open_other(sample, max_pixels)


def decode(sample: RawSample, max_pixels: int) -> Pixels:
    """The whole image, uint8 [H, W, 3]; raises as `open_image` and `EncodedImage.decode`."""
    return open_image(sample, max_pixels).decode()


def _open_jpeg(sample: RawSample, max_pixels: int, quick: bool) -> EncodedImage:
    data = sample.image
    height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
    _check_costs(height, width, sample, max_pixels)
    if colors not in ("YCbCr", "RGB", "Gray"):  # PIL handles CMYK and YCCK, inverted or not
        return _open_other(sample, max_pixels)
    orientation = _orientation(data)
    turned = orientation in _TURNS_SIDES

    def pixels(reduction: int) -> Pixels:
        smallest = {"min_height": -(-height // reduction), "min_width": -(-width // reduction)}
        try:
            image = simplejpeg.decode_jpeg(data, "RGB", fastupsample=quick, **smallest, min_factor=reduction)
        except ValueError:  # it stops at damage that PIL, as used by the published code, tolerates
            return _open_other(sample, max_pixels).decode()
        return _upright(image, orientation)

    return EncodedImage(width if turned else height, height if turned else width, pixels)


def _open_png(sample: RawSample, max_pixels: int) -> EncodedImage:
    data = sample.image
    width, height = struct.unpack(">II", data[16:24])
    _check_costs(height, width, sample, max_pixels)
    # OpenCV prints errors of damaged files to the terminal, may return half an image, and inflates unused texts
    if _is_whole_png(data) and not has_surplus(data):
        image = cv2.imdecode(np.frombuffer(without_texts(data, longest=0), np.uint8), cv2.IMREAD_COLOR_RGB)
    else:
        image = None
    if image is None:
        return _open_other(sample, max_pixels)
    return EncodedImage(image.shape[0], image.shape[1], lambda reduction: image)


def _is_whole_png(data: bytes) -> bool:
    """Chunks follow each other to the end, each with the CRC-32 that it states."""
    at, kind = 8, b""
    while at + 12 <= len(data):
        kind, end = data[at + 4 : at + 8], at + 8 + int.from_bytes(data[at : at + 4], "big")
        if zlib.crc32(data[at + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            return False
        at = end + 4
    return kind == b"IEND"


def _open_other(sample: RawSample, max_pixels: int) -> EncodedImage:
    """Decode any format of the list at once; few images take this path."""
    data = without_texts(sample.image) if sample.image.startswith(_PNG) else sample.image
    if sides := webp_sides(data):
        _check_costs(*sides, sample, max_pixels)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about large images: the limit is checked here
            file = Image.open(io.BytesIO(data), formats=_FORMATS)
            _check_costs(file.height, file.width, sample, max_pixels)
            image = np.array(_rgb(upright(file)))
    except BadSample:
        raise
    except UnidentifiedImageError:
        reason = "undecodable" if sample.image.startswith(_SIGNATURES) else "unknown_format"
        raise BadSample(reason, sample.key, sample.shard) from None
    except Image.DecompressionBombError:
        raise BadSample("too_many_pixels", sample.key, sample.shard) from None
    except Exception as error:  # PIL's decoders raise errors of any kind for damage
        reason = "truncated" if "truncated" in str(error).lower() else "undecodable"
        raise BadSample(reason, sample.key, sample.shard) from error
    return EncodedImage(image.shape[0], image.shape[1], lambda reduction: image)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of gray; PIL's convert would cut all above 255
        upper = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255)
        image = Image.fromarray(upper.astype(np.uint8))
    return image.convert("RGB")


def _check_costs(height: int, width: int, sample: RawSample, max_pixels: int) -> None:
    if reason := too_costly(sample.image, height, width, max_pixels):
        raise BadSample(reason, sample.key, sample.shard)


_TURNS_SIDES = (5, 6, 7, 8)


def _orientation(data: bytes) -> int:
    """EXIF's orientation of a JPEG, 1 to 8; 1 (upright) where there is none or it cannot be read."""
    at = 2
    while data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] != b"\xda":  # segments before the pixels
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if data[at + 1 : at + 2] == b"\xe1" and data[at + 4 : at + 10] == b"Exif\0\0":
            return orientation_of(data[at + 4 : end])
        at = end
    return 1


def _upright(image: Pixels, orientation: int) -> Pixels:
    if orientation in _TURNS_SIDES:
        image = cv2.transpose(image)
    # the flip after the transposition, by EXIF's table: 1 left-right, -1 both, 0 up-down
    flip = {2: 1, 3: -1, 4: 0, 6: 1, 7: -1, 8: 0}.get(orientation)
    return image if flip is None else cv2.flip(image, flip)
