"""A tiny recipe for tests: seconds become milliseconds, the meanings stay."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from paco_ds.config.load import load_recipe, validate_recipe
from paco_ds.config.recipe import Recipe
from paco_ds.data.manifest import Manifest
from paco_ds.data.stream.batches import MicroBatch, evaluation_stream
from paco_ds.models.recogniser import Recogniser, make_recogniser

TINY = """
name: tiny
seed: 3
data: {shards: unused, window: 4}
views:
  query: {name: small, size: 12, cutout: 4, shift: 1}
  key: {name: small, size: 12, cutout: 0, shift: 1}
  evaluation: {name: eval, size: 12, resize: 12}
model: {backbone: cifar_resnet8, width: 4, projection_dim: 8}
loss: {method: paco, alpha: 0.05, temperature: 0.2}
key_encoder: {momentum: 0.9}
queue: {length: 80}
step: {micro_batch: 8, micro_batches: 4}
optimizer: {lr: 0.05}
schedule: {epochs: 2, warmup_epochs: 0, per: step}
engine: {deepspeed: unused, threads: 1}
evaluation: {batch: 16}
metrics: {serve: false, log_every: 1}
"""


def tiny_recipe(*overrides: str) -> Recipe:
    """The tiny recipe with `key.path=value` overrides."""
    tree = yaml.safe_load(TINY)
    for override in overrides:
        key, _, value = override.partition("=")
        *sections, last = key.split(".")
        section = tree
        for part in sections:
            section = section.setdefault(part, {})
        section[last] = yaml.safe_load(value)
    return validate_recipe(tree, "tiny recipe")


def evaluation_batches(
    recipe: Recipe, manifest: Manifest, split: str, rank: int = 0, world_size: int = 1
) -> Iterator[MicroBatch]:
    """A rank's batches of a split, as an evaluation reads them."""
    return evaluation_stream(
        recipe.data, recipe.views.evaluation, manifest, split, recipe.evaluation.batch, rank, world_size
    )


def model_of(
    recipe: Recipe, classes: int, mean: Sequence[float] = (0.5,) * 3, std: Sequence[float] = (0.2,) * 3
) -> Recogniser:
    """The recipe's model with the weights of its seed; nothing is frozen."""
    return make_recogniser(recipe, classes, mean, std)


def write_tiny_recipe(path: Path, *overrides: str) -> Recipe:
    """The tiny recipe as a file, read back the way a user's is."""
    path.write_text(tiny_recipe(*overrides).to_yaml())
    return load_recipe(path)
