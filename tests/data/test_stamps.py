"""Lists of Tux Paint's stamps, made of a tree like the package's."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from paco_ds.data.pack.card import load_card
from paco_ds.data.pack.shards import build_shards

ROOT = Path(__file__).parents[2]
COUNTS = {"animals/birds": 7, "animals/birds/cartoon": 2, "clothes": 6, "food/nuts": 5}


@pytest.fixture(scope="module")
def stamps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stamps")
    for name, count in COUNTS.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            Image.fromarray(np.full((9, 9, 4), number, np.uint8)).save(folder / name / f"{number}.png")
    return folder


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "shards" / "make_stamps.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_class_is_two_levels_of_folders_and_gives_three_pictures_to_test(stamps: Path, tmp_path: Path) -> None:
    """Deeper folders belong to it; folders of fewer than six pictures are left out."""
    assert run(stamps, tmp_path / "lists").returncode == 0
    card = tmp_path / "lists" / "stamps.yaml"
    manifest = build_shards(load_card(card), stamps, tmp_path / "out")
    assert list(manifest.classes) == ["animals/birds", "clothes"]
    assert list(manifest.split("train").class_counts) == [6, 3]
    assert list(manifest.split("test").class_counts) == [3, 3]


def test_the_same_seed_draws_the_same_test_pictures(stamps: Path, tmp_path: Path) -> None:
    drawn = []
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert run(stamps, tmp_path / folder, "--seed", seed).returncode == 0
        drawn.append((tmp_path / folder / "test.csv").read_text())
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("fault", ["no pictures", "lists are there"])
def test_a_wrong_folder_is_one_line(stamps: Path, tmp_path: Path, fault: str) -> None:
    (tmp_path / "empty").mkdir()
    given = (tmp_path / "empty", tmp_path / "lists") if fault == "no pictures" else (stamps, tmp_path / "empty")
    ended = run(*given)
    assert ended.returncode == 1
    assert ended.stderr.count("\n") == 1
