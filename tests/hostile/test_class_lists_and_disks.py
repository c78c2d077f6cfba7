"""Commands given a class list that is not the run's, or a disk that fills up: one line, nothing half-written."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from paco_ds.data.pack.command import main as build
from paco_ds.training.import_checkpoint import main as import_checkpoint
from tests.commands import run_command
from tests.hostile.test_commands import MODULES, listing
from tests.training.test_import_checkpoint import published, recipe_of

WEIGHTS = "moco_ckpt.pth.tar"
ENDING = ("outcome.json", "metrics_targets.json")


@pytest.fixture(scope="module")
def run(striped_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of class0 to class3 that was imported, with figures of its own."""
    folder = tmp_path_factory.mktemp("imported")
    file, *_ = published("gpaco", folder)
    recipe = recipe_of("gpaco", striped_shards, folder, "schedule.epochs=8")
    assert import_checkpoint([str(file), "--config", str(recipe), "--output", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def other(striped_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of three other classes."""
    folder = tmp_path_factory.mktemp("other")
    for split in ("train", "val", "test"):
        for number, name in enumerate(("lynx", "otter", "stork")):
            shutil.copytree(striped_shards.parent / "images" / split / f"class{number}", folder / split / name)
    assert build(["build", "--source", "folder", "--root", str(folder), "--output", str(folder / "shards")]) == 0
    return folder / "shards"


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A copy that the command may spoil."""
    return Path(shutil.copytree(run, tmp_path / "copy"))


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("evaluate --run RUN --data OTHER", "has the class 'lynx' and 2 more, which the run was not trained on"),
        ("evaluate --run RUN --set data.shards=OTHER", "--data"),
        ("train --config RUN/recipe.yaml --output RUN --set data.shards=OTHER", "shards"),
        ("import WEIGHTS --config RUN/recipe.yaml --output NEW --set data.shards=OTHER", "--new-classifier"),
        ("build-shards build --source csv --root OTHER/.. --train LIST --classes OTHER/LIST --output NEW", "classes"),
        ("compare RUN RUN2", "another classes"),
    ],
)
def test_another_class_list_is_refused_and_nothing_is_written(
    command: str, said: str, run: Path, copy: Path, other: Path, tmp_path: Path
) -> None:
    """The run keeps its checkpoint and figures; a training says in its folder how it ended."""
    figures = {"seed": 3, "split": "test", "manifest_sha256": "ab", "class_names": ["a", "b"], "all": 0.5}
    figures |= dict.fromkeys(("many", "medium", "few"), 0.5)
    (copy / "metrics.json").write_text(json.dumps(figures))
    second = shutil.copytree(copy, tmp_path / "second")
    (second / "metrics.json").write_text(json.dumps(figures | {"class_names": ["a", "c"]}))
    (tmp_path / "list.csv").write_text("path,label\ntrain/lynx/0.png,lynx\n")
    (tmp_path / "classes.txt").write_text("otter\nstork\n")
    names = {
        "OTHER/LIST": tmp_path / "classes.txt",
        "LIST": tmp_path / "list.csv",
        "RUN2": second,
        "RUN": copy,
        "OTHER": other,
        "WEIGHTS": run.parent / WEIGHTS,
        "NEW": tmp_path / "new",
    }
    before = listing(tmp_path)
    done = run_command(*_command(command, names), check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert said in line
    after = listing(tmp_path)
    assert {name: size for name, size in after.items() if not name.endswith(ENDING)} == before


@pytest.mark.parametrize(
    ("command", "limit", "file"),
    [
        ("train --config RUN/recipe.yaml --output RUN --set checkpoint.every_steps=1", 2_000_000, r"step-\d+"),
        ("evaluate --run RUN", 1900, "metrics.json"),  # more than its table on standard output
        ("predict RUN IMAGES --device cpu --output NEW.csv", 4000, "NEW.csv"),
        ("build-shards build --source folder --root IMAGES --output NEW --workers 1", 20_000, "train-00000.tar"),
    ],
)
def test_a_full_disk_is_said_with_the_remedy_and_leaves_nothing_half_written(
    command: str, limit: int, file: str, striped_shards: Path, copy: Path, tmp_path: Path
) -> None:
    """By the kernel, in the middle of a file. What was there before is as it was."""
    names = {"RUN": copy, "IMAGES": striped_shards.parent / "images", "NEW": tmp_path / "new"}
    before = listing(tmp_path)
    module, *words = _command(command, names)
    done = run_command("tests.hostile.full_disk", limit, module, *words, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (74, False), done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert re.search(rf"{file.replace('NEW', 'new')} cannot be written: File too large; .*ulimit -f", line)
    after = listing(tmp_path)
    rewritten = "copy/recipe.yaml"  # whole, with the settings of this start
    kept = {name: size for name, size in before.items() if name != rewritten}
    assert {name: size for name, size in after.items() if name in kept} == kept
    # a log of what was done, a recipe and a lock are whole; of the builder, its state
    rest = {Path(name).name for name in after.keys() - before.keys() if (tmp_path / name).is_file()}
    assert not [name for name in rest if name.endswith((".tar", ".csv", ".safetensors", ".part", ".partial"))]


def _command(command: str, names: dict[str, Path]) -> list[str]:
    """The module of a command and its arguments, with paths for the words in capitals."""
    name, *words = command.split()
    for each, path in names.items():
        words = [word.replace(each, str(path)) for word in words]
    return [MODULES[name], *words]
