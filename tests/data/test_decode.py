"""Decoding: every kind of file that people have becomes right RGB bytes, or a reason, never a crash."""

import io
import struct
import zlib
from typing import Any

import cv2
import numpy as np
import pytest
import simplejpeg
from PIL import Image

from paco_ds.config.data import DataSettings
from paco_ds.data.shard import BadSample, RawSample
from paco_ds.data.stream.decode import decode, open_image
from tests.data.mutated_images import KINDS, mutations, whole_image

LIMIT = DataSettings(shards="unused").max_pixels
RAMP = np.stack(np.meshgrid(np.arange(48) * 5, np.arange(32) * 7), 2).astype(np.uint8)
PICTURE = np.dstack([RAMP, np.full((32, 48), 90, np.uint8)])  # 32 x 48, smooth: JPEG keeps it within a few bytes


def sample(data: bytes) -> RawSample:
    return RawSample("some-key", 0, "s.tar", data)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def read(data: bytes, max_pixels: int = LIMIT) -> np.ndarray:
    return decode(sample(data), max_pixels)


def reason(data: bytes, max_pixels: int = LIMIT) -> str:
    with pytest.raises(BadSample) as caught:
        read(data, max_pixels)
    assert (caught.value.key, caught.value.shard) == ("some-key", "s.tar")
    return caught.value.reason


JPEG = encoded(Image.fromarray(PICTURE), "JPEG", quality=95)
PNG = encoded(Image.fromarray(PICTURE), "PNG")


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "TIFF", "GIF", "JPEG"])
def test_a_file_is_known_by_its_bytes_not_by_its_name(kind):
    """A PNG named .jpg is a PNG; a format not on the list has a reason of its own."""
    of_kind: dict[str, dict[str, Any]] = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95}}
    options = of_kind.get(kind, {})
    data = encoded(Image.fromarray(PICTURE), kind, **options)
    if kind == "TIFF":
        assert reason(data) == "unknown_format"
        return
    image = read(data)
    assert (image.dtype, image.shape) == (np.uint8, (32, 48, 3))
    assert np.abs(image.astype(int) - PICTURE).mean() < {"JPEG": 3, "GIF": 12}.get(kind, 0.01)


def test_a_jpeg_has_the_bits_that_pil_gives():
    """Both are libjpeg-turbo: figures of the published code, which reads with PIL, stay comparable."""
    for options in ({"quality": 90}, {"quality": 75, "progressive": True}, {"quality": 85, "subsampling": "4:4:4"}):
        data = encoded(Image.fromarray(PICTURE), "JPEG", **options)
        np.testing.assert_array_equal(read(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_gray_becomes_three_equal_channels(kind):
    """Any later operation may count on three."""
    gray = Image.fromarray(PICTURE[..., 0])
    image = read(encoded(gray, kind))
    assert (image == image[..., :1]).all()
    assert np.abs(image[..., 0].astype(int) - PICTURE[..., 0]).max() < 12


def test_sixteen_bits_keep_their_upper_eight():
    """PIL's convert would make all but the darkest white."""
    deep = PICTURE[..., 0].astype(np.uint16) * 256 + 17
    for image in (deep, np.dstack([deep] * 3)):
        np.testing.assert_array_equal(read(cv2.imencode(".png", image)[1].tobytes())[..., 0], PICTURE[..., 0])


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "1"])
def test_transparency_is_dropped_and_palettes_are_looked_up(mode):
    """The colors under transparent pixels are shown, as PIL's convert("RGB") does."""
    image = Image.fromarray(PICTURE)
    if mode == "RGBA":
        image.putalpha(100)
    else:
        image = image.convert(mode)
    np.testing.assert_array_equal(read(encoded(image, "PNG")), np.asarray(image.convert("RGB")))


def test_cmyk_and_ycck_become_the_colors_they_show():
    """Adobe writes them inverted; libjpeg-turbo alone would give a negative."""
    cmyk = Image.fromarray(PICTURE).convert("CMYK")
    data = encoded(cmyk, "JPEG", quality=98)
    assert simplejpeg.decode_jpeg_header(data)[2] in ("CMYK", "YCCK")
    assert np.abs(read(data).astype(int) - PICTURE).mean() < 4
    adobe = data.index(b"Adobe")
    assert data[adobe + 11] == 0  # the color transform: 2 says that C, M, Y are stored as YCC
    ycck = data[: adobe + 11] + b"\x02" + data[adobe + 12 :]
    np.testing.assert_array_equal(read(ycck), np.asarray(Image.open(io.BytesIO(ycck)).convert("RGB")))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_an_image_stands_upright_as_its_exif_says(kind, orientation):
    """All eight orientations, as a viewer shows them; header and pixels agree on the size."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(PICTURE), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    plain = Image.fromarray(
        read(encoded(Image.fromarray(PICTURE), kind, **({"lossless": True} if kind == "WEBP" else {})))
    )
    turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # PIL's Transpose that puts each right
    expected = np.asarray(plain.transpose(Image.Transpose(turns[orientation])) if orientation > 1 else plain)
    found = open_image(sample(data), LIMIT)
    assert (found.height, found.width) == expected.shape[:2]
    np.testing.assert_array_equal(found.decode(), expected)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12", b"Exif\0\0" + bytes(range(64))]
)
def test_damaged_exif_leaves_the_image_as_stored(exif):
    """A camera's mistake costs no image."""
    assert read(encoded(Image.fromarray(PICTURE), "JPEG", exif=exif)).shape == (32, 48, 3)


@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_reduced_jpeg_is_the_image_at_a_smaller_side(reduction, orientation):
    """Sides are rounded up; colors stay."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = open_image(sample(encoded(Image.fromarray(PICTURE[:31]), "JPEG", quality=95, exif=exif)), LIMIT)
    small, whole = found.decode(reduction), found.decode()
    assert small.shape[:2] == (-(-found.height // reduction), -(-found.width // reduction))
    assert np.abs(small.mean((0, 1)) - whole.mean((0, 1))).max() < 5  # the last row of blocks is cut


def test_other_formats_are_never_reduced():
    """A smaller image is an offer of JPEG; others come whole."""
    assert open_image(sample(PNG), LIMIT).decode(8).shape == (32, 48, 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_one_pixel_is_an_image(kind):
    """The smallest there is."""
    assert read(encoded(Image.new("RGB", (1, 1), (9, 9, 9)), kind)).shape == (1, 1, 3)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animation_is_its_first_frame(kind):
    """As viewers without animation show it."""
    frames = [Image.new("RGB", (8, 8), color) for color in ((200, 0, 0), (0, 200, 0))]
    data = encoded(
        frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
    )
    assert (read(data) == (200, 0, 0)).all()


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "empty"),
        (b"no image at all", "unknown_format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "unknown_format"),  # PIL would call Ghostscript
        (b"\x80\x04\x95pickle", "unknown_format"),
        (JPEG[:4], "undecodable"),
        (JPEG[: len(JPEG) // 2], "truncated"),
        (PNG[:40], "undecodable"),
        (PNG[: len(PNG) // 2], "truncated"),
        (PNG[:60] + bytes([PNG[60] ^ 255]) + PNG[61:], "undecodable"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{len(value)} bytes",
)
def test_what_is_no_whole_image_has_a_reason(data, expected):
    """Short slugs: they are labels of a metric."""
    assert reason(data) == expected


@pytest.mark.parametrize("marker", [b"\xff\xdb", b"\xff\xd9"])
def test_damage_that_viewers_read_over_is_read_over(marker):
    """Bytes before a marker: libjpeg warns, PIL and browsers show the image."""
    at = JPEG.rindex(marker)
    spoilt = JPEG[:at] + b"\x12\x34" + JPEG[at:]
    with pytest.raises(ValueError, match="extraneous"):
        simplejpeg.decode_jpeg(spoilt)
    np.testing.assert_array_equal(read(spoilt), read(JPEG))


def test_a_bomb_is_refused_by_its_header():
    """No memory is taken for pixels that a few bytes promise, whatever the format."""
    size = (60_000).to_bytes(4, "big") * 2
    header = PNG[12:16] + size + PNG[24:29]
    png = PNG[:12] + header + zlib.crc32(header).to_bytes(4, "big") + PNG[33:]
    frame = JPEG.index(b"\xff\xc0")
    jpeg = JPEG[: frame + 5] + struct.pack(">HH", 60_000, 60_000) + JPEG[frame + 9 :]
    gif = encoded(Image.fromarray(PICTURE), "GIF")
    gif = gif[:6] + struct.pack("<HH", 60_000, 60_000) + gif[10:]
    bmp = encoded(Image.fromarray(PICTURE), "BMP")
    bmp = bmp[:18] + struct.pack("<II", 60_000, 60_000) + bmp[26:]
    webp = encoded(Image.new("RGB", (8, 8)), "WEBP", save_all=True, append_images=[Image.new("RGB", (8, 8), "red")])
    canvas = webp.index(b"VP8X") + 12
    webp = webp[:canvas] + (16_382).to_bytes(3, "little") * 2 + webp[canvas + 6 :]
    for data in (png, jpeg, gif, bmp, webp):
        assert reason(data) == "too_many_pixels"


def test_the_pixel_limit_is_a_setting():
    """An image of exactly the limit is decoded."""
    for data in (JPEG, PNG, encoded(Image.fromarray(PICTURE), "BMP")):
        assert read(data, 32 * 48).shape == (32, 48, 3)
        assert reason(data, 32 * 48 - 1) == "too_many_pixels"


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_files_give_an_image_or_a_reason(kind, capfd):
    """1,000 mutations of each format: nothing but BadSample is raised, nothing is printed."""
    reasons = set()
    for data in mutations(whole_image(kind), 1000, np.random.default_rng(0)):
        try:
            image = read(data, 1_000_000)
        except BadSample as bad:
            reasons.add(bad.reason)
        else:
            assert image.dtype == np.uint8
            assert image.ndim == 3
            assert image.shape[2] == 3
    assert reasons <= {"empty", "unknown_format", "too_many_pixels", "truncated", "undecodable"}
    assert capfd.readouterr() == ("", "")
