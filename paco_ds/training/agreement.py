"""Comparison of what every rank must hold alike: what is trained on what, the queue, the buffers of the model."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from paco_ds import __version__
from paco_ds.contrast.key_queue import KeyQueue, digest
from paco_ds.distributed.ranks import Ranks
from paco_ds.errors import RecipeError, TrainingError

_NAMED = 3  # settings that a message names


def check_same_run(settings: Mapping[str, Any], manifest_sha256: str, ranks: Ranks) -> None:
    """Compare what the ranks are about to train; a collective.

    Args:
        settings: the recipe's `resume_identity`.

    Raises:
        RecipeError: the settings, the shards or the version of paco_ds differ: each rank would train another model.
    """
    own = {"paco_ds": __version__, "manifest of data.shards": manifest_sha256[:12], **settings}
    if len(set(ranks.gather_objects(hashlib.sha256(json.dumps(own, sort_keys=True).encode()).digest()))) == 1:
        return
    of_ranks: list[dict[str, Any]] = ranks.gather_objects(own)
    differences = []
    for name in dict.fromkeys(name for of_rank in of_ranks for name in of_rank):
        by_value: dict[str, list[int]] = {}
        for rank, of_rank in enumerate(of_ranks):
            by_value.setdefault(repr(of_rank.get(name)), []).append(rank)
        if len(by_value) > 1:
            values = ", ".join(f"{value} on ranks {found_by}" for value, found_by in by_value.items())
            differences.append(f"{name} is {values}")
    more = f"; and {len(differences) - _NAMED} more" if len(differences) > _NAMED else ""
    raise RecipeError(
        f"ranks are given different runs: {'; '.join(differences[:_NAMED])}{more}. Give all hosts the same recipe, "
        f"shards and version of paco_ds"
    )


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
