"""Properties of what a job reads, for any number of ranks and loader processes and any changes of them.

The plan and the reading ahead are the stream's own; only the processes are played one after the other.
"""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paco_ds.data.shard import ShardReader, Stored
from paco_ds.data.stream.partition import Planned, TrainingPlan, held_bytes
from paco_ds.data.stream.read_ahead import TrainingSamples
from paco_ds.data.stream.sampler import ClassSampler
from paco_ds.distributed.ranks import MicroBatchLayout

SAMPLERS = ("instance_balanced", "square_root", "class_balanced", "progressively_balanced")
M = 24
RANKS, WORKERS = (1, 2, 3, 4, 6, 8, 12), (0, 1, 3, 8)
EPOCHS = 2


class Reader(ShardReader):
    """In place of shards: a sample's bytes are its id. Watches how much is read and held."""

    def __init__(self, samples: int) -> None:
        self.samples, self.keep = samples, 1
        self.storage: Any = SimpleNamespace(is_local=True)
        self.windows: list[list[int]] = []

    def read_window(self, sample_ids: Sequence[int], gap: int = 0) -> Iterator[Stored]:
        assert list(sample_ids) == sorted(set(sample_ids))
        self.windows.append(list(sample_ids))
        for i in sample_ids:
            yield Stored(i, "train", "s", np.void(b""), i.to_bytes(4, "big"))


def plan_of(counts: Sequence[int], layout: MicroBatchLayout, sampler: Any, window: int, start: int = 0) -> TrainingPlan:
    labels = np.arange(sum(counts), dtype=np.int32) ** 2 % 7 // 2
    classes = ClassSampler(
        sampler,
        tuple(counts),
        SimpleNamespace(labels=lambda: labels),
        tuple(np.bincount(labels, minlength=4)),
        seed=5,
        epochs=EPOCHS,
    )
    return TrainingPlan(
        counts,
        layout,
        seed=5,
        window=window,
        start=start,
        epochs=EPOCHS,
        sampler=None if sampler == "instance_balanced" else classes,
    )


Batches = dict[tuple[int, int], list[Planned]]


def batches(
    counts: Sequence[int],
    m: int,
    W: int,
    workers: int,
    sampler: str = "instance_balanced",
    window: int = 4,
    start: int = 0,
    steps: int | None = None,
) -> Batches:
    """{(step, micro-batch): samples} of `steps` steps, by all ranks, each with so many loader processes."""
    found: Batches = {}
    workers = max(min(workers, m), 1)
    for rank in range(W):
        layout = MicroBatchLayout(m, M, rank, W)
        plan = plan_of(counts, layout, sampler, window, start)
        last = plan.total_steps if steps is None else min(start + steps, plan.total_steps)
        shares = [TrainingSamples(plan, Reader(sum(counts))).share(n, workers) for n in range(workers)]
        sizes = [[len(slots) for slots in plan.slots_of(n, workers)] for n in range(workers)]
        for step in range(start, last):
            for slot, j in enumerate(layout.own):
                taken = [next(share) for n, share in enumerate(shares) for _ in range(sizes[n][slot])]
                assert all(stored.stretch == p.sample_id.to_bytes(4, "big") for p, stored in taken)
                found[step, j] = [p for p, _ in taken]
        if steps is None:
            assert [next(share, None) for share in shares] == [None] * workers
        for share in shares:
            share.close()
    return found


counts_of_shards = st.lists(st.integers(1, 90), min_size=2, max_size=8).filter(lambda c: sum(c) >= 4 * M)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    counts=counts_of_shards,
    m=st.integers(1, 4),
    W=st.sampled_from(RANKS),
    workers=st.sampled_from(WORKERS),
    sampler=st.sampled_from(SAMPLERS),
    window=st.integers(1, 9),
)
def test_any_ranks_and_workers_give_the_batches_of_one_process(counts, m, W, workers, sampler, window):
    """Ids and positions, which the random views follow from, in all epochs."""
    one = batches(counts, m, 1, 0, sampler, window)
    assert batches(counts, m, W, workers, sampler, window) == one


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    counts=counts_of_shards,
    m=st.integers(1, 3),
    sampler=st.sampled_from(SAMPLERS),
    window=st.integers(1, 9),
    parts=st.lists(st.tuples(st.sampled_from(RANKS), st.sampled_from(WORKERS), st.integers(1, 4)), min_size=4),
)
def test_changes_of_ranks_and_workers_within_an_epoch_change_nothing(counts, m, sampler, window, parts):
    """A run that is stopped three times and more, and goes on with others each time, is the run that was not."""
    one = batches(counts, m, 1, 0, sampler, window)
    total = max(step for step, _ in one) + 1
    found: Batches = {}
    step = 0
    for W, workers, steps in parts:
        if step < total:
            found |= batches(counts, m, W, workers, sampler, window, step, steps)
        step += steps
    if step < total:
        found |= batches(counts, m, 2, 3, sampler, window, step)
    assert found == one


@settings(max_examples=40, deadline=None, derandomize=True)
@given(counts=counts_of_shards, m=st.integers(1, 4), window=st.integers(1, 9), sampler=st.sampled_from(SAMPLERS))
def test_each_epoch_has_every_sample_as_often_as_planned_but_for_the_few_left_out(counts, m, window, sampler):
    """Once for the default; fewer than G places are left out."""
    one = batches(counts, m, 1, 0, sampler, window)
    plan = plan_of(counts, MicroBatchLayout(m, M, 0, 1), sampler, window)
    for epoch in range(EPOCHS):
        seen = Counter(p.sample_id for batch in one.values() for p in batch if p.epoch == epoch)
        times = plan.sampler.occurrences(epoch) if plan.sampler else np.ones(sum(counts), int)
        assert all(n <= times[i] for i, n in seen.items())
        assert sum(times) - sum(seen.values()) < m * M
        assert len({p.position for batch in one.values() for p in batch if p.epoch == epoch}) == sum(seen.values())


def test_the_comparison_above_can_fail():
    """A negative control: windows of another length give other batches."""
    assert batches([400, 300], 2, 1, 0, window=4) != batches([400, 300], 2, 1, 0, window=5)


@pytest.mark.parametrize("workers", [1, 3, 8])
def test_loader_processes_together_read_each_window_once(workers):
    """However many they are, no sample of a slot is read by two of them."""
    layout = MicroBatchLayout(8, 2, 0, 2)
    plan = plan_of([500, 300], layout, "instance_balanced", 16)
    reader = Reader(800)
    for n in range(workers):
        list(TrainingSamples(plan, reader).share(n, workers))
    assert sum(map(len, reader.windows)) == plan.total_steps * 8


def test_about_one_window_of_each_lane_is_held():
    """What a loader process holds: at most slots x (window + the steps ahead) samples, and not much less on average."""
    layout = MicroBatchLayout(16, 1, 0, 1)
    plan = plan_of([6400], layout, "instance_balanced", 64)
    reader = Reader(6400)
    held, most = 0, []
    for taken, _ in enumerate(TrainingSamples(plan, reader).share(0, 1), 1):
        held = sum(map(len, reader.windows)) - taken
        most.append(held)
    assert max(most) <= held_bytes(1, layout, 64) == 16 * (64 + 8)
    assert np.mean(most[: len(most) // 2]) < 16 * 70


def test_a_window_is_asked_for_before_it_is_needed():
    """No slot's next window is left to the step that needs it."""
    layout = MicroBatchLayout(16, 1, 0, 1)
    plan = plan_of([6400], layout, "instance_balanced", 64)
    reader = Reader(6400)
    samples = TrainingSamples(plan, reader).share(0, 1)
    for _ in range(16 * (64 - 7)):
        next(samples)
    deadline = time.monotonic() + 300
    while len(reader.windows) < 32 and time.monotonic() < deadline:
        time.sleep(0.001)
    samples.close()
    assert len(reader.windows) == 32
