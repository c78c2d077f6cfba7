"""The mean of gradients over ranks, in buckets, against one all_reduce of each gradient."""

import pytest
import torch


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
