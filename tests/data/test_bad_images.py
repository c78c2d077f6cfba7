"""What people's image files are like, and what the builder makes of them."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from paco_ds.data.manifest import Manifest
from paco_ds.data.pack import image_bytes
from paco_ds.data.pack import shards as shards_module
from paco_ds.data.pack.build_plan import BuildOptions
from paco_ds.data.pack.card import Card, changed, folder_card
from paco_ds.data.pack.check import check_shards
from paco_ds.data.pack.command import main
from paco_ds.data.pack.image_bytes import BadImage, ending_of, resized, verify
from paco_ds.data.pack.shards import build_shards
from paco_ds.data.shard import RawSample, ShardReader
from paco_ds.data.stream.decode import decode
from paco_ds.errors import DataError
from tests.data.tiny import encoded


def picture(mode: str = "RGB", size: tuple[int, int] = (40, 24), kind: str = "JPEG", **options: Any) -> bytes:
    """An image of noise as PIL writes it."""
    rng = np.random.default_rng(0)
    if mode == "I;16":
        image = Image.fromarray(rng.integers(0, 65536, size[::-1], dtype=np.uint16))
    else:
        bands = len(Image.new(mode, (1, 1)).getbands())
        pixels = rng.integers(0, 256, (size[1], size[0], bands), dtype=np.uint8)
        image = Image.frombytes(mode, size, pixels.tobytes())
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def folder(root: Path, files: dict[str, bytes]) -> Card:
    """One class of these files."""
    (root / "c").mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (root / "c" / name).write_bytes(data)
    return folder_card(root)


def samples(manifest: Manifest) -> list[RawSample]:
    """All samples of train."""
    reader = ShardReader(manifest.storage, manifest.split("train"))
    return [reader.read(i) for i in range(manifest.split("train").samples)]


def test_files_are_named_by_content_not_by_ending(tmp_path: Path) -> None:
    """A PNG called .jpg is a PNG in the shard; its bytes are kept."""
    root = tmp_path / "root"
    card = folder(root, {"a.jpg": encoded(".png"), "b.png": encoded(".jpg"), "c.JPEG": encoded(".webp")})
    manifest = build_shards(card, root, tmp_path / "out")
    tar = (tmp_path / "out" / "train-00000.tar").read_bytes()
    assert {s.image for s in samples(manifest)} == {encoded(".png"), encoded(".jpg"), encoded(".webp")}
    assert all(tar.count(ending) == 1 for ending in (b".png\0", b".jpg\0", b".webp\0"))


NAMES = ["ü ber 图像.jpg", "a.b.c.jpg", "x" * 240 + ".jpg", "'quote\".jpg", "new\nline.jpg"]


def test_names_of_any_kind_are_kept_in_the_json_alone(tmp_path: Path) -> None:
    """Unicode, dots, very long, quotes, a line break, bytes that are no UTF-8: keys are numbers, names are data."""
    import webdataset as wds

    root = tmp_path / "root"
    files = {name: encoded(seed=number) for number, name in enumerate(NAMES)}
    card = folder(root, files)
    Path(bytes(root / "c").decode(), b"latin\xe9.jpg".decode("utf-8", "surrogateescape")).write_bytes(encoded(seed=9))
    manifest = build_shards(card, root, tmp_path / "out")
    found = list(wds.WebDataset(str(tmp_path / "out" / "train-00000.tar"), shardshuffle=False).decode())
    assert {s["json"]["source"] for s in found} == {*(f"c/{name}" for name in NAMES), "c/latin\\xe9.jpg"}
    assert [s["__key__"] for s in found] == [f"train-{i:08d}" for i in range(6)]
    assert check_shards(manifest) == []


CUT = encoded(".jpg", 64)[:-400]
BAD = {
    "tiff.jpg": (
        b"II*\0" + bytes(8),
        "unknown_format (begins with 49 49 2a 00 00 00 00 00, no JPEG, PNG, WebP, GIF or BMP)",
    ),
    "html.jpg": (b"<html>404</html>", "unknown_format"),
    "none.jpg": (b"", "empty"),
}


def test_images_that_cannot_be_taken_end_the_build_with_the_list(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of them at once, with reasons; the list is in a file; nothing is called finished."""
    root, out = tmp_path / "root", tmp_path / "out"
    folder(root, {"good.jpg": encoded(), **{name: data for name, (data, _) in BAD.items() if data}})
    command = ["build", "--source", "folder", "--root", str(root), "--output", str(out), "--workers", "1"]
    assert main(command) == 2
    message = capsys.readouterr().err
    assert "2 bad images (2 unknown_format), at most 0 may be left out" in message
    for name in ("tiff.jpg", "html.jpg"):
        assert f"c/{name}: {BAD[name][1]}" in message
    assert len((out / "bad-images.txt").read_text().splitlines()) == 2
    assert not (out / "manifest.json").exists()
    assert main([*command, "--max-bad", "2"]) == 0
    assert "2 images left out, named in" in capsys.readouterr().out


def test_images_left_out_shift_no_key_of_other_shards(tmp_path: Path) -> None:
    """Ids go on without a gap, keys are those in the tars, and damage is named by them."""
    root = tmp_path / "root"
    good = {f"{n:02d}.jpg": encoded(".jpg", 40, n) for n in range(30)}
    card = folder(root, good | {name: data for name, (data, _) in BAD.items()})
    options = BuildOptions(shard_bytes=12_000, max_bad=3)
    manifest = build_shards(card, root, tmp_path / "out", options)
    keys = [sample.key for sample in samples(manifest)]
    assert len(keys) == 30 == len(set(keys))
    assert keys == sorted(keys)
    for sample, shard in ((s, tmp_path / "out" / s.shard) for s in samples(manifest)):
        assert f"{sample.key}.jpg".encode() in shard.read_bytes()
    assert {s.image for s in samples(manifest)} == set(good.values())
    assert check_shards(manifest) == []


def test_class_whose_images_are_all_bad_is_named(tmp_path: Path) -> None:
    """It would be a class that cannot be learnt."""
    root = tmp_path / "root"
    for name, data in (("good", encoded()), ("rotten", b"no image")):
        (root / name).mkdir(parents=True)
        (root / name / "1.jpg").write_bytes(data)
    with pytest.raises(DataError, match="no training image of rotten can be used"):
        build_shards(folder_card(root), root, tmp_path / "out", BuildOptions(max_bad=1))


GOOD: dict[str, Callable[[], bytes]] = {
    "rgb": lambda: picture(),
    "grey": lambda: picture("L"),
    "cmyk": lambda: picture("CMYK"),
    "progressive": lambda: picture(progressive=True),
    "1x1": lambda: picture(size=(1, 1)),
    "alpha": lambda: picture("RGBA", kind="PNG"),
    "palette": lambda: picture("P", kind="PNG"),
    "16 bit": lambda: picture("I;16", kind="PNG"),
    "webp": lambda: picture(kind="WEBP"),
}


@pytest.mark.parametrize("kind", GOOD)
def test_every_ordinary_kind_of_image_passes_verification(kind: str) -> None:
    """CMYK, 16 bits, alpha, palettes, grey, one pixel."""
    data = GOOD[kind]()
    verify(data, ending_of(data))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_truncated_image_fails_verification(kind: str) -> None:
    """It begins as it should, so only decoding shows it."""
    data = picture(size=(200, 200), kind=kind)
    with pytest.raises(BadImage, match="undecodable"):
        verify(data[: len(data) // 2], ending_of(data))


def test_truncated_image_is_found_when_asked_for(tmp_path: Path) -> None:
    """--verify; without it bytes are not decoded."""
    root = tmp_path / "root"
    card = folder(root, {"cut.jpg": CUT, "whole.jpg": encoded()})
    build_shards(card, root, tmp_path / "unseen")
    with pytest.raises(DataError, match=r"1 bad images \(1 undecodable\)(.|\n)*c/cut.jpg: undecodable"):
        build_shards(card, root, tmp_path / "out", BuildOptions(verify=True))


def test_decompression_bomb_is_refused_by_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pixels are never made."""
    monkeypatch.setattr(image_bytes, "MAX_PIXELS", 100)
    for kind in ("JPEG", "PNG", "WEBP"):
        data = picture(kind=kind)
        with pytest.raises(BadImage, match=r"too_many_pixels .40 x 24, at most 100"):
            verify(data, ending_of(data))
        with pytest.raises(BadImage, match="too_many_pixels"):
            resized(data, ending_of(data), 8, 90)


def size_of(data: bytes) -> tuple[int, int]:
    """Width and height."""
    return Image.open(io.BytesIO(data)).size


@pytest.mark.parametrize("kind", sorted(set(GOOD) - {"1x1"}))
def test_larger_images_become_small_jpegs(kind: str) -> None:
    """Every kind; the shorter side is as asked, the aspect stays."""
    data = GOOD[kind]()
    small, ending = resized(data, ending_of(data), 12, 90)
    assert (ending, ending_of(small)) == ("jpg", "jpg")
    assert size_of(bytes(small)) == (20, 12)


def test_small_images_keep_their_bytes() -> None:
    """Nothing is enlarged or encoded twice."""
    data = picture(kind="PNG")
    assert resized(data, "png", 24, 90) == (data, "png")


def test_strips_too_long_for_a_jpeg_keep_their_bytes() -> None:
    """Such as a page of comics: a JPEG has at most 65,500 pixels a side."""
    out = io.BytesIO()
    Image.new("L", (8, 90_000)).save(out, "PNG")
    assert resized(out.getvalue(), "png", 7, 90) == (out.getvalue(), "png")
    assert resized(out.getvalue(), "png", 5, 90)[1] == "jpg"


def test_a_build_that_stops_at_many_bad_images_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the number that the user allowed; others were not looked at."""
    monkeypatch.setattr(shards_module, "_MOST_BAD", 2)
    root = tmp_path / "root"
    card = folder(root, {"good.jpg": encoded(), **{f"{number}.jpg": b"no image" for number in range(4)}})
    message = r"4 bad images \(4 unknown_format\), at most 1 may be left out:[\s\S]* lists those found until the build"
    with pytest.raises(DataError, match=message):
        build_shards(card, root, tmp_path / "out", BuildOptions(max_bad=1))


def test_rotation_in_exif_is_done_before_it_is_lost() -> None:
    """The new file says nothing of it, so its pixels must be upright."""
    half = Image.new("RGB", (80, 40), "black")
    half.paste("white", (0, 0, 40, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned a quarter clockwise: what was left is on top
    out = io.BytesIO()
    half.save(out, "JPEG", exif=exif)
    small = Image.open(io.BytesIO(resized(out.getvalue(), "jpg", 20, 95)[0]))
    assert small.size == (20, 40)
    red = np.asarray(small)[..., 0]
    assert red[5, 10] > 240
    assert red[35, 10] < 15
    assert not small.getexif()


def test_16_bit_grey_keeps_its_range() -> None:
    """Pillow by itself would clip nearly all of it to white."""
    ramp = np.repeat(np.linspace(0, 65535, 64).astype(np.uint16)[None], 64, 0)
    out = io.BytesIO()
    Image.fromarray(ramp).save(out, "PNG")
    small = np.asarray(Image.open(io.BytesIO(resized(out.getvalue(), "png", 32, 95)[0])).convert("L"))
    assert np.abs(small[16].astype(int) - np.linspace(0, 255, 32)).max() < 12


def test_resizing_is_the_cards_or_the_commands(tmp_path: Path) -> None:
    """Shards of small JPEGs, the same with any number of workers' worth of runs."""
    root = tmp_path / "root"
    card = changed(folder(root, {f"{n}.png": encoded(".png", 64, n) for n in range(5)}), resize={"short": 16})
    manifest = build_shards(card, root, tmp_path / "out")
    assert {size_of(s.image) for s in samples(manifest)} == {(16, 16)}
    again = build_shards(card, root, tmp_path / "again")
    assert again.sha256 == manifest.sha256


def test_an_orientation_of_xmp_alone_turns_nothing() -> None:
    """Training reads EXIF alone, so shards that were made smaller show the image as those that were not."""
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    out = io.BytesIO()
    Image.new("RGB", (60, 40), (200, 30, 90)).save(out, "JPEG", xmp=xmp)
    assert Image.open(out).getexif()[0x0112] == 6
    small, _ = resized(out.getvalue(), "jpg", 20, 95)
    assert size_of(bytes(small)) == (30, 20)
    assert decode(RawSample("k", 0, "s", out.getvalue()), 10**6).shape == (40, 60, 3)
