"""Kills of a small job on two ranks: whoever dies, it goes on to the weights and log of an undisturbed run."""

import random
import re
import signal

from paco_ds.errors import RESUMABLE
from paco_ds.metrics.log import read
from paco_ds.training.outcome import read_outcome
from tests.endtoend.kills import TRAIN, KilledJob, deepspeed, learnt, write_recipe
from tests.multinode.hosts import free_port


def test_a_killed_rank_a_killed_keeper_and_a_killed_deepspeed_change_nothing(striped_shards, pool, tmp_path):
    """A rank is lost and started again, its keeper is killed, and the job goes on under `deepspeed`, killed too."""
    draw = random.Random(1019)
    rank_at, keeper_at, launcher_after = draw.randrange(8, 14), draw.randrange(20, 26), draw.randrange(4, 10)
    run, recipe = tmp_path / "run", write_recipe(tmp_path, striped_shards, epochs=15)
    pool(2).run("tests.distributed.training:train", recipe=recipe, run=tmp_path / "undisturbed")
    arguments = ("--config", recipe, "--output", run)
    first = KilledJob([TRAIN, "--ranks", 2, "--restarts", 3, "--set=data.workers=1", *arguments], run)
    first.wait_until(lambda: first.step >= rank_at)
    assert first.kill("rank", draw)
    first.wait_until(lambda: bool(_restarts(run)) and first.step >= keeper_at)
    assert re.search(r"rank . on host \S+ \(127.0.0.1\) was lost: its process died", first.job.said), first.job.said
    assert first.kill("keeper", draw)
    assert first.wait() == -signal.SIGKILL
    outcome = read_outcome(run)
    assert outcome.status == RESUMABLE
    # the first rank's own words, or those of another that noticed it a step earlier
    assert outcome.reason in ("asked to stop (its launcher died)", "asked to stop (another rank was)")

    assert outcome.step is not None
    began = outcome.step
    second = KilledJob(deepspeed(free_port(), *arguments), run)
    second.wait_until(lambda: second.step >= began + launcher_after)
    assert second.kill("deepspeed", draw)
    assert second.wait() == 0
    assert learnt(run) == learnt(tmp_path / "undisturbed")
    assert len(_restarts(run)) == 3
    assert second.unfinished() == []


def _restarts(run):
    log = run / "metrics.jsonl"
    return [line for line in read(log) if line["kind"] == "restart"] if log.exists() else []
