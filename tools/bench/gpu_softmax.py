"""The softmax that the loss writes over its scores, for the GPU bench: its error against float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def softmax_errors(classes: Sequence[int], rows: int = 64) -> str:
    """Largest error of torch's float32 softmax written over its scores, as the loss has it, against float64, in words.

    Scores are spread as those of a trained network: most far below the largest of their row.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    errors = []
    for count in classes:
        scores = 8 * torch.randn(rows, count, generator=torch.Generator().manual_seed(count))
        exact = torch.softmax(scores.double(), 1)
        placed = scores.to(device)
        torch.softmax(placed, 1, out=placed)
        errors.append(f"{count}: {float((placed.cpu().double() - exact).abs().max()):.1e}")
    return f"largest error against float64 by classes, on {device}: {', '.join(errors)}"
