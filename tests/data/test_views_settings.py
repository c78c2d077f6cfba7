"""Settings of views: mistakes are answered with the key and the remedy, and the recipes have the published ones."""

import re
from pathlib import Path

import pytest

from paco_ds.config.load import load_recipe
from paco_ds.errors import RecipeError

RECIPES = Path(__file__).resolve().parents[2] / "ds_configs" / "recipes"


def test_erasing_on_the_device_is_refused_before_the_first_is_drawn():
    with pytest.raises(
        RecipeError, match=r"'views': device accelerator cannot erase; set query\.erasing to 0, or device"
    ):
        load_recipe(RECIPES / "imagenet_lt_convnext_tiny.yaml", ["views.device=accelerator"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("views.query.randaugment.magnitud=3", "nearest valid name: 'views.query.randaugment.magnitude'"),
        ("views.query.area=[0.5, 0.1]", "'views.query': area [0.5, 0.1] is no range; write the smaller value first"),
        ("views.query.area=[0.5, 2]", "asks for crops larger than the image; set its end to at most 1"),
        ("views.key.blur_sigma=[2, 1]", "blur_sigma [2, 1] is no range"),
        ("views.key.blur_sigma=[2]", "'views.key.blur_sigma' has only 1 of its values; give the others"),
        ("views.query.hue=0.7", "'views.query.hue': Input should be less than or equal to 0.5"),
        ("views.query.gray=yes", "'views.query.gray': a number is expected here, not true or false"),
        ("views.query.name=randclss", "unknown view 'randclss'; nearest valid name: 'randcls' (valid: small, regular,"),
        ("views.query={size: 3}", "'views.query': its 'name' is missing (valid: small, regular, randcls,"),
        ("views.query.padding=3", "unknown key 'views.query.padding'"),
        ("views.query={name: cifar, autoaugment: svhn}", "'views.query.autoaugment': Input should be 'cifar10'"),
        ("views.query.randaugment.fill=[1, 2, 300]", "less than or equal to 255"),
        ("views.key.size=128", "'views': query.size 224 and key.size 128 differ; set them equal"),
        ("data.max_pixels=0", "'data.max_pixels': Input should be greater than or equal to 1"),
    ],
)
def test_a_wrong_setting_names_its_key_and_the_remedy(override, message):
    """Whatever is wrong, the override that set it is shown."""
    expected = re.escape(f"--set {override}: ") + ".*" + re.escape(message)
    with pytest.raises(RecipeError, match=expected):
        load_recipe(RECIPES / "imagenet_lt_resnet50.yaml", [override])


@pytest.mark.parametrize(
    ("name", "query", "key", "weight_decay"),
    [
        ("imagenet_lt_resnet50", "randcls", "sim", 5e-4),
        ("inaturalist2018_resnet50", "randcls", "sim", 1e-4),
        ("gpaco_imagenet_lt_resnet50", "randcls", "randclsstack", 5e-4),
        ("gpaco_inaturalist2018_resnet50", "randcls", "sim", 1e-4),
        ("resnet50", "randcls", "sim", 5e-4),
    ],
)
def test_recipes_have_the_published_views(name, query, key, weight_decay):
    """n2 m10 for the query; the key's where it has RandAugment as well."""
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    assert (recipe.views.query.name, recipe.views.key.name) == (query, key)
    assert recipe.optimizer.weight_decay == weight_decay
    for view in (recipe.views.query, recipe.views.key):
        assert (view.size, view.area, view.jitter, view.hue) == (224, (0.08, 1.0), 0.4, 0.0)
        if view.randaugment:
            assert (view.randaugment.operations, view.randaugment.magnitude, view.randaugment.magnitude_std) == (
                2,
                10,
                0.5,
            )


def test_a_strength_may_be_set_in_any_view():
    """The named views are one chain with other defaults."""
    overrides = ["views.key.randaugment={operations: 1}", "views.query.randaugment=null", "views.query.gray=0.1"]
    recipe = load_recipe(RECIPES / "imagenet_lt_resnet50.yaml", overrides)
    assert recipe.views.key.randaugment.operations == 1
    assert recipe.views.query.randaugment is None
    assert recipe.views.query.gray == 0.1


def test_defaults_are_written_as_meanings_are():
    """A checkpoint older than a setting is compared with the default: pairs are lists on both sides."""
    recipe = load_recipe(RECIPES / "imagenet_lt_resnet50.yaml")
    meaning = recipe.resume_identity()
    for key in ("views.key.ratio", "views.key.blur_sigma", "views.query.randaugment.fill", "data.max_pixels"):
        assert recipe.default(key) == meaning[key]


def test_views_do_without_timm():
    """Users install no second library of models for the sake of one policy; its networks are for who asks for them."""
    package = RECIPES.parents[1] / "paco_ds"
    sources = set(package.rglob("*.py")) - {package / "models" / "families" / "timm.py"}
    assert not [path for path in sources if re.search(r"^\s*(import|from) timm", path.read_text(), re.MULTILINE)]
