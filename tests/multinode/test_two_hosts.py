"""A job over two hosts, launched by hostfile as the README says; each test says what becomes of it."""

import os
import re
import signal

import pytest

from paco_ds.checkpoint import newest_checkpoint
from tests.multinode.training import CHECKPOINT_EVERY, EPOCHS, STEPS_PER_EPOCH, TRAIN, steps, write_recipe


def test_a_job_on_two_hosts_has_the_losses_of_local_ranks_though_a_rank_was_killed(two_hosts, striped_shards, pool):
    """Both hosts are scraped; the killed rank ends the job; the same command goes on to the end."""
    folder = two_hosts.folder
    run, config = folder / "run", write_recipe(folder, striped_shards)
    command = ("--hostfile", "hosts", TRAIN, "--config", config, "--output", "run", "--expect-ranks", 2)

    job = two_hosts.launch(*command)
    job.wait_until(lambda: len(steps(run)) > CHECKPOINT_EVERY, seconds=900)
    scraped = two_hosts.scrape(run)
    assert sorted(target.split(":")[0] for target in scraped) == ["10.77.0.1", "10.77.0.2"]
    for metrics in scraped.values():
        assert metrics["paco_steps_total"] > 0
        assert metrics["paco_samples_total"] == 2 * 8 * metrics["paco_steps_total"]
    (victim,) = two_hosts.hosts[1].ranks("train.py")
    os.kill(victim, signal.SIGKILL)
    assert job.wait(seconds=600) != 0
    step = newest_checkpoint(run).step
    assert "rank 1 on host node2 (10.77.0.2) was lost: its process died" in job.said, job.said
    assert f"Run the same command again to resume from step {step}" in job.said
    assert not re.search(r"10\.77\.0\.1: Traceback", job.said), job.said  # gloo's, which names nobody
    assert not any(host.ranks("train.py") for host in two_hosts.hosts)

    again = two_hosts.launch(*command)
    assert again.wait(seconds=900) == 0, again.said
    assert f"resumes from the checkpoint of step {step}" in again.said
    assert (run / "report.html").exists()

    local = folder / "local"
    pool(2).run("tests.distributed.training:train", recipe=config, run=local)
    assert len(steps(local)) == EPOCHS * STEPS_PER_EPOCH
    assert steps(run) == steps(local)


@pytest.mark.soak  # the refusal itself: tests/distributed/test_watchdog.py
def test_hosts_that_would_not_find_each_other_are_told_the_setting(two_hosts, striped_shards):
    """Without an interface gloo announces 127.0.0.1, and every host waits for itself."""
    config = write_recipe(two_hosts.folder, striped_shards)
    two_hosts.set_environment()
    job = two_hosts.launch("--hostfile", "hosts", TRAIN, "--config", config, "--output", "run")
    assert job.wait(seconds=900) != 0
    assert "gloo would announce 127.0.0.1 to the other hosts" in job.said, job.said
    assert re.search(r"a line GLOO_SOCKET_IFNAME=NAME in .deepspeed_env, .* node1 has eth0 \(10\.77\.0\.1\)", job.said)
    assert "Traceback" not in job.said
