"""The names of tensors in files of other projects, as those of our model.

* PaCo and GPaCo (https://github.com/dvlab-research/Parametric-Contrastive-Learning, `moco/builder.py` and
  `models/resnet_cifar.py`): `encoder_q` is a ResNet whose `fc` is the projection, `linear` the centers; `encoder_k` the
  key encoder; `queue`, `queue_l`, `queue_ptr` the ring of keys.
* MoCo (https://github.com/facebookresearch/moco): the same without centers; its queue has no labels.
* RIDE (https://github.com/frank-xwang/RIDE-LongTailRecognition), see `published_ride`.
* anything else: a network of torchvision or timm with its classifier, under the names that these have.

DistributedDataParallel puts `module.` before each.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from paco_ds.errors import RecipeError
from paco_ds.training.published_ride import is_ride, name_of_ride
from paco_ds.training.weight_files import hub_config, read_tensors, state_dict_of, weights_file

NETWORK = "query_encoder.backbone.network."
_ENCODERS = {"encoder_q": "query_encoder", "encoder_k": "key_encoder"}
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
Kind = Literal["paco", "moco", "ride", "network"]


@dataclass(frozen=True)
class Published:
    """A file of another project.

    Attributes:
        kind: whose names it has; "paco" is GPaCo's too, "network" is torchvision's and timm's.
        model: tensors by the names of our model; of a network also its classifier, under its own name.
        queue: `keys`, `labels` and `count`, as a `KeyQueue` has them; None where the file has none.
        unused: names in the file that our model has no place for.
        epoch: epochs that it was trained, where the file says so.
        timm_name: of the network in timm, where a config.json beside the weights says it.
        timm_arguments: with which timm builds it, where that file says them.
    """

    kind: Kind
    model: dict[str, Tensor]
    queue: dict[str, Tensor] | None = None
    unused: list[str] = field(default_factory=list)
    epoch: int | None = None
    timm_name: str | None = None
    timm_arguments: Mapping[str, Any] = field(default_factory=dict)


def read_published(path: Path) -> Published:
    """Read a file, or a folder of the hub, with tensors alone: nothing in it is executed.

    Raises:
        RecipeError: it cannot be read, or has no weights of a network.
    """
    file = weights_file(path)
    content = read_tensors(file, str(file))
    tensors = state_dict_of(content)
    kind = _kind_of(tensors, path)
    model, unused = {}, []
    for name, tensor in tensors.items():
        ours = _our_name(kind, name, tensors)
        if ours is None:
            unused.append(name)
        else:
            value = tensor.float() if tensor.is_floating_point() else tensor
            transposed = kind == "ride" and re.fullmatch(r"linears\.\d+\.weight", name.removeprefix("backbone."))
            cosine = transposed and name.replace("weight", "bias") not in tensors  # NormedLinear is [F, C]
            model[ours] = value.T.contiguous() if cosine else value
    epoch = content.get("epoch") if isinstance(content, Mapping) else None
    architecture, arguments = (hub_config(path).get(key) for key in ("architecture", "model_args"))
    blocks = _flat_blocks(model) if kind in ("paco", "moco") else {}
    return Published(
        kind,
        {_renamed(name, blocks): tensor for name, tensor in model.items()},
        _queue_of(tensors) if kind == "paco" else None,
        sorted(unused),
        epoch if isinstance(epoch, int) else None,
        architecture if isinstance(architecture, str) else None,
        arguments if isinstance(arguments, Mapping) else {},
    )


def _kind_of(tensors: Mapping[str, Tensor], path: Path) -> Kind:
    if any(name.startswith("encoder_q.") for name in tensors):
        return "paco" if "linear.weight" in tensors else "moco"
    if is_ride(tensors):
        return "ride"
    if not any(t.is_floating_point() and t.ndim > 1 for t in tensors.values()):
        shown = ", ".join(sorted(tensors)[:3]) or "no tensors"
        raise RecipeError(f"{path} holds no weights of PaCo, GPaCo, RIDE, MoCo, timm or torchvision: it has {shown}")
    return "network"


def _our_name(kind: Kind, name: str, tensors: Mapping[str, Tensor]) -> str | None:
    if kind == "ride":
        return name_of_ride(name, tensors)
    if kind == "network":
        return NETWORK + name
    first, _, rest = name.partition(".")
    if kind == "moco":  # a projection for instances, not for classes: only the backbone is of use
        return f"{NETWORK}{rest}" if first == "encoder_q" and not rest.startswith("fc.") else None
    if first == "linear":
        return f"centers.{rest}"
    if first not in _ENCODERS or (first == "encoder_k" and name.rpartition(".")[2] in STATISTICS):
        return None  # the key encoder normalises by the statistics of its batch alone
    encoder = _ENCODERS[first]
    if rest.startswith("fc."):
        return f"{encoder}.projection.{rest.removeprefix('fc.')}"
    return f"{encoder}.backbone.network.{rest}"


def _flat_blocks(model: Mapping[str, Tensor]) -> dict[str, int]:
    """Numbers of a CIFAR ResNet's blocks, which follow each other in ours: {"layer2.0": 5, ...}; of others none."""
    stem = model.get(f"{NETWORK}conv1.weight")
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
