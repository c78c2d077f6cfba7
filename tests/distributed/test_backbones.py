"""Networks of each family of timm take their steps on two ranks as on one, at the ZeRO stages and as they are run."""

import json

import pytest
import torch
from safetensors.torch import save_file

from paco_ds.checkpoint import newest_checkpoint
from tests.distributed.test_step import FLOAT32, check
from tests.matrix import matrix
from tests.models.tiny_networks import TINY, of
from tests.recipes import model_of, tiny_recipe, write_tiny_recipe

STEP = "tests.distributed.runs:run_steps"
SMALL = ("step.micro_batch=4", "step.micro_batches=2", "optimizer.lr=0.02", "queue.length=16")
METHODS = {
    "paco": ("key_encoder.batch_norm=auto",),
    "local": ("key_encoder.batch_norm=auto", "model.projection=three_layer"),
    "gpaco": ("key_encoder=none", "model.projection=three_layer"),
    "balanced": ("loss.method=balanced_softmax",),
    "experts": ("loss.method=ride", "model.experts=2", "model.centers=cosine"),
}
BRANCHING = ("vit", "deit3", "dinov2", "swin", "convnext")


def steps(pool, world_size, stage, *overrides, number=2):
    return pool(world_size).run(STEP, stage=stage, steps=number, overrides=(*SMALL, *overrides))[0]


@pytest.mark.parametrize(
    ("family", "method", "stage"),
    matrix(
        TINY,
        METHODS,
        (0, 1, 3),
        each_change=[
            ("vit", "paco", 3),
            ("deit3", "local", 0),
            ("swin", "gpaco", 1),
            ("convnext", "experts", 3),
            ("efficientnet", "paco", 1),
            ("eva", "balanced", 3),
            ("dinov2", "experts", 0),
        ],
    ),
)
def test_two_ranks_take_the_steps_of_one(pool, family, method, stage):
    """Losses to 1e-5 and updates to 1e-3; the one rank without ZeRO."""
    if method == "experts" and family not in BRANCHING:
        pytest.skip("refused by name, see tests/models/test_timm.py")
    settings = (*of(family), *METHODS[method])
    two = steps(pool, 2, stage, *settings)
    check(two, steps(pool, 1, 0, *settings), FLOAT32)
    assert two.skipped == [None, None]
    assert two.after.keys() == model_of(tiny_recipe(*SMALL, *settings), 4).state_dict().keys()  # what a resume asks for
    assert not all(torch.equal(two.after[name], before) for name, before in two.before.items())


def test_stochastic_depth_is_drawn_by_micro_batch(pool):
    """As on one rank, whatever was drawn before; blocks of queries and of keys are left out."""
    network = of("vit")
    dropping = [name.replace("drop_path_rate: 0", "drop_path_rate: 0.5") for name in network]
    settings = (*dropping, "model.kwargs.drop_path_rate=0.5", *METHODS["paco"])
    one = steps(pool, 1, 0, *settings)
    check(steps(pool, 2, 1, *settings), one, FLOAT32)
    assert steps(pool, 1, 0, *settings).losses == one.losses
    whole = steps(pool, 1, 0, *network, *METHODS["paco"])
    assert all(abs(a - b) > 1e-3 for a, b in zip(whole.losses, one.losses, strict=True))


@pytest.mark.parametrize(
    ("family", "setting", "stage"),
    [
        *((family, "activation_checkpointing", 3) for family in ("vit", "efficientnet")),
        *(
            pytest.param(family, setting, stage, marks=pytest.mark.soak)
            for family in TINY
            for setting, stage in (("activation_checkpointing", 3), ("channels_last", 3), ("compile", 1))
            if (family, setting)
            not in (("vit", "activation_checkpointing"), ("efficientnet", "activation_checkpointing"))
        ),
    ],
)
def test_how_a_network_is_run_leaves_its_steps(pool, family, setting, stage):
    """Recomputed, in another memory format, compiled: to rounding, on two ranks. The last two add in another order,
    and BatchNorm over four images makes more of that in a second step, so they take one."""
    settings, number = (*of(family), *METHODS["paco"]), 2 if setting == "activation_checkpointing" else 1
    fast = steps(pool, 2, stage, *settings, f"engine.{setting}=true", number=number)
    check(fast, steps(pool, 2, 0, *settings, number=number), FLOAT32)


def test_a_run_from_pretrained_weights_says_what_it_took_and_resumes(pool, striped_shards, tmp_path):
    """A ViT from a file on two ranks: both encoders start there, names are listed, resume is bit-equal."""
    tiny = of("vit", depth=1)
    network = model_of(tiny_recipe(*tiny, "seed=7"), 4).query_encoder.backbone.network
    state = network.state_dict() | {"head.weight": torch.ones(9, 16)}
    del state["cls_token"]
    save_file(state, tmp_path / "weights.safetensors")
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    small = ("schedule.epochs=1", "key_encoder.batch_norm=auto", "model.projection=three_layer")
    where = (f"data.shards={striped_shards}", "engine.deepspeed=zero.json", "model.start_from=weights.safetensors")
    write_tiny_recipe(tmp_path / "tiny.yaml", *tiny, *where, *small)
    train = "tests.distributed.training:train"
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    pool(2).run(train, recipe=tmp_path / "tiny.yaml", run=whole)
    pool(2).run(train, recipe=tmp_path / "tiny.yaml", run=halves, stop_at_step=2)
    pool(2).run(train, recipe=tmp_path / "tiny.yaml", run=halves)
    lists = json.loads((whole / "started_from.json").read_text())
    assert lists["not in the file, drawn from the seed"] == ["cls_token"]
    assert lists["classifier, left out"] == ["head.weight"]
    first, second = (newest_checkpoint(run).model() for run in (whole, halves))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
