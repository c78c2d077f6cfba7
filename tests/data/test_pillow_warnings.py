"""What Pillow warns of while shards are built is counted and said once."""

import warnings
from pathlib import Path

import pytest
from PIL import Image

from paco_ds.data.pack.command import main


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
