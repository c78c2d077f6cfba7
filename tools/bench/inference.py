"""Owns the bench of inference: every backbone and number of experts of Tables 9 to 12, against ResNet-50.

    python tools/bench/inference.py [--batch N] [--size N] [--rounds N] [--only WORD ...] [--channels-last] [--json]

A batch of images goes through backbone and centers to the logits that are answered (of experts their mean), float32,
in eval mode, on CUDA where there is one. All networks take turns with ResNet-50 in one process. Beside the ratio stand
the paper's, from the tables in ds_configs/, and the floor: what the ratio would be if time were multiplications.
The paper's milliseconds are of another machine, and 8.3 for 64 images at 224 pixels would be 63 TFLOP/s on a card that
has 13 in float32, so only ratios are compared.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

# The checkout need not be installed. This folder stays on the path, for the module that benches share.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from report import Bar, at_most, median_seconds, print_bars, print_table

from paco_ds.config.recipe import Recipe
from paco_ds.models.recogniser import Recogniser
from paco_ds.paper.tables import load_table
from paco_ds.training.build import Classes, build_model

TABLES = (9, 10, 11, 12)
REFERENCE = "ResNet-50"
BARRED, BAR = "RIDEResNet, 3 experts", 2.2
CLASSES = 1000  # ImageNet-LT's, for all


@dataclass(frozen=True)
class Network:
    """A backbone with its centers, as a row of the tables has it.

    Attributes:
        paper_ms: the paper's inference time of a batch of 64.
    """

    name: str
    recipe: Recipe
    paper_ms: float

    def make(self, device: str) -> Recogniser:
        """Randomly initialised, in eval mode."""
        with torch.device(device):
            return build_model(self.recipe, Classes((1,) * CLASSES, ())).eval()

    @cached_property
    def parameters(self) -> int:
        """Of what an answer needs: neither projection nor key encoder."""
        model = self.make("meta")
        return sum(p.numel() for part in (model.query_encoder.backbone, model.centers) for p in part.parameters())

    def flops(self, size: int) -> int:
        """Of one image of `size` pixels: two for each multiplication of convolutions and matrix products."""
        model = self.make("meta")
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            answer(model, torch.empty(1, 3, size, size, device="meta"))
        return counter.get_total_flops()


def answer(model: Recogniser, images: Tensor) -> Tensor:
    """Normalised images [B, 3, H, W] to the logits [B, C] of an answer."""
    logits: Tensor = model.centers(model.query_encoder.backbone(images))
    return logits.mean(0) if logits.ndim == 3 else logits


def networks() -> list[Network]:
    """Those of Tables 9 to 12, each once, in their order."""
    found: dict[str, Network] = {}
    for number in TABLES:
        table = load_table(str(number))
        for row in table.rows:
            recipe = table.resolve(row)
            experts = recipe.model.experts
            name = f"{row.backbone}, {experts} expert{'s' * (experts > 1)}" if experts else str(row.backbone)
            assert row.paper is not None
            assert row.paper.inference_ms is not None
            found.setdefault(name, Network(name, recipe, row.paper.inference_ms))
    return list(found.values())


def chosen(only: Sequence[str]) -> list[Network]:
    """The networks whose names hold one of the words, and ResNet-50 first.

    Raises:
        SystemExit: no name holds a word.
    """
    every = networks()
    for word in only:
        if not any(word in network.name for network in every):
            raise SystemExit(f"--only {word}: there are {'; '.join(network.name for network in every)}")
    rest = [n for n in every if n.name != REFERENCE and (not only or any(word in n.name for word in only))]
    return [next(n for n in every if n.name == REFERENCE), *rest]


def timed(model: Recogniser, images: Tensor) -> Callable[[], object]:
    """The work that is measured: the answer, on CUDA once it is there."""

    def work() -> object:
        with torch.inference_mode():
            logits = answer(model, images)
        if images.is_cuda:
            torch.cuda.synchronize()
        return logits

    return work


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; 1 if a bar does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64, help="images of one measurement")
    parser.add_argument("--size", type=int, default=224, help="pixels of their sides")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each network, in turn")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="networks whose names hold one of these")
    parser.add_argument("--channels-last", action="store_true", help="images and weights in that memory format")
    parser.add_argument("--json", action="store_true", help="end with a JSON line for each bar")
    arguments = parser.parse_args(argv)
    if arguments.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {arguments.rounds}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layout = torch.channels_last if arguments.channels_last else torch.contiguous_format
    images = torch.rand(arguments.batch, 3, arguments.size, arguments.size, device=device)
    images = images.contiguous(memory_format=layout)
    measured = chosen(arguments.only)
    models = {n.name: n.make(device).to(memory_format=layout) for n in measured}
    for model in models.values():
        # on a CPU one image is enough, where the whole batch takes seconds; on CUDA kernels are chosen by its size
        timed(model, images if images.is_cuda else images[:1])()
    works = {name: timed(model, images) for name, model in models.items()}
    seconds = median_seconds(works, arguments.rounds, warm_up=False)
    flops = {n.name: n.flops(arguments.size) for n in measured}
    reference = measured[0]

    def floor(network: Network) -> float:
        return flops[network.name] / flops[REFERENCE]

    print_table(
        f"{arguments.batch} images of {arguments.size} px, {_place(device)}, median of {arguments.rounds}",
        ["", "ms", "/ ResNet-50", "the paper's", "of FLOPs", "parameters, M", "GFLOPs an image"],
        [
            [
                n.name,
                f"{1000 * seconds[n.name]:.0f}" if device == "cpu" else f"{1000 * seconds[n.name]:.1f}",
                f"{seconds[n.name] / seconds[REFERENCE]:.2f}",
                f"{n.paper_ms / reference.paper_ms:.2f}",
                f"{floor(n):.2f}",
                f"{n.parameters / 1e6:.1f}",
                f"{flops[n.name] / 1e9:.2f}",
            ]
            for n in measured
        ],
        f"{flops[REFERENCE] * arguments.batch / seconds[REFERENCE] / 1e9:.0f} GFLOP/s in ResNet-50",
    )
    bars: list[Bar] = [
        at_most(
            f"{n.name} / ResNet-50, ms",
            seconds[n.name] / seconds[REFERENCE],
            BAR,
            ours=1000 * seconds[n.name],
            rival=1000 * seconds[REFERENCE],
            floor=1000 * seconds[REFERENCE] * floor(n),
        )
        for n in measured
        if n.name == BARRED
    ]
    print_bars(bars, as_json=arguments.json)
    return 0 if all(bar.holds for bar in bars) else 1


def _place(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"{threads} thread{'s' * (threads > 1)}"


if __name__ == "__main__":
    sys.exit(main())
