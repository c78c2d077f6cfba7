"""The names of tensors in files of RIDE's authors, as those of our model.

https://github.com/frank-xwang/RIDE-LongTailRecognition: `backbone` is a ResNet whose last stages are lists of experts
(`layer3s`, `layer4s`; for small images `layer2s`, `layer3s`), `linears` their classifiers, and `expert_help_pred_*` the
routers of the second stage.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

_SHARED = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5"}  # places in our Sequential
_EXPERT = "query_encoder.backbone.network.experts"
_ROUTERS = {"expert_help_pred_hidden_fcs": "routers.hidden", "expert_help_pred_fc": "routers.decide"}


def is_ride(tensors: Mapping[str, Tensor]) -> bool:
    """Whether names are those of RIDE's networks with several experts."""
    return "backbone.linears.0.weight" in tensors


def name_of_ride(name: str, tensors: Mapping[str, Tensor]) -> str | None:
    """Our name; None where we have no place, which names of a network never are: they stay and are refused."""
    if not name.startswith("backbone."):
        return None
    first, _, rest = name.removeprefix("backbone.").partition(".")
    if first in _ROUTERS:
        return f"{_ROUTERS[first]}.{rest}"
    if first == "linears":
        return f"centers.{rest}"
    small = "backbone.layer2s.0.0.conv1.weight" in tensors
    stages = ("layer2s", "layer3s") if small else ("layer3s", "layer4s")
    if first in stages:
        expert, _, inside = rest.partition(".")
        stage = stages.index(first)
        if not small:
            return f"{_EXPERT}.{expert}.{stage}.{inside}"
        block, _, inside = inside.partition(".")
        return f"{_EXPERT}.{expert}.{int(block) + stage * _blocks(tensors)}.{inside}"
    if small and first == "layer1":
        block, _, inside = rest.partition(".")
        return f"query_encoder.backbone.network.shared.{3 + int(block)}.{inside}"
    if first in _SHARED:
        return f"query_encoder.backbone.network.shared.{_SHARED[first]}.{rest}"
    return f"query_encoder.backbone.network.{first}.{rest}"


def _blocks(tensors: Mapping[str, Tensor]) -> int:
    """Blocks of each stage of a network for small images."""
    return len({m[1] for name in tensors if (m := re.match(r"backbone\.layer2s\.0\.(\d+)\.", name))})
