"""A hundred kills at any time: whoever dies, the run ends bit-equal to one that was never disturbed."""

import functools
import random
import time

import pytest

from tests.endtoend.kills import TRAIN, KilledJob, deepspeed, learnt, write_recipe
from tests.multinode.hosts import free_port

KILLS, EPOCHS = 10, 40
STEPS = 4 * EPOCHS
VICTIMS = ("rank", "rank", "rank", "loader", "launcher", "deepspeed")

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]


def _reached(job: KilledJob, goal: int) -> bool:
    return job.step >= goal


def _at(job: KilledJob, goal: int, moment: float) -> bool:
    return time.monotonic() >= moment or _reached(job, goal)


@pytest.mark.parametrize("seed", range(10))
def test_ten_kills_at_any_time_change_nothing(seed, striped_shards, pool, tmp_path, record):
    """Of a rank, a loader process, the launcher or `deepspeed`; while it starts, in steps, saves and evaluations."""
    draw = random.Random(seed)
    run, recipe = tmp_path / "run", write_recipe(tmp_path, striped_shards, EPOCHS, evaluate_every=3)
    pool(2).run("tests.distributed.training:train", recipe=recipe, run=tmp_path / "undisturbed")
    arguments = ("--config", recipe, "--output", run, "--set=data.workers=1")
    words = deepspeed(free_port(), *arguments) if seed % 3 == 0 else [TRAIN, "--ranks", 2, "--restarts", 30, *arguments]
    began, job = time.monotonic(), KilledJob(words, run)
    job.wait_until(functools.partial(_reached, job, 1))
    start = time.monotonic() - began
    for kill in range(1, KILLS + 1):
        most = kill * STEPS // (KILLS + 1)  # there are steps left for later kills
        if draw.random() < 0.5:  # the start is hit, or what comes soon after
            job.wait_until(functools.partial(_at, job, most, time.monotonic() + draw.uniform(0, 1.2 * start)))
        else:
            job.wait_until(functools.partial(_reached, job, min(job.step + draw.randrange(1, 8), most)))
        job.wait_until(lambda: job.kill(draw.choice(VICTIMS), draw))  # there may be none of that kind just now
    assert job.wait() == 0, job.job.said
    assert learnt(run) == learnt(tmp_path / "undisturbed")
    assert job.unfinished() == []
    record(f"{KILLS} kills, seed {seed}: bit-equal, nothing left", f"{time.monotonic() - began:.0f} s", True)


def test_torchrun_starts_the_ranks_of_a_host_again(striped_shards, pool, tmp_path, record, monkeypatch):
    """A rank is killed, and the run ends bit-equal. Each start has a store of its own: in a shared one gloo finds the
    addresses of the ranks of before."""
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    draw, run, recipe = random.Random(7), tmp_path / "run", write_recipe(tmp_path, striped_shards, EPOCHS)
    pool(2).run("tests.distributed.training:train", recipe=recipe, run=tmp_path / "undisturbed")
    torchrun = ("-m", "torch.distributed.run", "--nproc_per_node", 2, "--max-restarts", 3)
    job = KilledJob([*torchrun, TRAIN, "--config", recipe, "--output", run], run)
    job.wait_until(lambda: job.step >= 20)
    assert job.kill("rank", draw)
    assert job.wait() == 0, job.job.said
    assert learnt(run) == learnt(tmp_path / "undisturbed")
    record("torchrun on one host, a rank killed: started again", "bit-equal", True)
