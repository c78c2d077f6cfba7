"""A resumed run is the same run: stopped in mid-epoch, on the same and on other ranks and ZeRO stages."""

import json
import shutil

import pytest
import torch

from paco_ds.checkpoint import newest_checkpoint, read_checkpoint
from paco_ds.config.load import load_recipe
from paco_ds.errors import CheckpointError
from paco_ds.metrics.log import read
from paco_ds.training.replay import read_kept_step
from tests.pool import RankError
from tests.recipes import write_tiny_recipe

STOP, END = 3, 6  # an epoch of the striped shards has 4 steps: both lie inside one
TRAIN = "tests.distributed.training:train"


@pytest.fixture(scope="module")
def recipe(striped_shards, tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    for stage in range(4):
        (path.parent / f"zero{stage}.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    write_tiny_recipe(path, f"data.shards={striped_shards}", "engine.deepspeed=zero1.json")
    return path


def at_stage(recipe, stage):
    return (f"engine.deepspeed={recipe.parent / f'zero{stage}.json'}",)


def state_of(run):
    checkpoint = newest_checkpoint(run)
    assert checkpoint.step == END
    return {
        **{f"model.{name}": value for name, value in checkpoint.model().items()},
        **{f"optimizer.{name}": value for name, value in checkpoint.optimizer().items()},
        **{f"queue.{name}": value for name, value in checkpoint.queue().items()},
    }


def steps_logged(run):
    fields = ("step", "epoch", "loss", "lr", "grad_norm")
    return [tuple(line[f] for f in fields) for line in read(run / "metrics.jsonl") if line["kind"] == "step"]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_stopped_and_resumed_is_bit_equal_on_the_same_ranks_and_stage(pool, recipe, tmp_path, stage):
    """Weights, momentum, statistics, queue, and every logged step: no tolerance, whatever the number of workers. At
    stage 0 the device makes the views."""
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    overrides = at_stage(recipe, stage) + (("views.device=accelerator",) if stage == 0 else ())
    pool(2).run(TRAIN, recipe=recipe, run=straight, overrides=overrides, stop_at_step=END)
    pool(2).run(TRAIN, recipe=recipe, run=resumed, overrides=overrides, stop_at_step=STOP)
    assert newest_checkpoint(resumed).step == STOP
    workers = ("data.workers=2",) if stage == 1 else ()
    pool(2).run(TRAIN, recipe=recipe, run=resumed, overrides=overrides + workers, stop_at_step=END)
    expected = state_of(straight)
    for name, value in state_of(resumed).items():
        assert torch.equal(value, expected[name]), name
    assert steps_logged(resumed) == steps_logged(straight)


ONE_ENCODER = ("key_encoder=none", "model.projection=three_layer")
NOT_PUBLISHED = (
    "key_encoder.momentum_schedule=cosine",
    "key_encoder.scale_momentum=true",
    "step.micro_batches=2",
    "loss.contrast_scope=global_batch",
)


@pytest.mark.parametrize(
    ("stage", "overrides"),
    [
        pytest.param(3, ONE_ENCODER, id="one encoder", marks=pytest.mark.soak),
        pytest.param(2, NOT_PUBLISHED, id="schedule and scope"),
    ],
)
def test_other_key_encoders_resume_bit_equal_with_an_offloaded_optimizer(pool, recipe, tmp_path, stage, overrides):
    """GPaCo; momentum as a function of the step; keys of the global batch. The momentum buffers lie on the host."""
    path = recipe.parent / f"zero{stage}_offload.json"
    zero = {"stage": stage, "offload_optimizer": {"device": "cpu"}}
    path.write_text(json.dumps({"zero_optimization": zero}))
    overrides = (*overrides, f"engine.deepspeed={path}")
    for run, stops in (("straight", (END,)), ("resumed", (STOP, END))):
        for stop in stops:
            pool(2).run(TRAIN, recipe=recipe, run=tmp_path / run, overrides=overrides, stop_at_step=stop)
    expected = state_of(tmp_path / "straight")
    for name, value in state_of(tmp_path / "resumed").items():
        assert torch.equal(value, expected[name]), name
    assert steps_logged(tmp_path / "resumed") == steps_logged(tmp_path / "straight")
    assert any(name.startswith("model.key_encoder") for name in expected) == (overrides[:2] != ONE_ENCODER)


def test_what_is_left_to_the_hardware_is_told_kept_and_recorded(pool, recipe, tmp_path):
    """In the first lines, the log, metrics.json and the page; recipe.yaml leaves it to the hardware of the next start.
    A precision that changes is a changed setting."""
    run, words = tmp_path / "run", "tests.distributed.training:words_of_training"
    given = {"recipe": recipe, "run": run}
    auto = ("engine.deepspeed=auto", "engine.published_precision=float32", "evaluation.test_split=val")
    (said,) = pool(1).run(words, **given, overrides=auto, stop_at_step=STOP)
    assert "ZeRO stage 1 (auto: ranks on CPU share the memory of their host)" in said
    assert "  precision  float32\n" in said + "\n"
    kept = load_recipe(run / "recipe.yaml").engine
    assert (kept.deepspeed, kept.precision, kept.channels_last) == ("auto", "auto", "auto")
    (said,) = pool(1).run(words, **given, overrides=(*auto, "engine.precision=bfloat16"), stop_at_step=END)
    assert f"engine.precision was float32 until step {STOP}, and is bfloat16 from here on" in said
    assert "  precision  bfloat16 autocast where float32 is published" in said
    (said,) = pool(1).run(words, **given, overrides=auto)
    assert "precision stays bfloat16, in which the run was trained; a new run would have float32 here" in said
    execution = {"precision": "bfloat16", "published_precision": "float32", "channels_last": False, "compile": False}
    assert json.loads((run / "metrics.json").read_text())["execution"].items() >= execution.items()
    starts = [line["execution"] for line in read(run / "metrics.jsonl") if line["kind"] == "start"]
    assert [start["precision"] for start in starts] == ["float32", "bfloat16", "bfloat16"]
    assert "bfloat16 autocast where float32 is published, ZeRO stage 1" in (run / "report.html").read_text()


def test_a_bit_that_flips_on_one_rank_ends_the_run(pool, recipe, tmp_path):
    """At the next digest, on every rank, with what differs and where."""
    with pytest.raises(RankError) as error:
        pool(2).run(
            "tests.distributed.training:train_with_a_flipped_bit", recipe=recipe, run=tmp_path / "run", rank=1, after=3
        )
    for rank in range(2):
        assert f"rank {rank} of 2 raised" in str(error.value)
    assert str(error.value).count("TrainingError: queue differ between ranks [0] and [1], and nothing tells which") == 2
    assert [step[0] for step in steps_logged(tmp_path / "run")] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((2, 0), (1, 3)),
        ((2, 1), (4, 0)),
        ((1, 2), (2, 1)),
        ((4, 3), (2, 2)),
        pytest.param((2, 3), (1, 0), marks=pytest.mark.soak),
        pytest.param((1, 0), (2, 3), marks=pytest.mark.soak),
    ],
    ids=lambda ranks_and_stage: "W{}-stage{}".format(*ranks_and_stage),
)
def test_a_run_goes_on_at_another_stage_and_number_of_ranks(pool, recipe, tmp_path, first, second):
    """From one checkpoint, three steps elsewhere make the update of three steps where it was, to 1e-3."""
    stayed, moved = tmp_path / "stayed", tmp_path / "moved"
    keep = ("checkpoint.keep=5",)
    pool(first[0]).run(TRAIN, recipe=recipe, run=stayed, overrides=at_stage(recipe, first[1]), stop_at_step=STOP)
    shutil.copytree(stayed, moved)
    for (world_size, stage), run in ((first, stayed), (second, moved)):
        overrides = (*at_stage(recipe, stage), *keep)
        pool(world_size).run(TRAIN, recipe=recipe, run=run, overrides=overrides, stop_at_step=END)
    losses = [[step[2] for step in steps_logged(run)] for run in (stayed, moved)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    started = read_checkpoint(moved / "checkpoints" / f"step-{STOP:08d}").model()
    expected, got = state_of(stayed), state_of(moved)
    difference = size = 0.0
    for name, before in started.items():
        if before.is_floating_point():
            wanted = expected[f"model.{name}"] - before
            difference += float(((got[f"model.{name}"] - before - wanted) ** 2).sum())
            size += float((wanted**2).sum())
    assert difference**0.5 <= 1e-3 * size**0.5
    assert torch.equal(got["queue.labels"], expected["queue.labels"])


def test_from_two_ranks_to_one_and_back(pool, recipe, tmp_path):
    """Three legs of two steps give the update of six steps on two ranks, to 1e-3."""
    straight, legs = tmp_path / "straight", tmp_path / "legs"
    calm = ("optimizer.lr=0.005",)  # six steps at the recipe's rate amplify rounding beyond the bound by themselves
    pool(2).run(TRAIN, recipe=recipe, run=straight, overrides=calm, stop_at_step=END)
    for world_size, stop in ((2, 2), (1, 4), (2, END)):
        pool(world_size).run(TRAIN, recipe=recipe, run=legs, overrides=calm, stop_at_step=stop)
    expected, got = state_of(straight), state_of(legs)
    for part in ("model.query_encoder", "model.key_encoder", "optimizer."):
        names = [n for n, value in expected.items() if n.startswith(part) and value.is_floating_point()]
        difference = sum(float(((got[n] - expected[n]) ** 2).sum()) for n in names) ** 0.5
        size = sum(float((expected[n] ** 2).sum()) for n in names) ** 0.5
        assert difference <= 1e-3 * size, part
    assert [step[:2] for step in steps_logged(legs)] == [step[:2] for step in steps_logged(straight)]


def test_a_stop_that_was_reached_trains_no_further(pool, recipe, tmp_path):
    """The same command with the same --stop-at-step may be run again."""
    run = tmp_path / "run"
    for _ in range(2):
        assert pool(2).run(TRAIN, recipe=recipe, run=run, stop_at_step=2) == [2, 2]
    assert not (run / "metrics.json").exists()


def test_a_run_that_can_only_refuse_ends(pool, recipe, tmp_path):
    """Weights that cannot recover would otherwise train to the end and report chance."""
    hopeless = ("optimizer.lr=1e30", "engine.max_skipped=2")
    with pytest.raises(RankError, match=r"2 steps in a row were skipped.*not finite[\s\S]*lower optimizer.lr"):
        pool(2).run(TRAIN, recipe=recipe, run=tmp_path / "run", overrides=hopeless)
    (kept,) = (tmp_path / "run").glob("skipped-step-*")
    lines = pool(1).run("tests.distributed.training:replay_kept_step", folder=kept)[0]
    assert "skipped by 2 ranks" in lines[0]
    assert any("not finite" in line for line in lines[1:])
    assert "here the step is skipped" in lines[-1]
    for name in ("model", "micro-batch-00003"):
        whole = (kept / f"{name}.safetensors").read_bytes()
        (kept / f"{name}.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(CheckpointError, match=f"{name}.safetensors is damaged: its digest"):
            read_kept_step(kept)
        (kept / f"{name}.safetensors").write_bytes(whole)


def test_the_log_is_cut_at_the_checkpoint_a_run_goes_on_from(pool, recipe, tmp_path):
    """Steps that were logged after it and are taken again stand there once."""
    run = tmp_path / "run"
    pool(2).run(TRAIN, recipe=recipe, run=run, stop_at_step=5)
    (run / "checkpoints" / "step-00000005").rename(tmp_path / "gone")
    pool(2).run(TRAIN, recipe=recipe, run=run, stop_at_step=END)
    assert [step[0] for step in steps_logged(run)] == list(range(1, END + 1))


def lines_without_times(run):
    wall = ("images_per_second", "data_wait_seconds", "step_seconds")
    lines = [line for line in read(run / "metrics.jsonl") if line["kind"] == "step"]
    for line in lines:
        for place in (line, line.get("range", {})):
            for name in wall:
                place.pop(name, None)
    return lines


def test_a_run_resumed_inside_a_window_of_the_log_writes_the_same_lines(pool, recipe, tmp_path):
    """By the checkpoints of two stops; what a stop wrote of its window is replaced."""
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    windows = ("metrics.log_every=3",)
    pool(2).run(TRAIN, recipe=recipe, run=straight, overrides=windows, stop_at_step=END)
    pool(2).run(TRAIN, recipe=recipe, run=resumed, overrides=windows, stop_at_step=2)
    assert [(line["step"], line["steps"]) for line in lines_without_times(resumed)] == [(2, 2)]
    for stop in (5, END):
        pool(2).run(TRAIN, recipe=recipe, run=resumed, overrides=windows, stop_at_step=stop)
    assert lines_without_times(resumed) == lines_without_times(straight)
    assert [line["step"] for line in lines_without_times(straight)] == [3, 4, 6]


def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(pool, recipe, tmp_path):
    """Said so, and the run goes on from there."""
    run = tmp_path / "run"
    pool(2).run(TRAIN, recipe=recipe, run=run, stop_at_step=2)
    pool(2).run(TRAIN, recipe=recipe, run=run, stop_at_step=STOP)
    weights = run / "checkpoints" / f"step-{STOP:08d}" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-20] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"step-00000003 is damaged: SHA-256 of model.safetensors"):
        read_checkpoint(weights.parent)
    assert newest_checkpoint(run).step == 2
    pool(2).run(TRAIN, recipe=recipe, run=run, stop_at_step=STOP)
    assert newest_checkpoint(run).step == STOP


@pytest.mark.parametrize(
    ("unreadable", "overrides", "logged", "saved"),
    [
        pytest.param(4, (), 4, ["step-00000004"], id="at the end of an epoch"),
        pytest.param(3, ("checkpoint.every_steps=3",), 3, ["step-00000003"], id="after a checkpoint"),
        pytest.param(3, (), 2, [], id="within an epoch: the step before asks for them"),
        pytest.param(3, ("key_encoder.batch_norm=local",), 3, [], id="nothing to send ahead"),
    ],
)
def test_images_that_cannot_be_read_take_no_epoch_and_no_checkpoint_with_them(
    pool, recipe, tmp_path, unreadable, overrides, logged, saved
):
    """They are asked for a step ahead, but not past what is to be evaluated or saved first."""
    run = tmp_path / "run"
    with pytest.raises(RankError) as error:
        pool(2).run(
            "tests.distributed.training:train_until_unreadable",
            recipe=recipe,
            run=run,
            overrides=overrides,
            step=unreadable,
        )
    assert str(error.value).count("DataError: the next shard is gone") == 2
    assert len(steps_logged(run)) == logged
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == saved


def test_a_checkpoint_of_another_meaning_is_refused_by_the_setting(pool, recipe, tmp_path):
    """Each difference is named with both values; what is only running may change."""
    run = tmp_path / "run"
    pool(2).run(TRAIN, recipe=recipe, run=run, stop_at_step=1)
    free = ("data.workers=1", "evaluation.batch=5", "checkpoint.every_steps=2", "engine.digest_every=1")
    pool(2).run(TRAIN, recipe=recipe, run=run, overrides=free, stop_at_step=2)
    lower = ("optimizer.lr=0.01", "optimizer.clip_norm=1.5")
    pool(2).run(TRAIN, recipe=recipe, run=run, overrides=lower, stop_at_step=3)
    changes = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if "changed" in line]
    assert [(c["step"], c["setting"], c["now"]) for c in changes] == [
        (2, "optimizer.lr", 0.01),
        (2, "optimizer.clip_norm", 1.5),
    ]
    with pytest.raises(RankError, match=r"optimizer\.lr: 0\.01 in the checkpoint, 0\.05 in this recipe"):
        pool(2).run(TRAIN, recipe=recipe, run=run, overrides=("optimizer.clip_norm=1.5",), stop_at_step=4)
    with pytest.raises(
        RankError, match=r"loss\.alpha: 0\.05 in the checkpoint, 0\.1 in this recipe[\s\S]*another --output"
    ):
        pool(2).run(TRAIN, recipe=recipe, run=run, overrides=("loss.alpha=0.1", *lower), stop_at_step=4)


def test_a_run_directory_that_only_some_ranks_see_is_refused(pool, recipe, tmp_path):
    """Otherwise ranks would go on from different steps and wait for each other for ever."""
    run = tmp_path / "run"
    pool(2).run(TRAIN, recipe=recipe, run=run, stop_at_step=1)
    with pytest.raises(RankError, match=r"rank 0: step 1 \(\w{8}\), rank 1: none.*storage that all hosts share"):
        pool(2).run("tests.distributed.training:train_with_private_directory", recipe=recipe, run=run)


def test_ranks_that_are_given_other_runs_are_refused(pool, recipe, striped_shards, tmp_path):
    """Recipe or shards of a host that are not those of the others; what differs is named, and on which ranks."""
    stale = json.loads((striped_shards / "manifest.json").read_text()) | {"license": "another"}
    shutil.copytree(striped_shards, tmp_path / "stale")
    (tmp_path / "stale" / "manifest.json").write_text(json.dumps(stale))
    for override, said in (
        ("seed=4", r"different runs: seed is 3 on ranks \[0\], 4 on ranks \[1\]\. Give all hosts the same recipe"),
        (f"data.shards={tmp_path / 'stale'}", r"manifest of data\.shards is '\w{12}' on ranks \[0\], '\w{12}' on"),
    ):
        arguments = {"recipe": recipe, "run": tmp_path / "run", "overrides": (override,)}
        with pytest.raises(RankError, match=said):
            pool(2).run("tests.distributed.training:train_with_own_settings", **arguments)
    assert not (tmp_path / "run").exists()


def test_a_finished_run_evaluates_and_ends(pool, recipe, tmp_path):
    """The same command again trains nothing and writes the same accuracy."""
    run = tmp_path / "run"
    assert pool(2).run(TRAIN, recipe=recipe, run=run) == [8, 8]
    results = json.loads((run / "metrics.json").read_text())
    lines = steps_logged(run)
    shutil.copy(run / "metrics.json", tmp_path / "first.json")
    assert pool(1).run(TRAIN, recipe=recipe, run=run) == [8]
    again = json.loads((run / "metrics.json").read_text())
    assert again["per_class"] == results["per_class"]
    assert (again["world_size"], results["world_size"]) == (1, 2)
    assert steps_logged(run) == lines
    assert (run / "report.html").stat().st_size > 10_000


def test_a_rank_told_to_terminate_stops_all_with_a_checkpoint(pool, recipe, tmp_path):
    """Preemption: the step under way and the next are finished, and the same command goes on from there."""
    run = tmp_path / "run"
    steps = pool(2).run("tests.distributed.training:train_until_terminated", recipe=recipe, run=run, rank=1, after=2)
    assert steps == [3, 3]
    assert newest_checkpoint(run).step == 3
    assert pool(2).run(TRAIN, recipe=recipe, run=run, stop_at_step=4) == [4, 4]


def test_a_rank_told_to_terminate_in_an_evaluation_makes_all_leave_it(pool, recipe, tmp_path):
    """At the next batch, the same one, so that no rank waits for another."""
    ends = pool(2).run("tests.distributed.training:leave_evaluation", recipe=recipe, run=tmp_path / "run", rank=1)
    assert ends == [[4, 2]] * 2
    assert not any(line["kind"] == "evaluation" for line in read(tmp_path / "run" / "metrics.jsonl"))
