"""Shipped recipes, tables and cards: found by name or path, refused with the nearest names."""

from pathlib import Path

import pytest

from paco_ds.config import shipped
from paco_ds.config.load import load_recipe
from paco_ds.errors import DataError, RecipeError


@pytest.mark.parametrize(
    ("find", "name", "file"),
    [
        (shipped.find_recipe, "demo", "ds_configs/recipes/demo.yaml"),
        (shipped.find_recipe, "small/glyphs", "ds_configs/recipes/small/glyphs.yaml"),
        (shipped.find_table, 13, "ds_configs/tables/table13.yaml"),
        (shipped.find_table, "methods", "ds_configs/tables/methods.yaml"),
        (shipped.find_card, "inaturalist2018", "shards/inaturalist2018.yaml"),
    ],
)
def test_what_ships_is_found_by_name_from_any_folder(find, name, file, tmp_path, monkeypatch):
    """A folder of the same name in the working directory does not hide it; a file does."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    assert find(name) == shipped.ROOT / file
    (tmp_path / "mine.yaml").touch()
    assert find("mine.yaml") == Path("mine.yaml")


@pytest.mark.parametrize(
    ("find", "error", "message"),
    [
        (lambda: load_recipe("dmo"), RecipeError, r"no recipe dmo: .* in \S+/ds_configs/recipes; nearest: demo, "),
        (lambda: load_recipe("a/resnet50.yml"), RecipeError, r"no recipe a/resnet50.yml: .*; nearest: resnet50, "),
        (lambda: shipped.find_table("15"), RecipeError, r"no table table15: .*/ds_configs/tables; nearest: table1"),
        (
            lambda: shipped.find_card("imagenet"),
            DataError,
            r"no dataset card imagenet: .*/shards; nearest: imagenet_lt",
        ),
    ],
)
def test_an_unknown_name_is_refused_in_one_line(find, error, message):
    """With the folder that was searched and the nearest names."""
    with pytest.raises(error, match=message) as refused:
        find()
    assert "\n" not in str(refused.value)


def test_a_recipe_may_name_a_shipped_base_and_deepspeed_json(tmp_path):
    """In place of paths, which somebody with a wheel does not know."""
    (tmp_path / "mine.yaml").write_text("base: demo\nengine: {deepspeed: zero2}\n")
    assert load_recipe(tmp_path / "mine.yaml").engine.deepspeed == str(shipped.DEEPSPEED / "zero2.json")


def test_shards_of_a_wheels_recipe_are_in_the_working_directory(tmp_path, monkeypatch):
    """Nothing is looked for, or written, inside the installed package."""
    monkeypatch.setattr(shipped, "_IN_WHEEL", shipped.ROOT)
    monkeypatch.chdir(tmp_path)
    shards = load_recipe("demo").data.shards
    assert shards == str(tmp_path / "data" / "fashion-mnist-lt")
    assert shipped.card_with_images(shards) == shipped.CARDS / "fashion-mnist-lt.yaml"


def test_only_a_card_with_its_images_can_build_missing_shards():
    """Not one whose images must be fetched, and not for shards of another place."""
    assert shipped.card_with_images(load_recipe("demo").data.shards) == shipped.CARDS / "fashion-mnist-lt.yaml"
    assert shipped.card_with_images(load_recipe("cifar100_lt_resnet32").data.shards) is None
    assert shipped.card_with_images("/elsewhere/fashion-mnist-lt") is None
