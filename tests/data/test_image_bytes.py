"""Formats of images in a build, and what lies under transparent parts."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from paco_ds.data.pack.card import card_of_options, changed, folder_card, make_card
from paco_ds.data.pack.image_bytes import BadImage, ending_of, on_background, resized, size_of, verify
from paco_ds.data.pack.shards import build_shards
from paco_ds.data.shard import RawSample, ShardReader
from paco_ds.data.stream.decode import decode
from paco_ds.errors import DataError

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)


def encoded(kind: str, mode: str = "RGB", **options: object) -> bytes:
    out = io.BytesIO()
    Image.fromarray(PIXELS).convert(mode).save(out, kind, **options)
    return out.getvalue()


def animated() -> bytes:
    """A GIF of two frames, the first red."""
    out = io.BytesIO()
    first, second = (Image.new("RGB", (8, 8), color) for color in ("red", "blue"))
    first.save(out, "GIF", save_all=True, append_images=[second])
    return out.getvalue()


@pytest.mark.parametrize(
    ("kind", "ending"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("GIF", "gif"), ("BMP", "bmp")]
)
def test_formats_are_known_by_their_bytes(kind, ending):
    """And are whole, or not."""
    data = encoded(kind)
    assert ending_of(data) == ending
    assert size_of(data) == (10, 12)
    verify(data, ending)
    with pytest.raises(BadImage):
        verify(data[: len(data) // 2], ending)


def test_two_letters_are_no_bitmap_and_reserved_bytes_may_be_any():
    """Training reads what the builder takes."""
    data = bytearray(encoded("BMP"))
    data[6:10] = b"abcd"
    assert ending_of(bytes(data)) == "bmp"
    assert (decode(RawSample("", 0, "", bytes(data)), 1000) == PIXELS).all()
    with pytest.raises(BadImage, match="unknown_format"):
        ending_of(b"BMW and other words of a text")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif_is_no_damage(kind):
    """In none of the ways to build, nor in training: the image is taken as it is stored."""
    data = encoded(kind, "RGB" if kind == "JPEG" else "RGBA", exif=b"Exif\0\0junkjunk")
    ending = ending_of(data)
    verify(data, ending)
    assert resized(data, ending, 5, 90)[1] == "jpg"
    assert on_background(data, ending, (0, 0, 0))[0] == data
    assert decode(RawSample("", 0, "", data), 1000).shape == (12, 10, 3)


def test_a_damaged_header_is_named_without_an_address():
    """The same damage makes the same line."""
    data = encoded("PNG")
    with pytest.raises(BadImage) as raised:
        verify(data[:10] + bytes(len(data) - 10), "png")
    assert str(raised.value) == ": undecodable (damaged header)"


def test_every_format_is_built_and_trained_on(tmp_path: Path) -> None:
    """Whatever the file is called; bytes are kept, an animation gives its first frame."""
    folder = tmp_path / "in" / "train" / "a"
    folder.mkdir(parents=True)
    files = {
        "1.jfif": encoded("JPEG"),
        "2.gif": animated(),
        "3.BMP": encoded("BMP"),
        "4.jpe": encoded("PNG"),
        "5.webp": encoded("WEBP", lossless=True),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    card = folder_card(tmp_path / "in")
    manifest = build_shards(card, tmp_path / "in", tmp_path / "out")
    reader = ShardReader(manifest.storage, manifest.split("train"))
    samples = [reader.read(number) for number in range(5)]
    assert sorted(sample.image for sample in samples) == sorted(files.values())
    decoded = {sample.image: decode(sample, 1000) for sample in samples}
    assert (decoded[files["2.gif"]] == (255, 0, 0)).all()
    for name in ("3.BMP", "4.jpe", "5.webp"):
        np.testing.assert_array_equal(decoded[files[name]], PIXELS)


def transparent(kind: str, mode: str) -> bytes:
    """Red; the left half is not seen."""
    picture = Image.new("RGBA", (8, 8), (255, 0, 0, 255))
    picture.paste((0, 0, 0, 0), (0, 0, 4, 8))
    out = io.BytesIO()
    picture.convert(mode).save(out, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return out.getvalue()


@pytest.mark.parametrize(
    ("kind", "mode"), [("PNG", "RGBA"), ("WEBP", "RGBA"), ("PNG", "P"), ("GIF", "RGBA"), ("PNG", "LA")]
)
def test_transparent_parts_have_the_background(kind, mode):
    """Of every format that has some; the rest is as it was."""
    data = transparent(kind, mode)
    filled, ending = on_background(data, ending_of(data), (0, 0, 255))
    assert ending == "png"
    pixels = np.asarray(Image.open(io.BytesIO(filled)))
    assert (pixels[:, :4] == (0, 0, 255)).all()
    assert (pixels[:, 4:] == ((255, 0, 0) if mode != "LA" else 76)).all()


@pytest.mark.parametrize("data", [encoded("PNG"), encoded("JPEG"), encoded("PNG", "RGBA"), encoded("GIF")])
def test_an_opaque_image_keeps_its_bytes(data):
    assert on_background(data, ending_of(data), (1, 2, 3)) == (data, ending_of(data))


@pytest.mark.parametrize(
    ("background", "color"), [("white", (255,) * 3), ("mean", (124, 116, 104)), ("#0A0b0c", (10, 11, 12)), (None, None)]
)
def test_backgrounds_of_a_card(tmp_path: Path, background, color):
    card = card_of_options({"source": "list", "root": str(tmp_path), "train": "t.txt"})
    assert changed(card, **({"background": background} if background else {})).background_color == color
    with pytest.raises(DataError, match="background"):
        make_card(card.model_dump(exclude_none=True) | {"background": "pink"}, "card")


def test_shards_are_built_with_a_background_and_a_test_split(tmp_path: Path) -> None:
    """By the card's keys; both splits are taken from train."""
    folder = tmp_path / "in" / "train" / "a"
    folder.mkdir(parents=True)
    for number in range(10):
        (folder / f"{number}.png").write_bytes(transparent("PNG", "RGBA"))
    card = changed(folder_card(tmp_path / "in"), background="white", test_share=0.2, validation_share=0.25)
    manifest = build_shards(card, tmp_path / "in", tmp_path / "out")
    assert manifest.background == "#ffffff"
    assert manifest.trained_data().state()["background"] == "#ffffff"
    assert {name: split.samples for name, split in manifest.splits.items()} == {"train": 6, "test": 2, "val": 2}
    sample = ShardReader(manifest.storage, manifest.split("test")).read(0)
    assert (decode(sample, 1000)[:, :4] == 255).all()
    with pytest.raises(DataError, match="test_share makes a split test out of train, but the card has a test already"):
        changed(card, splits={"train": {"folder": "train"}, "test": {"folder": "test"}})


def test_the_transparent_value_of_16_bit_gray_has_the_background():
    """Of a ramp that is cut to its upper 8 bits, and not clipped to white; the value is compared in 16 bits."""
    ramp = np.arange(0, 65_536, 64, dtype=np.uint16).reshape(32, 32)
    out = io.BytesIO()
    Image.fromarray(ramp).save(out, "PNG", transparency=64)
    filled, ending = on_background(out.getvalue(), "png", (9, 8, 7))
    pixels = np.asarray(Image.open(io.BytesIO(filled)))
    assert ending == "png"
    assert tuple(pixels[0, 1]) == (9, 8, 7)
    pixels = np.delete(pixels.reshape(-1, 3), 1, 0)
    assert (pixels == np.delete(ramp.ravel() >> 8, 1)[:, None]).all()
