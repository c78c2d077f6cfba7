"""Recipe files: read from YAML, overridden on the command line, every mistake answered with its key and place."""

from __future__ import annotations

import difflib
import logging
import re
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from paco_ds.config import shipped
from paco_ds.config.parse import brief, parse_yaml, read_yaml
from paco_ds.config.recipe import Recipe
from paco_ds.config.views import TrainView
from paco_ds.errors import CheckpointError, RecipeError
from paco_ds.files import is_url

RENAMED = {"engine.max_refused": "engine.max_skipped"}  # {name until 0.8: name}
PATH_KEYS = (
    "data.shards",
    "data.cache.directory",
    "engine.deepspeed",
    "model.start_from",
    "model.centers_from",
    "loss.distill.teacher",
)
_NO_PATHS = {("engine.deepspeed", "auto"), ("model.centers_from", "class_means")}


_FORMER_AUTOCAST = re.compile(r"(zero[0-3](?:_offload)?)_autocast(\.json)?$")  # shipped until 0.13
_MOST_EXPLAINED = 20  # mistakes of a recipe

log = logging.getLogger(__name__)


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe, given by path or by the name of a shipped one, and apply `key.path=value` overrides (values are
    YAML).

    Paths in the file are relative to the file; paths in overrides are relative to the working directory.

    Raises:
        RecipeError: names the key, where it was set, and what is valid there.
    """
    path = shipped.find_recipe(path)
    tree = _read(path)
    if isinstance(base := tree.pop("base", None), str):
        shared = _read(shipped.find_recipe(base, path.parent))
        if "base" in shared:
            raise RecipeError(f"{path}: base {base} has a base of its own; recipes share parts by one level")
        tree = _merged(shared, tree)
    elif base is not None:
        raise RecipeError(f"{path}: base is a recipe, by a path relative to this one or by name, not {brief(base)}")
    reference = _get(tree, "step.micro_batches")
    origin: dict[str, str] = {}
    for override in overrides:
        key = _apply_override(tree, override)
        origin[key] = _place_of(override)
        if key == "engine.deepspeed":
            _split_autocast(tree, Path.cwd(), _place_of(override))
    for key in PATH_KEYS:  # those of the file are absolute by now
        _anchor_path(tree, key, Path.cwd())
    if isinstance(tree.get("step"), dict):
        tree["step"].setdefault("reference_micro_batches", reference)
    return validate_recipe(tree, str(path), origin)


def load_recipe_of_run(run: Path, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe in a run directory.

    Raises:
        CheckpointError: it is not one.
        RecipeError: as `load_recipe`.
    """
    if not (run / "recipe.yaml").is_file():
        raise CheckpointError(f"{run} is not the run directory of a training: {run / 'recipe.yaml'} is missing")
    return load_recipe(run / "recipe.yaml", overrides)


def validate_recipe(tree: dict[str, Any], place: str, origin: dict[str, str] | None = None) -> Recipe:
    """Build a Recipe from a tree of plain values; `place` and `origin` say in errors where a key was set."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        details = error.errors(include_url=False)
        lines = [_explain(detail, place, origin or {}) for detail in details[:_MOST_EXPLAINED]]
        if len(details) > len(lines):
            lines.append(f"{place}: and {len(details) - len(lines)} more mistakes")
        raise RecipeError("\n".join(lines)) from None


def _read(path: Path) -> dict[str, Any]:
    """The tree of one file, its paths made absolute."""
    tree = read_yaml(path, RecipeError)
    if not isinstance(tree, dict):
        raise RecipeError(f"{path} must be a mapping of settings, not {type(tree).__name__}")
    _rename(tree, str(path))
    _split_autocast(tree, path.parent, str(path))
    for key in PATH_KEYS:
        _anchor_path(tree, key, path.parent)
    return tree


def _merged(shared: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """`shared` with what `own` says instead; sections are merged, and a view of another name replaces one."""
    merged = dict(shared)
    for key, value in own.items():
        before = merged.get(key)
        if isinstance(before, dict) and isinstance(value, dict) and value.get("name") in (None, before.get("name")):
            value = _merged(before, value)
        merged[key] = value
    return merged


def _get(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def _anchor_path(tree: dict[str, Any], key: str, base: Path) -> None:
    section, _, name = key.rpartition(".")
    value = _get(tree, key)
    if not isinstance(value, str) or (key, value) in _NO_PATHS:
        return
    if not is_url(value) and not value.startswith(("torchvision:", "timm:")):
        if "\0" in value:
            raise RecipeError(f"{key} {brief(value)} is no path: it has a zero byte in it")
        path = shipped.find_deepspeed(value, base) if key == "engine.deepspeed" else base / value
        _get(tree, section)[name] = str(shipped.outside_package(path.resolve()))


def _rename(tree: dict[str, Any], place: str) -> None:
    """Give settings under names of earlier versions their present names, in place, with a warning.

    Raises:
        RecipeError: a setting is given under both names.
    """
    for old, new in RENAMED.items():
        section, _, old_name = old.rpartition(".")
        settings, new_name = _get(tree, section), new.rpartition(".")[2]
        if not isinstance(settings, dict) or old_name not in settings:
            continue
        if new_name in settings:
            raise RecipeError(f"{place}: {old!r} is the former name of {new!r}, and both are given; keep {new!r}")
        log.warning("%s: %s is called %s now; rename it", place, old, new)
        settings[new_name] = settings.pop(old_name)


def _split_autocast(tree: dict[str, Any], base: Path, place: str) -> None:
    """`zero1_autocast` of earlier versions is `zero1` and `engine.precision: bfloat16` now, in place, with a warning.
    A file of the user by that name stays what it is."""
    value = _get(tree, "engine.deepspeed")
    former = _FORMER_AUTOCAST.search(value) if isinstance(value, str) else None
    if former is None or (base / value).exists():
        return
    log.warning("%s: %s is %s and engine.precision=bfloat16 now; write that", place, former[0], former[1])
    engine = tree["engine"]
    engine["deepspeed"] = str(shipped.DEEPSPEED / f"{former[1]}.json")
    if engine.get("precision", "auto") == "auto":
        engine["precision"] = "bfloat16"


def _apply_override(tree: dict[str, Any], override: str) -> str:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"{_place_of(override)}: write key.path=value, for example --set optimizer.lr=0.05")
    if key in RENAMED:
        log.warning("%s: %s is called %s now; rename it", _place_of(override), key, RENAMED[key])
        key = RENAMED[key]
    *sections, last = key.split(".")
    for part in sections:
        if tree.get(part) is None and part not in _WITHOUT:  # a recipe that a run wrote names its empty sections too
            tree[part] = {}
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise RecipeError(f"{_place_of(override)}: {part!r} is a setting, not a section{_WITHOUT.get(part, '')}")
    tree[last] = parse_yaml(text, f"{_place_of(override)}: the value", RecipeError)
    return key


def _place_of(override: str) -> str:
    """An override in messages: on one line, cut after 200 characters."""
    text = " ".join(override.split())
    return f"--set {text}" if len(text) <= 200 else f"--set {text[:200]}..."


def _explain(detail: Any, place: str, origin: dict[str, str]) -> str:
    names: list[str] = []
    model: type[BaseModel] = Recipe
    for part in detail["loc"]:
        if part in _VIEWS and names[:1] == ["views"]:  # pydantic names the chosen kind of view in the place
            model = _VIEWS[part]
            continue
        names.append(str(part))
        model = _section_of(model, str(part)) or model
    key = ".".join(names)
    where = _origin(key, origin) or place
    if detail["type"] == "extra_forbidden":
        valid = list(model.model_fields)
        near = difflib.get_close_matches(names[-1][:100], valid, n=1, cutoff=0.0)[0]
        prefix = ".".join([*names[:-1], ""]).lstrip(".")
        return f"{where}: unknown key {brief(key)}; nearest valid name: {prefix + near!r} (valid: {', '.join(valid)})"
    if detail["type"] == "missing" and names[-1].isdigit():
        return f"{where}: {key.rpartition('.')[0]!r} has only {names[-1]} of its values; give the others"
    if detail["type"] == "missing":
        return f"{where}: {key!r} is missing; add it to the recipe or give --set {key}=..."
    if detail["type"] in ("union_tag_invalid", "union_tag_not_found"):
        tag = detail.get("ctx", {}).get("tag")
        wrong = f"unknown view {tag!r}" if tag else "its 'name' is missing"
        near = f"; nearest valid name: {difflib.get_close_matches(tag, _VIEWS, n=1, cutoff=0.0)[0]!r}" if tag else ""
        return f"{where}: {key!r}: {wrong}{near} (valid: {', '.join(_VIEWS)})"
    given = "" if isinstance(detail["input"], dict) else f" (given: {brief(detail['input'])})"
    of_key = f"{key!r}: " if key else ""  # a rule of the whole recipe names its keys itself
    return f"{where}: {of_key}{detail['msg'].removeprefix('Value error, ')}{given}"


def _origin(key: str, origin: dict[str, str]) -> str | None:
    """The override that set a key, or a part of it, or a section around it."""
    if key in origin:
        return origin[key]
    related = (o for k, o in origin.items() if k.startswith(key + ".") or key.startswith(k + "."))
    return next(related, None)


_WITHOUT = {
    "key_encoder": ", while it is none: both views then run through one encoder inside their micro-batch, so there "
    "are no groups of keys to shuffle and no momentum. Leave this out, or give the recipe a key_encoder section"
}
_VIEWS: dict[str, type[BaseModel]] = {view.model_fields["name"].default: view for view in typing.get_args(TrainView)}


def _section_of(model: type[BaseModel], name: str) -> type[BaseModel] | None:
    field = model.model_fields.get(name)
    if field is None:
        return None
    for candidate in (field.annotation, *typing.get_args(field.annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None
