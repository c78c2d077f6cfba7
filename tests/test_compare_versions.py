"""The comparison of versions finds a changed byte, value or setting, and names it. Nothing is trained here."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

import compare_versions
import differences


def write_run(run: Path, losses=(2.5, 0.1), weight=(1.0, 2.0, 3.0), versions="1", **meaning) -> Path:
    """A run of two steps with a checkpoint of each; the weight after the first step is zero."""
    lines = [
        {"kind": "step", "step": n, "loss": loss, "grad_norm": None, "step_seconds": np.random.random()}
        for n, loss in enumerate(losses, 1)
    ]
    for number in (1, 2):
        checkpoint = run / "checkpoints" / f"step-{number:08d}"
        checkpoint.mkdir(parents=True)
        tensor = np.array(weight, np.float32) * (number - 1)
        save_file({"centers.weight": tensor, "centers.bias": np.ones(2, np.float32)}, checkpoint / "model.safetensors")
        state = {"step": number, "versions": versions, "meaning": {"seed": 3, **meaning}}
        (checkpoint / "state.json").write_text(json.dumps(state))
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def checkpoints_differ(old: Path, new: Path) -> str:
    return differences.difference_of_checkpoints(*(run / "checkpoints" / "step-00000002" for run in (old, new)))


def test_equal_runs_differ_in_nothing(tmp_path):
    """Wall times and the versions that a checkpoint names may be others."""
    old, new = write_run(tmp_path / "old"), write_run(tmp_path / "new", versions="2")
    assert differences.difference_of_logs(old, new, steps=2) == ""
    assert checkpoints_differ(old, new) == ""
    assert differences.distances(old, new, last=2) == (0, 0)


def test_the_last_bit_of_a_loss_and_a_short_log_are_found(tmp_path):
    old = write_run(tmp_path / "old")
    new = write_run(tmp_path / "new", losses=(2.5, float(np.nextafter(0.1, 1))))
    assert differences.difference_of_logs(old, new, steps=2) == "step 2: loss 0.1 is now 0.10000000000000002"
    assert "has 2 steps, not 3" in differences.difference_of_logs(old, old, steps=3)
    negative = write_run(tmp_path / "negative", losses=(2.5, -0.0)), write_run(tmp_path / "zero", losses=(2.5, 0.0))
    assert "loss -0.0 is now 0.0" in differences.difference_of_logs(*negative, steps=2)


def test_a_changed_tensor_a_setting_and_a_missing_file_are_named(tmp_path):
    old = write_run(tmp_path / "old")
    tensor = write_run(tmp_path / "tensor", weight=(1.0, 2.0, 3.0000002))
    assert checkpoints_differ(old, tensor) == "model.safetensors: centers.weight differs"
    setting = write_run(tmp_path / "setting", seed=4)
    assert checkpoints_differ(old, setting) == "state.json: seed 3 is now 4"
    (setting / "checkpoints" / "step-00000002" / "model.safetensors").unlink()
    assert checkpoints_differ(old, setting) == "model.safetensors is of the older version alone"
    (setting / "checkpoints" / "step-00000002" / "state.json").unlink()
    assert checkpoints_differ(old, setting) == "the newer version has no checkpoint step-00000002"


def test_a_younger_setting_must_be_named_and_at_its_default(tmp_path, monkeypatch):
    old, new = write_run(tmp_path / "old"), write_run(tmp_path / "new", **{"loss.margin": 0.5})
    assert checkpoints_differ(old, new) == "state.json: loss.margin missing is now 0.5"
    monkeypatch.setitem(differences.NEW_SETTINGS, "loss.margin", 0.5)
    assert checkpoints_differ(old, new) == ""
    monkeypatch.setitem(differences.NEW_SETTINGS, "loss.margin", 0.4)
    assert checkpoints_differ(old, new) == "state.json: loss.margin missing is now 0.5"


def test_a_changed_byte_and_a_shorter_file_are_found(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    assert "holds no file" in differences.difference_of_folders(old, new)
    for folder, content in ((old, b"abcd"), (new, b"abxd")):
        folder.mkdir()
        (folder / "train.tar").write_bytes(content)
    assert differences.difference_of_folders(old, new) == "train.tar: byte 2 of 4 differs"
    (new / "train.tar").write_bytes(b"abc")
    assert differences.difference_of_folders(old, new) == "train.tar: byte 3 of 4 differs"


def test_distances_are_of_losses_and_of_the_update_of_a_part(tmp_path):
    """And not a number, which is within no bound, where a loss or a weight is none."""
    old = write_run(tmp_path / "old", weight=(3.0, 4.0, 0.0))
    new = write_run(tmp_path / "new", losses=(2.5, 0.3), weight=(3.0, 4.0, 0.5))
    assert differences.distances(old, new, last=2) == pytest.approx((0.2, 0.1))
    broken = write_run(tmp_path / "broken", losses=(None, 0.1), weight=(np.nan, 1.0, 1.0))
    assert np.isnan(differences.distances(old, broken, last=2)).all()


def test_what_is_no_version_and_a_command_that_fails_are_named(tmp_path):
    with pytest.raises(compare_versions.ComparisonError, match="no-such is no folder and git finds no such revision"):
        compare_versions.source_tree("no-such", tmp_path / "source")
    version = compare_versions.Version("old", tmp_path, tmp_path, timeout=60)
    with pytest.raises(compare_versions.ComparisonError, match=r"(?s)old: .* ended with 3:\n  too bad"):
        version.run(sys.executable, "-c", "print('too bad'); raise SystemExit(3)")
    failing: Any = (version.run("false") for _ in range(1))
    rows = compare_versions.or_failure("paco", failing)
    assert [(row.check, row.holds) for row in rows] == [("paco", False)]


def test_a_command_that_takes_too_long_ends_with_its_children(tmp_path):
    version = compare_versions.Version("new", tmp_path, tmp_path, timeout=1)
    with pytest.raises(compare_versions.ComparisonError, match="took over 1 s"):
        version.run("sh", "-c", "sleep 10000 & wait")  # it returns when nobody holds its output any more
