"""What Pillow warns of while shards are built is counted and said once."""

import io
import warnings
from pathlib import Path

import pytest
from PIL import Image

from paco_ds.data.pack.command import main
from paco_ds.data.pack.duplicates import picture_hash


@pytest.mark.parametrize("workers", ["1", "2"])
def test_warnings_of_pillow_are_one_line_with_the_first_of_them(tmp_path: Path, capfd, workers: str) -> None:
    """Palettes whose transparency is bytes; the images are kept, and one without is not counted."""
    folder = tmp_path / "images" / "train" / "a"
    folder.mkdir(parents=True)
    for number in range(3):
        image = Image.new("P", (40, 40), number)
        image.putpalette([10 * number, 20, 30] * 256)
        if number:
            image.info["transparency"] = bytes([0, 128, 255])
        image.save(folder / f"{number}.png")
    words = ["build", "--source", "folder", "--root", str(tmp_path / "images"), "--output", str(tmp_path / "shards")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main([*words, "--resize-short", "20", "--workers", workers]) == 0
    said = " ".join("".join(capfd.readouterr()).split())
    assert "2 images made Pillow warn, the first train/a/" in said
    assert said.count("Palette images with Transparency expressed in bytes") == 1


def test_a_search_for_duplicates_does_not_pass_them_on() -> None:
    """An image that was taken is not worth a line at each check."""
    out = io.BytesIO()
    image = Image.new("P", (40, 40), 1)
    image.putpalette([10, 20, 30] * 256)
    image.info["transparency"] = bytes([0, 128, 255])
    image.save(out, "PNG")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture_hash(out.getvalue())
