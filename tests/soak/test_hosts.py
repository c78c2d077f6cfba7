"""Two hosts again: what takes a minute to happen to them."""

import os
import signal
import time

import pytest

from paco_ds.checkpoint import newest_checkpoint
from tests.multinode.training import CHECKPOINT_EVERY, TRAIN, steps, write_recipe

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]


@pytest.fixture
def job(two_hosts, striped_shards):
    """A job in the middle of its training, which would last for hours."""
    config = write_recipe(two_hosts.folder, striped_shards, epochs=10000)
    job = two_hosts.launch("--hostfile", "hosts", TRAIN, "--config", config, "--output", "run", "--expect-ranks", 2)
    job.wait_until(lambda: len(steps(two_hosts.folder / "run")) > CHECKPOINT_EVERY, seconds=240)
    return job


@pytest.mark.parametrize("lost", [0, 1])
def test_a_host_that_vanishes_ends_the_job(two_hosts, job, lost, record):
    """Its cable is pulled. The ranks of both sides end, though neither gets word from the other, and so does ssh."""
    began = time.monotonic()
    two_hosts.hosts[lost].cut_off()
    assert job.wait(seconds=60) != 0
    record(f"host of rank {lost} vanishes: job ended, at most 60 s", f"{time.monotonic() - began:.0f} s", True)
    host = two_hosts.hosts[1]
    said = job.said if lost == 1 else ""
    if lost == 1:  # what node2 says does not come through
        assert f"rank 1 on host {host.name} ({host.address}) was lost: its host does not answer" in said, job.said
    deadline = began + 60
    while left := [pid for each in two_hosts.hosts for pid in each.ranks("train.py")]:
        assert time.monotonic() < deadline, f"still there: {left}\n{job.said}"
        time.sleep(0.2)


def test_ctrl_c_on_the_launching_host_stops_all_with_a_checkpoint(two_hosts, job):
    """The launcher passes it on by ssh; the step under way is finished first."""
    before = len(steps(two_hosts.folder / "run"))
    os.kill(job.process.pid, signal.SIGINT)
    job.wait(seconds=90)
    deadline = time.monotonic() + 60
    while any(host.ranks("train.py") for host in two_hosts.hosts):
        assert time.monotonic() < deadline, job.said
        time.sleep(0.2)
    checkpoint = newest_checkpoint(two_hosts.folder / "run")
    assert checkpoint.step >= before
    assert "was lost" not in job.said, job.said
