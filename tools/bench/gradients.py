"""Owns the bench of the gradients' mean without ZeRO: ranks of one host on CPU, in one run.

    python tools/bench/gradients.py [--rounds N] [--ranks W] [--json]

shared memory     ours (paco_ds/training/shared_memory.py)
sockets           ours where ranks do not share a host: gloo, every large gradient where it lies
DDP's buckets     gloo, in the buckets of 25 MiB that DistributedDataParallel fills
DeepSpeed         its collective in shared memory (inference_all_reduce), every gradient where it lies, and then divided
floor             copying every gradient out and in again, on all ranks at once: what no mean does without

The gradients are those of a ResNet-50. Contestants take turns; a figure is the median over rounds of the slower rank.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

# The checkout need not be installed. This folder stays on the path, for the modules that benches share.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import deepspeed.comm
from ranks import RankGroup
from report import MIB, at_most, print_bars, print_table
from torchvision.models import resnet50

from paco_ds.distributed.ranks import Ranks
from paco_ds.training.gradients import GradientMean

BUCKET = 25 * MIB // 4  # numbers
OURS, SOCKETS, BUCKETS, DEEPSPEED, FLOOR = "shared memory", "sockets", "DDP's buckets", "DeepSpeed", "floor"


class Gradients:
    """The gradients of a rank, and every way to their mean."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        with torch.device("meta"):
            shapes = [p.shape for p in resnet50().parameters()]
        torch.manual_seed(ranks.rank)
        self._gradients = [torch.randn(shape) for shape in shapes]
        self._copies = [g.clone() for g in self._gradients]
        shared = GradientMean(ranks, timeout=60)
        if shared.shared is None:
            raise RuntimeError("the ranks of this bench share no memory; see above")
        self._ways: dict[str, Callable[[Sequence[Tensor]], object]] = {
            OURS: shared,
            SOCKETS: GradientMean(ranks, timeout=60, share=False),
            BUCKETS: self._in_buckets,
            DEEPSPEED: self._deepspeed,
            FLOOR: self._copy,
        }

    def bytes(self) -> int:
        return sum(g.nbytes for g in self._gradients)

    def run(self, way: str) -> float:
        """Seconds of one mean."""
        self._ranks.wait_for_all()
        began = time.perf_counter()
        self._ways[way](self._gradients)
        return time.perf_counter() - began

    def error(self, way: str) -> float:
        """Largest difference from the mean in float64."""
        given = [g.clone() for g in self._gradients]
        exact = [g.double() for g in given]
        for g in exact:
            dist.all_reduce(g)
            g /= self._ranks.world_size
        self._ways[way](given)
        return max(float((g - e).abs().max()) for g, e in zip(given, exact, strict=True))

    def _in_buckets(self, gradients: Sequence[Tensor]) -> None:
        under_way, bucket, size = [], [], 0
        for gradient in reversed(gradients):
            bucket.append(gradient)
            size += gradient.numel()
            if size >= BUCKET or gradient is gradients[0]:
                flat = torch.cat([g.view(-1) for g in bucket]).div_(self._ranks.world_size)
                under_way.append((dist.all_reduce(flat, async_op=True), flat, bucket))
                bucket, size = [], 0
        for work, flat, of_bucket in under_way:
            work.wait()
            for gradient, mean in zip(of_bucket, flat.split([g.numel() for g in of_bucket]), strict=True):
                gradient.copy_(mean.view_as(gradient))

    def _deepspeed(self, gradients: Sequence[Tensor]) -> None:
        for gradient in gradients:
            deepspeed.comm.inference_all_reduce(gradient)
        torch._foreach_mul_(list(gradients), 1 / self._ranks.world_size)

    def _copy(self, gradients: Sequence[Tensor]) -> None:
        for gradient, copy in zip(gradients, self._copies, strict=True):
            copy.copy_(gradient)
        for gradient, copy in zip(gradients, self._copies, strict=True):
            gradient.copy_(copy)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--ranks", type=int, default=2, help="no more than cores, or DeepSpeed's wait takes them all")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)
    ways = [OURS, SOCKETS, BUCKETS, DEEPSPEED, FLOOR]
    group = RankGroup(arguments.ranks, "gradients:Gradients")
    try:
        size = group.call("bytes")[0]
        errors = {way: max(group.call("error", way)) for way in ways[:-1]}
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(arguments.rounds + 1):
            first = number % len(ways)
            for way in (*ways[first:], *ways[:first]):
                slower = max(group.call("run", way))
                if number:  # the first round is unmeasured
                    seconds[way].append(slower)
    finally:
        group.close()
    if wrong := [way for way, error in errors.items() if error > 1e-6]:
        raise RuntimeError(f"not the mean: {', '.join(wrong)}")
    median = {way: 1000 * statistics.median(of_way) for way, of_way in seconds.items()}
    bars = [
        at_most(
            f"ResNet-50 gradients, {arguments.ranks} ranks of one host, ms",
            statistics.median(a / b for a, b in zip(seconds[OURS], seconds[BUCKETS], strict=True)),
            0.5,
            ours=median[OURS],
            rival=median[BUCKETS],
            floor=median[FLOOR],
        )
    ]
    print_table(
        f"Mean of {size / MIB:.0f} MiB of gradients over {arguments.ranks} gloo ranks of one thread",
        ("", "ms", "times as fast as DDP's buckets", "share of the floor"),
        [
            (way, f"{median[way]:.1f}", f"{median[BUCKETS] / median[way]:.2f}", f"{median[FLOOR] / median[way]:.2f}")
            for way in ways
        ],
        f"medians of {arguments.rounds} rounds, the slower rank; torch {torch.__version__}",
    )
    print_bars(bars, as_json=arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
