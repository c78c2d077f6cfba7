"""The main job as a user runs it: shards, training by the launcher, a stop, a resume, evaluation, report."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from paco_ds.metrics.log import read
from tests.damaged import copy_with_damage

ROOT = Path(__file__).parents[2]
DEEPSPEED = Path(sys.executable).with_name("deepspeed")
RECIPE = ROOT / "ds_configs" / "recipes" / "demo.yaml"
EPOCHS, STEPS_PER_EPOCH = 4, 38
STOP = 3 * STEPS_PER_EPOCH + 17  # in mid-epoch


def command(*arguments, cwd):
    """Run a command as a user would, from another folder; its completed process."""
    return subprocess.run([str(a) for a in arguments], cwd=cwd, capture_output=True, text=True)


def train(ranks, run, shards, *more, cwd, hostfile=None):
    settings = (
        f"schedule.epochs={EPOCHS}",
        "model.backbone=cifar_resnet8",
        "model.width=16",
        "schedule.warmup_epochs=1",
        "evaluation.every_epochs=2",
        f"data.shards={shards}",
    )
    overrides = [f"--set={s}" for s in (*settings, "metrics.port=19400", "optimizer.lr=0.05")]
    where = (
        ("--hostfile", hostfile, "--no_ssh_check", "--master_addr", "127.0.0.1") if hostfile else ("--num_gpus", ranks)
    )
    launch = (DEEPSPEED, *where, "--master_port", 29611, ROOT / "paco_ds" / "train.py")
    return command(*launch, "--config", RECIPE, "--output", run, *overrides, *more, cwd=cwd)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """The shards of the demo, built from the images that ship."""
    output = tmp_path_factory.mktemp("shards") / "fashion-mnist-lt"
    card = ROOT / "shards" / "fashion-mnist-lt.yaml"
    build = command(
        sys.executable, ROOT / "tools" / "build_shards.py", "build", card, "--output", output, cwd=output.parent
    )
    assert build.returncode == 0, build.stderr
    return output


def test_from_images_to_report_with_a_stop_and_a_resume(shards, tmp_path):
    """Two ranks by a hostfile, stopped in mid-epoch, resumed on one, evaluated on two: far above chance."""
    run = tmp_path / "run"
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    stop = ("--stop-at-step", STOP, "--expect-ranks", 2)
    first = train(2, run, shards, *stop, cwd=tmp_path, hostfile=tmp_path / "hosts")
    assert first.returncode == 0, first.stderr
    assert f"stopped after step {STOP}" in first.stdout
    targets = json.loads((run / "metrics_targets.json").read_text())
    assert [t["labels"] for t in targets] == [{"run": "run", "rank": "0"}, {"run": "run", "rank": "1"}]

    second = train(1, run, shards, cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    assert f"resumes from the checkpoint of step {STOP}" in second.stdout
    lines = list(read(run / "metrics.jsonl"))
    assert [line["step"] for line in lines if line["kind"] == "step"] == list(range(1, EPOCHS * STEPS_PER_EPOCH + 1))
    assert not any(line["skipped"] or line["bad_samples"] for line in lines if line["kind"] == "step")
    trained = json.loads((run / "metrics.json").read_text())
    assert trained["all"] > 0.5
    assert trained["top5"]["all"] > 0.8
    assert len(trained["per_class"]) == 10
    page = (run / "report.html").read_text()
    assert all(name in page for name in ("Ankle boot", "T-shirt/top"))

    launch = (DEEPSPEED, "--num_gpus", 2, "--master_port", 29612, ROOT / "paco_ds" / "evaluate.py", "--run", run)
    evaluation = command(*launch, cwd=tmp_path)
    assert evaluation.returncode == 0, evaluation.stderr
    assert "Medium" in evaluation.stdout
    evaluated = json.loads((run / "metrics.json").read_text())
    assert evaluated["world_size"] == 2
    for name in ("many", "medium", "few", "all"):
        assert evaluated[name] == pytest.approx(trained[name], abs=2e-3)
    assert evaluated["manifest_sha256"] == trained["manifest_sha256"]


def test_missing_shards_end_the_job_with_the_remedy(tmp_path):
    """On every rank alike."""
    run = train(2, tmp_path / "run", tmp_path / "absent", cwd=tmp_path)
    assert run.returncode != 0
    assert "absent" in run.stderr
    assert "paco-build-shards build" in run.stderr
    assert "Traceback" not in run.stderr.split("error (rank")[1].split("subprocess")[0]


@pytest.mark.soak  # the same without `deepspeed`: tests/distributed/test_saving.py, tests/endtoend/test_kills.py
def test_a_rank_that_dies_ends_the_job(shards, tmp_path):
    """A damaged evaluation image is seen by one rank only; the other does not wait for ever."""
    damaged = copy_with_damage(shards, tmp_path / "damaged", "val-00000.tar")
    more = ("--set=schedule.epochs=1", "--set=schedule.warmup_epochs=0", "--set=evaluation.every_epochs=1")
    run = train(2, tmp_path / "run", damaged, *more, cwd=tmp_path)
    assert run.returncode != 0
    assert "sample val-00000000 of val-00000.tar cannot be evaluated (crc_mismatch)" in run.stderr
