"""The names of tensors in files that the authors' code writes, as those of our model.

PaCo and GPaCo (https://github.com/dvlab-research/Parametric-Contrastive-Learning, `moco/builder.py` and
`models/resnet_cifar.py`): `encoder_q` is a ResNet whose `fc` is the projection, `linear` the centers; `encoder_k` the
key encoder; `queue`, `queue_l`, `queue_ptr` the ring of keys. DistributedDataParallel puts `module.` before each.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paco_ds.errors import RecipeError
from paco_ds.training.initial_weights import read_tensors

_ENCODERS = {"encoder_q": "query_encoder", "encoder_k": "key_encoder"}
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class Published:
    """A file of the authors' code.

    Attributes:
        model: tensors by the names of our model.
        queue: `keys`, `labels` and `count`, as a `KeyQueue` has them; None where the file has none.
        unused: names in the file that our model has no place for.
        epoch: epochs that it was trained, where the file says so.
    """

    model: dict[str, Tensor]
    queue: dict[str, Tensor] | None
    unused: list[str] = field(default_factory=list)
    epoch: int | None = None


def read_published(path: Path) -> Published:
    """Read a file with tensors alone: nothing in it is executed.

    Raises:
        RecipeError: it cannot be read, or is none of PaCo's or GPaCo's.
    """
    content = read_tensors(path, str(path))
    tensors = _tensors_of(content)
    if not any(name.startswith("encoder_q.") for name in tensors) or "linear.weight" not in tensors:
        shown = ", ".join(sorted(tensors)[:3]) or "no tensors"
        raise RecipeError(
            f"{path} is no file of PaCo's or GPaCo's, which have encoder_q.* and linear.*: it has {shown}. Weights of "
            "a backbone alone are given as model.start_from"
        )
    model, unused = {}, []
    for name, tensor in tensors.items():
        ours = _our_name(name)
        if ours is None:
            unused.append(name)
        else:
            model[ours] = tensor.float() if tensor.is_floating_point() else tensor
    epoch = content.get("epoch") if isinstance(content, dict) else None
    blocks = _flat_blocks(model)
    return Published(
        {_renamed(name, blocks): tensor for name, tensor in model.items()},
        _queue_of(tensors),
        sorted(unused),
        epoch if isinstance(epoch, int) else None,
    )


def _tensors_of(content: Any) -> dict[str, Tensor]:
    """The state dict of a file, without `module.`."""
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping):
        return {}
    return {str(name).removeprefix("module."): t for name, t in content.items() if isinstance(t, Tensor)}


def _our_name(name: str) -> str | None:
    first, _, rest = name.partition(".")
    if first == "linear":
        return f"centers.{rest}"
    if first not in _ENCODERS or (first == "encoder_k" and name.rpartition(".")[2] in _STATISTICS):
        return None  # the key encoder normalises by the statistics of its batch alone
    encoder = _ENCODERS[first]
    if rest.startswith("fc."):
        return f"{encoder}.projection.{rest.removeprefix('fc.')}"
    return f"{encoder}.backbone.network.{rest}"


def _flat_blocks(model: Mapping[str, Tensor]) -> dict[str, int]:
    """Numbers of a CIFAR ResNet's blocks, which follow each other in ours: {"layer2.0": 5, ...}; of others none."""
    stem = model.get("query_encoder.backbone.network.conv1.weight")
    if stem is None or stem.shape[-1] != 3:  # 3 x 3: a stem for small images
        return {}
    found = {match[1] for name in model if (match := re.search(r"network\.(layer\d+\.\d+)\.", name))}
    order = sorted(found, key=lambda block: [int(number) for number in re.findall(r"\d+", block)])
    return {block: number for number, block in enumerate(order)}


def _renamed(name: str, blocks: Mapping[str, int]) -> str:
    return re.sub(r"network\.(layer\d+\.\d+)\.", lambda m: f"network.blocks.{blocks[m[1]]}.", name) if blocks else name


def _queue_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """A full ring whose next slot is where `queue_ptr` points; rows that were never written are random, and their
    labels too, as the authors' code begins."""
    if "queue" not in tensors or "queue_l" not in tensors:
        return None
    keys, labels = tensors["queue"].float(), tensors["queue_l"].long()
    pointer = int(tensors["queue_ptr"]) if "queue_ptr" in tensors else 0
    return {"keys": keys, "labels": labels, "count": torch.tensor(len(labels) + pointer)}
