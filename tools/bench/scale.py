"""Owns the bench of what grows with the number of ranks: 1,024 of them simulated, without a model or a network.

    python tools/bench/scale.py [--ranks 1024] [--repeats N] [--json]

What one rank does in a step at the size that the whole job has: its part of the order and who sends which key image to
whom, on the host; the merging of everybody's keys and the queue, on the rank's device, here the CPU. And what the first
rank writes once, and every rank renders at each scrape, for Prometheus. The rival of the exchange is the same
arithmetic as a loop over ranks; the floor of the merging is to copy the same rows twice, once to unpack and once to
sort them.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

# The checkout need not be installed. This folder stays on the path, for the module that benches share.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from prometheus_client import generate_latest
from report import Bar, at_least, at_most, median_seconds, print_bars, print_table

from paco_ds.contrast.key_encoder import gather_keys
from paco_ds.contrast.key_exchange import key_exchange
from paco_ds.contrast.key_queue import KeyQueue
from paco_ds.data.stream.order import EpochOrder
from paco_ds.distributed.ranks import MicroBatchLayout, Pending
from paco_ds.metrics.exporter import Exporter
from paco_ds.metrics.steps import StepRecord
from paco_ds.metrics.targets import targets
from paco_ds.randomness import DrawPurpose, permutation

MICRO_BATCH, DIM, CLASSES, WINDOW = 32, 128, 8142, 64
SHARDS, SAMPLES_PER_SHARD = 10_000, 1_400
ARITHMETIC_SECONDS = 0.02  # a tenth of a ResNet-50 step of a fast GPU at the very most


@dataclass
class Job:
    """A job of `ranks` ranks as its last rank sees it, one micro-batch each."""

    ranks: int

    def __post_init__(self) -> None:
        W = self.ranks
        self.layout = MicroBatchLayout(MICRO_BATCH, W, W - 1, W)
        self.groups = permutation(self.layout.global_batch, DrawPurpose.KEY_GROUPS, 1, 0).reshape(W, MICRO_BATCH)
        counts = [SAMPLES_PER_SHARD] * max(SHARDS, -(-self.layout.global_batch // SAMPLES_PER_SHARD))
        self.order = EpochOrder(counts, self.layout.global_batch, seed=1, epoch=0, window=WINDOW)
        self.counts = counts
        generator = torch.Generator().manual_seed(0)
        self.packed = torch.randn(W, MICRO_BATCH * (DIM + 1) + 1, generator=generator)
        labels = torch.randint(CLASSES, (W, MICRO_BATCH), generator=generator, dtype=torch.int32)
        self.packed[:, MICRO_BATCH * DIM : -1] = labels.view(torch.float32)
        self.queue = KeyQueue(4 * self.layout.global_batch, DIM)
        self.ranks_of_job: Any = SimpleNamespace(begin_gather=lambda rows: Pending(self.packed))
        self.keys = self.merge()

    def merge(self) -> tuple[Tensor, Tensor]:
        """Everybody's keys and labels in slot order."""
        own = torch.zeros(MICRO_BATCH, DIM), torch.zeros(MICRO_BATCH, dtype=torch.int64)
        keys = gather_keys(self.layout, self.ranks_of_job, *own, self.groups).wait()
        return keys.keys_GD, keys.labels_G

    def exchange_in_a_loop(self) -> tuple[np.ndarray, list[int], list[int]]:
        """What :func:`key_exchange` gives, by a loop over all ranks."""
        layout, groups, W = self.layout, self.groups, self.ranks
        owner = np.arange(layout.global_batch) // layout.micro_batch % W
        place = np.empty(layout.global_batch, dtype=np.int64)
        for rank in range(W):
            place[owner == rank] = np.arange(layout.accumulation * layout.micro_batch)
        wanted = [groups[list(layout.owned_by(rank))].ravel() for rank in range(W)]
        outgoing = [slots[owner[slots] == layout.rank] for slots in wanted]
        source = owner[wanted[layout.rank]]
        receive = [int((source == rank).sum()) for rank in range(W)]
        return place[np.concatenate(outgoing)], [len(slots) for slots in outgoing], receive


def works(job: Job, folder: Path) -> dict[str, Callable[[], Any]]:
    """Everything that is timed, by name."""
    layout, W = job.layout, job.ranks
    slots = [slot for j in layout.own for slot in layout.slots(j)]
    exporter = _exporter()
    in_order = torch.from_numpy(job.groups.ravel())
    addresses = [f"10.0.{rank // 256}.{rank % 256}:18400" for rank in range(W)]
    return {
        "order: an epoch made": lambda: EpochOrder(job.counts, layout.global_batch, seed=1, epoch=1, window=WINDOW),
        "order: a window of 64 steps, one rank": lambda: job.order.window_ids(0, slots),
        "order: the same for all ranks' slots": lambda: job.order.window_ids(0, range(layout.global_batch)),
        "key groups drawn": lambda: permutation(layout.global_batch, DrawPurpose.KEY_GROUPS, 1, 1),
        "exchange": lambda: key_exchange(job.groups, layout),
        "exchange, a loop over ranks": job.exchange_in_a_loop,
        "merging of gathered keys": job.merge,
        "copying them twice": lambda: (job.packed.clone(), job.keys[0][in_order]),
        "queue push": lambda: job.queue.push(*job.keys),
        "queue snapshot": lambda: job.queue.snapshot(CLASSES),
        "list of targets": lambda: targets(addresses, "run"),
        "/metrics rendered, one rank": lambda: generate_latest(exporter.registry),
    }


def _exporter() -> Exporter:
    exporter = Exporter()
    for reason in ("undecodable", "checksum"):
        exporter.observe_bad_sample(reason)
    for op in ("all_reduce", "all_gather", "all_to_all"):
        exporter.add_collective_bytes(op, 1)
    shots = {"many": 0.5, "medium": 0.5, "few": 0.5}
    figures: dict[str, Any] = dict.fromkeys(StepRecord.__dataclass_fields__, 1.0)
    figures |= {name: shots for name in figures if "probability" in name}
    figures["parts"] = {"softmax": 0.5, "contrast": 0.5}
    exporter.observe_step(StepRecord(**figures), 32)
    return exporter


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print, and return the exit status: a bench reports, it does not judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="end with one JSON line per bar")
    arguments = parser.parse_args(argv)
    job = Job(arguments.ranks)
    with tempfile.TemporaryDirectory() as folder:
        seconds = median_seconds(works(job, Path(folder)), arguments.repeats)
    print_table(
        f"{job.ranks} ranks of {MICRO_BATCH} images, queue {len(job.queue.keys_KD)}, {len(job.counts)} shards",
        ["what", "ms"],
        [[name, f"{1000 * value:.2f}"] for name, value in seconds.items()],
        caption="median; one rank's work",
    )
    print_bars(bars(job.ranks, seconds), as_json=arguments.json)
    return 0


def bars(ranks: int, seconds: dict[str, float]) -> list[Bar]:
    """What Python does in a step, the exchange against a loop, the merging against copying the same rows."""
    window = seconds["order: a window of 64 steps, one rank"] / WINDOW
    arithmetic = window + seconds["key groups drawn"] + seconds["exchange"]
    ours, loop = seconds["exchange"], seconds["exchange, a loop over ranks"]
    merging, copying = seconds["merging of gathered keys"], seconds["copying them twice"]
    return [
        at_most(f"order and exchange of a step at {ranks} ranks, s", arithmetic, ARITHMETIC_SECONDS, ours=arithmetic),
        at_least(f"exchange at {ranks} ranks, times as fast as a loop", loop / ours, 10, ours=ours, rival=loop),
        at_most(f"merging keys of {ranks} ranks, of copying them", merging / copying, 2, ours=merging, floor=copying),
    ]


if __name__ == "__main__":
    sys.exit(main())
