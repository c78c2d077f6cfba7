#!/usr/bin/env python3
"""Write what is generated from settings, recipes and a job: `make pages`.

    docs/settings.md                 every setting: type, bounds, default, meaning
    docs/recipes.md                  the recipes, and what they train
    ds_configs/recipe.schema.json    JSON Schema of a recipe, for editors
    ds_configs/jobs/imagenet-lt.*    what starts a job, as paco-job writes it from the description beside them

`tests/test_reference.py` fails while one of them is not what this program writes.
"""

from __future__ import annotations

import json
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from paco_ds.config.load import load_recipe
from paco_ds.config.methods import METHODS
from paco_ds.config.recipe import Recipe
from paco_ds.config.section import RUNNING
from paco_ds.config.shipped import RECIPES
from paco_ds.config.views import ChainView, RandAugmentSettings, TrainView, ViewSettings
from paco_ds.files import replace_text
from paco_ds.planning.job import KINDS
from paco_ds.planning.job_description import read_job

ROOT = Path(__file__).resolve().parents[1]
_JOB = ROOT / "ds_configs" / "jobs" / "imagenet-lt.yaml"
_BOUNDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
_SIGNS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
_PLUGIN = {"type": "string", "pattern": r"^[\w.]+:\w+$"}

_HEADER = "| setting | type | default | meaning |\n|---|---|---|---|"

_SETTINGS = """# Settings

Every setting of a recipe; `make pages` writes this page from the code. `--set KEY=VALUE` overrides one on the command
line. A setting marked ° is free to change when a run is resumed; the others determine the result.

An editor with a YAML language server completes and checks a recipe that begins with the line

    # yaml-language-server: $schema=PATH/ds_configs/recipe.schema.json

as those in `ds_configs/recipes` do ([recipes.md](recipes.md)). Conditions between settings are told by the commands."""

_RECIPES = """# Recipes

The recipes in `ds_configs/recipes`, by name for `--config`; `make pages` writes this page. M x m: micro-batches of a
step, and images of each. [settings.md](settings.md) explains every setting; [methods.md](methods.md) has the methods,
and the tables of the paper that use these recipes. In the comments, *published* means a value of the authors' scripts,
*paper* one of the paper, and *inferred* ours, where neither says.

| recipe | method | backbone | classes | M x m | queue | epochs | lr |
|---|---|---|---|---|---|---|---|"""


def recipe_schema() -> dict[str, Any]:
    """JSON Schema of a recipe file, for editors: it knows every key, its type and bounds.

    No key is required, since a recipe with `base` leaves out what it shares; conditions between settings are told by
    the commands.
    """
    schema: dict[str, Any] = _plain(Recipe.model_json_schema())
    sections = schema["properties"]
    sections["base"] = {"type": "string", "description": "recipe whose settings are shared, by path or name"}
    sections["key_encoder"]["anyOf"].append({"const": "none"})  # written as a word, see Recipe
    method = schema["$defs"]["LossSettings"]["properties"]["method"]
    method["anyOf"] = [{"enum": sorted(METHODS)}, _PLUGIN]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "A recipe of paco_ds"}


def _plain(node: Any) -> Any:
    """What pydantic wrote, in the keywords of JSON Schema alone, with nothing required."""
    if isinstance(node, list):
        return [_plain(each) for each in node]
    if not isinstance(node, dict):
        return node
    named = {"properties", "$defs"} & node.keys()  # their keys are names, not keywords
    kept = {
        _BOUNDS.get(key, "anyOf" if key == "oneOf" else key): (
            {name: _plain(each) for name, each in value.items()} if key in named else _plain(value)
        )
        for key, value in node.items()
        if key not in ("required", "discriminator", "title", RUNNING)
    }
    if isinstance(kept.get("default"), dict):  # of a section: each of its settings has its own
        del kept["default"]
    return kept


def settings_page() -> str:
    """docs/settings.md."""
    schema = Recipe.model_json_schema()
    parts = [_SETTINGS]
    for prefix, model, running in _sections(Recipe, "", False):
        parts += [f"## {prefix or 'The recipe'}", _sentence(model.__doc__), _table(model, schema, running)]
    parts += ["## views", _sentence(ViewSettings.__doc__), "`views.evaluation` is `eval`; `name` chooses the others."]
    device = ViewSettings.model_fields["device"]
    kind = _kind(ViewSettings.model_json_schema()["properties"]["device"])
    parts += [f"{_HEADER}\n| `device` | {kind} | {_default(device)} | {_cell(device.description or '')} |"]
    for view in (ChainView, *typing.get_args(TrainView), ViewSettings.model_fields["evaluation"].annotation):
        parts += _view(view, schema)
    return "\n\n".join(parts) + "\n"


def _sections(model: type[BaseModel], prefix: str, running: bool) -> Iterator[tuple[str, type[BaseModel], bool]]:
    """(dotted key, section, whether all of it is free to change) of a section and of those in it, but for views."""
    yield prefix, model, running
    for name, field in model.model_fields.items():
        for inner in _models(field.annotation):
            if inner is not ViewSettings:
                yield from _sections(inner, f"{prefix}.{name}".lstrip("."), running or _is_running(field))


def _view(view: Any, schema: Mapping[str, Any]) -> list[str]:
    if view is ChainView:
        chain = ["### The chain of operations", _sentence(view.__doc__), _table(view, view.model_json_schema(), False)]
        inside = RandAugmentSettings
        return [*chain, "#### randaugment", _sentence(inside.__doc__), _table(inside, schema, False)]
    title, text = f"### {view.model_fields['name'].default}", _sentence(view.__doc__)
    if not issubclass(view, ChainView):
        return [title, text, _table(view, schema, False)]
    own = {
        name: field
        for name, field in view.model_fields.items()
        if name != "name" and field.default != ChainView.model_fields[name].default
    }
    changes = ", ".join(f"`{name}` {_default(field)}".strip() for name, field in own.items())
    return [title, f"{text} The chain with {changes}." if own else f"{text} The chain with its defaults."]


def _table(model: type[BaseModel], schema: Mapping[str, Any], running: bool) -> str:
    """A row for each setting; a section inside is a row that points to its own heading."""
    properties = schema.get("$defs", {}).get(model.__name__, schema)["properties"]
    rows = [_HEADER]
    for name, field in model.model_fields.items():
        if name == "name" and model is not Recipe:
            continue  # chooses the view
        mark = "°" if running or _is_running(field) else ""
        inner = list(_models(field.annotation))
        kind = _kind(properties[name])
        meaning = field.description or (_sentence(inner[0].__doc__) if inner else "")
        rows.append(f"| `{name}`{mark} | {kind} | {_default(field)} | {_cell(meaning)} |")
    return "\n".join(rows)


def _kind(schema: Mapping[str, Any]) -> str:
    """Type and bounds in words."""
    if "anyOf" in schema:
        return " or ".join(_kind(each) for each in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    if "$ref" in schema:
        return "section"
    if schema.get("type") == "object":
        return "mapping"
    if schema.get("type") == "array":
        items = schema.get("prefixItems") or [schema["items"], "..."]
        return "[" + ", ".join(each if isinstance(each, str) else _kind(each) for each in items) + "]"
    bounds = {_BOUNDS.get(key, key): value for key, value in schema.items()}
    said = " and ".join(f"{sign} {bounds[key]:,}" for key, sign in _SIGNS.items() if key in bounds)
    return f"{schema.get('type', 'any')} {said}".strip()


def _default(field: FieldInfo) -> str:
    value = field.default
    if field.is_required():
        return "required"
    if isinstance(value, BaseModel):
        return ""  # each of its settings has its own
    if isinstance(value, tuple):
        return "[" + ", ".join(f"{each:.3g}" for each in value) + "]"
    return f"{value:g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections that an annotation names."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in typing.get_args(annotation):
        yield from _models(part)


def _is_running(field: FieldInfo) -> bool:
    return isinstance(field.json_schema_extra, dict) and RUNNING in field.json_schema_extra


def _sentence(docstring: str | None) -> str:
    """The first paragraph, on one line."""
    return " ".join((docstring or "").split("\n\n")[0].split())


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


def recipes_page() -> str:
    """docs/recipes.md."""
    paths = sorted(RECIPES.rglob("*.yaml"))
    table = "\n".join([_RECIPES, *(_recipe_row(path) for path in paths)])
    comments = "\n".join(f"* `{_name(path)}`: {_comment(path)}" for path in paths)
    return "\n\n".join([table, "## Where their values are from", comments]) + "\n"


def _recipe_row(path: Path) -> str:
    recipe = load_recipe(path)
    gpaco = recipe.loss.method == "paco" and recipe.keys_from == "query_encoder"
    method = "paco (GPaCo)" if gpaco else recipe.loss.method
    queue = f"{recipe.queue.length:,}" if recipe.keys_from else ""
    step = f"{recipe.step.micro_batches} x {recipe.step.micro_batch}"
    cells = (method, recipe.model.backbone, f"{recipe.data.classes or 'any'}", step, queue, recipe.schedule.epochs)
    return f"| `{_name(path)}` | {' | '.join(map(str, cells))} | {recipe.optimizer.lr:g} |"


def _name(path: Path) -> str:
    return path.relative_to(RECIPES).with_suffix("").as_posix()


def _comment(path: Path) -> str:
    """The comment at the head of a recipe."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if "yaml-language-server" not in line:
            lines.append(line.lstrip("# "))
    return " ".join(lines)


def pages() -> dict[Path, str]:
    """{file: what belongs in it}."""
    return {
        ROOT / "docs" / "settings.md": settings_page(),
        ROOT / "docs" / "recipes.md": recipes_page(),
        ROOT / "ds_configs" / "recipe.schema.json": json.dumps(recipe_schema(), indent=1) + "\n",
        **{_JOB.with_suffix(f".{kind}.{'yaml' if kind == 'jobset' else 'sh'}"): _job(kind) for kind in KINDS},
    }


def _job(kind: str) -> str:
    return KINDS[kind](read_job(_JOB))


if __name__ == "__main__":
    for file, content in pages().items():
        replace_text(file, content)
