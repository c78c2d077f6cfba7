"""Every command, given a wrong path, a foreign file or a full disk: one line, nothing half-written."""

import errno
import importlib
import os
import shutil
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from tests.training.test_import_checkpoint import published, recipe_of

MODULES = {
    "train": "paco_ds.train",
    "keep-running": "paco_ds.training.keep_running",
    "evaluate": "paco_ds.evaluate",
    "predict": "paco_ds.evaluation.predict",
    "embed": "paco_ds.evaluation.embed",
    "neighbours": "paco_ds.evaluation.neighbours",
    "export": "paco_ds.evaluation.export",
    "import": "paco_ds.training.import_checkpoint",
    "build-shards": "paco_ds.data.pack.entry",
    "preflight": "paco_ds.planning.preflight",
    "job": "paco_ds.planning.job",
    "reproduce": "paco_ds.paper.reproduce",
    "theory": "paco_ds.paper.theory",
    "report": "paco_ds.report.entry",
    "compare": "paco_ds.paper.compare",
    "wrong-labels": "paco_ds.report.wrong_labels",
}
COMMANDS = [  # WHAT is the input that is wrong
    "train --config WHAT --output new",
    "keep-running --run new -- WHAT",
    "evaluate --run WHAT",
    "predict WHAT image.png --device cpu --output new.csv",
    "embed WHAT image.png --device cpu --output new.npz",
    "neighbours WHAT --query image.png",
    "export WHAT --to safetensors --output new.safetensors",
    "import WHAT --config resnet50 --output new",
    "build-shards build WHAT --output new",
    "build-shards check WHAT",
    "preflight --plan --recipe WHAT",
    "job WHAT --for slurm",
    "reproduce --table WHAT --output new",
    "theory --card WHAT --output new.png",
    "report WHAT",
    "compare WHAT --output new.md",
    "wrong-labels WHAT --output new.html",
]
WRONG = ["nowhere", "empty", "foreign.json", "text.txt", "image.png", "foreign.zip"]
FAULTS = {errno.EROFS: "have it mounted for writing", errno.ENOSPC: "make room there"}


def listing(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*"))}


def refused(line: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What a command says on standard error; it must end with a user's status, on one line."""
    name, *words = line.split()
    with pytest.raises(SystemExit) as ended:
        raise SystemExit(importlib.import_module(MODULES[name]).main(words))
    said = capsys.readouterr().err
    assert ended.value.code in (2, 74), said
    assert "Traceback" not in said
    return said


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the user is: a folder with things that are not what commands want."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign.json").write_text('{"a": 1}')
    (tmp_path / "text.txt").write_text("no recipe, no weights\n")
    Image.new("RGB", (12, 12)).save(tmp_path / "image.png")
    with zipfile.ZipFile(tmp_path / "foreign.zip", "w") as file:
        file.writestr("a", "b")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_not_wanted_is_named_and_nothing_is_written(command, wrong, folder, capsys):
    before = listing(folder)
    said = refused(command.replace("WHAT", wrong), capsys)
    assert wrong in said
    first, *others = said.splitlines()
    assert first.startswith("error")
    if not (command.startswith(("train", "preflight")) and wrong == "foreign.json"):  # all wrong keys, a line each
        assert not others
    assert listing(folder) == before


@pytest.fixture(scope="module")
def run(striped_shards, tmp_path_factory):
    """A run that was imported."""
    folder = tmp_path_factory.mktemp("imported")
    file, *_ = published("gpaco", folder)
    recipe = recipe_of("gpaco", striped_shards, folder)
    words = [str(file), "--config", str(recipe), "--output", str(folder / "run")]
    assert importlib.import_module(MODULES["import"]).main(words) == 0
    return folder / "run"


@pytest.mark.parametrize("command", ["evaluate --run lost", "predict lost image.png", "export lost --to hf --output o"])
def test_a_run_without_checkpoint_is_told(command, run, folder, capsys):
    (folder / "lost").mkdir()
    shutil.copy(run / "recipe.yaml", folder / "lost")
    before = listing(folder)
    said = refused(command, capsys)
    assert "checkpoint" in said
    assert len(said.splitlines()) == 1
    assert listing(folder) == before


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    "command",
    [
        "predict RUN image.png --device cpu --output new.csv",
        "predict RUN image.png --device cpu --output new.parquet",
        "embed RUN image.png --device cpu --output new.npz",
        "export RUN --to safetensors --output new.safetensors",
        "export RUN --to torchvision --output new.pt",
        "export RUN --to hf --output new",
        "import FILE --config RECIPE --output new",
    ],
)
def test_a_disk_that_cannot_be_written_is_told(command, fault, run, folder, monkeypatch, capsys):
    """The fault comes when what was written is flushed to disk, as late as it can."""
    names = {"RUN": run, "FILE": run.parent / "moco_ckpt.pth.tar", "RECIPE": run.parent / "tiny.yaml"}
    for name, path in names.items():
        command = command.replace(name, str(path))

    def fail(descriptor):
        raise OSError(fault, os.strerror(fault))

    before = listing(folder)
    monkeypatch.setattr("paco_ds.files.os.fsync", fail)
    said = refused(command, capsys)
    assert FAULTS[fault] in said
    assert len(said.splitlines()) == 1
    assert listing(folder) == before
