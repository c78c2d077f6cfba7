"""Shipped recipes and rows hold the published values; each line names its source.

PaCo and GPaCo: dvlab-research/Parametric-Contrastive-Learning, scripts and defaults. RIDE: frank-xwang's configs.
BalPoE: emasa's. BCL: FlamieZhu's main.py. ProCo: LeapLabTHU's sh/ and main.py.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from paco_ds.config.engine import deviation
from paco_ds.config.load import load_recipe
from paco_ds.models.execution import Hardware, choose
from paco_ds.paper.tables import SMALL_RECIPES, load_table

ROOT = Path(__file__).resolve().parents[2]
LISTED = r"^\| `(\w+)` \| .* \| (\d+) \| (\d+) \| (\d+) \|$"
RIDE = {"loss.ride.reweight_epoch": 320, "optimizer.nesterov": True, "optimizer.weight_decay": 2e-4}
SADE = {
    "model.centers": "cosine",
    "model.centers_scale": 30.0,
    "model.experts": 3,
    "model.expert_width": "reduced",
    "optimizer.nesterov": True,
}
MDCS = SADE | {
    "loss.mdcs.taus": (-0.5, 1.0, 2.5),
    "loss.mdcs.weight": 0.6,
    "loss.mdcs.ramp_epochs": 20,
    "optimizer.weight_decay": 5e-4,
    "schedule.epochs": 400,
}
BALPOE = {
    "model.centers": "cosine",
    "model.centers_scale": 30.0,
    "model.expert_width": "full",
    "optimizer.nesterov": True,
}
CONTRAST = {
    "model.centers": "cosine",
    "model.projection_dim": 1024,
    "loss.temperature": 0.07,
    "step.global_batch": 256,
    # augmentation_sim of both main.py: jitter of BYOL's strength in 80 %, no blur
    "views.query.name": "randcls",
    "views.key.hue": 0.1,
    "views.key.jitter_probability": 0.8,
    "views.key.gray": 0.2,
    "views.key.blur": 0.0,
}
VIT = {"global_pool": "avg"}
GPACO_VIT = {
    "loss.alpha": 0.2,
    "loss.beta": 1.0,
    "loss.gamma": 1.0,
    "loss.temperature": 0.2,
    "loss.smoothing": 0.1,
    "loss.class_prior": False,
    "key_encoder": None,
    "queue.length": 8192,
    "optimizer.name": "adamw",
    "optimizer.weight_decay": 0.05,
    "optimizer.decay_norms_and_biases": False,
    "schedule.warmup_epochs": 5,
    "schedule.minimum_lr": 1e-6,
    "model.projection_activation": "gelu",
    "views.query.name": "randclsstack",
    "views.query.randaugment.operations": 12,
    "views.query.randaugment.magnitude": 10,
    "views.query.erasing": 0.0,
    "views.key.name": "sim",
    "views.evaluation.interpolation": "bicubic",
    "engine.published_precision": "float16",
}
PUBLISHED = {
    # RIDE: configs/config_{imagenet_lt_resnet50,imagenet_lt_resnext50,iNaturalist_resnet50}_ride.json, 80 of 100
    # epochs; a micro-batch is what BatchNorm sees on one of n_gpu cards, here and in the next three
    "ride_imagenet_lt_resnet50": RIDE
    | {"lr": 0.1, "step.global_batch": 256, "step.micro_batch": 32, "loss.ride.reweight_factor": 0.02},
    "ride_imagenet_lt_resnext50": RIDE | {"lr": 0.1, "step.global_batch": 256, "loss.ride.diversity": 0.2},
    "ride_inaturalist2018_resnet50": RIDE
    | {"lr": 0.2, "step.global_batch": 512, "step.micro_batch": 64, "loss.ride.reweight_factor": 0.015},
    # BalPoE: configs/mixup/long_training/*_bs-experts.json, tau = 1 - lambda
    "balpoe_cifar100_lt_resnet32": BALPOE
    | {"taus": [0, 1, 2], "step.mixup": 0.4, "lr": 0.1, "step.global_batch": 128, "step.micro_batch": 128}
    | {"views.query.name": "cifar", "views.query.autoaugment": "cifar10", "views.query.cutout": 0},
    "balpoe_imagenet_lt_resnet50": BALPOE
    | {"taus": [0, 1.25, 2.5], "step.mixup": 0.3, "lr": 0.025, "step.micro_batch": 32}
    | {"views.query.name": "randcls", "views.query.randaugment.magnitude": 10},
    "balpoe_imagenet_lt_resnext50": BALPOE | {"taus": [0, 1.25, 2.5], "step.mixup": 0.3, "step.global_batch": 64},
    "balpoe_inaturalist2018_resnet50": BALPOE
    | {"taus": [-1, 1, 3], "step.mixup": 0.2, "lr": 0.2, "step.global_batch": 512, "step.micro_batch": 128},
    # SADE: configs/config_*_sade.json; tau, batch, lr, epochs; views of test_training_*.py
    "sade_imagenet_lt_resnext50": SADE
    | {"loss.sade.tau": 2, "lr": 0.025, "step.global_batch": 64, "schedule.epochs": 180, "schedule.warmup_epochs": 0}
    | {"optimizer.weight_decay": 5e-4, "views.query.name": "regular", "views.key.name": "mocov2"},
    "sade_inaturalist2018_resnet50": SADE
    | {"loss.sade.tau": 1, "lr": 0.2, "step.global_batch": 512, "schedule.epochs": 100, "schedule.milestones": (60, 80)}
    | {"views.query.jitter": 0, "views.key.area": (0.08, 1.0), "step.micro_batch": 128}
    | {"optimizer.weight_decay": 2e-4, "schedule.warmup_epochs": 5, "schedule.warmup_overshoot": False},
    "sade_cifar100_lt_resnet32": SADE
    | {"loss.sade.tau": 2, "lr": 0.1, "step.global_batch": 128, "schedule.epochs": 200}
    | {"schedule.milestones": (160, 180), "schedule.warmup_epochs": 5, "schedule.warmup_overshoot": False},
    # MDCS: configs/*_mdcs*.json; powers of the counts, weight and `warmup` of MDCSLoss in model/loss.py
    "mdcs_imagenet_lt_resnext50": MDCS
    | {"step.global_batch": 256, "lr": 0.1, "schedule.warmup_epochs": 0, "views.key.name": "randcls"}
    | {"step.micro_batch": 128},  # 4 cards, two of which see the weak views and two the strong ones
    "mdcs_cifar100_lt_resnet32": MDCS
    | {"step.global_batch": 64, "lr": 0.1, "schedule.milestones": (200, 320, 380), "schedule.warmup_epochs": 20},
    # BCL: README's commands, defaults of main.py; ProCo: sh/*.sh, defaults of ProCo/main.py
    "bcl_imagenet_lt_resnet50": CONTRAST | {"lr": 0.1, "schedule.epochs": 90, "loss.bcl.contrast_weight": 0.35},
    "bcl_inaturalist2018_resnet50": CONTRAST | {"lr": 0.2, "schedule.epochs": 100, "optimizer.weight_decay": 1e-4},
    "proco_imagenet_lt_resnet50": CONTRAST | {"lr": 0.1, "schedule.epochs": 180, "optimizer.weight_decay": 5e-4},
    "proco_inaturalist2018_resnet50": CONTRAST | {"lr": 0.2, "schedule.epochs": 90, "optimizer.weight_decay": 1e-4},
    # PaCo: PaCo/LT/paco_cifar.py (`epoch > 320`, `epoch <= warmup_epochs`), models/resnet_cifar.py `_weights_init`
    "cifar100_lt_resnet32": {
        "schedule.milestones": (321, 361),
        "schedule.warmup_overshoot": True,
        "model.initialisation": "published",
    },
    # LIFT: utils/config.py, configs/model/clip_vit_b16.yaml, models/peft_vit.py: 2 ** int(log2(1000 / (2 x 12)))
    "imagenet_lt_vit_base_lift": {
        "model.trained": "adaptformer",
        "model.adaptformer.width": 32,
        "model.adaptformer.scale": 1.0,
        "model.adaptformer.learned_scale": True,
        "model.centers_scale": 25.0,
        "loss.method": "logit_adjustment",
        "lr": 0.01,
        "step.global_batch": 128,
        "optimizer.weight_decay": 5e-4,
        "schedule.epochs": 10,
        "views.evaluation.resize": 248,
        "views.evaluation.crops": "five",
        "engine.published_precision": "float16",
    },
    # GPaCo/MAE-ViTs/sh/finetune_{base,large}_mae_gpaco.sh, main_finetune_gpaco.py, util/datasets.py
    "gpaco_imagenet_vit_base": GPACO_VIT
    | {"lr": 5e-4 * 4, "optimizer.layer_decay": 0.65, "model.kwargs": VIT | {"drop_path_rate": 0.1}}
    | {"schedule.epochs": 100, "step.micro_batch": 32, "step.global_batch": 1024},
    "gpaco_imagenet_vit_large": GPACO_VIT
    | {"lr": 1e-3 * 4, "optimizer.layer_decay": 0.75, "model.kwargs": VIT | {"drop_path_rate": 0.2}}
    | {"schedule.epochs": 50, "step.micro_batch": 16, "step.global_batch": 1024},
    # no paper: the optimizer of the first, the loss of gpaco_inaturalist2018_resnet50
    "inaturalist2018_vit_base": {
        "lr": 5e-4 * 4,
        "optimizer.layer_decay": 0.65,
        "loss.alpha": 0.05,
        "loss.smoothing": 0.0,
        "loss.class_prior": True,
        "views.query.randaugment.operations": 2,
    },
    # no paper: facebookresearch/ConvNeXt's TRAINING.md, from 22k at 224 pixels
    "imagenet_lt_convnext_tiny": {
        "lr": 5e-5,
        "optimizer.weight_decay": 1e-8,
        "optimizer.layer_decay": 0.8,
        "schedule.epochs": 30,
        "schedule.warmup_epochs": 0,
        "step.global_batch": 512,
    },
    # PaCo/Full-ImageNet/sh/train_resnet{50,101,200}.sh
    "imagenet_resnet50": {"step.micro_batch": 64, "step.micro_batches": 4, "lr": 0.04, "loss.class_prior": False},
    "imagenet_resnet101": {"step.global_batch": 256, "lr": 0.04, "optimizer.weight_decay": 1e-4, "loss.alpha": 0.05},
    "imagenet_resnet200": {
        "engine.published_precision": "float16",
        "views.query.name": "randclsstack",
        "views.query.randaugment.operations": 3,
        "views.query.randaugment.magnitude": 12,
        "lr": 0.04,
    },
    # GPaCo/LT/sh/ImageNet/train_resnet50.sh and sh/CIFAR/CIFAR100_train.sh
    "gpaco_imagenet_resnet50": {"loss.smoothing": 0.1, "lr": 0.08, "step.global_batch": 512, "loss.class_prior": False},
    "gpaco_cifar100_resnet50": {
        "loss.temperature": 0.07,
        "loss.alpha": 0.01,
        "queue.length": 1024,
        "views.query.name": "cifar_key",
        "views.key.name": "cifar_key",
        "key_encoder": None,
    },
    # GPaCo/LT/sh/LT/*.sh: --gres=gpu:4 of the Inat_train_R152, no --fp16 in ImageNetLT_train_X50 and _X101
    "gpaco_inaturalist2018_resnet152": {"step.micro_batch": 32, "step.micro_batches": 4, "lr": 0.04},
    "gpaco_imagenet_lt_resnext50": {
        "engine.published_precision": "float32",
        "loss.alpha": 0.05,
        "views.query.randaugment.operations": 3,
    },
    "gpaco_imagenet_lt_resnext101": {
        "engine.published_precision": "float32",
        "lr": 0.06,
        "views.query.randaugment.operations": 5,
    },
    # sh/PlacesLT_train_R152.sh: --aug sim_sim --epochs 30 --reload_torch resnet152-394f9c45.pth, IMAGENET1K_V1's file
    "places_lt_resnet152": {
        "model.start_from": "torchvision:IMAGENET1K_V1",
        "schedule.epochs": 30,
        "engine.published_precision": "float16",
    },
    "gpaco_places_lt_resnet152": {
        "model.start_from": "torchvision:IMAGENET1K_V1",
        "views.query.name": "sim",
        "views.key.name": "sim",
        "schedule.epochs": 30,
        "loss.alpha": 0.02,
        "engine.published_precision": "float16",
    },
}


def value(recipe, key):
    """A setting by its dotted key, and what is written in another way in the sources."""
    if key == "taus":
        return [1 - each for each in recipe.loss.balpoe.lambdas]
    found = recipe
    for name in key.split("."):
        found = getattr(found, name)
    return found


@pytest.mark.parametrize(("name", "published"), PUBLISHED.items())
def test_a_recipe_has_the_published_values(name, published):
    """Those that an earlier version had otherwise, or that only this recipe has."""
    recipe = load_recipe(name)
    assert {key: value(recipe, key) for key in published} == published


@pytest.mark.parametrize(("number", "factor"), [(10, 0.02), (12, 0.015)])
@pytest.mark.parametrize("small", [None, *sorted(SMALL_RECIPES.glob("*.yaml"))], ids=lambda path: path and path.stem)
def test_rides_rows_re_weight_in_the_last_fifth(number, factor, small):
    """At every scale; without it the published loss cannot run. Nesterov and cosine centers everywhere."""
    table = load_table(str(number))
    for row in table.rows:
        recipe = table.resolve(row, small)
        assert value(recipe, "loss.ride.reweight_epoch") == round(0.8 * recipe.schedule.epochs)
        assert recipe.optimizer.nesterov
        assert recipe.model.centers == "cosine"
        if small is None:
            assert value(recipe, "loss.ride.reweight_factor") == factor


def test_the_share_is_of_the_epochs_that_are_trained():
    """Also where a user shortens the training; what he sets himself stays."""
    table = load_table("10")
    row = table.rows[0]
    key = "loss.ride.reweight_epoch"
    assert value(table.resolve(row, None, ("schedule.epochs=50",)), key) == 40
    assert value(table.resolve(row, None, (f"{key}=7",)), key) == 7


@pytest.mark.parametrize(("name", "epochs"), [("methods", 26), ("trials", 26), ("glyphs", 3)])
def test_methods_are_compared_with_an_equal_budget_of_steps(name, epochs):
    """The same images, batch and epochs for every row; those of a second stage with those of its first."""
    table, budgets, same = load_table(name), set(), set()
    for row in table.rows:
        if row.drawn:
            stages = [stage for stage in (table.first_stage(row), row) if stage is not None]
            recipes = [table.resolve(s, None, ("model.start_from=FIRST",) if s.after else ()) for s in stages]
            budgets.add(sum(recipe.schedule.epochs for recipe in recipes))
            same |= {(recipe.step.global_batch, recipe.data.shards) for recipe in recipes}
    assert budgets == {epochs}
    assert [batch for batch, _ in same] == [64]


KIN = {
    "CE, tau-normalised": "CE",
    "RIDE, 1 expert": "RIDE, 3 experts",
    "RIDE, 2 experts": "RIDE, 3 experts",
    "SADE, 3 experts, aggregated": "SADE, 3 experts",
    "PaCo without center rebalance": "PaCo",
}
TRIED_BEFORE = {"PaCo", "PaCo, 3 experts", "PaCo without center rebalance", "GPaCo"}  # by some 20 trials of the demo


def test_every_method_is_tried_with_two_learning_rates_on_validation():
    """But what shares those of its kin; second stages, from the same first stage."""
    methods, trials = load_table("methods"), load_table("trials")
    tried: dict[str, set[float]] = {}
    for row in trials.rows:
        if row.drawn:
            name, _, lr = row.name.rpartition(", lr ")
            recipe = trials.resolve(row, None, ("model.start_from=FIRST",) if row.after else ())
            assert recipe.optimizer.lr == float(lr)
            assert row.evaluate == ("--split", "val")
            tried.setdefault(name, set()).add(float(lr))
            (of_methods,) = (each for each in methods.rows if each.name == name)
            assert {s for s in row.set if "optimizer.lr" not in s} == {
                s for s in of_methods.set if "optimizer.lr" not in s
            }
    assert set(map(frozenset, tried.values())) == {frozenset({0.1, 0.2})}
    assert {row.name for row in methods.rows if row.drawn} - set(tried) == KIN.keys() | {"RIDE, 3 experts, routed"}


def test_methods_have_the_learning_rate_that_was_best_on_validation():
    """By the kept results of table `trials`; the recipe's rate where two are equal. Kin share that of their kin."""
    accuracies: dict[str, dict[float, float]] = {}
    kept = {line["row"]: line for line in map(json.loads, (ROOT / "results" / "trials.jsonl").read_text().splitlines())}
    for row in load_table("trials").rows:
        if row.drawn:
            name, _, lr = row.name.rpartition(", lr ")
            figures = kept[f"{row.folder}-seed1"]
            assert figures["split"] == "val"
            accuracies.setdefault(name, {})[float(lr)] = figures["all"]
    table = load_table("methods")
    for row in table.rows:
        if row.drawn and "routed" not in row.name:
            recipe = table.resolve(row, None, ("model.start_from=FIRST",) if row.after else ())
            of_rates = accuracies[KIN.get(row.name, row.name)]
            assert recipe.optimizer.lr == max(of_rates, key=lambda lr: (of_rates[lr], lr)), row.name
            assert row.trials == (22 if row.name in TRIED_BEFORE else 2), row.name


# --fp16 of PaCo's and GPaCo's sh/; engine_finetune_paco.py has torch.cuda.amp
FLOAT16 = {
    "places_lt_resnet152",
    "gpaco_places_lt_resnet152",
    "imagenet_resnet200",
    "gpaco_imagenet_vit_base",
    "gpaco_imagenet_vit_large",
}


def test_every_recipe_of_a_table_says_in_what_precision_it_was_published():
    """float16 in scripts with --fp16; float32 elsewhere: RIDE's and BalPoE's `use_fp16` is False, and BCL's and ProCo's
    code has no autocast. What a run has chosen otherwise is a deviation."""
    tables = [load_table(path.stem) for path in sorted((ROOT / "ds_configs" / "tables").glob("*.yaml"))]
    paths = {Path(table.recipe_of(row)) for table in tables if table.scale == "paper" for row in table.rows}
    assert len(paths) > 20
    for path in paths:
        engine = load_recipe(path).engine
        assert engine.published_precision == ("float16" if path.stem in FLOAT16 else "float32"), path.stem
        assert engine.precision == "auto"
        assert deviation(choose(engine, Hardware())) == (
            "float32 where float16 is published" if path.stem in FLOAT16 else None
        )
        assert deviation(choose(engine, Hardware("cuda", (9, 0)))).startswith("bfloat16 where ")


def counted(table):
    """Its rows, those with inferred values, and those whose figure is not at hand."""
    return len(table.rows), sum(1 for row in table.rows if row.inferred), sum(1 for row in table.rows if not row.paper)


def test_every_table_at_paper_scale_is_counted_by_label():
    """In docs/methods.md; a row has a figure, or says where it is reported."""
    page = (ROOT / "docs" / "methods.md").read_text()
    tables = {path.stem: load_table(path.stem) for path in sorted((ROOT / "ds_configs" / "tables").glob("*.yaml"))}
    at_paper_scale = {name: table for name, table in tables.items() if table.scale == "paper"}
    listed = {name: tuple(map(int, numbers)) for name, *numbers in re.findall(LISTED, page, re.MULTILINE)}
    assert listed == {name: counted(table) for name, table in at_paper_scale.items()}
    for table in at_paper_scale.values():
        assert all(row.paper or row.source for row in table.rows)
