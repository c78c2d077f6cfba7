"""The key encoder on real ranks: an exact moving average at every stage, and no more bytes than the paper's count."""

import functools

import numpy as np
import pytest

from paco_ds.randomness import DrawPurpose, permutation
from tests.distributed.reference import plain_steps
from tests.distributed.runs import Outcome
from tests.distributed.test_step import FLOAT32, check
from tests.matrix import matrix
from tests.recipes import tiny_recipe

MOVING_AVERAGE = "tests.distributed.key_runs:moving_average"
RUN_STEPS = "tests.distributed.runs:run_steps"
EXACT = 1e-6

OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
PARTITION_ALL = {"stage3_param_persistence_threshold": 0}
ONE_ENCODER = ("key_encoder=none", "model.projection=three_layer", "step.micro_batch=4")
GLOBAL_SCOPE = ("loss.contrast_scope=global_batch", "step.micro_batch=4")


def micro_batches(count: int) -> tuple[str, ...]:
    return (f"step.micro_batches={count}",)


@functools.cache
def reference(*overrides: str) -> Outcome:
    recipe = tiny_recipe(*overrides)
    return plain_steps(recipe, 3, recipe.lr)


SOAK = pytest.mark.soak  # the others have each value once


@pytest.mark.parametrize(
    ("world_size", "stage", "autocast", "zero", "overrides"),
    [
        pytest.param(1, 0, False, {}, micro_batches(2), id="one rank"),
        pytest.param(1, 3, False, PARTITION_ALL, micro_batches(1), id="one rank, stage 3", marks=SOAK),
        pytest.param(2, 1, True, OFFLOAD, micro_batches(2), id="stage 1, autocast, offload"),
        pytest.param(2, 2, False, OFFLOAD, micro_batches(4), id="stage 2, offload, accumulation", marks=SOAK),
        pytest.param(2, 3, True, OFFLOAD, micro_batches(4), id="stage 3, autocast, offload, accumulation", marks=SOAK),
        pytest.param(
            2,
            3,
            False,
            PARTITION_ALL,
            (*micro_batches(2), "key_encoder.momentum_schedule=cosine"),
            id="stage 3, all partitioned, cosine",
        ),
        pytest.param(4, 0, True, {}, micro_batches(4), id="four ranks, autocast"),
    ],
)
def test_twenty_steps_leave_the_average_of_the_recorded_weights(pool, world_size, stage, autocast, zero, overrides):
    """To 1e-6 of a float64 average; the whole matrix of these runs in tests/soak."""
    arguments = {"stage": stage, "autocast": autocast, "zero": zero, "overrides": overrides}
    for error, moved in pool(world_size).run(MOVING_AVERAGE, **arguments):
        assert error <= EXACT
        assert moved > 1e3 * EXACT


def test_a_missed_average_is_noticed(pool):
    """Negative control: the same figure is far beyond the bound."""
    for error, _ in pool(2).run(MOVING_AVERAGE, stage=1, overrides=micro_batches(2), fault="no moving average"):
        assert error > 1e3 * EXACT


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_optimizers_states_go_in_and_out_of_host_memory(pool, stage):
    """What checkpoints need of an offloaded optimizer."""
    assert all(pool(2).run("tests.distributed.runs:states_there_and_back", stage=stage, zero=OFFLOAD))


@pytest.mark.parametrize(("stage", "fault"), [(1, "loss"), (1, "gradient"), (2, "gradient"), (3, "loss")])
def test_an_offloaded_optimizer_takes_the_step_of_one_process(pool, stage, fault):
    """Clipped, and with the guard in its place: a gradient that is not finite changes nothing."""
    overrides = ("step.micro_batch=4", "optimizer.clip_norm=0.5")
    outcome = pool(2).run(RUN_STEPS, stage=stage, zero=OFFLOAD, overrides=overrides)[0]
    check(outcome, reference(*overrides), FLOAT32)
    arguments = {"stage": stage, "zero": OFFLOAD, "fault_rank": 1, "overrides": overrides}
    for before, after, later in pool(2).run("tests.distributed.runs:state_around_a_fault", fault=fault, **arguments):
        assert (after.skipped, later.skipped) == ([fault], [None])
        for name, value in {**before.after, **before.states}.items():
            changed = {**after.after, **after.states}[name]
            assert "key_encoder" in name or value.equal(changed), name


@pytest.mark.parametrize(
    ("world_size", "stage"),
    matrix((1, 2, 4), (0, 1, 2, 3), each_change=[(1, 3), (2, 0), (2, 1), (2, 2), (2, 3), (4, 0)]),
)
def test_one_encoder_for_both_views_takes_the_step_of_one_process(pool, world_size, stage):
    """GPaCo: both views are anchors and contrasts with gradient; queues equal the plain loop's on every rank."""
    outcomes = pool(world_size).run(RUN_STEPS, stage=stage, overrides=ONE_ENCODER)
    expected = reference(*ONE_ENCODER)
    for outcome in outcomes:
        check(outcome, expected, FLOAT32)
        for name, value in outcome.queue.items():
            assert value.equal(outcomes[0].queue[name])
        assert not [name for name in outcome.after if name.startswith("key_encoder")]
        assert "all_to_all" not in outcome.bytes_sent
    assert int(outcomes[0].queue["count"]) == 3 * tiny_recipe(*ONE_ENCODER).step.global_batch


def test_a_second_view_without_gradient_is_noticed(pool):
    """Negative control of the test above."""
    outcome = pool(2).run(RUN_STEPS, stage=1, overrides=ONE_ENCODER, fault="second view detached")[0]
    with pytest.raises(AssertionError, match="differ"):
        check(outcome, reference(*ONE_ENCODER), FLOAT32)


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_one_encoder_changes_nothing_where_something_is_not_finite(pool, fault):
    """The guard of GPaCo: weights, momentum, queue and statistics stand, the next step goes on."""
    arguments = {"stage": 1, "fault": fault, "fault_rank": 1, "overrides": ONE_ENCODER}
    for before, after, later in pool(2).run("tests.distributed.runs:state_around_a_fault", **arguments):
        assert (after.skipped, later.skipped) == ([fault], [None])
        for kind in ("after", "states", "queue"):
            for name, value in getattr(before, kind).items():
                assert value.equal(getattr(after, kind)[name]), name


@pytest.mark.parametrize(
    ("world_size", "stage", "batch_norm"),
    [(1, 0, "shuffle"), (2, 0, "shuffle"), (2, 3, "shuffle"), (2, 0, "local")],
)
def test_images_sent_a_step_ahead_change_no_bit_and_no_byte(pool, world_size, stage, batch_norm):
    """As the trainer has them, beside images that each step sends itself; in a refused step's neighbours too."""
    overrides = (f"key_encoder.batch_norm={batch_norm}", "step.micro_batches=4", "step.micro_batch=4")
    arguments = {"stage": stage, "steps": 4, "fault": "keys", "overrides": overrides}
    ahead = pool(world_size).run(RUN_STEPS, ahead=True, **arguments)
    for outcome, expected in zip(ahead, pool(world_size).run(RUN_STEPS, **arguments), strict=True):
        assert outcome.skipped == [None, "keys", None, None]
        assert outcome.bytes_sent == expected.bytes_sent
        assert ("all_to_all" in outcome.bytes_sent) == (world_size > 1 and batch_norm == "shuffle")
        for kind in ("after", "states", "queue"):
            for name, value in getattr(expected, kind).items():
                assert value.equal(getattr(outcome, kind)[name]), name


@pytest.mark.parametrize(("world_size", "stage"), [(1, 0), (2, 3), (4, 1)])
def test_keys_of_the_global_batch_are_met_by_every_query(pool, world_size, stage):
    """Whoever computes them; and the meaning is another than the micro-batch's."""
    outcome = pool(world_size).run(RUN_STEPS, stage=stage, overrides=GLOBAL_SCOPE)[0]
    check(outcome, reference(*GLOBAL_SCOPE), FLOAT32)
    with pytest.raises(AssertionError, match="differ"):
        check(outcome, reference("step.micro_batch=4"), FLOAT32)


BLOCKS = ("key_encoder.shuffle_block=2", "step.micro_batches=4", "step.micro_batch=4")


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_blocks_of_the_shuffle_give_one_model_on_any_ranks(pool, world_size):
    """The step of one process, whose groups are drawn by a plain loop; images leave no block: of four ranks, each has
    one peer, and no all-to-all is run."""
    outcomes = pool(world_size).run(RUN_STEPS, stage=0, overrides=BLOCKS)
    for outcome in outcomes:
        check(outcome, reference(*BLOCKS), FLOAT32)
        assert "all_to_all" not in outcome.bytes_sent
        assert ("send_receive" in outcome.bytes_sent) == (world_size > 1)
    with pytest.raises(AssertionError, match="differ"):
        check(outcomes[0], reference(*BLOCKS[1:]), FLOAT32)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_keys_of_a_block_are_bit_equal_on_any_ranks(pool, world_size):
    """Keys and labels of one step, before any rounding of a reduction."""
    runs = [pool(size).run("tests.distributed.key_runs:keys_of_a_step", overrides=BLOCKS) for size in (1, world_size)]
    (keys, labels), others = runs[0][0], runs[1]
    for keys_there, labels_there in others:
        assert keys_there.equal(keys)
        assert labels_there.equal(labels)


def test_images_of_blocks_sent_a_step_ahead_change_no_bit(pool):
    """Sends and receives of two steps do not mix."""
    ahead, expected = (pool(4).run(RUN_STEPS, stage=1, steps=4, ahead=a, overrides=BLOCKS) for a in (True, False))
    for outcome, other in zip(ahead, expected, strict=True):
        assert outcome.bytes_sent == other.bytes_sent
        assert all(value.equal(outcome.after[name]) for name, value in other.after.items())


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_key_view_crosses_at_most_once_and_the_queue_needs_no_collective_of_its_own(pool, world_size):
    """Each rank sends the images that another rank's groups hold, once, as bytes; keys, labels and a flag in one
    gather. As published, every rank would send all its images as float32 to every other."""
    recipe, number = tiny_recipe("step.micro_batches=4"), 5
    m, M, size, dim = recipe.step.micro_batch, 4, recipe.views.key.size, recipe.model.key_dim
    groups = permutation(m * M, DrawPurpose.KEY_GROUPS, recipe.seed, number).reshape(M, m)
    arguments = {"overrides": micro_batches(4)}
    ours = pool(world_size).run("tests.distributed.key_runs:key_bytes", number=number, **arguments)
    published = pool(world_size).run("tests.distributed.key_runs:published_key_bytes", **arguments)
    own = m * M // world_size
    for rank, (sent, rival) in enumerate(zip(ours, published, strict=True)):
        leaving = sum(
            1
            for group, slots in enumerate(groups)
            for slot in slots
            if slot // m % world_size == rank and group % world_size != rank
        )
        assert 0 < leaving <= own
        assert sent["all_to_all"] == leaving * 3 * size * size
        assert sent["all_gather"] == (world_size - 1) * 4 * (own * (dim + 1) + 1)
        assert set(sent) == {"all_to_all", "all_gather"}
        assert rival["images"] == (world_size - 1) * own * 3 * size * size * 4
        assert sent["all_to_all"] <= rival["images"] / (4 * (world_size - 1))
        assert sent["all_gather"] < rival["keys"]
    total = sum(sent["all_to_all"] for sent in ours) / (3 * size * size)
    assert total == np.count_nonzero(groups // m % world_size != np.arange(M)[:, None] % world_size)
