"""docs/transfer.md as a reader does it: pictures and weights from packages, then training with weights and without."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]
ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "ds_configs" / "recipes" / "stamps.yaml"


@pytest.fixture
def shell(tmp_path, monkeypatch):
    """`shell(commands)` in an empty folder that has the checkout's shards/; pip installs beside it."""
    (tmp_path / "shards").symlink_to(ROOT / "shards")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PIP_TARGET", str(tmp_path / "site"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    return lambda commands: subprocess.run(
        ["bash", "-ec", commands], cwd=tmp_path, capture_output=True, text=True, check=False
    )


def commands_of(section: str) -> str:
    """The indented lines below a heading of the page."""
    text = (ROOT / "docs" / "transfer.md").read_text(encoding="utf-8")
    lines = text.partition(f"## {section}\n")[2].partition("\n## ")[0].splitlines()
    return "\n".join(line[4:] for line in lines if line.startswith("    "))


@pytest.mark.skipif(shutil.which("apt-get") is None, reason="the pictures are a package of Debian")
def test_weights_from_imagenet_are_worth_more_than_none(tmp_path, record, shell):
    """Every command of the page up to the training, then cross-entropy for 6 epochs from them and from scratch."""
    for section in ("Pictures", "Weights"):
        done = shell(commands_of(section))
        assert done.returncode == 0, done.stderr
    accuracies = {}
    for name, weights in (("ImageNet", tmp_path / "data" / "lite0.pth"), ("scratch", "null")):
        settings = ("data.shards=data/stamps", f"model.start_from={weights}", "loss.method=cross_entropy")
        short = ("schedule.epochs=6", "engine.threads=1", "metrics.serve=false")
        given = " ".join(f"--set {setting}" for setting in (*settings, *short))
        done = shell(f"paco-train --config {RECIPE} --ranks 2 {given} --output {name}")
        assert done.returncode == 0, done.stderr
        accuracies[name] = 100 * json.loads((tmp_path / name / "metrics.json").read_text())["all"]
    gain = accuracies["ImageNet"] - accuracies["scratch"]
    record("docs/transfer.md: ImageNet's weights over none, at least 15 points", f"{gain:.1f}", gain >= 15)
    assert gain >= 15
