"""Kept results: a JSON file for each finished training, with its recipe.

A file holds the metrics of metrics.json, `recipe` (all settings that affect the result), `first_stage` (the same of the
first stage, for a second stage), `evaluate` (options of evaluate.py), `ranks` and `seconds` of the training. It
contains no machine paths, so it is valid in another clone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paco_ds.config.parse import read_json
from paco_ds.config.recipe import Recipe
from paco_ds.errors import UserError
from paco_ds.files import replace_text

JUDGED_BY = ("evaluation.split", "evaluation.test_split", "evaluation.checkpoint")


@dataclass(frozen=True)
class Identity:
    """What decides the result of a recipe.

    Attributes:
        settings: {dotted key: value}, as in JSON.
        default: of a setting, by its dotted key.
    """

    settings: Mapping[str, Any]
    default: Callable[[str], Any]

    @classmethod
    def of(cls, recipe: Recipe) -> Identity:
        """The settings that decide what is learnt, and those it is judged by."""
        judged = {key: getattr(recipe.evaluation, key.rpartition(".")[2]) for key in JUDGED_BY}
        return cls(json.loads(json.dumps(recipe.resume_identity() | judged)), recipe.default)

    def compare(self, saved: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
        """(key, saved value, current value); settings newer than `saved` have their default as saved value."""
        saved = {key: self.default(key) for key in self.settings.keys() - saved.keys()} | dict(saved)
        keys = sorted(saved.keys() | self.settings.keys())
        return [(key, saved.get(key), self.settings.get(key)) for key in keys]


def keep_result(
    path: Path,
    figures: Mapping[str, Any],
    identity: Identity,
    first_stage: Identity | None,
    options: Sequence[str],
    *,
    ranks: int,
    seconds: float,
) -> None:
    """Write the result of a training atomically, one key per line.

    Args:
        figures: the content of metrics.json, or of the output of an evaluation with `options`.
        ranks, seconds: of the training; seconds are those of its optimizer steps.
    """
    kept = {
        **{key: value for key, value in figures.items() if key != "world_size"},  # it may be an evaluation's
        "ranks": ranks,
        "seconds": round(seconds, 1),
        "evaluate": list(options),
        "recipe": identity.settings,
        **({"first_stage": first_stage.settings} if first_stage else {}),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in kept.items())
    replace_text(path, f"{{\n{lines}\n}}\n")


def read_result(
    path: Path, identity: Identity, first_stage: Identity | None, options: Sequence[str], manifest_sha256: str | None
) -> dict[str, Any]:
    """The kept result of a training of this identity, after one of `first_stage` for a second stage.

    Args:
        manifest_sha256: of the local shards, or None without shards.

    Raises:
        UserError: the file is of another recipe, other shards or other options; lists the differences.
    """
    try:
        kept = read_json(path, UserError)
        saved, trained_on, evaluated = kept["recipe"], kept["manifest_sha256"], kept["evaluate"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a kept result ({error!r}): move it away to train that row again") from None
    found = identity.compare(saved)
    before = kept.get("first_stage")
    if first_stage is not None and before is not None:
        found += [(f"first stage: {key}", then, here) for key, then, here in first_stage.compare(before)]
    else:
        found += [("starts from a first stage", before is not None, first_stage is not None)]
    found += [("options of the evaluation", evaluated, list(options))]
    if manifest_sha256 is not None:
        found += [("shards (manifest)", trained_on[:12], manifest_sha256[:12])]
    if differences := [f"  {name}: {then!r} there, {here!r} now" for name, then, here in found if then != here]:
        raise UserError(
            f"{path} is the result of another training:\n"
            + "\n".join(differences)
            + "\nGive another --keep folder (one for each data set), or move the file away to train that row again"
        )
    return dict(kept)
