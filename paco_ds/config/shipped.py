"""Recipes, tables, DeepSpeed JSON and dataset cards that ship with the project: where they are, found by name or path.

In a checkout they are `ds_configs/` and `shards/` beside the package; a wheel carries both inside the package. Their
paths to each other are the same in both. No other module reaches for files outside the package.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from paco_ds.errors import DataError, RecipeError, UserError

PACKAGE = Path(__file__).resolve().parents[1]
_IN_WHEEL = PACKAGE / "shipped"  # setup.py fills it
ROOT = _IN_WHEEL if _IN_WHEEL.is_dir() else PACKAGE.parent
DEEPSPEED = ROOT / "ds_configs"
RECIPES, TABLES, CARDS = DEEPSPEED / "recipes", DEEPSPEED / "tables", ROOT / "shards"
SMALL_RECIPES = RECIPES / "small"


def data_folder() -> Path:
    """Where the shards of shipped recipes are: `data/` of the checkout, or of the working directory for a wheel."""
    return Path.cwd() / "data" if ROOT == _IN_WHEEL else ROOT / "data"


def outside_package(path: Path) -> Path:
    """The path, or what stands for it in the working directory if it leads to the data folder inside a wheel."""
    inside = ROOT / "data"
    return data_folder() / path.relative_to(inside) if path.is_relative_to(inside) else path


def find_recipe(given: str | Path, beside: Path = Path()) -> Path:
    """The file of a recipe given by path, relative to `beside`, or by name: `demo`, `small/glyphs`.

    Raises:
        RecipeError: there is none; names the nearest, and where it looked.
    """
    return _find("recipe", given, RECIPES, RecipeError, beside)


def find_table(given: str | Path) -> Path:
    """The file of a table given by number (9 to 14), by name (`methods`) or by path; RecipeError if there is none."""
    return _find("table", f"table{given}" if str(given).isdigit() else given, TABLES, RecipeError)


def find_card(given: str | Path) -> Path:
    """The file of a dataset card given by name (`inaturalist2018`) or by path; DataError if there is none."""
    return _find("dataset card", given, CARDS, DataError)


def find_deepspeed(given: str, beside: Path) -> Path:
    """The DeepSpeed JSON at a path relative to `beside`, which need not be there, or the shipped one named `zero2`."""
    path, shipped = beside / given, DEEPSPEED / f"{given}.json"
    return shipped if _is_file(shipped) and not path.exists() else path


def card_with_images(shards: str | Path) -> Path | None:
    """The shipped card from which these shards can be built here, if its images ship too and they are in their place.

    Args:
        shards: `data.shards` of a recipe.
    """
    shards = Path(shards)
    card = CARDS / f"{shards.name}.yaml"
    return card if shards == data_folder() / shards.name and card.is_file() and card.with_suffix("").is_dir() else None


def _find(what: str, given: str | Path, folder: Path, error: type[UserError], beside: Path = Path()) -> Path:
    path = beside / given
    if _is_file(path):
        return path
    names = {file.relative_to(folder).with_suffix("").as_posix(): file for file in folder.rglob("*.yaml")}
    if str(given) in names:
        return names[str(given)]
    near = difflib.get_close_matches(Path(given).stem[:100], sorted(names), n=3, cutoff=0.0)
    raise error(
        f"no {what} {str(given)[:500]}: there is no such file, nor that name in {folder}; nearest: {', '.join(near)}"
    )


def _is_file(path: Path) -> bool:
    """Whether there is a file, or a pipe, of that name; no name is too long or too odd to be asked for."""
    try:
        return path.exists() and not path.is_dir()
    except (OSError, ValueError):
        return False
