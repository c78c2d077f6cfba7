"""Gradients of ranks become their mean, where they lie."""

import pytest

AVERAGE = "tests.distributed.runs:average_gradients"


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_gradients_become_their_mean_in_place(pool, ranks):
    """Large and small ones, channels last and not, none at all; each keeps its memory and its strides."""
    for error, kept in pool(ranks).run(AVERAGE):
        assert error < 1e-6
        assert kept
