"""The mean of gradients over ranks, in buckets, against one all_reduce of each gradient."""

import json
from pathlib import Path

import pytest
import torch

from paco_ds.training.engine import stage_config
from tests.distributed.test_step import FLOAT32, check, reference


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("bucket_bytes", [1, 1000, 2**20])
def test_each_rank_has_the_mean_of_all(pool, world_size, bucket_bytes):
    """Bit for bit on two ranks, whatever the buckets; a parameter that no rank used has 0."""
    for got, expected, buckets in pool(world_size).run(
        "tests.distributed.averaging:means", bucket_bytes=bucket_bytes, bfloat16=False
    ):
        assert buckets == {1: 8, 1000: 2, 2**20: 1}[bucket_bytes]
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        assert len(got) == 8


def test_in_bfloat16_a_gradient_is_right_to_a_part_in_128(pool):
    """Each summand and the sum are rounded, by a part in 256 at most."""
    for got, expected, _ in pool(2).run("tests.distributed.averaging:means", bucket_bytes=1000, bfloat16=True):
        assert all(g.dtype == torch.float32 for g in got)
        for a, b in zip(got, expected, strict=True):
            assert (a - b).abs().max() <= b.abs().max() / 128
        assert not all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("stage", [1, 2])
def test_with_the_shipped_settings_zero_sends_during_backward_and_takes_the_same_step(pool, stage):
    """Bit for bit what DeepSpeed's own settings give on two ranks."""
    shipped = json.loads(Path("ds_configs", f"zero{stage}.json").read_text())
    assert shipped == stage_config(stage)
    zero = {key: value for key, value in shipped["zero_optimization"].items() if key != "stage"}
    assert zero["overlap_comm"]
    outcomes = pool(2).run("tests.distributed.runs:run_steps", stage=stage, zero=zero)
    plain = pool(2).run("tests.distributed.runs:run_steps", stage=stage)
    for outcome, other in zip(outcomes, plain, strict=True):
        check(outcome, reference(), FLOAT32)
        assert outcome.losses == other.losses
        assert all(torch.equal(outcome.after[name], other.after[name]) for name in other.after)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_bfloat16_gradients_are_a_setting(pool, stage):
    """Three steps are those of float32 to a few parts in a hundred, and not the same."""
    settings = ("engine.gradients=bfloat16",)
    for outcome in pool(2).run("tests.distributed.runs:run_steps", stage=stage, overrides=settings):
        check(outcome, reference(), {"loss": 1e-2, "update": 5e-2})
        assert outcome.skipped == [None] * 3
        with pytest.raises(AssertionError):
            check(outcome, reference(), {"loss": 1e-7, "update": 1e-4})
