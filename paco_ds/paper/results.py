"""Kept results: a JSON-lines file of finished trainings, a line for each row with a seed.

A line holds `row` (its name and the seed), the metrics of metrics.json, `recipe` (all settings that affect the result),
`first_stage` (the same of the first stage, for a second stage), `evaluate` (options of evaluate.py), `ranks` and
`seconds` of the training. It contains no machine paths, so it is valid in another clone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from paco_ds.config.parse import parse_json
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


class KeptResults:
    """The kept results of one data set, in a file that tables of it may share.

    Args:
        path: the file, which may not exist yet.
    """

    def __init__(self, path: Path) -> None:
        if path.is_dir():
            raise UserError(f"--keep {path} is a folder: results are kept in one file, such as {path}.jsonl")
        self.path = path

    def __contains__(self, row: str) -> bool:
        return row in self._lines()

    def keep(
        self,
        row: str,
        figures: Mapping[str, Any],
        identity: Identity,
        first_stage: Identity | None,
        options: Sequence[str],
        *,
        ranks: int,
        seconds: float,
    ) -> None:
        """Add the result of a training, in place of an earlier one of that name.

        Args:
            row: its name and the seed.
            figures: the content of metrics.json, or of the output of an evaluation with `options`.
            ranks, seconds: of the training; seconds are those of its optimizer steps.

        Raises:
            StorageError: the file cannot be written; what it held stays.
        """
        line = {
            "row": row,
            **{key: value for key, value in figures.items() if key != "world_size"},  # it may be an evaluation's
            "ranks": ranks,
            "seconds": round(seconds, 1),
            "evaluate": list(options),
            "recipe": identity.settings,
            **({"first_stage": first_stage.settings} if first_stage else {}),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.path}.lock"):  # rows that are trained at a time, here or by another command
            lines = self._lines() | {row: line}
            replace_text(self.path, "".join(f"{json.dumps(lines[name])}\n" for name in sorted(lines)))

    def read(
        self,
        row: str,
        identity: Identity,
        first_stage: Identity | None,
        options: Sequence[str],
        manifest_sha256: str | None,
    ) -> dict[str, Any]:
        """The kept result of a training of this identity, after one of `first_stage` for a second stage.

        Args:
            manifest_sha256: of the local shards, or None without shards.

        Raises:
            UserError: it is of another recipe, other shards or other options; lists the differences.
        """
        place, kept = f"{self.path}: {row}", self._lines()[row]
        try:
            saved, trained_on, evaluated = kept["recipe"], kept["manifest_sha256"], kept["evaluate"]
        except KeyError as error:
            raise UserError(
                f"{place} is not a kept result ({error!r}): remove its line to train that row again"
            ) from None
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
                f"{place} is the result of another training:\n"
                + "\n".join(differences)
                + "\nGive another --keep file (one for each data set), or remove its line to train that row again"
            )
        return kept

    def _lines(self) -> dict[str, dict[str, Any]]:
        """{row: its line}."""
        if not self.path.exists():
            return {}
        lines = {}
        for number, text in enumerate(self.path.read_text(encoding="utf-8").splitlines(), 1):
            line = parse_json(text, f"line {number} of {self.path}", UserError, ": remove it to train that row again")
            if not isinstance(line, dict) or "row" not in line:
                raise UserError(f"line {number} of {self.path} is not a kept result: remove it to train that row again")
            lines[line["row"]] = line
        return lines
