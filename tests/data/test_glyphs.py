"""Glyph images from the typefaces that matplotlib ships, built as iNaturalist's."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from paco_ds.data.build.shards import build_shards
from paco_ds.data.card import load_card

ROOT = Path(__file__).parents[2]
FAMILIES = ("DejaVuSansMono", "DejaVuSans-", "DejaVuSerif", "STIXGeneral")


@pytest.fixture(scope="module")
def glyphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 classes, 4 families."""
    folder = tmp_path_factory.mktemp("glyphs")
    shipped = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    for family in FAMILIES:
        (folder / "fonts" / family).mkdir(parents=True)
        for file in shipped.glob(f"{family}*.ttf"):
            shutil.copy(file, folder / "fonts" / family)
    command = [sys.executable, str(ROOT / "shards" / "make_glyphs.py"), str(folder / "fonts"), str(folder / "images")]
    subprocess.run([*command, "--classes", "40", "--factor", "4", "--workers", "1"], check=True, cwd=folder)
    return folder / "images"


def test_made_set_builds(glyphs: Path, tmp_path: Path) -> None:
    """Long-tailed by the factor, every class in every split."""
    manifest = build_shards(load_card(glyphs / "glyphs.yaml"), glyphs, tmp_path / "out")
    counts = np.array(manifest.split("train").class_counts)
    assert len(counts) == 40
    assert counts.max() / counts.min() == pytest.approx(4, rel=0.4)
    assert set(manifest.splits) == {"train", "val", "test"}
    assert min(manifest.split("test").class_counts) > 0


def test_profile_of_inaturalists_size_has_its_sum() -> None:
    """437,513 images of 8,142 classes, falling by 500, none empty."""
    sys.path.insert(0, str(ROOT / "shards"))
    try:
        from make_glyphs import profile
    finally:
        sys.path.pop(0)
    counts = profile(np.full(8142, 1000), 500, 437_513)
    assert (counts.sum(), counts.min()) == (437_513, 1)
    assert counts.max() < 400
    with pytest.raises(SystemExit, match="class 0 would need"):
        profile(np.full(8142, 100), 500, 437_513)


def test_look_alikes_of_other_scripts_are_one_class(glyphs: Path) -> None:
    """No two classes are Latin, Greek and Cyrillic capital A."""
    names = [entry["name"] for entry in json.loads((glyphs / "train.json").read_text())["categories"]]
    assert len({*names} & {"U+0041 A", "U+0391 Α", "U+0410 А"}) <= 1


def test_families_are_not_shared_between_splits(glyphs: Path) -> None:
    """File names carry the typeface's number; each is in one split."""
    faces = {name: {path.stem for path in (glyphs / name).rglob("*.png")} for name in ("train", "val", "test")}
    assert not faces["train"] & faces["val"]
    assert not (faces["train"] | faces["val"]) & faces["test"]
