"""Two hosts again: what takes a minute to happen to them."""

import os
import signal
import sys
import time

import pytest

from paco_ds.checkpoint import newest_checkpoint
from tests.multinode.hosts import BIN, Job
from tests.multinode.training import CHECKPOINT_EVERY, EPOCHS, ROOT, STEPS_PER_EPOCH, TRAIN, steps, write_recipe

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_on_each_host_have_the_losses_of_four_local_ranks(two_hosts, striped_shards, pool, stage, record):
    """At every ZeRO stage, and every rank of them is scraped."""
    folder = two_hosts.folder
    two_hosts.set_slots(2)
    run, config = folder / "run", write_recipe(folder, striped_shards, stage=stage)
    job = two_hosts.launch("--hostfile", "hosts", TRAIN, "--config", config, "--output", "run", "--expect-ranks", 4)
    job.wait_until(lambda: len(steps(run)) > CHECKPOINT_EVERY, seconds=240)
    scraped = two_hosts.scrape(run)
    assert sorted(target.split(":")[0] for target in scraped) == 2 * ["10.77.0.1"] + 2 * ["10.77.0.2"]
    for metrics in scraped.values():
        assert metrics["paco_samples_total"] == 8 * metrics["paco_steps_total"] > 0
    assert job.wait(seconds=240) == 0, job.said
    pool(4).run("tests.distributed.training:train", recipe=config, run=folder / "local")
    assert len(steps(run)) == EPOCHS * STEPS_PER_EPOCH
    assert steps(run) == steps(folder / "local")
    record(f"two hosts of two ranks, stage {stage}: losses of four local ranks", "bit-equal", True)


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


def _environment(two_hosts):
    path = f"{two_hosts.folder / 'bin'}:{BIN}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}


def test_a_kept_job_goes_on_when_the_link_is_back(two_hosts, striped_shards, pool, record):
    """Both hosts are needed: starts fail until the cable is back. The losses are those of an undisturbed run."""
    folder, run, epochs = two_hosts.folder, two_hosts.folder / "run", 40
    two_hosts.set_environment(GLOO_SOCKET_IFNAME="eth0", DEEPSPEED_TIMEOUT="1")  # minutes that a start waits for a host
    config = write_recipe(folder, striped_shards, epochs=epochs)
    launch = ("deepspeed", "--hostfile", "hosts", TRAIN, "--config", config, "--output", "run", "--expect-ranks", 2)
    keeper = (sys.executable, ROOT / "tools" / "keep_running.py", "--restarts", 10, "--", *launch)
    job = Job(two_hosts.hosts[0].inside(*keeper), folder, _environment(two_hosts))
    job.wait_until(lambda: len(steps(run)) > CHECKPOINT_EVERY, seconds=240)
    two_hosts.hosts[1].cut_off()
    job.wait_until(lambda: "restart 2 in" in job.said, seconds=300)
    host, before = two_hosts.hosts[1], len(steps(run))
    assert f"rank 1 on host {host.name} ({host.address}) was lost: its host does not answer" in job.said, job.said
    host.plug_in()
    assert job.wait(seconds=600) == 0, job.said
    pool(2).run("tests.distributed.training:train", recipe=config, run=folder / "local")
    assert steps(run) == steps(folder / "local")
    record(f"a link cut at step {before} of {epochs * STEPS_PER_EPOCH} and put back: losses", "bit-equal", True)


def test_a_kept_elastic_job_goes_on_with_the_host_that_is_left(two_hosts, striped_shards, record):
    """Its cable is pulled; the ranks that are left can share a step."""
    folder, run = two_hosts.folder, two_hosts.folder / "run"
    config = write_recipe(folder, striped_shards, epochs=40)
    launch = ("deepspeed", "--hostfile", "hosts", TRAIN, "--config", config, "--output", "run", "--expect-ranks", 2)
    keeper = (sys.executable, ROOT / "tools" / "keep_running.py", "--elastic", "--", *launch)
    job = Job(two_hosts.hosts[0].inside(*keeper), folder, _environment(two_hosts))
    job.wait_until(lambda: len(steps(run)) > CHECKPOINT_EVERY, seconds=240)
    two_hosts.hosts[1].cut_off()
    assert job.wait(seconds=600) == 0, job.said
    assert (run / "hosts").read_text() == "10.77.0.1 slots=1\n"
    assert len(steps(run)) == 40 * STEPS_PER_EPOCH
    record("a host vanishes from a kept elastic job: goes on with the other", f"{len(steps(run))} steps", True)


def test_torchrun_starts_the_ranks_of_two_hosts_again(two_hosts, striped_shards, pool, record):
    """One of them is killed. Each round has a store of its own: agents count restarts apart, and a kept store has the
    addresses of the ranks of before."""
    folder, run, epochs = two_hosts.folder, two_hosts.folder / "run", 40
    config = write_recipe(folder, striped_shards, epochs=epochs)
    jobs = []
    for number, host in enumerate(two_hosts.hosts):
        elastic = ("--nnodes=2:4", "--nproc-per-node=1", "--max-restarts=3", f"--local-addr={host.address}")
        meeting = ("--rdzv-backend=c10d", f"--rdzv-endpoint={two_hosts.hosts[0].address}:29400")
        conf = f"--rdzv-conf=last_call_timeout=3,is_host={1 - number}"  # their names are in no name server
        train = (TRAIN, "--config", config, "--output", "run", "--expect-ranks", 2)
        words = (sys.executable, "-m", "torch.distributed.run", *elastic, *meeting, conf, *train)
        environment = _environment(two_hosts) | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        jobs.append(Job(host.inside(*words), folder, environment))
    jobs[0].wait_until(lambda: len(steps(run)) > CHECKPOINT_EVERY, seconds=240)
    (victim,) = two_hosts.hosts[1].ranks("train.py")
    os.kill(victim, signal.SIGKILL)
    for job in jobs:
        assert job.wait(seconds=600) == 0, "\n".join(job.said for job in jobs)
    pool(2).run("tests.distributed.training:train", recipe=config, run=folder / "local")
    assert steps(run) == steps(folder / "local")
    record("torchrun on two hosts, a rank killed: started again", "bit-equal", True)
