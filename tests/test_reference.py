"""What is generated from the settings is current, and an editor's schema knows what a recipe may say."""

import json
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

import reference

from paco_ds.config.load import load_recipe
from paco_ds.config.shipped import RECIPES

SHIPPED = sorted(RECIPES.rglob("*.yaml"))
DEMO = yaml.safe_load((RECIPES / "demo.yaml").read_text())


@pytest.mark.parametrize("file", reference.pages(), ids=lambda file: file.name)
def test_a_generated_page_is_current(file):
    """After a change of settings or recipes: `make pages`."""
    assert file.read_text(encoding="utf-8") == reference.pages()[file]


def test_every_setting_is_on_the_page_with_its_meaning():
    """As a row of its section, whose last cell is not empty."""
    rows = [line.split(" | ") for line in reference.settings_page().splitlines() if line.startswith("| `")]
    assert [row[0] for row in rows if not row[-1].strip(" |")] == []
    named = {row[0].strip("|` °") for row in rows}
    recipe = load_recipe("imagenet_lt_resnet50")
    assert {key.rpartition(".")[2] for key in recipe.resume_identity()} - {"name"} <= named


@pytest.fixture(scope="module")
def errors():
    """`errors(recipe)`: what an editor would mark, as (path, message)."""
    schema = reference.recipe_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    return lambda recipe: [(error.json_path, error.message) for error in validator.iter_errors(recipe)]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_recipe_names_the_schema_and_is_valid(errors, path):
    """By the path that stands in its first line."""
    first, _, text = path.read_text(encoding="utf-8").partition("\n")
    named = first.removeprefix("# yaml-language-server: $schema=")
    assert json.loads((path.parent / named).read_text()) == reference.recipe_schema()
    assert errors(yaml.safe_load(text)) == []


@pytest.mark.parametrize(
    ("change", "marked"),
    [
        ({"qeue": {"length": 8}}, "'qeue' was unexpected"),
        ({"queue": {"lenght": 8}}, "'lenght' was unexpected"),
        ({"queue": {"length": -1}}, "-1 is less than the minimum of 0"),
        ({"optimizer": {"lr": 0}}, "0 is less than or equal to the minimum of 0"),
        ({"schedule": {"epochs": "ten"}}, "'ten' is not of type 'integer'"),
        ({"loss": {"method": "pako"}}, "'pako' is not valid"),
        ({"views": {"query": {"name": "sin"}}}, "is not valid under any"),
        ({"key_encoder": "nothing"}, "is not valid under any"),
    ],
)
def test_a_typo_is_marked(errors, change, marked):
    """And nothing else of the recipe."""
    ((_, message),) = errors(DEMO | change)
    assert marked in message


@pytest.mark.parametrize(
    "change", [{"key_encoder": "none"}, {"loss": {"method": "my_module:Mine", "options": {"a": 1}}}, {"base": "demo"}]
)
def test_what_a_recipe_may_say_is_not_marked(errors, change):
    assert errors(DEMO | change) == []
