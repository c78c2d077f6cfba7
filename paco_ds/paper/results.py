"""Results kept beside a project: a JSON file for each finished training, with the recipe that it belongs to.

A file holds the figures of metrics.json, and `recipe` (all that decides what is learnt and on what it is judged),
`first_stage` (the same of the training it started from, if it is a second stage),
`evaluate` (options of evaluate.py that the figures came with), `ranks` and `seconds` of the training. It names no place
on a machine, so it is good in another clone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from paco_ds.config.recipe import Recipe
from paco_ds.errors import UserError
from paco_ds.files import replace_text

JUDGED_BY = ("evaluation.split", "evaluation.test_split", "evaluation.checkpoint")


def keep_result(
    path: Path,
    figures: Mapping[str, Any],
    recipe: Recipe,
    first_stage: Recipe | None,
    options: Sequence[str],
    *,
    ranks: int,
    seconds: float,
) -> None:
    """Write what a training reached, as a whole or not at all, a key to a line.

    Args:
        figures: the content of metrics.json, or of what an evaluation with `options` wrote.
        ranks, seconds: of the training; seconds are those of its optimizer steps.
    """
    kept = {
        **{key: value for key, value in figures.items() if key != "world_size"},  # which may be an evaluation's
        "ranks": ranks,
        "seconds": round(seconds, 1),
        "evaluate": list(options),
        "recipe": _identity(recipe),
        **({"first_stage": _identity(first_stage)} if first_stage else {}),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in kept.items())
    replace_text(path, f"{{\n{lines}\n}}\n")


def read_result(
    path: Path, recipe: Recipe, first_stage: Recipe | None, options: Sequence[str], manifest_sha256: str | None
) -> dict[str, Any]:
    """What a training of this recipe, after one of `first_stage` if it is a second stage, reached.

    Args:
        manifest_sha256: of the shards that are here, or None where there are none to compare.

    Raises:
        UserError: the file is of another recipe, other shards or other options, each difference named.
    """
    try:
        kept = json.loads(path.read_text())
        saved, trained_on, evaluated = kept["recipe"], kept["manifest_sha256"], kept["evaluate"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no kept result ({error!r}): move it away to train that row again") from None
    found = _compared(saved, recipe)
    before = kept.get("first_stage")
    if first_stage is not None and before is not None:
        found += [(f"first stage: {key}", then, here) for key, then, here in _compared(before, first_stage)]
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


def _compared(saved: Mapping[str, Any], recipe: Recipe) -> list[tuple[str, Any, Any]]:
    """(key, what was saved, what is now); a setting younger than the file then was what it is by default."""
    now = _identity(recipe)
    saved = {key: recipe.default(key) for key in now.keys() - saved.keys()} | dict(saved)
    return [(key, saved.get(key), now.get(key)) for key in sorted(saved.keys() | now.keys())]


def _identity(recipe: Recipe) -> dict[str, Any]:
    """{dotted key: value} as JSON has it, of what decides a recipe's figures."""
    judged = {key: getattr(recipe.evaluation, key.rpartition(".")[2]) for key in JUDGED_BY}
    return dict(json.loads(json.dumps(recipe.resume_identity() | judged)))
