"""Comparison of what every rank must hold alike: the checkpoint to resume from, the queue, the buffers of the model."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
from torch import nn

from paco_ds.checkpoint import Checkpoint
from paco_ds.contrast.key_queue import KeyQueue, digest
from paco_ds.distributed.ranks import Ranks
from paco_ds.errors import RecipeError, TrainingError


def same_on_all_ranks(checkpoint: Checkpoint | None, run: Path, ranks: Ranks) -> Checkpoint | None:
    """The checkpoint that this rank found in a run directory, if every rank found the same step; a collective.

    Raises:
        RecipeError: they did not: the run directory has to be shared.
    """
    mine = torch.tensor(checkpoint.step if checkpoint else 0, device=ranks.device)
    found = [int(step) for step in ranks.gather(mine)]
    if len(set(found)) > 1:
        steps = ", ".join(f"rank {rank}: {step}" for rank, step in enumerate(found))
        raise RecipeError(
            f"ranks found different checkpoints in {run} ({steps}): put --output on storage that all hosts share"
        )
    return checkpoint


def check_replicas_equal(model: nn.Module, queue: KeyQueue | None, ranks: Ranks) -> None:
    """Compare digests of queue and buffers between ranks; a collective.

    Raises:
        TrainingError: names what differs and the ranks where it does, or, where no value is that of more than half of
            them, the ranks that agree with each other. Ranks that differ would train different models.
    """
    digests = {"buffers": digest(model.buffers())}
    if queue is not None:
        digests["queue"] = queue.digest()
    gathered = ranks.gather(torch.stack([d.to(ranks.device) for d in digests.values()])).tolist()
    differences = []
    for name, of_ranks in zip(digests, zip(*gathered, strict=True), strict=True):
        most, count = Counter(of_ranks).most_common(1)[0]
        if count == len(of_ranks):
            continue
        if count > len(of_ranks) / 2:
            odd = [rank for rank, value in enumerate(of_ranks) if value != most]
            differences.append(f"{name} of ranks {odd} differ from those of the other {count} ranks")
        else:
            alike = [str([rank for rank, v in enumerate(of_ranks) if v == value]) for value in dict.fromkeys(of_ranks)]
            differences.append(f"{name} differ between ranks {' and '.join(alike)}, and nothing tells which are right")
    if differences:
        raise TrainingError(
            f"{'; '.join(differences)}. Their results cannot be trusted: run again from the last checkpoint, and check "
            f"the memory and network of these hosts"
        )
