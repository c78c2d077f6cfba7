"""What recipes and rows once had otherwise than published: each value with its source.

Beside tests/paper/test_published.py (recipes at paper scale) and tests/data/test_selection.py (the published CIFAR-LT).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from paco_ds.config.load import load_recipe
from paco_ds.config.views import MocoV2View
from paco_ds.evaluation.choose_tau import TAUS
from paco_ds.paper.tables import load_table

ROOT = Path(__file__).resolve().parents[2]
START = ("model.start_from=FIRST_STAGE",)


def rows_of(table: str, part: str):
    return [row for row in load_table(table).rows if part in row.name]


@pytest.mark.parametrize("table", ["methods", "settings", "trials", "glyphs"])
def test_small_rows_of_ride_re_weight_too(table):
    """RIDE, configs/*_ride.json: from 80 of 100 epochs, with Nesterov; but the rows that show what this is worth."""
    loaded, found = load_table(table), 0
    for row in loaded.rows:
        recipe = loaded.resolve(row, None, (f"{row.start}=FIRST",) if row.after else ())
        if recipe.loss.method == "ride":
            settings = recipe.loss.model_dump()["ride"]
            assert (settings["reweight_epoch"] is None) == ("no re-weighting" in row.name)
            assert settings["reweight_epoch"] in (None, round(0.8 * recipe.schedule.epochs))
            assert recipe.optimizer.nesterov == ("plain momentum" not in row.name)
            found += 1
    assert found


@pytest.mark.parametrize("table", ["methods", "settings", "trials", "glyphs"])
def test_small_rows_of_balpoe_have_cosine_centers_and_mixup(table):
    """BalPoE, configs/mixup/long_training/config_cifar100_ir100_bs-experts.json: use_norm, alpha .4, taus 0, 1, 2."""
    loaded = load_table(table)
    rows = [row for row in loaded.rows if "BalPoE" in row.name]
    assert rows
    for row in rows:
        recipe = loaded.resolve(row)
        assert (recipe.model.centers == "cosine") == ("linear centers" not in row.name)
        assert recipe.step.mixup == 0.4
        assert recipe.loss.model_dump()["balpoe"]["lambdas"] == (1.0, 0.0, -1.0)


def test_second_stages_say_how_long_the_published_ones_are():
    """classifier-balancing, config/ImageNet_LT/cls_crt.yaml 10 epochs, cls_lws.yaml 5, after 90. An epoch there ends
    after n / batch steps (run_networks.py, epoch_steps), so it has as many images as ours."""
    (crt,), (lws,) = rows_of("methods", "cRT"), rows_of("methods", "LWS")
    assert crt.inferred is not None
    assert "10 after 90" in crt.inferred
    assert lws.inferred is not None
    assert "5 after 90" in lws.inferred
    for row in (crt, lws):
        assert load_table("methods").resolve(row, None, START).data.sampler == "class_balanced"
    settings = load_table("settings")
    training = [settings.resolve(row, None, START) for row in rows_of("settings", "BatchNorm in training")]
    assert [recipe.model.frozen_batch_norm for recipe in training] == ["training"] * 2


def test_re_weighted_rows_say_that_the_released_weights_are_one():
    """GPaCo's code and PaCo's: a slip of shapes; both readings are rows of table `settings`."""
    rows = [row for table in ("13", "14") for row in rows_of(table, "Re-weighting")]
    assert len(rows) == 8
    assert all("factors are all 1 in the released code" in (row.inferred or "") for row in rows)
    (re_weighted,), (plain,) = rows_of("settings", "+ Re-weighting"), rows_of("settings", "+ SupCon")
    assert [s.replace("reweighted", "supcon") for s in re_weighted.set] == list(plain.set)


def test_places_figures_are_of_the_val_list():
    """paco_fp16_places.py validates on Places_LT_val.txt, 7,300 images; the test list is the training's last."""
    table = load_table("places_lt")
    assert "val list" in table.title
    for row in table.rows:
        assert row.evaluate == ("--split=val",)
        assert table.resolve(row).evaluation.test_split == "test"


def test_the_card_of_cifar_takes_the_published_images():
    """LDAM-DRW's imbalance_cifar.py: RandomState(0), a shuffle a class."""
    assert "selection: published" in (ROOT / "shards" / "cifar100_lt.yaml").read_text()


@pytest.mark.parametrize("name", ["imagenet_lt_resnet50_plain", "inaturalist2018_resnet50_plain"])
def test_views_without_randaugment_are_marked_inferred(name):
    """The only published pair without it is sim / sim (PaCo/LT/sh)."""
    text = (ROOT / "ds_configs" / "recipes" / f"{name}.yaml").read_text()
    assert "# inferred: the query's view" in text
    assert "sim / sim" in text
    assert load_recipe(name).views.query.model_dump()["randaugment"] is None


def test_mocov2_is_moco_v2s():
    """moco/main_moco.py, aug_plus: crops from .2, jitter .4, .4, .4, .1 in 80 %, gray in 20 %, blur in half, flip."""
    view = MocoV2View()
    assert (view.area, view.jitter, view.hue, view.jitter_probability) == ((0.2, 1.0), 0.4, 0.1, 0.8)
    assert (view.gray, view.gray_first, view.blur, view.blur_sigma, view.flip) == (0.2, False, 0.5, (0.1, 2.0), 0.5)


def test_tau_is_tried_from_0_to_2():
    """classifier-balancing, tau_norm.py: steps of a tenth."""
    assert pytest.approx([step / 10 for step in range(21)]) == TAUS


@pytest.mark.parametrize(
    ("table", "figures"),
    [
        (
            "imagenet",
            [79.3, 80.9, 81.8, 79.7, 84.0, 83.4, 86.0],
        ),  # PaCo ResNet-50, -101, -200; GPaCo ResNet-50, ViT-B, -L
        ("places_lt", [41.2, 41.7]),
        ("cifar100", [None, None, None, None, 80.3, 79.1]),  # imbalance factors 100, 50, 10; BalPoE; balanced
        ("table1", [None] * 4),  # CE, SupCon in two stages, PaCo
        ("gpaco", [58.5, 58.9, 60.8, 75.4, 78.1, None, None]),  # the last two are multi-task
        ("rivals", [None, None, None, 58.8, 72.9, 49.8, None, None, 57.2, None, 57.8, 73.5]),
    ],
)
def test_tables_beyond_the_supplement_have_the_figures_at_hand(table, figures):
    """Where the authors' README has one; the others say where it is reported. Every row resolves."""
    loaded = load_table(table)
    assert [row.paper.all if row.paper else None for row in loaded.rows] == figures
    for row in loaded.rows:
        loaded.resolve(row, None, (f"{row.start}=FIRST",) if row.after else ())
        assert row.source


@pytest.mark.parametrize(("name", "factor"), [("cifar100_lt", 100), ("cifar100_lt50", 50), ("cifar100_lt10", 10)])
def test_cifar_has_a_recipe_for_each_imbalance_factor(name, factor):
    """PaCo/LT/sh/CIFAR100_train_imb*.sh: the rows of its table."""
    text = (ROOT / "ds_configs" / "recipes" / f"{name}_resnet32.yaml").read_text()
    assert str(factor) in text
    assert load_recipe(f"{name}_resnet32").model.backbone == "cifar_resnet32"
