"""Tables as data: recipe, overrides and the paper's numbers of every row.

    title: Table 13, ImageNet-LT, ResNet-50, ...
    recipe: ../recipes/imagenet_lt_resnet50.yaml
    scale: paper
    rows:
      - {method: CE, set: [loss.method=cross_entropy], paper: {all: 48.4}}

At small scale a row is the small recipe of a data set with the row's `set` and then its `small` overrides, which name
a small backbone. A second stage starts from the run, of the same seed, of the row that its `after` names:

      - {method: LWS, after: CE, set: [loss.method=cross_entropy, model.trained=center_scales]}

or, with `start: loss.distill.teacher`, is taught by that run.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, model_validator

from paco_ds.config.load import load_recipe
from paco_ds.config.parse import read_yaml
from paco_ds.config.recipe import Recipe
from paco_ds.config.section import Section
from paco_ds.config.shipped import SMALL_RECIPES, find_recipe, find_table
from paco_ds.data.manifest import validation_message
from paco_ds.errors import RecipeError

ALIASES = {"ce": "cross_entropy"}


def method_key(name: str) -> str:
    """What two spellings of a method share: Cross-Entropy, cross entropy, cross_entropy and CE are one method."""
    key = re.sub(r"[\W_]+", "_", name.lower()).strip("_")
    return ALIASES.get(key, key)


class PaperFigures(Section):
    """The paper's numbers for a row: top-1 in percent, and milliseconds for a batch of 64 on its GPU."""

    many: float | None = None
    medium: float | None = None
    few: float | None = None
    all: float
    inference_ms: float | None = None

    def fractions(self) -> dict[str, float]:
        """The reported top-1 accuracies as fractions, by many, medium, few, all."""
        figures = {"many": self.many, "medium": self.medium, "few": self.few, "all": self.all}
        return {name: value / 100 for name, value in figures.items() if value is not None}


class Row(Section):
    """One line of a table."""

    method: str
    backbone: str | None = None
    recipe: str | None = Field(None, description="at paper scale, if not the table's; relative to the table")
    set: tuple[str, ...] = Field((), description="overrides that make the method, at any scale")
    small: tuple[str, ...] = Field((), description="further overrides at small scale")
    share_of_epochs: dict[str, Annotated[float, Field(gt=0, lt=1)]] = Field(
        {}, description="settings that count epochs, as shares of schedule.epochs, at any scale"
    )
    after: str | None = Field(None, description="name of the first stage's row, above, whose run this one starts from")
    start: Literal["model.start_from", "loss.distill.teacher"] = Field(
        "model.start_from", description="the setting that names the run of `after`: weights to start from, or a teacher"
    )
    drawn: bool = Field(True, description="false: only a first stage, not a row of the drawn table")
    evaluate: tuple[str, ...] = Field((), description="options of evaluate.py that give the row's accuracies")
    trials: Annotated[int, Field(ge=0)] = Field(
        0, description="settings of the method that were tried on the validation split before these were chosen"
    )
    inferred: str | None = Field(None, description="which of its values are neither in the paper nor in its code")
    paper: PaperFigures | None = None
    source: str | None = Field(None, description="where the figures stand, if not in the paper's supplement")

    @property
    def name(self) -> str:
        """Backbone and method; unique in a table."""
        return f"{self.backbone}, {self.method}" if self.backbone else self.method

    @property
    def folder(self) -> str:
        """The name as part of a path."""
        return "".join(c if c.isalnum() else "-" for c in self.name.lower())


class Table(Section):
    """The rows of a comparison; they differ only in their overrides and the seed."""

    title: str
    recipe: str
    scale: Literal["here", "paper"] = Field("here", description="paper: the recipes are for a cluster")
    rows: tuple[Row, ...]

    @model_validator(mode="after")
    def _runs_are_apart(self) -> Self:
        names = [row.folder for row in self.rows]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"rows share the run folders {sorted(twice)}; give each row its own method name")
        spelt: dict[tuple[str | None, str], str] = {}
        for row in self.rows:
            if other := spelt.get(key := (row.backbone, method_key(row.method))):
                raise ValueError(f"rows {other!r} and {row.method!r} name one method in two ways; rename one")
            spelt[key] = row.method
        return self

    @model_validator(mode="after")
    def _first_stages_are_above(self) -> Self:
        above: dict[str, Row] = {}
        for row in self.rows:
            if row.after is not None and row.after not in above:
                raise ValueError(f"row {row.name} is after {row.after!r}, which is no row above it")
            if row.after is not None and above[row.after].after is not None:
                raise ValueError(f"row {row.name} is after {row.after!r}, which is a second stage itself")
            above[row.name] = row
        begun = {row.after for row in self.rows}
        if idle := [row.name for row in self.rows if not row.drawn and row.name not in begun]:
            raise ValueError(f"rows {idle} are not drawn, and no row is after them: nothing would train them")
        return self

    def first_stage(self, row: Row) -> Row | None:
        """The first stage of a row, if it is a second stage."""
        return next((other for other in self.rows if other.name == row.after), None)

    def recipe_of(self, row: Row) -> str:
        """Path of a row's recipe at paper scale."""
        return row.recipe or self.recipe

    def resolve(self, row: Row, small_recipe: Path | None = None, overrides: Sequence[str] = ()) -> Recipe:
        """The recipe of a row with its overrides, at paper scale or, with a small recipe, at small scale.

        Args:
            overrides: further overrides; for a second stage with its `start`.

        Raises:
            RecipeError: recipe and overrides are not compatible.
        """
        return load_recipe(small_recipe or self.recipe_of(row), self.overrides(row, small_recipe, overrides))

    def overrides(self, row: Row, small_recipe: Path | None = None, further: Sequence[str] = ()) -> tuple[str, ...]:
        """All overrides of the row's recipe: its own, its shares as numbers of epochs, then `further` ones.

        Raises:
            RecipeError: as `resolve`.
        """
        own = (*row.set, *(row.small if small_recipe else ()))
        if not row.share_of_epochs:
            return (*own, *further)
        unset = (f"{key}=null" for key in row.share_of_epochs)
        epochs = load_recipe(small_recipe or self.recipe_of(row), (*own, *unset, *further)).schedule.epochs
        counted = (f"{key}={round(share * epochs)}" for key, share in row.share_of_epochs.items())
        return (*own, *counted, *further)


def load_table(name: str | Path) -> Table:
    """Read a table by number (9 to 14), by name, or by the path of its file; recipes in it are given by name or by a
    path relative to it.

    Raises:
        RecipeError: with the file and the mistake.
    """
    path = find_table(name)
    try:
        table = Table.model_validate(read_yaml(path, RecipeError))
    except ValidationError as error:
        raise RecipeError(f"{path}: {validation_message(error)}") from None

    def absolute(recipe: str) -> str:
        return str(find_recipe(recipe, path.parent).resolve())

    rows = tuple(row.model_copy(update={"recipe": absolute(row.recipe)} if row.recipe else {}) for row in table.rows)
    return table.model_copy(update={"recipe": absolute(table.recipe), "rows": rows})


def small_recipe(data: str) -> Path:
    """The small recipe of a data set by its name.

    Raises:
        RecipeError: there is none; lists the existing ones.
    """
    path = SMALL_RECIPES / f"{data}.yaml"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in SMALL_RECIPES.glob("*.yaml")))
        raise RecipeError(f"no small recipe for {data}: {path} is missing; there are {known}")
    return path
