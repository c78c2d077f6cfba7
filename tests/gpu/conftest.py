"""A rank that computes on a GPU, for the tests of a module."""

from collections.abc import Iterator

import pytest

from tests.pool import RankPool


@pytest.fixture(scope="module")
def cuda_rank() -> Iterator[RankPool]:
    """One CUDA rank."""
    pool = RankPool(1, cuda=True)
    yield pool
    pool.close()
