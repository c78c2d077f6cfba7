"""Gradients of ranks become their mean, where they lie."""

import pytest
import torch

AVERAGE = "tests.distributed.runs:average_gradients"


@pytest.mark.parametrize("shared", [True, False], ids=["shared memory", "sockets"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_gradients_become_their_mean_in_place(pool, ranks, shared):
    """Large and small ones, channels last and not, none at all; each keeps its memory and its strides."""
    first, *others = pool(ranks).run(AVERAGE, shared=shared)
    for error, stayed, means in (first, *others):
        assert error < 1e-6
        assert stayed
        assert all(torch.equal(mean, of_first) for mean, of_first in zip(means, first[2], strict=True))


def test_gradients_of_double_precision_keep_it(pool):
    """What ranks share is of single precision: these go through sockets."""
    for error, stayed, _ in pool(2).run(AVERAGE, shared=True, dtype=torch.float64):
        assert error < 1e-12
        assert stayed
