"""Hangs: which rank the others wait for, by numbers alone; then real ranks, one of which is stopped."""

import os
import signal
import subprocess
import threading
from unittest.mock import Mock

import psutil
import pytest

from paco_ds.distributed import hang as hang_module
from paco_ds.distributed.end_messages import in_time, name_ranks, resume_children
from paco_ds.distributed.hang import ANSWER, Hang, HangWatch, Pace, Place
from paco_ds.distributed.heartbeat import SLOW, SLOW_SECONDS, Heartbeat
from paco_ds.errors import HANG
from tests.distributed.test_watchdog import Job, eventually
from tests.recipes import write_tiny_recipe


def beating(hang_seconds=10.0, phase="training", step=1, slow=False):
    heartbeat = Heartbeat()
    heartbeat.hang_seconds = hang_seconds
    heartbeat.mark(phase, step, slow)
    return heartbeat


def stand(pace, seconds, start=0.0):
    """Ticks of one second; the last place."""
    for second in range(1, seconds + 1):
        place = pace.tick(start + second)
    return place


def test_ranks_of_a_training_mark_alike(pool, striped_shards, tmp_path):
    """Else the rank with the lowest count would not be the one that the others wait for."""
    settings = ("engine.deepspeed=auto", "schedule.epochs=2", "evaluation.every_epochs=1")
    write_tiny_recipe(tmp_path / "tiny.yaml", f"data.shards={striped_shards}", *settings)
    arguments = {"recipe": tmp_path / "tiny.yaml", "run": tmp_path / "run"}
    first, second = pool(2).run("tests.distributed.training:marks_of_training", **arguments)
    assert first == second


@pytest.mark.parametrize(
    ("hang_seconds", "slow", "overdue_after"),
    [(10.0, False, 10), (10.0, True, int(SLOW_SECONDS)), (100.0, True, 100 * SLOW), (None, False, None)],
)
def test_a_mark_may_stand_for_so_long(hang_seconds, slow, overdue_after):
    """A slow phase for longer, and for ever where the search is off."""
    pace = Pace(beating(hang_seconds, slow=slow), now=0.0)
    assert not stand(pace, overdue_after or 1000).overdue
    assert stand(pace, 1, start=overdue_after or 1000).overdue == (overdue_after is not None)


def test_progress_is_a_new_mark():
    """Of the same phase and step too, as in an evaluation."""
    heartbeat = beating()
    pace = Pace(heartbeat, now=0.0)
    assert stand(pace, 11).overdue
    heartbeat.mark("training", 1)
    assert not stand(pace, 10, start=11).overdue


def test_before_the_first_mark_nothing_hangs():
    """Shards may be built by one rank."""
    heartbeat = Heartbeat()
    heartbeat.hang_seconds = 10.0
    assert not stand(Pace(heartbeat, now=0.0), 1000).overdue


def test_a_job_that_was_suspended_does_not_hang():
    """Time in which the process did not run is none in which it could make progress."""
    pace = Pace(beating(), now=0.0)
    assert pace.tick(3600.0).seconds == 2


class Ranks:
    """Hang watches that talk to each other at once; `stopped` neither tick nor answer."""

    def __init__(self, world_size, hang_seconds=10.0):
        self.now, self.stopped, self.found = 0.0, set(), {}
        self.beats = [beating(hang_seconds) for _ in range(world_size)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hang_module.time, "monotonic", lambda: 0.0)
            self.watches = [self._watch(rank, world_size) for rank in range(world_size)]

    def _watch(self, rank, world_size):
        others = [0] if rank else list(range(1, world_size))

        def tell(message):
            for other in others:
                if other not in self.stopped:
                    self.watches[other].hear(rank, message, self.now)

        return HangWatch(rank, self.beats[rank], tell, lambda: others)

    def run(self, seconds):
        for _ in range(seconds):
            self.now += 1.0
            for rank, watch in enumerate(self.watches):
                if rank not in self.stopped and (hang := watch.tick(self.now)):
                    self.found.setdefault(rank, hang)


def test_a_stopped_rank_is_named_by_the_others_silence():
    """Seconds after the time is up."""
    ranks = Ranks(4)
    ranks.stopped = {2}
    ranks.run(10)
    assert ranks.found == {}
    ranks.run(int(ANSWER) + 2)
    assert list(ranks.found) == [0]
    assert ranks.found[0].late == [2]
    assert ranks.found[0].places.keys() == {0, 1, 3}


def test_when_rank_0_is_stopped_each_other_finds_it():
    """There is nobody to ask."""
    ranks = Ranks(3)
    ranks.stopped = {0}
    ranks.run(10 + 2 * int(ANSWER) + 3)
    assert {rank: hang.late for rank, hang in ranks.found.items()} == {1: [0], 2: [0]}


def test_the_ranks_at_the_lowest_mark_are_those_that_the_others_wait_for():
    """A loader that is stuck: the others wait in a collective."""
    ranks = Ranks(4)
    for rank in (0, 2, 3):
        ranks.beats[rank].mark("training", 2)
    ranks.run(12)
    assert ranks.found[0].late == [1]


def test_a_rank_in_a_slow_phase_is_waited_for():
    """The others are past it; then it stands for too long as well."""
    ranks = Ranks(3)
    ranks.beats[1].mark("save", 1, slow=True)
    for rank in (0, 2):
        ranks.beats[rank].mark("save", 1, slow=True)
        ranks.beats[rank].mark("training", 2)
    ranks.run(int(SLOW_SECONDS))
    assert ranks.found == {}
    ranks.run(3)
    assert ranks.found[0].late == [1]


def test_ranks_that_go_on_after_all_do_not_hang():
    """Between the question and its end."""
    ranks = Ranks(3)
    ranks.stopped = {2}
    ranks.run(12)
    ranks.stopped = set()
    for heartbeat in ranks.beats:
        heartbeat.mark("training", 2)
    ranks.run(9)
    assert ranks.found == {}


def test_a_rank_alone_is_watched():
    """By itself."""
    ranks = Ranks(1)
    ranks.run(12)
    assert ranks.found[0].late == [0]


def test_a_hang_in_words():
    """Late ranks with their hosts, the others by where they are."""
    at = lambda count, phase, step: Place(count, phase, step, 301, True)  # noqa: E731
    places = {0: at(7, "training", 6), 1: at(5, "evaluation", 5), 2: at(7, "training", 6), 3: at(6, "images", 6)}
    with_host = lambda ranks: f"{name_ranks(ranks)} on host h"  # noqa: E731
    assert Hang([1], places).describe(name_ranks, with_host) == (
        "no progress for 301 s (engine.hang_seconds): rank 1 on host h at step 5 (evaluation); "
        "ranks 0, 2 at step 6 (training); rank 3 at step 6 (images)"
    )
    del places[1]
    assert "rank 1 on host h gives no answer (stopped?); ranks 0, 2 at" in Hang([1], places).describe(
        name_ranks, with_host
    )


def test_a_remedy_that_cannot_be_read_is_not_waited_for():
    """The run's folder may be on the disk that hangs."""
    held = threading.Event()
    assert in_time(lambda: str(held.wait(300)), 0.05) == "Run the same command again"
    held.set()


def test_a_remedy_that_fails_is_no_reason_to_say_nothing():
    """Nor to keep its reason."""
    failing = Mock(side_effect=ValueError("no folder"))
    assert in_time(failing, 300) == "Run the same command again (no folder)"


def test_stopped_processes_of_a_rank_are_continued_before_it_ends():
    """Else its loaders would outlive it."""
    with subprocess.Popen(["sleep", "300"]) as child:
        child.send_signal(signal.SIGSTOP)
        eventually(lambda: psutil.Process(child.pid).status() == psutil.STATUS_STOPPED)
        resume_children()
        eventually(lambda: psutil.Process(child.pid).status() != psutil.STATUS_STOPPED)
        child.kill()


def test_a_hang_ends_every_rank_with_its_stacks(monkeypatch, capfd):
    """Each prints its own; the ranks that are late are named once a host."""
    job = Job(monkeypatch)
    for rank, each in enumerate(job.watchdogs):
        each.heartbeat.mark("images", 6)
        if rank != 1:
            each.heartbeat.mark("training", 6)
        each.heartbeat.hang_seconds = 0.3
    eventually(lambda: {(rank, HANG) for rank in range(4)} <= set(job.ends))
    said = capfd.readouterr().err
    named = [line for line in said.splitlines() if "rank 1 on host" in line]
    assert [line.split(":")[0] for line in sorted(named)] == [f"watchdog (rank {rank} of 4)" for rank in (0, 2)]
    assert "at step 6 (images); ranks 0, 2-3 at step 6 (training). Go on from step 7" in named[0]
    for rank in range(4):
        assert f"watchdog (rank {rank} of 4): process {os.getpid()} on host" in said
    assert said.count("in eventually") == 4  # where the main thread is


@pytest.mark.parametrize("stage", [0, 3])
def test_a_stopped_rank_ends_the_others_in_a_step(pool, striped_shards, tmp_path, stage):
    """Real ranks in a collective; they would continue if the stopped rank did, since no message replaces its part."""
    recipe = tmp_path / "tiny.yaml"
    (tmp_path / "zero.json").write_text(f'{{"zero_optimization": {{"stage": {stage}}}}}')
    write_tiny_recipe(recipe, f"data.shards={striped_shards}", "engine.deepspeed=zero.json", "engine.hang_seconds=3")
    run = {"recipe": recipe, "run": tmp_path / "run", "stopped": 1, "after": 3}
    for status, said in pool(2).run("tests.distributed.hanging:train_until_stopped", **run)[:1]:
        assert status == HANG
        assert "rank 1 on host" in said
        assert "gives no answer (stopped?); rank 0 at step 4 (training)" in said
        assert "train_step" in said
