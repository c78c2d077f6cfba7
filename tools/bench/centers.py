"""Owns the bench of center logits over many classes: would a classifier fused with its loss, class tile by class
tile, pay? It never makes anchors x classes, but computes each logit twice.

    python tools/bench/centers.py [--repeats N] [--classes C ...]

ours    a linear classifier and ParametricContrastiveLoss without contrast (Balanced Softmax), forward + backward
tiled   the same loss and gradients by a fused function over tiles of the classes
linear  the classifier's three matrix products alone, which both have to do
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# The checkout need not be installed. This folder stays on the path, for the module that benches share.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from report import MIB, median_seconds, peak_extra_bytes, print_table

from paco_ds.losses import ParametricContrastiveLoss
from paco_ds.losses.base import Anchors

ANCHORS, FEATURES, TILE = 128, 2048, 4096


class TiledCenters(torch.autograd.Function):
    """Mean over anchors of logsumexp(x W' + prior) - (x W' + prior)_y; the products are made again in backward."""

    @staticmethod
    def forward(ctx: Any, feature_BF: Tensor, weight_CF: Tensor, prior_C: Tensor, labels_B: Tensor) -> Tensor:
        tiles = zip(weight_CF.split(TILE), prior_C.split(TILE), strict=True)
        lse_B = torch.stack([torch.addmm(prior, feature_BF, tile.T).logsumexp(1) for tile, prior in tiles]).logsumexp(0)
        own_B = (feature_BF * weight_CF[labels_B]).sum(1) + prior_C[labels_B]
        ctx.save_for_backward(feature_BF, weight_CF, prior_C, labels_B, lse_B)
        return (lse_B - own_B).mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        feature_BF, weight_CF, prior_C, labels_B, lse_B = ctx.saved_tensors
        grad = grad / len(labels_B)
        feature_grad_BF, weight_grad_CF = -grad * weight_CF[labels_B], torch.empty_like(weight_CF)
        for start in range(0, len(weight_CF), TILE):
            rows = slice(start, start + TILE)
            slope_BT = grad * (torch.addmm(prior_C[rows], feature_BF, weight_CF[rows].T) - lse_B[:, None]).exp()
            feature_grad_BF += slope_BT @ weight_CF[rows]
            torch.mm(slope_BT.T, feature_BF, out=weight_grad_CF[rows])
        return feature_grad_BF, weight_grad_CF.index_add_(0, labels_B, -grad * feature_BF), None, None


def works(classes: int) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """The three, on the same inputs; "ours" and "tiled" return the same gradients."""
    generator = torch.Generator().manual_seed(0)
    feature_BF = torch.randn(ANCHORS, FEATURES, generator=generator).requires_grad_()
    weight_CF = (torch.randn(classes, FEATURES, generator=generator) / FEATURES**0.5).requires_grad_()
    prior_C = -torch.arange(1, classes + 1).log()
    labels_B = torch.randint(classes, (ANCHORS,), generator=generator)
    loss = ParametricContrastiveLoss(alpha=0, temperature=1, contrast=False, log_prior_C=prior_C)
    inputs = (feature_BF, weight_CF)
    ones_BC = torch.ones(()).expand(ANCHORS, classes)
    return {
        "ours": lambda: torch.autograd.grad(loss(Anchors(labels_B, F.linear(*inputs))).loss, inputs),
        "tiled": lambda: torch.autograd.grad(TiledCenters.apply(*inputs, prior_C, labels_B), inputs),
        "linear": lambda: torch.autograd.grad(F.linear(*inputs), inputs, ones_BC),
    }


def prepare(name: str, classes: int) -> Callable[[], object]:
    return works(classes)[name]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Center logits of many classes: as they are, and tiled.")
    parser.add_argument("--repeats", type=int, default=7, help="measured rounds per size (default %(default)s)")
    parser.add_argument("--classes", type=int, nargs="+", default=[8142, 20_000, 100_000])
    arguments = parser.parse_args(argv)
    rows = []
    for classes in arguments.classes:
        seconds = median_seconds(works(classes), arguments.repeats)
        peaks = [peak_extra_bytes(prepare, name, classes) for name in ("ours", "tiled")]
        rows.append(
            [f"{classes:,}"]
            + [f"{1000 * seconds[name]:.0f}" for name in ("ours", "tiled", "linear")]
            + [f"{1 - seconds['linear'] / seconds['ours']:.0%}", f"{seconds['tiled'] / seconds['ours']:.2f}"]
            + [f"{size / MIB:.0f}" for size in (*peaks, 3 * 4 * classes * FEATURES)]
        )
    columns = ["classes", "ours ms", "tiled ms", "linear ms", "loss's share", "tiled / ours"]
    columns += ["peak extra MiB: ours", "tiled", "weight + gradient + momentum"]
    caption = f"{ANCHORS} anchors, {FEATURES} features, float32, medians of {arguments.repeats} in turn. "
    print_table("The classifier with its loss", columns, rows, caption + "peak extra: with the weight's gradient")
    return 0


if __name__ == "__main__":
    sys.exit(main())
