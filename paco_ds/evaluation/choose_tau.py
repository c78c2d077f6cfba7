"""The strength tau of a correction of a trained model, chosen on a validation split."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from paco_ds.data.stream.load import Replaced
from paco_ds.distributed.ranks import Ranks
from paco_ds.evaluation.accuracy import ClassCounts
from paco_ds.evaluation.split import EvaluationSplit

TAUS = tuple(step / 10 for step in range(21))  # as Kang et al.'s tau_norm.py tries them


@torch.no_grad()
def choose_tau(
    module: nn.Module,
    logits_of_taus: Callable[[Tensor], Iterable[Tensor]],
    split: EvaluationSplit,
    ranks: Ranks,
    taus: Sequence[float] = TAUS,
) -> tuple[float, dict[float, float]]:
    """(tau with the best balanced accuracy on a split, the smallest of equals; balanced accuracy by tau). A collective.

    Args:
        module: put into evaluation mode.
        logits_of_taus: images [B, 3, H, W] to the logits [B, C] of each tau, in order.
    """
    counts = [ClassCounts.zeros(len(split.shots), ranks.device) for _ in taus]
    module.eval()
    bad: list[Replaced] = []
    for batch in split.batches(ranks):
        bad += batch.replaced
        labels, valid = batch.labels.to(ranks.device), batch.valid.to(ranks.device)
        for logits_BC, counted in zip(logits_of_taus(batch.query.to(ranks.device)), counts, strict=True):
            counted.add(logits_BC, labels, valid)
    split.left_out(bad, ranks)
    totals = ranks.sum(torch.stack([c.as_tensor() for c in counts]))
    balanced = {tau: _balanced(ClassCounts.from_tensor(total)) for tau, total in zip(taus, totals, strict=True)}
    return max(taus, key=lambda tau: balanced[tau]), balanced


def _balanced(counts: ClassCounts) -> float:
    present_C = counts.total_C > 0
    return float((counts.correct1_C[present_C] / counts.total_C[present_C]).mean())
