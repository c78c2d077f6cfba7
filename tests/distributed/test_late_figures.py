"""Beside a GPU the figures of a step are read when the next one has been taken, so that it never waits for the log."""

import json

import pytest

from paco_ds.metrics.log import read
from tests.recipes import write_tiny_recipe


@pytest.fixture(scope="module")
def recipe(striped_shards, tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    (path.parent / "zero0.json").write_text(json.dumps({"zero_optimization": {"stage": 0}}))
    write_tiny_recipe(path, f"data.shards={striped_shards}", "engine.deepspeed=zero0.json", "metrics.log_every=1")
    return path


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), {1: 2, 2: 3, 3: 4, 4: 4, 5: 6, 6: 7, 7: 8, 8: 8}),
        (("checkpoint.every_steps=3",), {1: 2, 2: 3, 3: 3, 4: 4, 5: 6, 6: 6, 7: 8, 8: 8}),
        (("engine.max_skipped=1",), {number: number for number in range(1, 9)}),
    ],
    ids=["at the end of an epoch", "at a checkpoint", "where the next skip would be the last"],
)
def test_they_are_read_a_step_later_but_where_they_must_be_known(pool, recipe, tmp_path, overrides, expected):
    """An epoch has 4 steps; none is lost from the log, and its lines are in order."""
    run = tmp_path / "run"
    (when,) = pool(1).run("tests.distributed.training:steps_when_read", recipe=recipe, run=run, overrides=overrides)
    assert when == expected
    assert [line["step"] for line in read(run / "metrics.jsonl") if line["kind"] == "step"] == list(range(1, 9))
