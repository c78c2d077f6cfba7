"""Saving in a whole training: before evaluations, never what is not finite, and told when the disk is full."""

import json
import shutil

import pytest
import torch

from paco_ds.checkpoint import newest_checkpoint, read_checkpoint
from paco_ds.metrics.log import read
from tests.data.tiny import flip_byte
from tests.pool import RankError
from tests.recipes import write_tiny_recipe

TRAIN = "tests.distributed.training:train"
EPOCH = 4  # steps
TIMES = ("images_per_second", "data_wait_seconds", "step_seconds", "seconds")


@pytest.fixture(scope="module")
def recipe(striped_shards, tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    (path.parent / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 0}}))
    write_tiny_recipe(
        path,
        f"data.shards={striped_shards}",
        "engine.deepspeed=zero.json",
        "evaluation.checkpoint=best_balanced",
    )
    return path


@pytest.fixture(scope="module")
def straight(pool, recipe, tmp_path_factory):
    """Two epochs, undisturbed."""
    run = tmp_path_factory.mktemp("straight") / "run"
    pool(1).run(TRAIN, recipe=recipe, run=run)
    return run


def log_of(run):
    lines = (line for line in read(run / "metrics.jsonl") if line["kind"] not in ("start", "checkpoint"))
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def steps_of(run):
    return [line["step"] for line in read(run / "metrics.jsonl") if line["kind"] == "step"]


def results_of(run):
    results = json.loads((run / "metrics.json").read_text())
    return {key: value for key, value in results.items() if key not in ("started", "finished")}


def equal_tensors(a, b):
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


@pytest.mark.parametrize("lost", ["the evaluation", "the best weights", "both"])
def test_a_run_ended_between_checkpoint_evaluation_and_best_makes_up_for_them(pool, recipe, straight, tmp_path, lost):
    """Log, best weights and results are those of a run that never stopped."""
    run = tmp_path / "run"
    pool(1).run(TRAIN, recipe=recipe, run=run, stop_at_step=EPOCH)
    assert "after epoch 1" in (run / "report.html").read_text()
    log = run / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    assert json.loads(lines[-1])["kind"] == "evaluation"
    if lost != "the best weights":
        log.write_text("".join(lines[:-1]))
    if lost != "the evaluation":
        shutil.rmtree(run / "checkpoints" / "best")
    pool(1).run(TRAIN, recipe=recipe, run=run)
    assert log_of(run) == log_of(straight)
    assert results_of(run) == results_of(straight)
    best, expected = (read_checkpoint(folder / "checkpoints" / "best") for folder in (run, straight))
    assert (best.step, best.state["score"]) == (expected.step, expected.state["score"])
    assert equal_tensors(best.model(), expected.model())


@pytest.fixture
def with_a_bad_image(striped_shards, tmp_path):
    """Shards of which one validation image has a flipped byte."""
    shards = tmp_path / "shards"
    shutil.copytree(striped_shards, shards)
    flip_byte(shards / "val-00000.tar", 700)
    return f"data.shards={shards}"


def test_an_unreadable_validation_image_costs_no_epoch(pool, recipe, with_a_bad_image, tmp_path):
    """The epoch is saved first; allowed to be left out, it is named, and the run ends with all figures."""
    run = tmp_path / "run"
    with pytest.raises(RankError, match=r"DataError: sample val-00000000 .* cannot be evaluated .*max_bad_share"):
        pool(1).run(TRAIN, recipe=recipe, run=run, overrides=(with_a_bad_image,))
    assert newest_checkpoint(run).step == EPOCH
    overrides = (with_a_bad_image, "evaluation.max_bad_share=0.05")
    assert pool(1).run(TRAIN, recipe=recipe, run=run, overrides=overrides) == [2 * EPOCH]
    evaluations = [line for line in read(run / "metrics.jsonl") if line["kind"] == "evaluation"]
    assert [(line["step"], line["left_out"]) for line in evaluations] == [(EPOCH, 1), (2 * EPOCH, 1)]
    assert "left_out" not in results_of(run)


def test_more_unreadable_images_than_allowed_end_an_evaluation_on_every_rank(pool, recipe, with_a_bad_image, tmp_path):
    """With their number, the setting and the first."""
    said = pool(2).run(
        "tests.distributed.training:refusal_of_training",
        recipe=recipe,
        run=tmp_path / "run",
        overrides=(with_a_bad_image, "evaluation.max_bad_share=0.03"),
    )
    assert [name for name, _ in said] == ["DataError"] * 2
    assert "1 of 24 images of val cannot be read, more than evaluation.max_bad_share = 0.03 allows" in said[0][1]


@pytest.mark.parametrize(("what", "name"), [("disk full", "StorageError"), ("not finite", "NotFiniteError")])
def test_a_save_that_fails_ends_the_run_on_every_rank_and_keeps_the_one_before(pool, recipe, tmp_path, what, name):
    """In one line, in mid-epoch after the next step; what was written is whole, and the run can go on."""
    run = tmp_path / "run"
    pool(2).run(TRAIN, recipe=recipe, run=run, stop_at_step=1)
    said = pool(2).run(
        "tests.distributed.training:refusal_of_training",
        recipe=recipe,
        run=run,
        overrides=("checkpoint.every_steps=2",),
        fault=what,
        after=2,
    )
    assert [refused for refused, _ in said] == [name] * 2
    assert all("\n" not in message for _, message in said)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000001"]
    assert steps_of(run) in (list(range(1, 3)), list(range(1, 4)))
    assert pool(2).run(TRAIN, recipe=recipe, run=run, stop_at_step=3) == [3, 3]
    assert newest_checkpoint(run).step == 3
