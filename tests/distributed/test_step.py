"""One optimizer step on real ranks against its meaning: a plain loop in one process."""

import functools
from dataclasses import replace

import pytest
import torch

from tests.distributed.reference import plain_steps
from tests.distributed.runs import Outcome
from tests.matrix import matrix
from tests.recipes import tiny_recipe

STEPS = 3
FLOAT32 = {"loss": 1e-5, "update": 1e-3}
# bfloat16 keeps 8 bits, so a difference of float32 rounding can flip a rounding 60,000 times as large
AUTOCAST = {"loss": 1e-3, "update": 5e-2}


@functools.cache
def reference(*overrides: str) -> Outcome:
    recipe = tiny_recipe(*overrides)
    return plain_steps(recipe, STEPS, recipe.lr)


def check(outcome: Outcome, expected: Outcome, bounds: dict[str, float]) -> None:
    """Losses agree, and so does the update of every part of the model, whatever parts it has, and of statistics."""
    worst = max(abs(a - b) for a, b in zip(outcome.losses, expected.losses, strict=True))
    assert worst <= bounds["loss"], f"losses differ by {worst:.1e}"
    assert outcome.after.keys() == expected.after.keys()
    for part in ("running", *sorted({name.split(".")[0] for name in expected.after})):
        difference, size = update_difference(outcome, expected, part)
        assert difference <= bounds["update"] * size, f"update of {part} differs by {difference:.1e} of {size:.1e}"


def update_difference(outcome: Outcome, expected: Outcome, part: str) -> tuple[float, float]:
    """(||dw - dw_ref||, ||dw_ref||) of weights, or of running statistics."""
    difference = size = 0.0
    for name, after in expected.after.items():
        running = "running" in name
        if not after.is_floating_point() or running != (part == "running") or not (running or name.startswith(part)):
            continue
        wanted = after - expected.before[name]
        got = outcome.after[name] - outcome.before[name]
        difference += float(((got - wanted) ** 2).sum())
        size += float((wanted**2).sum())
    return difference**0.5, size**0.5


@pytest.mark.parametrize(
    ("world_size", "stage"),
    matrix((1, 2, 4), (0, 1, 2, 3), each_change=[(1, 0), (1, 3), (2, 0), (2, 1), (2, 2), (2, 3), (4, 1)]),
)
def test_any_ranks_and_stage_take_the_step_of_one_process(pool, world_size, stage):
    """Losses to 1e-5 and the update to 1e-3 after three steps at the recipe's learning rate; queues are equal."""
    outcomes = pool(world_size).run("tests.distributed.runs:run_steps", stage=stage, steps=STEPS)
    for outcome in outcomes:
        check(outcome, reference(), FLOAT32)
        assert outcome.skipped == [None] * STEPS
        for name, value in outcome.queue.items():
            assert torch.equal(value, outcomes[0].queue[name])
        for name, value in outcome.after.items():
            assert torch.equal(value, outcomes[0].after[name]), name


EXPERTS = ("model.experts=2", "model.expert_width=reduced", "step.micro_batch=4")


@pytest.mark.parametrize(
    ("world_size", "stage", "key_encoder"),
    [(1, 0, "none"), (2, 3, "momentum"), (2, 3, "none"), (4, 1, "momentum")],
)
def test_experts_are_heads_of_the_same_step(pool, world_size, stage, key_encoder):
    """PaCo and GPaCo on two experts: keys cross ranks beside each other, the loss is the mean over experts."""
    overrides = (*EXPERTS, "key_encoder=none", "model.projection=three_layer") if key_encoder == "none" else EXPERTS
    outcomes = pool(world_size).run("tests.distributed.runs:run_steps", overrides=overrides, stage=stage, steps=STEPS)
    check(outcomes[0], reference(*overrides), FLOAT32)
    assert outcomes[0].queue["keys"].shape[1] == 2 * 8


BCL = ("loss.method=bcl", "key_encoder=none", "queue.length=0", "step.micro_batch=4")


@pytest.mark.parametrize(("world_size", "stage"), [(1, 0), (2, 1), (2, 3)])
def test_bcl_takes_the_step_of_its_equation(pool, world_size, stage):
    """Two views of one encoder and no queue, as published; prototypes and their projection are trained too."""
    outcome = pool(world_size).run("tests.distributed.runs:run_steps", overrides=BCL, stage=stage, steps=STEPS)[0]
    expected = reference(*BCL)
    check(outcome, expected, FLOAT32)
    prototypes = [name for name in expected.after if name.startswith("prototypes.") and name.endswith("weight")]
    assert prototypes
    assert not any(torch.equal(outcome.after[name], outcome.before[name]) for name in prototypes)


@pytest.mark.parametrize("fault", ["gradient lost", "statistics not averaged"])
def test_the_check_notices_prototypes_that_differ(fault):
    """Negative controls: as above, prototypes' weights left as they were, or their running statistics."""
    expected = reference(*BCL)
    left = [n for n in expected.after if n.startswith("prototypes.") and ("running" in n) == (fault != "gradient lost")]
    after = {**expected.after, **{name: expected.before[name] for name in left}}
    with pytest.raises(AssertionError, match="differs"):
        check(replace(expected, after=after), expected, FLOAT32)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_autocast_takes_the_step_of_one_rank_within_bfloat16_rounding(pool, stage):
    """Every stage agrees with one rank under autocast; weights and momentum stay float32, losses near float32's."""
    (one,) = pool(1).run("tests.distributed.runs:run_steps", autocast=True, steps=STEPS)
    two = pool(2).run("tests.distributed.runs:run_steps", stage=stage, autocast=True, steps=STEPS)[0]
    check(two, one, AUTOCAST)
    distances = [abs(a - b) / b for a, b in zip(two.losses, reference().losses, strict=True)]
    assert 1e-6 < max(distances) < 0.02
    assert all(t.dtype == torch.float32 for t in (*two.states.values(), two.after["centers.weight"]))


@pytest.mark.parametrize(
    ("fault", "stage"),
    [
        ("gradients doubled", 1),
        ("micro-batch lost", 1),
        ("statistics not averaged", 1),
        ("no moving average", 3),
    ],
)
def test_the_check_notices_a_wrong_step(pool, fault, stage):
    """Negative controls: the same check fails when the step is wrong in one way."""
    outcome = pool(2).run("tests.distributed.runs:run_steps", stage=stage, steps=STEPS, fault=fault)[0]
    with pytest.raises(AssertionError, match="differ"):
        check(outcome, reference(), FLOAT32)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_clipping_is_by_the_global_norm(pool, stage):
    """A small clip_norm gives the update of the plain loop, and the norm before clipping is reported."""
    override = "optimizer.clip_norm=0.5"
    outcome = pool(2).run("tests.distributed.runs:run_steps", stage=stage, steps=STEPS, overrides=(override,))[0]
    check(outcome, reference(override), FLOAT32)
    assert min(outcome.grad_norms) > 0.5


def test_keys_normalised_over_micro_batches_move_no_image(pool):
    """`batch_norm: local` agrees with the plain loop and sends no images."""
    override = "key_encoder.batch_norm=local"
    outcome = pool(2).run("tests.distributed.runs:run_steps", overrides=(override,), steps=STEPS)[0]
    check(outcome, reference(override), FLOAT32)
    assert "all_to_all" not in outcome.bytes_sent


def test_shuffled_key_views_cross_at_most_once_as_bytes(pool):
    """No rank sends more than its own images, each 3 x 12 x 12 bytes."""
    recipe = tiny_recipe()
    for outcome in pool(4).run("tests.distributed.runs:run_steps", steps=STEPS):
        own = recipe.step.global_batch // 4 * 3 * 12 * 12 * STEPS
        assert 0 < outcome.bytes_sent["all_to_all"] <= own


def test_small_parameters_follow_at_stage_3_whatever_the_persistence_threshold(pool):
    """Threshold 0 partitions BatchNorm too; the default keeps full copies, which the moving average must reach."""
    outcomes = [
        pool(2).run("tests.distributed.runs:run_steps", stage=3, steps=STEPS, zero=zero)[0]
        for zero in ({}, {"stage3_param_persistence_threshold": 0})
    ]
    for name, value in outcomes[0].after.items():
        assert torch.equal(value, outcomes[1].after[name]), name


@pytest.mark.parametrize("method", ["cross_entropy", "balanced_softmax"])
def test_methods_without_contrast_take_steps(pool, method):
    """No key encoder, no queue, the same step."""
    override = (f"loss.method={method}",)
    one, two = (
        pool(W).run("tests.distributed.runs:run_steps", overrides=override, stage=1, steps=STEPS)[0] for W in (1, 2)
    )
    check(two, one, FLOAT32)


@pytest.mark.parametrize(
    ("stage", "clip", "fault"),
    matrix(
        (0, 1, 2, 3),
        ("null", "5"),
        ("keys", "loss", "gradient", "statistics", "outlier"),
        each_change=[
            (0, "5", "statistics"),
            (1, "null", "statistics"),
            (3, "5", "statistics"),
            (0, "5", "outlier"),
            (1, "5", "outlier"),
            (3, "null", "outlier"),
            (0, "null", "keys"),
            (0, "5", "loss"),
            (0, "null", "gradient"),
            (0, "5", "gradient"),
            (1, "5", "keys"),
            (1, "null", "loss"),
            (1, "5", "gradient"),
            (2, "null", "loss"),
            (2, "5", "gradient"),
            (3, "5", "keys"),
            (3, "null", "loss"),
            (3, "null", "gradient"),
        ],
    ),
)
def test_something_not_finite_on_one_rank_changes_nothing_on_any(pool, fault, stage, clip):
    """Weights, momentum, queue and statistics stand bit for bit; the step after it goes on."""
    overrides = (f"optimizer.clip_norm={clip}", "engine.max_grad_norm_ratio=10")
    arguments = {"stage": stage, "fault": fault, "fault_rank": 1, "overrides": overrides}
    for before, after, later in pool(2).run("tests.distributed.runs:state_around_a_fault", **arguments):
        assert after.skipped == [fault]
        assert later.skipped == [None]
        for kind in ("after", "states", "queue"):
            for name, value in getattr(before, kind).items():
                if "key_encoder" in name:  # the moving average may stand
                    assert getattr(after, kind)[name].isfinite().all()
                    continue
                assert torch.equal(value, getattr(after, kind)[name]), name
        moved = [name for name, value in after.after.items() if not torch.equal(value, later.after[name])]
        assert "centers.weight" in moved


@pytest.mark.parametrize(("what", "rank"), [("queue", 2), ("buffers", 0)])
def test_one_flipped_bit_on_one_rank_is_named(pool, what, rank):
    """What differs, and the rank that is alone with it, the first too; every rank says the same."""
    function = "tests.distributed.runs:message_after_a_flipped_bit"
    for message in pool(4).run(function, what=what, rank=rank):
        assert message.startswith(f"{what} of ranks [{rank}] differ from those of the other 3 ranks. ")


@pytest.mark.parametrize(
    ("world_size", "stage"), matrix((1, 2), (0, 1, 2, 3), each_change=[(1, 3), (2, 0), (2, 1), (2, 2), (2, 3)])
)
def test_the_optimizers_states_go_in_and_out_of_every_stage(pool, world_size, stage):
    """Pins the two private calls that DeepSpeed's stages need for it."""
    assert all(pool(world_size).run("tests.distributed.runs:states_there_and_back", stage=stage))


@pytest.mark.parametrize(("fault", "stage"), [("keys", 0), ("loss", 2)])
def test_ranks_agree_to_stop_in_a_refused_step_too(pool, fault, stage):
    """One rank alone is asked; the other would wait for it for ever."""
    found = pool(2).run("tests.distributed.runs:stop_heard_in_a_refused_step", fault=fault, stage=stage)
    assert found == [(fault, True)] * 2
