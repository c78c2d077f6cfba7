"""Images that cost far more than their bytes are bad samples: in training, in the builder and in suggest."""

import io
import struct

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from paco_ds.config.data import DataSettings
from paco_ds.data import image_costs
from paco_ds.data.image_costs import MOST_SCANS, has_surplus, too_costly, without_texts
from paco_ds.data.pack.build_plan import BuildOptions
from paco_ds.data.pack.card import changed, folder_card
from paco_ds.data.pack.image_bytes import BadImage, ending_of, resized, size_of, verify
from paco_ds.data.pack.shards import build_shards
from paco_ds.data.pack.suggest import suggest
from paco_ds.data.shard import BadSample, RawSample
from paco_ds.data.stream.decode import decode
from tests.data.tiny import encoded
from tests.hostile.images import bmp_of_runs, iccp, jpeg_of_scans, png, webp_canvas, ztxt

LIMIT = DataSettings(shards="unused").max_pixels


def trained(data: bytes) -> np.ndarray | str:
    """What training and evaluation make of a file: pixels, or a bad sample's reason."""
    try:
        return decode(RawSample("key", 0, "shard", data), LIMIT)
    except BadSample as error:
        return error.reason


def built(data: bytes) -> set[str | None]:
    """What --verify, --resize-short and suggest make of it: reasons, None for a good image."""
    reasons: set[str | None] = set()
    for use in (
        lambda: verify(data, ending_of(data)),
        lambda: resized(data, ending_of(data), 8, 90),
        lambda: size_of(data),
    ):
        try:
            use()
            reasons.add(None)
        except BadImage as error:
            reasons.add(error.reason)
    return reasons


@pytest.mark.parametrize(("side", "scans"), [(9400, 150), (9400, 13), (64, 101), (5000, 60)])
def test_a_jpeg_of_too_many_scans_is_never_decoded(side, scans):
    """Neither its scans nor scans times pixels may be too many; 9,400 px a side and 150 scans took 27 s and 1.1 GB."""
    data = jpeg_of_scans(side, scans)
    assert trained(data) == "too_many_scans"
    assert built(data) == {"too_many_scans"}


def test_a_plain_decoder_passes_over_all_scans():
    """The control: the file is valid, its header says nothing of them."""
    data = jpeg_of_scans(64, 150)
    assert simplejpeg.decode_jpeg_header(data)[:2] == (64, 64)
    assert simplejpeg.decode_jpeg(data).shape == (64, 64, 3)


@pytest.mark.parametrize("side", [64, 1000])
def test_a_jpeg_of_many_scans_that_cost_little_is_taken(side):
    """As many as the bound."""
    data = jpeg_of_scans(side, MOST_SCANS)
    assert np.shape(trained(data)) == (side, side, 3)
    assert built(data) == {None}


def test_what_only_looks_like_a_scan_does_not_count():
    """Thumbnails and comments in segments, bytes after the end of the image, and restarts between."""
    whole = jpeg_of_scans(64, 10)
    comment = b"\xff\xfe" + struct.pack(">H", 2 + 600) + b"\xff\xda\0" * 200
    padded = b"\xff" * 5
    assert too_costly(whole[:2] + comment + padded + whole[2:] + b"\xff\xda\0\x08" * 200, 64, 64, LIMIT) is None
    assert too_costly(whole[:-2] + b"\xff\x00\xff\xd0\xff\xff\xda\0\x08" * 200, 64, 64, LIMIT) == "too_many_scans"


def test_a_webp_canvas_and_a_bmp_of_runs_are_bounded():
    """The first is allocated when the file is opened, the second is decoded in Python."""
    assert trained(webp_canvas(16_383)) == "too_many_pixels"
    assert built(webp_canvas(16_383)) == {"too_many_pixels"}
    assert trained(bmp_of_runs(4096)) == "too_many_pixels"
    assert np.shape(trained(bmp_of_runs(64))) == (64, 64, 3)


@pytest.mark.parametrize(
    "chunks",
    [(ztxt(3_000_000),), (iccp(3_000_000),), tuple(ztxt(900_000, b"k%d" % n) for n in range(80)), (ztxt(10), iccp(10))],
)
def test_a_png_with_long_texts_is_taken_as_every_viewer_does(chunks):
    """Texts and profiles are not inflated for long; the pixels are those of the image without them."""
    data = png(*chunks)
    assert (trained(data) == trained(png())).all()
    assert built(data) == {None}


def test_pillow_alone_refuses_long_texts():
    """The control."""
    with pytest.raises(ValueError, match="too large"):
        Image.open(io.BytesIO(png(ztxt(3_000_000))))


def test_orientation_in_a_text_is_kept():
    """ImageMagick writes EXIF as text, and Photoshop as XMP; a cut file is Pillow's."""
    exif = Image.Exif()
    exif[0x0112] = 6
    out = io.BytesIO()
    Image.new("RGB", (20, 10)).save(out, "PNG", exif=exif)
    assert without_texts(out.getvalue()) == out.getvalue()
    short = png(ztxt(1000, b"XML:com.adobe.xmp"))
    assert without_texts(short) is short


def test_what_follows_the_pixels_is_not_inflated(monkeypatch):
    """OpenCV would inflate 3 GB of zeros in 9 s; Pillow, which gets such a file, stops at the last pixel."""
    surplus = png(surplus=bytes(2**25))
    assert not has_surplus(surplus)  # 30 ms are let through
    monkeypatch.setattr(image_costs, "_SURPLUS", 2**20)
    assert has_surplus(surplus)
    assert (trained(surplus) == trained(png())).all()
    for honest in (png(side=700), encoded(".png", 700)):
        assert not has_surplus(honest)


def test_a_costly_image_is_named_by_the_builder_and_by_suggest(tmp_path):
    """And left out where --max-bad allows it; suggest tells of those it cannot use."""
    (tmp_path / "in" / "c").mkdir(parents=True)
    (tmp_path / "in" / "c" / "bomb.jpg").write_bytes(jpeg_of_scans(64, 150))
    for number in range(3):
        (tmp_path / "in" / "c" / f"{number}.jpg").write_bytes(encoded(seed=number))
    card = folder_card(tmp_path / "in")
    for way, options in (("verified", BuildOptions(verify=True, max_bad=1)), ("resized", BuildOptions(max_bad=1))):
        chosen = changed(card, resize={"short": 16}) if way == "resized" else card
        manifest = build_shards(chosen, tmp_path / "in", tmp_path / way, options)
        assert manifest.split("train").samples == 3
        assert "c/bomb.jpg: too_many_scans (64 x 64 in each" in (tmp_path / way / "bad-images.txt").read_text()
    with_bomb = build_shards(card, tmp_path / "in", tmp_path / "unseen")
    (line,) = [line for line in suggest(with_bomb).reasons if "cannot be read" in line]
    assert "too_many_scans" in line
