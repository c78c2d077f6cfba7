"""Owns the bench of the loss: time, memory and gradients beside the published formulation, in one run.

    python tools/bench/loss.py [--repeats N] [--processes N] [--json]

ours       ParametricContrastiveLoss, and a quarter of KeyQueue.snapshot, taken once per step of M = 4 micro-batches
published  a transcription of the formulation of the paper's code: one softmax over centers, batch and queue, with
           weights and a mask of anchors x (C + 2 m + K); autograd, float32
floor      the two matrix products and softmaxes that no formulation by plain operations goes without: queue scores,
           their softmax, its product with the keys (the gradient), and the softmax of the center logits

All get the same projections, center logits and queue (long-tailed labels, full). The published code's guards
against 0 (1e-9, 1e-12) are left out, so that both compute the same number.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# The checkout need not be installed. This folder stays on the path, for the module that benches share.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from report import (
    MIB,
    Bar,
    at_least,
    at_most,
    in_own_process,
    median_seconds,
    peak_extra_bytes,
    print_bars,
    print_table,
)

from paco_ds.contrast.key_queue import KeyQueue, QueueSnapshot
from paco_ds.losses import ParametricContrastiveLoss
from paco_ds.losses.base import Anchors, LossOutput
from paco_ds.losses.paco import class_prior

ALPHA, BETA, GAMMA, SUPT, TAU = 0.05, 1.0, 1.0, 1.0, 0.2
DIM, MICRO_BATCHES = 128, 4
SIZE_COLUMN = "anchors/classes/queue"


@dataclass(frozen=True)
class Size:
    """Anchors, classes and keys in the queue, and the bars that are set at this size."""

    anchors: int
    classes: int
    queue: int
    times_as_fast: float | None = None
    share_of_floor: float | None = None
    share_of_memory: float | None = None

    def __str__(self) -> str:
        return f"{self.anchors}/{self.classes}/{self.queue}"


SIZES = (
    Size(256, 8142, 65536, times_as_fast=8, share_of_floor=0.75, share_of_memory=0.1),
    Size(128, 8142, 8192, times_as_fast=4),
    Size(32, 8142, 8192, times_as_fast=3),
    Size(128, 20_000, 8192),
    Size(128, 100_000, 8192),
)


@dataclass(frozen=True)
class Case:
    """Inputs of one micro-batch, and the queue it meets."""

    labels_B: Tensor
    logits_BC: Tensor
    query_BD: Tensor
    key_BD: Tensor
    queue: KeyQueue
    loss: ParametricContrastiveLoss
    centers_alone: ParametricContrastiveLoss

    @property
    def inputs(self) -> tuple[Tensor, Tensor]:
        """The tensors that get a gradient."""
        return self.query_BD, self.logits_BC

    def snapshot(self) -> QueueSnapshot:
        return self.queue.snapshot(self.logits_BC.shape[1])

    def ours(self, snapshot: QueueSnapshot) -> Tensor:
        output: LossOutput = self.loss(Anchors(self.labels_B, self.logits_BC, self.query_BD, self.key_BD, snapshot))
        return output.loss

    def published(self, dtype: torch.dtype = torch.float32) -> Tensor:
        keys_KD = self.queue.keys_KD.to(dtype)
        query, key, logits, log_prior = (
            t.to(dtype) for t in (self.query_BD, self.key_BD, self.logits_BC, self.loss.get_buffer("log_prior_C"))
        )
        return published_loss(query, key, logits, self.labels_B, keys_KD, self.queue.labels_K, log_prior)

    @torch.no_grad()
    def floor(self) -> tuple[Tensor, Tensor]:
        keys_KD = self.queue.keys_KD
        attended_BD = torch.softmax((self.query_BD / TAU) @ keys_KD.T, 1) @ keys_KD
        return attended_BD, torch.softmax(self.logits_BC, 1)


def make_case(size: Size, *, clustered: bool = False, seed: int = 0) -> Case:
    """Unit rows, independent of their labels or, `clustered`, close to one direction per class."""
    generator = torch.Generator().manual_seed(seed)
    counts_C = 1000 / torch.arange(1, size.classes + 1)  # Zipf: as long-tailed as the data sets of the paper
    labels_B = torch.multinomial(counts_C, size.anchors, replacement=True, generator=generator)
    labels_K = torch.multinomial(counts_C, size.queue, replacement=True, generator=generator)
    directions_CD = torch.randn(size.classes, DIM, generator=generator)

    def unit(labels: Tensor) -> Tensor:
        noise = torch.randn(len(labels), DIM, generator=generator)
        return F.normalize(directions_CD[labels] + 0.1 * noise if clustered else noise, dim=1)

    queue = KeyQueue(size.queue, DIM)
    queue.push(unit(labels_K), labels_K)
    logits_BC = torch.randn(size.anchors, size.classes, generator=generator).requires_grad_()
    query_BD = unit(labels_B).requires_grad_()
    settings: dict[str, Any] = {"alpha": ALPHA, "temperature": TAU, "log_prior_C": class_prior(counts_C)}
    losses = ParametricContrastiveLoss(**settings), ParametricContrastiveLoss(**settings, contrast=False)
    return Case(labels_B, logits_BC, query_BD, unit(labels_B), queue, *losses)


def published_loss(
    query_BD: Tensor,
    key_BD: Tensor,
    logits_BC: Tensor,
    labels_B: Tensor,
    queue_KD: Tensor,
    queue_labels_K: Tensor,
    log_prior_C: Tensor,
) -> Tensor:
    """Eq. (4) operation by operation as the paper's code writes it: its model puts features together from a clone of
    the queue for every micro-batch, its loss makes logits of everything, and a weight and a mask for each of them."""
    size, classes = logits_BC.shape
    features_AD = torch.cat([query_BD, key_BD, queue_KD.clone().detach()])
    labels_A1 = torch.cat([labels_B, labels_B, queue_labels_K.clone().detach()]).view(-1, 1)
    mask_BA = torch.eq(labels_A1[:size], labels_A1.T).to(query_BD.dtype)
    contrast_BA = torch.div(features_AD[:size] @ features_AD.T, TAU)
    all_logits = torch.cat([(logits_BC + log_prior_C) / SUPT, contrast_BA], 1)
    largest_B1, _ = torch.max(all_logits, dim=1, keepdim=True)
    all_logits = all_logits - largest_B1.detach()
    not_itself_BA = torch.scatter(torch.ones_like(mask_BA), 1, torch.arange(size).view(-1, 1), 0)
    mask_BA = mask_BA * not_itself_BA
    one_hot_BC = F.one_hot(labels_B, classes).to(query_BD.dtype)
    weights = torch.cat([one_hot_BC * BETA, mask_BA * ALPHA], 1)
    terms = torch.cat([torch.ones(size, classes, dtype=query_BD.dtype), GAMMA * not_itself_BA], 1)
    log_probability = all_logits - torch.log((torch.exp(all_logits) * terms).sum(1, keepdim=True))
    return -((weights * log_probability).sum(1) / weights.sum(1)).mean()


def gradient_error(size: Size, *, clustered: bool) -> float:
    """Norm of our gradient's difference to the published one in float64, relative; queries or logits, the worse."""
    case = make_case(size, clustered=clustered)
    ours = torch.autograd.grad(case.ours(case.snapshot()), case.inputs)
    exact_case = replace(
        case,
        logits_BC=case.logits_BC.detach().double().requires_grad_(),
        query_BD=case.query_BD.detach().double().requires_grad_(),
    )
    exact = torch.autograd.grad(exact_case.published(torch.float64), exact_case.inputs)
    return max(float((a - b).norm() / b.norm()) for a, b in zip(ours, exact, strict=True))


def saved_bytes(forward: Callable[[], object]) -> int:
    """Bytes of the storages that autograd keeps for backward, each counted once, inputs among them."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        # Holding the tensor keeps its address from being given to another.
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del result
    return total


def saved_by_ours(size: Size) -> int:
    case = make_case(size)
    snapshot = case.snapshot()
    return saved_bytes(lambda: case.ours(snapshot))


def prepare_step(variant: str, size: Size) -> Callable[[], object]:
    """Forward and backward of `ours`, its snapshot included, or `published`; the threads already started."""

    def step(case: Case) -> Any:
        loss = case.ours(case.snapshot()) if variant == "ours" else case.published()
        return torch.autograd.grad(loss, case.inputs)

    step(make_case(Size(8, 64, 512)))
    case = make_case(size)
    return lambda: step(case)


@dataclass(frozen=True)
class Figures:
    """What was measured at one size: milliseconds, bytes, relative errors."""

    loss_ms: float
    centers_ms: float
    snapshot_ms: float
    published_ms: float
    floor_ms: float
    saved: int
    saved_shorter_queue: int
    saved_published: int
    peak: int
    peak_published: int
    error_random: float
    error_clustered: float

    @property
    def ours_ms(self) -> float:
        return self.loss_ms + self.snapshot_ms / MICRO_BATCHES


def median_ms(size: Size, repeats: int) -> dict[str, float]:
    """Milliseconds of each piece of work, in turn."""
    case = make_case(size)
    snapshot = case.snapshot()
    works: dict[str, Callable[[], object]] = {
        "loss": lambda: torch.autograd.grad(case.ours(snapshot), case.inputs),
        "centers": lambda: torch.autograd.grad(
            case.centers_alone(Anchors(case.labels_B, case.logits_BC)).loss, case.logits_BC
        ),
        "snapshot": case.snapshot,
        "published": lambda: torch.autograd.grad(case.published(), case.inputs),
        "floor": case.floor,
    }
    return {f"{name}_ms": 1000 * seconds for name, seconds in median_seconds(works, repeats).items()}


def measure(size: Size, repeats: int, processes: int) -> Figures:
    # glibc keeps memory for later once large blocks were freed: a size must not be timed after a larger one. And where
    # memory lies, which a process keeps to its end, moves a time of milliseconds by a third.
    each = [in_own_process(median_ms, size, repeats) for _ in range(processes)]
    return Figures(
        **{name: statistics.median(times[name] for times in each) for name in each[0]},
        saved=saved_by_ours(size),
        saved_shorter_queue=saved_by_ours(Size(size.anchors, size.classes, size.queue // 8)),
        saved_published=saved_bytes(make_case(size).published),
        peak=peak_extra_bytes(prepare_step, "ours", size),
        peak_published=peak_extra_bytes(prepare_step, "published", size),
        error_random=gradient_error(size, clustered=False),
        error_clustered=gradient_error(size, clustered=True),
    )


def bars_of(measured: dict[Size, Figures]) -> list[Bar]:
    bars = []
    for size, f in measured.items():
        times = {"ours": f.ours_ms, "rival": f.published_ms, "floor": f.floor_ms}
        memory = {"ours": f.peak / MIB, "rival": f.peak_published / MIB}
        if size.times_as_fast is not None:
            speed = f.published_ms / f.ours_ms
            bars.append(at_least(f"{size} ms, published / ours", speed, size.times_as_fast, **times))
        if size.share_of_floor is not None:
            bars.append(at_most(f"{size} ms, ours / floor", f.ours_ms / f.floor_ms, size.share_of_floor, **times))
        if size.share_of_memory is not None:
            share = f.peak / f.peak_published
            bars.append(at_most(f"{size} peak extra MiB, ours / published", share, size.share_of_memory, **memory))
    worst = max(f.error_random for f in measured.values())
    bars.append(at_most("gradient error, random, worst size", worst, 1e-6, ours=worst))
    worst = max(f.error_clustered for f in measured.values())
    bars.append(at_most("gradient error, clustered, worst size", worst, 1e-5, ours=worst))
    worst = max(f.saved / (4 * size.anchors * size.classes) for size, f in measured.items())
    bars.append(at_most("saved for backward, anchors-x-classes copies, worst size", worst, 2, ours=worst))
    worst = max(f.saved / f.saved_shorter_queue for f in measured.values())
    bars.append(at_most("saved for backward, queue / an eighth of it, worst size", worst, 1, ours=worst))
    return bars


def print_figures(measured: dict[Size, Figures], repeats: int, processes: int) -> None:
    print_table(
        "The loss of one micro-batch: milliseconds forward + backward",
        [
            SIZE_COLUMN,
            "ours",
            "of it centers",
            "snapshot / 4",
            "published",
            "floor",
            "published / ours",
            "ours / floor",
        ],
        [
            [
                str(size),
                f"{f.ours_ms:.1f}",
                f"{f.centers_ms:.1f}",
                f"{f.snapshot_ms / MICRO_BATCHES:.1f}",
                f"{f.published_ms:.1f}",
                f"{f.floor_ms:.1f}",
                f"{f.published_ms / f.ours_ms:.1f}",
                f"{f.ours_ms / f.floor_ms:.2f}",
            ]
            for size, f in measured.items()
        ],
        f"{DIM} dimensions, float32, medians of {repeats} in turn, and of {processes} processes of each size, torch "
        f"{torch.__version__}, {torch.get_num_threads()} threads. Of ours: centers, the loss without contrast; "
        "snapshot / 4",
    )
    print_table(
        "Memory in MiB, and the gradient's relative difference to float64",
        [SIZE_COLUMN, "saved: ours", "published", "peak extra: ours", "published", "error: random", "clustered"],
        [
            [
                str(size),
                *(f"{b / MIB:.1f}" for b in (f.saved, f.saved_published, f.peak, f.peak_published)),
                *(f"{error:.1e}" for error in (f.error_random, f.error_clustered)),
            ]
            for size, f in measured.items()
        ],
        "saved: storages that autograd keeps for backward. peak extra: growth of peak resident memory over the "
        "inputs, each variant in a process of its own; ours with the whole snapshot",
    )


def main(argv: Sequence[str] | None = None, sizes: Sequence[Size] = SIZES) -> int:
    """Measure, print the tables and the bars; a bar that does not hold is printed as such and is no failure."""
    parser = argparse.ArgumentParser(description="Time, memory and gradients of the loss beside the published one.")
    parser.add_argument("--repeats", type=int, default=21, help="measured rounds per process (default %(default)s)")
    parser.add_argument("--processes", type=int, default=5, help="processes per size (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="end with one JSON line per bar")
    arguments = parser.parse_args(argv)
    if arguments.processes < 1:
        parser.error(f"--processes must be at least 1, got {arguments.processes}")
    measured = {size: measure(size, arguments.repeats, arguments.processes) for size in sizes}
    print_figures(measured, arguments.repeats, arguments.processes)
    print_bars(bars_of(measured), as_json=arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
