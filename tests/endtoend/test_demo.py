"""The main job as a newcomer runs it: the launcher with `train.py` alone, a stop, a resume, evaluation, report."""

import json
import sys
from pathlib import Path

import pytest

from paco_ds.metrics.log import read
from tests.damaged import copy_with_damage

TRAIN = Path(__file__).parents[2] / "paco_ds" / "train.py"
DEEPSPEED = Path(sys.executable).with_name("deepspeed")
EPOCHS, STEPS_PER_EPOCH = 4, 38
STOP = 3 * STEPS_PER_EPOCH + 17  # in mid-epoch
SHORT = (
    f"schedule.epochs={EPOCHS}",
    "model.backbone=cifar_resnet8",
    "model.width=16",
    "schedule.warmup_epochs=1",
    "evaluation.every_epochs=2",
    "metrics.port=19400",
    "metrics.log_every=1",
    "optimizer.lr=0.05",
    "engine.threads=1",  # two on two cores wait for each other while other tests run
)


def overridden(*settings):
    return [f"--set={setting}" for setting in settings]


@pytest.mark.timeout(600)
def test_from_images_to_report_with_a_stop_and_a_resume(site, run, tmp_path):
    """From a wheel, in an empty folder. Its shards are built first; two ranks by a hostfile, stopped in mid-epoch,
    resumed on one, evaluated: far above chance."""
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    where = ("--hostfile", "hosts", "--no_ssh_check", "--master_addr", "127.0.0.1", "--master_port", 29616)
    train = (site / "paco_ds" / "train.py", *overridden(*SHORT))
    first = run(DEEPSPEED, *where, *train, "--stop-at-step", STOP, "--expect-ranks", 2)
    assert first.returncode == 0, first.stderr
    assert "no --config: training the recipe demo into runs/demo; for another give --config" in first.stdout
    assert f"stopped after step {STOP}" in first.stdout
    assert (tmp_path / "data/fashion-mnist-lt/manifest.json").exists()
    assert not (site / "paco_ds/shipped/data").exists()
    demo = tmp_path / "runs" / "demo"
    assert not (demo / "metrics_targets.json").exists()  # a clean end: no rank is missed

    second = run(sys.executable, *train)
    assert second.returncode == 0, second.stderr
    assert f"resumes from the checkpoint of step {STOP}" in second.stdout
    assert "report: runs/demo/report.html" in second.stdout
    lines = list(read(demo / "metrics.jsonl"))
    assert [line["step"] for line in lines if line["kind"] == "step"] == list(range(1, EPOCHS * STEPS_PER_EPOCH + 1))
    assert not any(line["skipped"] or line["bad_samples"] for line in lines if line["kind"] == "step")
    trained = json.loads((demo / "metrics.json").read_text())
    assert trained["all"] > 0.5
    assert trained["top5"]["all"] > 0.8
    assert len(trained["per_class"]) == 10
    page = (demo / "report.html").read_text()
    assert all(name in page for name in ("Ankle boot", "T-shirt/top"))

    evaluation = run(site / "bin" / "paco-evaluate", "--run", demo)
    assert evaluation.returncode == 0, evaluation.stderr
    assert "Medium" in evaluation.stdout
    evaluated = json.loads((demo / "metrics.json").read_text())
    for name in ("many", "medium", "few", "all"):
        assert evaluated[name] == pytest.approx(trained[name], abs=2e-3)
    assert evaluated["manifest_sha256"] == trained["manifest_sha256"]


def test_missing_shards_end_the_job_with_the_remedy(run, tmp_path):
    """On every rank alike."""
    settings = overridden(*SHORT, "data.shards=absent")
    done = run(sys.executable, TRAIN, "--ranks", 2, "--config", "demo", *settings, "--output", "run")
    assert done.returncode == 2
    assert "absent" in done.stderr
    assert "paco-build-shards build" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.soak  # the same without `deepspeed`: tests/distributed/test_saving.py, tests/endtoend/test_kills.py
def test_a_rank_that_dies_ends_the_job(striped_shards, run, tmp_path):
    """A damaged evaluation image is seen by one rank only; the other does not wait for ever."""
    damaged = copy_with_damage(striped_shards, tmp_path / "damaged", "val-00000.tar")
    settings = (
        "schedule.epochs=1",
        "schedule.warmup_epochs=0",
        "evaluation.every_epochs=1",
        f"data.shards={damaged}",
        "data.classes=4",
    )
    launch = (DEEPSPEED, "--num_gpus", 2, "--master_port", 29611, TRAIN, "--config", "demo", "--output", "run")
    done = run(*launch, *overridden(*settings, "metrics.port=19400"))
    assert done.returncode != 0
    assert "sample val-00000000 of val-00000.tar cannot be evaluated (crc_mismatch)" in done.stderr
