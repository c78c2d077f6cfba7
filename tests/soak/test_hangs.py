"""A rank that hangs under `deepspeed`: found, explained and gone, at every ZeRO stage and wherever it is."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from paco_ds.errors import HANG
from paco_ds.training.outcome import read_outcome
from tests.multinode.training import steps
from tests.soak.launched import Launched

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]
HANG_SECONDS = 10


def stop_rank_1(job: Launched) -> str:
    job.rank(1).send_signal(signal.SIGSTOP)
    return "rank 1 on host"


def stop_a_loader_of_rank_1(job: Launched) -> str:
    for process in job.rank(1).children(recursive=True):
        process.send_signal(signal.SIGSTOP)
    return "(images); rank 0 at step"


def stop_rank_0_in_a_save(job: Launched) -> str:
    job.wait_until(lambda: list((job.run / "checkpoints").glob("*.part*")))
    job.rank(0).send_signal(signal.SIGSTOP)
    return "rank 0 on host"


@pytest.mark.parametrize(
    ("stage", "stop"),
    [
        *((stage, stop_rank_1) for stage in range(4)),
        (0, stop_a_loader_of_rank_1),
        (3, stop_a_loader_of_rank_1),
        (0, stop_rank_0_in_a_save),
        (3, stop_rank_0_in_a_save),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_hang_ends_the_job_with_its_status_and_stacks(
    tmp_path: Path,
    striped_shards: Path,
    record: Callable[[str, str, bool], None],
    stage: int,
    stop: Callable[[Launched], str],
) -> None:
    """No process is left, the stopped ones neither."""
    job = Launched(tmp_path, striped_shards, f"engine.hang_seconds={HANG_SECONDS}", stage=stage)
    try:
        job.wait_until(lambda: len(steps(job.run)) > 30)
        family, named, began = job.family(), stop(job), time.monotonic()
        status = job.process.wait(timeout=300)
        seconds = time.monotonic() - began
    finally:
        job.close()
    left = [process for process in family if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    outcome = read_outcome(job.run)  # none where rank 0 is stopped; the launcher has the status of another rank
    hang = HANG in (status, outcome.status if outcome else 0)
    holds = hang and named in job.said and "Current thread" in job.said and not left
    record(f"{stop.__name__}, ZeRO {stage}: the job ends with {HANG}", f"{status} after {seconds:.0f} s", holds)
    assert holds, (status, left, job.said)
