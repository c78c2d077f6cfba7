"""A method and a backbone from outside the package, as a user would write them, and the ranks that train them."""

from __future__ import annotations

import sys
from pathlib import Path
from unittest.mock import patch

from paco_ds.config import plugins
from paco_ds.distributed.ranks import Ranks
from paco_ds.errors import RecipeError
from tests.distributed.training import train

NAME = "code_from_outside"
MODULE = """
import torch
from torch import nn

from paco_ds.config.methods import Method
from paco_ds.config.section import Positive
from paco_ds.losses import Loss, LossOutput


class SharpenedLoss(Loss):
    part_names = ("sharpness",)

    def __init__(self, sharpness):
        super().__init__()
        self.sharpness = sharpness

    def forward(self, anchors):
        loss = nn.functional.cross_entropy(self.sharpness * anchors.logits.float(), anchors.labels_B)
        return LossOutput(loss, parts={"sharpness": torch.tensor(self.sharpness)})


class Sharpened(Method):
    name = "sharpened"
    loss = lambda settings, shared, class_counts, class_names: SharpenedLoss(settings.sharpness)

    sharpness: Positive = 1.0


def flat_network(settings):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 12, 8), nn.BatchNorm1d(8), nn.ReLU()), 8
"""


def train_outside(ranks: Ranks, folder: Path, recipe: Path, run: Path, overrides: tuple[str, ...]) -> str:
    """Train with code that lies in `folder`; what is said without permission."""
    with patch.object(sys, "path", [*sys.path, str(folder)]), patch.object(plugins, "_allowed", False):
        try:
            train(ranks, recipe, run, overrides)
        except RecipeError as error:
            said = str(error)
        plugins.allow_code()
        train(ranks, recipe, run, overrides)
        sys.modules.pop(NAME, None)
        return said
