"""`timm:NAME`, any network of timm where that is installed."""

from __future__ import annotations

import difflib
import importlib.util
from typing import Any

from torch import nn

from paco_ds.config.recipe import ModelSettings
from paco_ds.errors import RecipeError
from paco_ds.models.families.base import Family

_PREFIX = "timm:"


def _make(settings: ModelSettings) -> tuple[nn.Module, int]:
    name = settings.backbone.removeprefix(_PREFIX)
    if importlib.util.find_spec("timm") is None:
        raise RecipeError(f"model.backbone timm:{name} needs timm: pip install timm")
    import timm

    if name not in timm.list_models():
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise RecipeError(f"model.backbone timm:{name} is not one of timm's; did you mean {' or '.join(near)}?")
    network: Any = timm.create_model(name, pretrained=False, num_classes=0)
    return network, int(
        getattr(network, "head_hidden_size", None) or network.num_features
    )  # of some, the head is wider


FAMILY = Family(owns=lambda name: name.startswith(_PREFIX), names=tuple, make=_make)
