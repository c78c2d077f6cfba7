"""Owns the bench of the queue's attention: the ways torch has to compute it, in turn, on a GPU or the CPU.

    python tools/bench/attention.py [--device cuda] [--repeats N]

fused      what `paco_ds.losses.queue_attention` uses on the device: torch's efficient attention over parts of the keys
           (CUDA), its flash attention for the CPU
plain      the same by plain operations, tile by tile (`attend_tiled`)
flex       torch's FlexAttention with its log-sum-exp, compiled (CUDA alone; its CPU kernel gives none)
floor      the two matrix products alone, scores and their product with the keys, without a softmax

Every way gives attention with V = K and its log-sum-exp: the contrast's denominator and its gradient.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# The checkout need not be installed. This folder stays on the path, for the module that benches share.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from report import median_seconds, print_table

from paco_ds.losses.queue_attention import attend_efficient_cuda, attend_flash_cpu, attend_tiled

DIM, TAU = 128, 0.2
SIZES = ((256, 65_536), (128, 8192), (32, 8192))  # anchors, keys


def flex() -> Callable[..., tuple[Tensor, Tensor]]:
    """FlexAttention as an `Attend`."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled: Any = torch.compile(flex_attention)

    def attend(query_EBD: Tensor, keys_EKD: Tensor, scale: float, bias_K: None = None) -> tuple[Tensor, Tensor]:
        output, lse = compiled(query_EBD[None], keys_EKD[None], keys_EKD[None], scale=scale, return_lse=True)
        return output[0], lse[0]

    return attend


def products(query_EBD: Tensor, keys_EKD: Tensor, scale: float, bias_K: None = None) -> Tensor:
    """The floor."""
    return (scale * query_EBD @ keys_EKD.mT) @ keys_EKD


def to_its_end(way: Callable[..., Any], *inputs: Any) -> Any:
    """What a way returns, once the GPU has computed it."""
    result = way(*inputs)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="The queue's attention by each of torch's ways.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=31)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    ways: dict[str, Callable[..., Any]] = {
        "fused": attend_efficient_cuda if device.type == "cuda" else attend_flash_cpu,
        "plain": attend_tiled,
    }
    if device.type == "cuda":
        ways["flex"] = flex()
    rows = []
    for anchors, keys in SIZES:
        generator = torch.Generator().manual_seed(0)
        query, queue = (
            F.normalize(torch.randn(1, n, DIM, generator=generator), dim=2).to(device) for n in (anchors, keys)
        )
        inputs = (query, queue, 1 / TAU)
        exact = attend_tiled(query.double(), queue.double(), 1 / TAU)
        errors = {}
        for name, way in ways.items():
            output, lse = way(*inputs)  # compiles, too
            errors[name] = max(float((output - exact[0]).norm() / exact[0].norm()), float((lse - exact[1]).abs().max()))
        works = {name: partial(to_its_end, way, *inputs) for name, way in (ways | {"floor": products}).items()}
        found = {name: 1000 * seconds for name, seconds in median_seconds(works, arguments.repeats).items()}
        rows.append(
            [f"{anchors}/{keys}", *(f"{found[n]:.3f} ({errors[n]:.0e})" for n in ways), f"{found['floor']:.3f}"]
        )
    print_table(
        "Attention over the queue, milliseconds (error against float64)",
        ["anchors/keys", *ways, "floor"],
        rows,
        f"{DIM} dimensions, float32, medians of {arguments.repeats} in turn, torch {torch.__version__}, "
        f"{torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'}",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
