"""Glyph images from the typefaces that matplotlib ships, built as iNaturalist's."""

import importlib
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import matplotlib
import numpy as np
import pytest

from paco_ds.data.pack.card import load_card
from paco_ds.data.pack.shards import build_shards

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


@pytest.fixture
def make_glyphs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module."""
    monkeypatch.syspath_prepend(ROOT / "shards")
    return importlib.import_module("make_glyphs")


def test_profile_of_inaturalists_size_has_its_sum(make_glyphs: ModuleType) -> None:
    """437,513 images of 8,142 classes, falling by 500, none empty."""
    profile = make_glyphs.profile
    counts = profile(np.full(8142, 1000), 500, 437_513)
    assert (counts.sum(), counts.min()) == (437_513, 1)
    assert counts.max() < 400
    with pytest.raises(SystemExit, match="class 0 would need"):
        profile(np.full(8142, 100), 500, 437_513)


def test_look_alikes_of_other_scripts_are_one_class(make_glyphs: ModuleType, glyphs: Path) -> None:
    """Of Latin, Greek and Cyrillic capitals the first that looks so is taken, in real typefaces."""
    characters = [ord(c) for c in "ABO\u0391\u0392\u0393\u0410\u0411\u0412"]  # A B O; Alpha, Beta, Gamma; A, Be, Ve
    typefaces = [t for t in make_glyphs.read_typefaces(glyphs.parent / "fonts") if t.path.name.startswith("DejaVu")]
    seen = np.array([make_glyphs.looks((typeface, characters)) for typeface in typefaces])
    assert (seen != 0).all()
    kept = make_glyphs.distinct(characters, seen)
    assert [chr(characters[column]) for column in kept] == ["A", "B", "O", "\u0393", "\u0411"]


@pytest.mark.parametrize(("alike", "both", "kept"), [(3, 10, [0, 1]), (4, 10, [0]), (3, 6, [0]), (0, 0, [0, 1])])
def test_look_alikes_look_alike_where_a_typeface_has_both(
    make_glyphs: ModuleType, alike: int, both: int, kept: list[int]
) -> None:
    """Above 30 % of those typefaces; one that lacks either has no say."""
    first, second = np.arange(1, 21), np.arange(101, 121)
    second[:alike] = first[:alike]
    second[both:] = 0
    assert make_glyphs.distinct([65, 913], np.stack([first, second], 1)) == kept


def test_families_are_not_shared_between_splits(make_glyphs: ModuleType, glyphs: Path) -> None:
    """File names carry the typeface's number; all typefaces of a family are in one split, and none is left out."""
    typefaces = make_glyphs.read_typefaces(glyphs.parent / "fonts")
    drawn = {name: {int(path.stem) for path in (glyphs / name).rglob("*.png")} for name in ("train", "val", "test")}
    families = {name: {typefaces[number].path.parent.name for number in drawn[name]} for name in drawn}
    assert sorted(len(found) for found in families.values()) == [1, 1, 2]
    assert set.union(*families.values()) == set(FAMILIES)
    assert max(len(drawn[name]) for name in ("val", "test")) > 1
