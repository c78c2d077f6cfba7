"""Whole tensors from few collectives are those that DeepSpeed gives for each tensor, bit for bit."""

import pytest


@pytest.mark.parametrize(
    ("stage", "autocast", "offload", "bucket"),
    [(1, True, False, 1), (2, False, True, 1), (3, False, False, 1), (3, True, True, 3000), (3, False, False, 2**23)],
)
def test_whole_tensors_are_deepspeeds(pool, stage, autocast, offload, bucket):
    """On 2 ranks, whose parts do not end where tensors do; at stage 3 with any number of tensors in a collective."""
    more = {"offload_optimizer": {"device": "cpu"}} if offload else {}
    odd = pool(2).run(
        "tests.distributed.zero_runs:differences_to_deepspeed",
        stage=stage,
        autocast=autocast,
        offload=more,
        bucket=bucket,
    )
    assert odd == [[], []]
