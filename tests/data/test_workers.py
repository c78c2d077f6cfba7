"""Processes that work on shards: results, reports and errors come back, and what is lost is said."""

import os

import pytest

from paco_ds.command import Screen
from paco_ds.data.pack.progress_bar import ShardProgress
from paco_ds.data.pack.workers import Report, Workers
from paco_ds.errors import DataError


def _times(factor: int, job: int, report: Report) -> int:
    report(1, job, 0)
    return factor * job


def _square(number: int) -> int:
    return number * number


def _end(code: int) -> int:
    os._exit(code)


def _refuse(_: None, job: int, report: Report) -> int:
    raise DataError(f"job {job} is bad")


def _quiet() -> ShardProgress:
    return ShardProgress(Screen(quiet=True), "", 10, 45)


@pytest.mark.parametrize("count", [1, 3])
def test_jobs_and_items_are_done(count: int) -> None:
    """By this process or others: items in their order, jobs in any, each reported."""
    progress = _quiet()
    with Workers(count) as workers:
        assert list(workers.map(_square, range(20))) == [n * n for n in range(20)]
        assert sorted(workers.run(_times, 3, range(10), progress)) == [3 * n for n in range(10)]
    assert progress.figures().startswith("10 of 10 images")


@pytest.mark.parametrize("count", [1, 2])
def test_an_error_of_a_job_is_raised_here(count: int) -> None:
    """As it is, and the block ends."""
    with pytest.raises(DataError, match="job 0 is bad"), Workers(count) as workers:
        list(workers.run(_refuse, None, [0], _quiet()))


def test_a_process_that_was_ended_is_said() -> None:
    """By what was under way, and by what is asked for afterwards."""
    with Workers(2) as workers:
        for _ in range(2):
            with pytest.raises(DataError, match=r"worker process was killed.*fewer --workers"):
                list(workers.map(_end, [3]))
