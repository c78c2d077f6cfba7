"""Owns the bench of the key queue: a million keys on every rank, beside the same queue cut into shards, on paper.

    python tools/bench/key_queue.py [--keys K] [--repeats N] [--json]

(Not named queue.py: benches have this folder on their path, where that would hide the standard library's.)

replicated  every rank holds all K keys. Per optimizer step of A micro-batches of m anchors a rank: the class sums of K
            keys once, A times the log-sum-exp of m anchors over K keys, and the push. Nothing is sent but the gather
            of the step's keys, which both ways need.
sharded     on paper: every rank holds K / W keys. Class sums of K / W keys; A times the log-sum-exp of the W m anchors
            of all ranks over K / W keys; A times two collectives: a gather of all anchors, and an all-to-all of each
            rank's share of every anchor's log-sum-exp, output (its gradient), class sum and count. The parts are
            measured, all ranks at once; the sum is not run.

Both ways score m K pairs a micro-batch and rank. Sharding saves memory and class sums in proportion to K and costs
collectives whatever K is, so it pays in time beyond K* = A t_collectives / (t_replicated - t_sharded per key).
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

# The checkout need not be installed. This folder stays on the path, for the modules that benches share.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ranks import on_ranks
from report import MIB, Bar, at_most, median_seconds, peak_extra_bytes, print_bars, print_table

from paco_ds.contrast.key_encoder import gather_keys
from paco_ds.contrast.key_queue import KeyQueue
from paco_ds.distributed.launch import join_job, leave_job
from paco_ds.distributed.ranks import ByteCounter, MicroBatchLayout, Ranks
from paco_ds.losses.queue_attention import queue_attention

DIM, CLASSES, TAU, MICRO_BATCH, MICRO_BATCHES = 128, 8142, 0.2, 32, 4
WORLD_SIZES = (2, 4)
KEY_BYTES = 4 * DIM + 8  # float32 row and int64 label
PORTION = 4096  # keys pushed at a time: few enough that making them does not show in the queue's memory


@dataclass(frozen=True)
class Times:
    """Milliseconds of a rank, medians: of the replicated queue, of one shard, and of what both or one must send."""

    class_sums: float
    logsumexp: float
    push: float
    digest: float
    shard_class_sums: float
    shard_logsumexp: float
    collectives: float
    gather: float
    gather_bytes: int

    def replicated(self, accumulation: int) -> float:
        return self.class_sums + accumulation * self.logsumexp

    def sharded(self, accumulation: int) -> float:
        return self.shard_class_sums + accumulation * (self.shard_logsumexp + self.collectives)

    def keys_where_sharding_pays(self, accumulation: int, keys: int) -> float:
        """K*, what is proportional to K being taken so; infinite if a shard is no cheaper a key."""
        saved_per_key = (
            self.class_sums - self.shard_class_sums + accumulation * (self.logsumexp - self.shard_logsumexp)
        ) / keys
        return accumulation * self.collectives / saved_per_key if saved_per_key > 0 else float("inf")


PORTION = 4096  # pushed at a time: few enough that making them does not show in the queue's memory


def full_queue(length: int) -> KeyQueue:
    """Random unit keys, labels as long-tailed as iNaturalist's."""
    generator = torch.Generator().manual_seed(0)
    queue = KeyQueue(length, DIM)
    for start in range(0, length, PORTION):
        count = min(PORTION, length - start)
        labels = torch.multinomial(1 / torch.arange(1.0, CLASSES + 1), count, replacement=True, generator=generator)
        queue.push(F.normalize(torch.randn(count, DIM, generator=generator)), labels)
    return queue


def anchors(count: int) -> Tensor:
    return F.normalize(torch.randn(count, DIM, generator=torch.Generator().manual_seed(1)))


def attend(query_BD: Tensor, keys_KD: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp over the queue and its gradient."""
    return queue_attention(query_BD[None], keys_KD[None], TAU)


def times_of_a_rank(keys: int, repeats: int) -> Times:
    ranks = join_job(threads=1)
    W = ranks.world_size
    layout = MicroBatchLayout(MICRO_BATCH, MICRO_BATCHES, ranks.rank, W)
    queue, shard = full_queue(keys), full_queue(keys // W)
    own, of_all = anchors(MICRO_BATCH), anchors(W * MICRO_BATCH)
    rows = anchors(layout.accumulation * MICRO_BATCH)
    labels = torch.zeros(len(rows), dtype=torch.int64)
    new_keys, new_labels = anchors(layout.global_batch), torch.zeros(layout.global_batch, dtype=torch.int64)
    works: dict[str, Callable[[], object]] = {
        "class_sums": lambda: queue.snapshot(CLASSES),
        "logsumexp": lambda: attend(own, queue.keys_KD),
        "push": lambda: queue.push(new_keys, new_labels),
        "digest": queue.digest,
        "shard_class_sums": lambda: shard.snapshot(CLASSES),
        "shard_logsumexp": lambda: attend(of_all, shard.keys_KD),
        "collectives": lambda: exchange_of_shards(ranks, own),
        "gather": lambda: gather_keys(layout, ranks, rows, labels).wait(),
    }
    together = {name: _after_all(ranks, work) for name, work in works.items()}
    # what ranks wait for each other at the barrier is no part of the work
    together["barrier"] = ranks.wait_for_all
    seconds = median_seconds(together, repeats)
    barrier = seconds.pop("barrier")
    ranks.on_bytes = counter = ByteCounter()
    gather_keys(layout, ranks, rows, labels).wait()
    leave_job()
    return Times(
        **{name: 1000 * max(value - barrier, 0.0) for name, value in seconds.items()},
        gather_bytes=counter.sent["all_gather"],
    )


def _after_all(ranks: Ranks, work: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        ranks.wait_for_all()
        return work()

    return run


def exchange_of_shards(ranks: Ranks, query_BD: Tensor) -> Tensor:
    """The collectives of one sharded micro-batch: all anchors to all, then each anchor's shares back to its rank."""
    of_all = ranks.gather(query_BD).reshape(-1, DIM)
    shares = of_all.new_zeros(len(of_all), 2 * DIM + 2)  # output, class sum, log-sum-exp, count
    back = torch.empty_like(shares)
    dist.all_to_all_single(back, shares, group=ranks.group)
    return back


def prepare_queue(keys: int) -> Callable[[], object]:
    return lambda: full_queue(keys)


def prepare_step(keys: int) -> Callable[[], object]:
    """What a step needs beside the queue: class sums, log-sum-exp and its gradient, push, and a digest."""
    queue, query_BD = full_queue(keys), anchors(MICRO_BATCH)
    attend(query_BD, queue.keys_KD[:64])  # the threads are started

    def step() -> object:
        snapshot = queue.snapshot(CLASSES)
        attend(query_BD, snapshot.keys_ND)
        queue.push(anchors(MICRO_BATCH), torch.zeros(MICRO_BATCH, dtype=torch.int64))
        return queue.digest()

    return step


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the tables and the bars; a bar that does not hold is printed as such and is no failure."""
    parser = argparse.ArgumentParser(description="A replicated queue of a million keys beside a sharded one.")
    parser.add_argument("--keys", type=int, default=1_000_000, help="length of the queue (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="measured rounds (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="end with one JSON line per bar")
    arguments = parser.parse_args(argv)
    K = arguments.keys
    times = {W: on_ranks(W, times_of_a_rank, K, arguments.repeats)[0] for W in WORLD_SIZES}
    held, extra = peak_extra_bytes(prepare_queue, K), peak_extra_bytes(prepare_step, K)
    _print(K, times, arguments.repeats)
    print_bars(_bars(K, held, extra), as_json=arguments.json)
    return 0


def _print(K: int, times: dict[int, Times], repeats: int) -> None:
    rows = []
    for W, t in times.items():
        A = MICRO_BATCHES // W
        rows += [
            [
                f"{W} ranks, replicated",
                f"{K * KEY_BYTES / MIB:.0f}",
                f"{t.class_sums:.1f}",
                f"{A} x {t.logsumexp:.1f}",
                "0",
                f"{t.replicated(A):.1f}",
                "",
            ],
            [
                f"{W} ranks, sharded (on paper)",
                f"{K * KEY_BYTES / W / MIB:.0f}",
                f"{t.shard_class_sums:.1f}",
                f"{A} x {t.shard_logsumexp:.1f}",
                f"{A} x {t.collectives:.2f}",
                f"{t.sharded(A):.1f}",
                f"{t.keys_where_sharding_pays(A, K):.3g}",
            ],
        ]
    print_table(
        f"A queue of {K} keys of {DIM} dimensions: a rank's memory and milliseconds per optimizer step",
        ["", "MiB", "class sums", "log-sum-exp", "collectives", "together", "pays beyond K ="],
        rows,
        f"{MICRO_BATCHES} micro-batches of {MICRO_BATCH} anchors, {CLASSES} classes, gloo, a thread a rank, medians of "
        f"{repeats}, torch {torch.__version__}",
    )
    print_table(
        "What both need",
        ["", "gather of keys, ms", "bytes sent by a rank", "push, ms", "digest, ms (every 100 steps)"],
        [
            [f"{W} ranks", f"{t.gather:.2f}", str(t.gather_bytes), f"{t.push:.2f}", f"{t.digest:.0f}"]
            for W, t in times.items()
        ],
    )


def _bars(K: int, held: int, extra: int) -> list[Bar]:
    paper = K * KEY_BYTES
    return [
        at_most(f"{K} keys, MiB of a rank, measured / on paper", held / paper, 1.1, ours=held / MIB, floor=paper / MIB),
        at_most(
            f"{K} keys, extra MiB of a step, share of the queue",
            extra / paper,
            0.25,
            ours=extra / MIB,
            rival=paper / MIB,
        ),
    ]


if __name__ == "__main__":
    sys.exit(main())
