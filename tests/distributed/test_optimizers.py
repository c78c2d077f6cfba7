"""AdamW, LARS and Muon on real ranks: a plain loop's steps, the guard, checkpoints, elasticity, the plan."""

import functools
import json
import re
import shutil

import pytest
import torch

from paco_ds.checkpoint import newest_checkpoint, read_checkpoint
from tests.distributed.reference import plain_steps
from tests.distributed.test_plan import check_memory
from tests.models.tiny_networks import of
from tests.pool import RankError
from tests.recipes import tiny_recipe, write_tiny_recipe

STEPS = 5
RUNS = "tests.distributed.runs"
TRAIN = "tests.distributed.training:train"
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
SMALL = ("step.micro_batch=4", "step.micro_batches=2", "queue.length=16", "key_encoder.batch_norm=auto")
# an eps so large that the update of a gradient of zero, but for rounding, is none
ADAMW = (
    "optimizer.name=adamw",
    "optimizer.lr=0.001",
    "optimizer.eps=0.001",
    "optimizer.weight_decay=0.05",
    "optimizer.clip_norm=2",
)
GROUPS = ("optimizer.decay_norms_and_biases=false", "optimizer.layer_decay=0.5")
VIT = (*of("vit"), *SMALL, *ADAMW, *GROUPS, "model.projection=three_layer")
WHOLE = {  # optimizers of whole weights, on a ViT and on a CIFAR ResNet
    "lars": (
        *SMALL[:3],
        "optimizer.name=lars",
        "optimizer.lr=0.1",
        "optimizer.trust_coefficient=0.05",
        "optimizer.weight_decay=0.05",
        "optimizer.decay_norms_and_biases=false",
        "optimizer.clip_norm=2",
    ),
    "muon": (
        *of("vit"),
        *SMALL,
        *ADAMW,
        "optimizer.name=muon",
        "optimizer.lr=0.0001",
        "optimizer.momentum=0.95",
        "optimizer.nesterov=true",
        "optimizer.decay_norms_and_biases=false",
        "model.projection=three_layer",
    ),
}
FIRST_DEPTHS = ("cls_token", "pos_embed", "patch_embed")


def group_of(name, parameter):
    """Of the ViT of four blocks, written out: stem, blocks, the norm with the last of them, heads."""
    depth = 5
    if (inside := name.removeprefix("query_encoder.backbone.network.")) != name:
        block = re.match(r"blocks\.(\d)", inside)
        depth = 0 if inside.startswith(FIRST_DEPTHS) else int(block[1]) + 1 if block else 4
    undecayed = parameter.ndim == 1 or inside in FIRST_DEPTHS
    return 0.5 ** (5 - depth), 0.0 if undecayed else 0.05


@functools.cache
def plain():
    recipe = tiny_recipe(*VIT)
    return plain_steps(recipe, STEPS, recipe.lr, group_of=group_of)


@pytest.mark.parametrize(
    ("world_size", "stage"), [(1, 0), (1, 1), (1, 3), (2, 0), (2, 1), (2, 2), (2, 3)], ids=lambda n: str(n)
)
def test_weights_and_states_are_those_of_a_plain_loop(pool, world_size, stage):
    """After five clipped steps, to 1e-6: weights, both means, the number of steps."""
    outcome = pool(world_size).run(f"{RUNS}:run_steps", stage=stage, steps=STEPS, overrides=VIT)[0]
    expected = plain()
    assert outcome.losses == pytest.approx(expected.losses, abs=1e-5)
    assert outcome.states.keys() == expected.states.keys()
    for got, wanted in ((outcome.after, expected.after), (outcome.states, expected.states)):
        for name, value in wanted.items():
            torch.testing.assert_close(got[name], value, rtol=0, atol=1e-6, msg=name)
    assert max(float((value - expected.before[name]).abs().max()) for name, value in expected.after.items()) > 1e-3


def is_matrix_of_vit(name, parameter):
    return parameter.ndim == 2 and ("network.blocks." in name or "projection" in name)


@functools.cache
def plain_of_whole(name):
    recipe = tiny_recipe(*WHOLE[name])
    matrices = is_matrix_of_vit if name == "muon" else lambda *_: False
    decay = lambda *pair: (1.0, group_of(*pair)[1])  # noqa: E731
    return plain_steps(recipe, STEPS, recipe.lr, group_of=decay, is_matrix=matrices)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name", WHOLE)
def test_lars_and_muon_are_those_of_a_plain_loop(pool, world_size, name):
    """After five clipped steps, to 1e-6: weights, states, the number of steps of Muon's AdamW. Muon's own matrices to a
    twentieth of their updates: directions in which a gradient is nothing but rounding are made as long as all others.
    """
    outcome = pool(world_size).run(f"{RUNS}:run_steps", stage=0, steps=STEPS, overrides=WHOLE[name])[0]
    expected = plain_of_whole(name)
    assert outcome.losses == pytest.approx(expected.losses, abs=1e-4 if name == "muon" else 1e-5)
    assert outcome.states.keys() == expected.states.keys()
    for key, value in expected.states.items():
        torch.testing.assert_close(outcome.states[key], value, rtol=1e-4, atol=1e-6, msg=key)
    moved = 0.0
    for key, value in expected.after.items():
        change, error = value - expected.before[key], (outcome.after[key] - value).abs()
        moved = max(moved, float(change.abs().max()))
        if name == "muon" and is_matrix_of_vit(key, value):
            assert float(error.norm()) <= 0.05 * float(change.norm()), key
        else:
            assert float(error.max()) <= 1e-6, key
    assert moved > 3e-4


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("fault", ["gradient", "keys", "outlier"])
def test_a_refused_step_of_lars_and_muon_changes_nothing(pool, name, fault):
    """Weights, states and queue stand bit for bit on both ranks; the step after it goes on."""
    overrides = (*WHOLE[name], "engine.max_grad_norm_ratio=10")
    arguments = {"stage": 0, "fault": fault, "fault_rank": 1, "overrides": overrides}
    for before, after, later in pool(2).run(f"{RUNS}:state_around_a_fault", **arguments):
        assert (after.skipped, later.skipped) == ([fault], [None])
        for kind in ("after", "states", "queue"):
            for key, value in getattr(before, kind).items():
                assert "key_encoder" in key or torch.equal(value, getattr(after, kind)[key]), key
        assert not torch.equal(after.after["centers.weight"], later.after["centers.weight"])


@pytest.mark.parametrize("name", WHOLE)
def test_states_of_lars_and_muon_go_in_and_out(pool, name):
    """Of every group."""
    assert all(pool(1).run(f"{RUNS}:states_there_and_back", stage=0, overrides=WHOLE[name]))


@pytest.mark.parametrize(
    ("stage", "fault", "zero"),
    [
        (0, "gradient", None),
        (1, "loss", None),
        (2, "gradient", None),
        (3, "keys", None),
        (0, "outlier", None),
        (2, "outlier", None),
        pytest.param(1, "gradient", OFFLOAD, marks=pytest.mark.soak),
        pytest.param(3, "gradient", OFFLOAD, marks=pytest.mark.soak),
    ],
)
def test_a_step_that_is_refused_changes_nothing(pool, stage, fault, zero):
    """Weights, means, the number of steps and the queue stand bit for bit on both ranks; the step after it goes on."""
    overrides = (*VIT, "engine.max_grad_norm_ratio=10")
    arguments = {"stage": stage, "fault": fault, "fault_rank": 1, "overrides": overrides, "zero": zero}
    for before, after, later in pool(2).run(f"{RUNS}:state_around_a_fault", **arguments):
        assert (after.skipped, later.skipped) == ([fault], [None])
        assert (float(before.states["step"]), float(later.states["step"])) == (2, 3)
        for kind in ("after", "states", "queue"):
            for name, value in getattr(before, kind).items():
                assert "key_encoder" in name or torch.equal(value, getattr(after, kind)[name]), name
        assert not torch.equal(after.after["centers.weight"], later.after["centers.weight"])


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_first_step_that_is_refused_leaves_states_of_zero(pool, stage):
    """And no step counted."""
    arguments = {"stage": stage, "steps": 1, "fault": "gradient", "fault_step": 0, "overrides": VIT}
    for outcome in pool(2).run(f"{RUNS}:run_steps", **arguments):
        assert outcome.skipped == ["gradient"]
        assert not any(state.any() for state in outcome.states.values())


@pytest.mark.parametrize(
    ("world_size", "stage", "zero"),
    [(1, 0, None), (2, 1, None), (2, 2, None), (2, 3, None), (1, 3, None), (2, 1, OFFLOAD), (2, 3, OFFLOAD)],
)
def test_states_go_in_and_out_of_every_stage(pool, world_size, stage, zero):
    """Of every group, on the device and on the host."""
    arguments = {"stage": stage, "overrides": VIT, "zero": zero}
    assert all(pool(world_size).run(f"{RUNS}:states_there_and_back", **arguments))


@pytest.fixture(scope="module")
def recipe(striped_shards, tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    for stage in range(4):
        (path.parent / f"zero{stage}.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    write_tiny_recipe(path, *VIT, f"data.shards={striped_shards}", "engine.deepspeed=zero1.json")
    return path


def train(pool, recipe, run, world_size, stage, stop, *overrides):
    overrides = (f"engine.deepspeed={recipe.parent / f'zero{stage}.json'}", "checkpoint.keep=5", *overrides)
    pool(world_size).run(TRAIN, recipe=recipe, run=run, overrides=overrides, stop_at_step=stop)
    checkpoint = newest_checkpoint(run)
    return checkpoint.model() | {f"optimizer.{name}": state for name, state in checkpoint.optimizer().items()}


@pytest.mark.parametrize("stage", [*(pytest.param(s, marks=pytest.mark.soak) for s in (0, 1, 2)), 3])
def test_a_resumed_run_is_bit_equal_on_the_same_ranks(pool, recipe, tmp_path, stage):
    """Weights, means and number of steps, stopped in mid-epoch."""
    straight = train(pool, recipe, tmp_path / "straight", 2, stage, 4)
    train(pool, recipe, tmp_path / "resumed", 2, stage, 2)
    resumed = train(pool, recipe, tmp_path / "resumed", 2, stage, 4)
    assert resumed.keys() == straight.keys()
    for name, value in straight.items():
        assert torch.equal(resumed[name], value), name
    assert straight["optimizer.step"] == 4


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((2, 0), (1, 3)),
        ((2, 3), (1, 0)),
        pytest.param((1, 2), (2, 1), marks=pytest.mark.soak),
        pytest.param((2, 1), (1, 2), marks=pytest.mark.soak),
    ],
)
def test_a_run_goes_on_at_another_stage_and_number_of_ranks(pool, recipe, tmp_path, first, second):
    """Two steps elsewhere make the update of two steps where it was, to 1e-3."""
    stayed, moved = tmp_path / "stayed", tmp_path / "moved"
    train(pool, recipe, stayed, *first, 2)
    shutil.copytree(stayed, moved)
    expected, got = train(pool, recipe, stayed, *first, 4), train(pool, recipe, moved, *second, 4)
    checkpoint = read_checkpoint(moved / "checkpoints" / "step-00000002")
    before = checkpoint.model() | {f"optimizer.{name}": state for name, state in checkpoint.optimizer().items()}
    difference, size = (
        sum(float(((a[name] - b[name]).float() ** 2).sum()) for name in before) ** 0.5
        for a, b in ((got, expected), (expected, before))
    )
    assert difference <= 1e-3 * size
    assert got["optimizer.step"] == 4


@pytest.mark.parametrize("name", WHOLE)
def test_a_resumed_run_of_lars_and_muon_is_bit_equal_and_goes_on_at_another_number_of_ranks(
    pool, striped_shards, tmp_path, name
):
    """Stopped in mid-epoch; on one rank two steps make the update of two on two ranks, to 1e-3 (of Muon 1e-2, whose
    updates are rounded to bfloat16)."""
    file = tmp_path / "tiny.yaml"
    (tmp_path / "zero0.json").write_text(json.dumps({"zero_optimization": {"stage": 0}}))
    write_tiny_recipe(file, *WHOLE[name], f"data.shards={striped_shards}", "engine.deepspeed=zero0.json")
    straight = train(pool, file, tmp_path / "straight", 2, 0, 4)
    train(pool, file, tmp_path / "resumed", 2, 0, 2)
    shutil.copytree(tmp_path / "resumed", tmp_path / "moved")
    checkpoint = read_checkpoint(tmp_path / "resumed" / "checkpoints" / "step-00000002")
    before = checkpoint.model() | {f"optimizer.{key}": state for key, state in checkpoint.optimizer().items()}
    resumed = train(pool, file, tmp_path / "resumed", 2, 0, 4)
    assert resumed.keys() == straight.keys()
    for key, value in straight.items():
        assert torch.equal(resumed[key], value), key
    moved = train(pool, file, tmp_path / "moved", 1, 0, 4)
    difference, size = (
        sum(float(((a[key] - b[key]).float() ** 2).sum()) for key in before) ** 0.5
        for a, b in ((moved, straight), (straight, before))
    )
    assert difference <= (1e-2 if name == "muon" else 1e-3) * size


def test_a_checkpoint_of_another_optimizer_is_refused_by_name(pool, recipe, tmp_path):
    """With both."""
    run = tmp_path / "run"
    train(pool, recipe, run, 1, 0, 1)
    others = ("optimizer.name=sgd", "optimizer.eps=1e-8")
    with pytest.raises(RankError, match=r"optimizer\.name: 'adamw' in the checkpoint, 'sgd' in this recipe"):
        train(pool, recipe, run, 1, 0, 2, *others)


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.soak), 2])
def test_the_plan_of_a_vit_with_adamw_is_within_15_percent(pool, world_size):
    """ZeRO-1, a ViT of 5 million weights in groups by depth. Its smallest activations are of over a MiB,
    which the allocator gives back when they are freed."""
    views = (f"views.{v}={json.dumps({'name': 'small', 'size': 96, 'cutout': 0})}" for v in ("query", "key"))
    vit = ("model.backbone=timm:vit_tiny_patch16_224", "model.projection_dim=128", "queue.length=8192", *views)
    evaluation = f"views.evaluation={json.dumps({'name': 'eval', 'size': 96, 'resize': 96})}"
    batches = ("step.micro_batch=48", "step.micro_batches=2", "key_encoder.batch_norm=auto")
    check_memory(pool(world_size), stage=1, overrides=(*vit, evaluation, *batches, *ADAMW, *GROUPS))
