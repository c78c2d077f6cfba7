"""Plans of runs: sizes, what is counted on fake tensors, legal settings, verdicts, and what bad input is told."""

import functools
import io
import json
import re

import numpy as np
import pytest
import torch

from paco_ds.command import Screen, exit_status
from paco_ds.config.shipped import DEEPSPEED
from paco_ds.data.stream.views import RawView, raw_batch, render
from paco_ds.data.stream.views.blur import Blur
from paco_ds.data.stream.views.color import Contrast
from paco_ds.data.stream.views.crop import Box
from paco_ds.data.stream.views.instructions import instruction
from paco_ds.distributed.ranks import MicroBatchLayout
from paco_ds.errors import RESUMABLE, DataError, RecipeError, UnreachableError, UserError
from paco_ds.losses import make_loss
from paco_ds.planning import plan as plan_module
from paco_ds.planning.memory import PARTS, Device, plan_memory, zero_settings
from paco_ds.planning.network import few_steps_hint, open_files
from paco_ds.planning.plan import Data, Plan, _shards_per_rank, find_data, judge, make_plan, planned_stage
from paco_ds.planning.planned_rank import PlannedRank
from paco_ds.planning.preflight import main
from paco_ds.planning.print_plan import as_json, print_plan, verdict_lines
from paco_ds.planning.remedies import find_remedies
from paco_ds.planning.sizes import format_bytes, parse_bytes
from paco_ds.planning.trace import LiveBytes, trace_step, views_peak
from paco_ds.planning.traffic import plan_traffic
from paco_ds.training.build import Classes, build_model
from paco_ds.training.forward import Forward
from tests.recipes import model_of, tiny_recipe, write_tiny_recipe

DEEP = "model.backbone=cifar_resnet20"  # enough blocks for what is not saved of them
COUNTS = (80, 40, 20, 8)
GIB = 2**30


@pytest.fixture
def zero1(tmp_path):
    path = tmp_path / "zero1.json"
    path.write_text('{"zero_optimization": {"stage": 1}}')
    return f"engine.deepspeed={path}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("80GiB", 80 * GIB),
        ("80GB", 80 * 10**9),
        ("1.5 TiB", int(1.5 * 2**40)),
        ("24000mib", 24000 * 2**20),
        ("12Gi", 12 * GIB),
        ("1024", 1024),
    ],
)
def test_sizes_are_read_in_both_units(text, expected):
    """GB is 10^9 and GiB 2^30."""
    assert parse_bytes(text, "--gpu-memory") == expected


@pytest.mark.parametrize("text", ["80G B", "eighty", "", "-1GiB", "0GiB", "80GBit", "80 X"])
def test_an_unreadable_size_is_refused_with_the_forms_there_are(text):
    """The setting is named."""
    with pytest.raises(UserError, match=r"--gpu-memory .*80GiB .*80GB"):
        parse_bytes(text, "--gpu-memory")


def test_sizes_are_written_in_the_unit_that_fits():
    """Powers of 1024."""
    assert [format_bytes(n) for n in (0, 1023, 1536, 5 * 2**20, 80 * GIB, 3 * 2**40)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "5.0 MiB",
        "80.0 GiB",
        "3.00 TiB",
    ]


def test_live_bytes_follow_tensors_made_and_dropped():
    """Views share a storage, held tensors do not count, and the peak stays."""
    held = torch.ones(100)
    with LiveBytes([held]) as live:
        a = held * 2  # 400 bytes
        b = a[:50].view(5, 10)
        c = a + 1
        assert (live.live, live.peak) == (800, 800)
        del a, b
        assert (live.live, live.peak) == (400, 800)
        del c
    assert (live.live, live.peak) == (0, 800)


def test_saved_bytes_on_fake_tensors_are_those_of_a_real_forward():
    """The same hooks on real tensors save the same bytes, weights and queue left out."""
    recipe = tiny_recipe("loss.method=balanced_softmax")
    planned = trace_step(recipe, COUNTS, autocast=False)
    model = model_of(recipe, len(COUNTS), (0.5,) * 3, (0.5,) * 3)
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved = {}
    images = torch.zeros(8, 3, 12, 12, dtype=torch.uint8)
    labels = torch.zeros(8, dtype=torch.int64)

    def save(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights | {labels.data_ptr(), images.data_ptr()}:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        forward = Forward(model, make_loss(recipe.loss, COUNTS))
        loss = forward.run_loss(forward.run_model(images, None, labels)).loss
    assert loss.requires_grad
    assert planned.saved == pytest.approx(sum(saved.values()), rel=0.01)
    assert planned.trained == tuple(p.numel() for p in model.parameters())
    assert planned.followed == ()


def test_activations_grow_with_the_micro_batch_and_autocast_halves_most_of_them():
    """Proportional to m; bfloat16 has half the bytes, but for what stays float32."""
    small, large = tiny_trace(), trace_step(tiny_recipe("step.micro_batch=16"), COUNTS, False)
    assert large.saved == pytest.approx(2 * small.saved, rel=0.02)
    half = trace_step(tiny_recipe("step.micro_batch=16"), COUNTS, True)
    assert 0.4 < half.saved / large.saved < 0.8


def test_activation_checkpointing_is_planned():
    """Less is saved; a block is computed again in backward, beside what is saved."""
    plain = trace_step(tiny_recipe(DEEP), COUNTS, False)
    recomputed = trace_step(tiny_recipe(DEEP, "engine.activation_checkpointing=true"), COUNTS, False)
    assert recomputed.saved < 0.5 * plain.saved
    assert recomputed.peak < 0.7 * plain.peak
    assert recomputed.peak - recomputed.saved > plain.peak - plain.saved
    assert recomputed.key_peak == plain.key_peak


def test_compiled_encoders_are_planned_as_if_they_were_not():
    """No compiler runs for a plan."""
    assert trace_step(tiny_recipe("engine.compile=true"), COUNTS, False) == trace_step(tiny_recipe(), COUNTS, False)


def test_a_large_network_is_planned_without_its_memory(monkeypatch):
    """ResNet-50 at 224 pixels, m = 32: no parameter is ever allocated."""
    recipe = tiny_recipe("model.backbone=resnet50", "step.micro_batch=32", "views.query.size=224", "views.key.size=224")
    monkeypatch.setattr(torch.nn.init, "kaiming_normal_", _must_be_meta)
    trace = trace_step(recipe, (10,) * 1000, autocast=False)
    assert 4 * sum(trace.trained) > 100 * 2**20
    assert 2 * GIB < trace.saved < 4 * GIB
    assert trace.peak_with_gradients >= trace.peak >= trace.saved


def _must_be_meta(tensor, *arguments, **named):
    assert tensor.is_meta
    return tensor


@functools.cache
def tiny_trace():
    return trace_step(tiny_recipe(), COUNTS, False)


def memory_of(stage, world_size, device="cpu", **zero):
    recipe = tiny_recipe("step.micro_batches=8")
    trace = tiny_trace()
    settings = zero_settings({"zero_optimization": {"stage": stage, **zero}})
    layout = MicroBatchLayout(8, 8, 0, world_size)
    return trace, plan_memory(PlannedRank(recipe, trace, len(COUNTS), layout), settings, device)


def test_what_zero_partitions_falls_with_the_ranks():
    """Momentum from stage 1 on, the key encoder at stage 3."""
    trace, whole = memory_of(0, 4)
    assert whole.parts["optimizer states"] == 4 * sum(trace.trained)
    for stage in (1, 2, 3):
        assert memory_of(stage, 4)[1].parts["optimizer states"] == pytest.approx(sum(trace.trained), abs=4)
    assert memory_of(2, 4)[1].parts["key encoder"] == 4 * sum(trace.followed)
    assert memory_of(3, 4)[1].parts["key encoder"] == pytest.approx(sum(trace.followed), abs=4)


def test_buckets_are_allocated_whole_on_a_gpu_and_resident_as_far_as_they_are_used_on_a_cpu():
    """DeepSpeed's 5e8 elements are 2 GB; overlapping doubles them below stage 3."""
    trace, memory = memory_of(2, 2, "cuda")
    assert memory.parts["reduction buckets"] >= 2e9
    assert memory_of(2, 2, "cuda", overlap_comm=True)[1].parts["reduction buckets"] >= 4e9
    assert memory_of(2, 2, "cuda", reduce_bucket_size=1000)[1].parts["reduction buckets"] <= 8000
    assert memory_of(2, 2, "cpu")[1].parts["reduction buckets"] <= 2 * 4 * sum(trace.trained)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_offloaded_optimizer_lies_on_the_host(stage):
    """Beside a GPU; for a CPU rank that is its own memory. Four or five shares of the weights."""
    offload = {"offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 1000}
    trace, here = memory_of(stage, 4, "cuda", reduce_bucket_size=1000)
    _, gpu = memory_of(stage, 4, "cuda", **offload)
    _, cpu = memory_of(stage, 4, "cpu", **offload)
    own = sum(trace.trained)  # 4 bytes of a number, 4 ranks
    assert here.parts["optimizer states"] == here.parts["own weights, copy"] == pytest.approx(own, abs=4)
    assert gpu.parts["optimizer states"] == gpu.parts["own weights, copy"] == gpu.parts["offloaded optimizer"] == 0
    assert 4 * own <= gpu.host <= 6 * own + 4 * max(trace.trained)
    assert (cpu.host, cpu.parts["offloaded optimizer"]) == (0, gpu.host)


def test_offload_is_nothing_at_stage_0():
    """DeepSpeed ignores it there."""
    assert memory_of(0, 4, "cuda", offload_optimizer={"device": "cpu"}) == memory_of(0, 4, "cuda")


def test_one_rank_sends_nothing():
    """And no part of the traffic divides by zero."""
    rank = PlannedRank(tiny_recipe(), tiny_trace(), len(COUNTS), MicroBatchLayout(8, 4, 0, 1))
    assert plan_traffic(rank, zero_settings({})) == []


@pytest.mark.parametrize(
    ("total", "verdict"), [(5.9 * GIB, "fits"), (6.5 * GIB, "tight"), (7.0 * GIB, "tight"), (7.1 * GIB, "does not fit")]
)
def test_a_gpu_keeps_a_gigabyte_outside_torch_and_a_plan_a_margin(total, verdict):
    """8 GiB are 7 for torch; above 7 / 1.15 a plan may be wrong."""
    assert judge(int(total), 8 * GIB, "cuda") == verdict


def test_a_plan_says_steps_rate_and_time(zero1):
    """lr scales with M, an epoch is whole steps, time follows from the images/s."""
    recipe = tiny_recipe(zero1, "step.micro_batches=8", "step.reference_micro_batches=4")
    plan = make_plan(recipe, 4, find_data(recipe.data, 1000, 10), images_per_second=32.0)
    said = as_json(plan)
    assert said["peak_lr"] == pytest.approx(0.1)
    assert said["legal_ranks"] == [1, 2, 4, 8]
    assert (said["accumulation"], said["steps_per_epoch"]) == (2, 1000 // 64)
    assert said["seconds_per_epoch"] == pytest.approx(15 * 64 / 32)
    assert said["shards_per_rank"] is None
    for memory in plan.memory.values():
        assert set(memory.parts) == set(PARTS)
        assert memory.total == sum(memory.parts.values())


def test_a_set_too_small_for_so_many_ranks_is_told(zero1):
    """Under 50 steps an epoch, with the largest step that has 50; not at 50."""
    for images, steps in ((50 * 32 - 1, 49), (50 * 32, 50)):
        recipe = tiny_recipe(zero1)
        plan = make_plan(recipe, 4, find_data(recipe.data, images, 10))
        console = io.StringIO()
        print_plan(plan, Screen(console, width=200))
        hint = as_json(plan)["few_steps"]
        assert plan.steps_per_epoch == steps
        assert (hint is None) == (steps == 50)
        assert ("few steps" in console.getvalue()) == (steps < 50)
    assert few_steps_hint(7, MicroBatchLayout(32, 512, 0, 512)) == (
        "7 steps an epoch, under 50: the set is small for so many ranks; "
        "with step.micro_batches=71 or fewer, and as many ranks at most, it has 50"
    )
    assert few_steps_hint(12, MicroBatchLayout(32, 1, 0, 1)) == (
        "12 steps an epoch, under 50: the set is small for step.micro_batch=32: lower it, or train for more epochs"
    )


@pytest.mark.parametrize(("block", "peers", "op"), [("null", 511, "all_to_all"), ("8", 7, "send_receive")])
def test_512_ranks_on_paper(zero1, block, peers, op):
    """Bytes, time by link speed, connections: with a node's ranks as blocks, images go to the other seven alone."""
    recipe = tiny_recipe(zero1, "step.micro_batches=512", f"key_encoder.shuffle_block={block}")
    plan = make_plan(recipe, 512, find_data(recipe.data, 10**6, 10))
    said = as_json(plan)
    assert said["connections"]["key images"] == peers
    assert said["connections"]["watchdog and store, rank 0"] == 2 * 511
    images = next(row for row in plan.traffic[1] if row.what == "key images")
    assert (images.op, images.bytes % (3 * 12 * 12)) == (op, 0)
    rest = sum(row.bytes for row in plan.traffic[1]) - images.bytes
    for speed, seconds in said["link_seconds"].items():
        assert seconds["ahead"] == pytest.approx(images.bytes * 8 / (speed * 1e9))
        assert seconds["exposed"] == pytest.approx(rest * 8 / (speed * 1e9))
    console = io.StringIO()
    print_plan(plan, Screen(console, width=200))
    assert f"key images {peers}" in console.getvalue()
    assert "400 Gbit/s" in console.getvalue()


def test_shards_that_are_open_are_bounded():
    """By the shards there are, those read at once, and the reader's limit, in each loader process."""
    layout = MicroBatchLayout(32, 4, 0, 4)
    assert open_files([1000] * 3, layout, 64, workers=0) == 2  # a rank reads one stretch, which may end in the next
    assert open_files([100] * 10_000, layout, 64, workers=8) == 8 * 53
    assert open_files([100] * 10_000, MicroBatchLayout(512, 4, 0, 4), 64, workers=2) == 2 * 128


def test_an_outage_while_a_run_is_planned_keeps_its_status(monkeypatch):
    """The same command may go on when storage is back."""

    def unreachable(*_):
        raise UnreachableError("8 tries")

    monkeypatch.setattr(plan_module, "load_manifest", unreachable)
    with pytest.raises(DataError, match="To plan without shards") as caught:
        find_data(tiny_recipe().data, None, None)
    assert exit_status(caught.value) == RESUMABLE


def test_what_does_not_fit_is_told_what_would(zero1):
    """Stage 1's default bucket of 2 GB is too much for 3 GiB; stage 0 or a smaller bucket is not."""
    recipe = tiny_recipe(zero1)
    data = find_data(recipe.data, 1000, 10)
    plan = make_plan(recipe, 2, data, gpu_memory=int(2.5 * GIB))
    assert plan.verdict == "does not fit"
    remedies = find_remedies(plan)
    assert any("stage 0" in remedy for remedy in remedies)
    assert any("reduce_bucket_size" in remedy for remedy in remedies)
    verdict, *ways = verdict_lines(plan, remedies)
    assert verdict.startswith("DOES NOT FIT: stage 1 needs")
    assert ways == [f"  would fit: {remedy}" for remedy in remedies]
    ample = make_plan(recipe, 2, data, gpu_memory=80 * GIB)
    assert ample.verdict == "fits"
    assert not find_remedies(ample)


def test_a_stage_left_to_auto_is_planned_with_the_settings_of_its_own_file():
    """What a remedy advises, `engine.deepspeed=zero3`, needs what the plan says; buckets are never made larger."""
    data = find_data(tiny_recipe().data, 1000, 10)
    auto = make_plan(tiny_recipe("engine.deepspeed=auto"), 2, data)
    for stage in (0, 1, 2, 3):
        named = make_plan(tiny_recipe(f"engine.deepspeed={DEEPSPEED}/zero{stage}.json"), 2, data)
        assert auto.memory[stage].total == named.memory[stage].total
    needed = auto.memory[1].total
    tight = make_plan(tiny_recipe("engine.deepspeed=auto"), 2, data, gpu_memory=GIB + needed // 2)
    assert not any("reduce_bucket_size" in remedy and "stage 1" in remedy for remedy in find_remedies(tight))


@pytest.mark.parametrize(
    ("shards", "sampler", "bound"),
    [
        ([4] * 10, "instance_balanced", 3),
        ([1] * 8 + [32], "instance_balanced", 8),
        ([4] * 10, "square_root", 10),
    ],
)
def test_the_shards_of_a_rank_are_bounded(shards, sampler, bound):
    """A rank of two reads a run of 8 ids: one shard and the ends of two, or eight small ones. Other samplers go through
    all shards several times."""
    assert _shards_per_rank(Data(True, (20, 20), tuple(shards)), MicroBatchLayout(2, 2, 0, 2), 4, sampler) == bound


def test_activation_checkpointing_is_offered_where_it_makes_a_plan_fit(tmp_path):
    """Beside autocast, which fits too; compiled encoders must give way, and are never offered stage 3."""
    path = tmp_path / "zero1.json"
    path.write_text('{"zero_optimization": {"stage": 1, "reduce_bucket_size": 100000}}')
    settings = (
        DEEP,
        "engine.precision=float32",
        f"engine.deepspeed={path}",
        "step.micro_batch=128",
        "views.query.size=96",
        "views.key.size=96",
    )
    data = find_data(tiny_recipe().data, 1000, 10)
    recipe = tiny_recipe(*settings, "engine.compile=true")
    needed = make_plan(recipe, 1, data).memory[1].total
    remedies = find_remedies(make_plan(recipe, 1, data, gpu_memory=GIB + int(0.95 * needed)))
    checkpointing, autocast = remedies
    assert checkpointing.startswith("engine.activation_checkpointing=true engine.compile=false at ZeRO stage 1")
    assert autocast.startswith("bfloat16 autocast")
    assert "stage 3" not in " ".join(remedies)


def test_the_stage_left_to_a_plan_is_0_where_it_fits_and_1_where_not():
    """For GPUs; without their memory 0 is planned, on CPU 1, as a run there has it. A start says it on one line."""
    recipe = tiny_recipe("engine.deepspeed=auto")
    data = find_data(recipe.data, 1000, 10)

    def plan(gpu_memory: int | None, device: Device = "cuda") -> Plan:
        return make_plan(recipe, 2, data, gpu_memory=gpu_memory, device=device)

    ample, tight = plan(80 * GIB), plan(GIB + 2**17)
    assert (ample.stage, ample.autocast, ample.verdict) == (0, True, "fits")
    assert planned_stage(ample)[0] == 0
    assert re.fullmatch(r"auto: [\d.]+ KiB planned of 80.0 GiB", planned_stage(ample)[1])
    assert tight.stage == 1
    assert re.fullmatch(
        r"auto: [\d.]+ MiB planned of [\d.]+ GiB, does not fit: see paco-preflight .*", planned_stage(tight)[1]
    )
    assert plan(None).stage == 0
    assert plan(None, "cpu").stage == 1
    assert plan(None, "cpu").autocast is False


@pytest.mark.parametrize("name", ["lars", "muon"])
def test_optimizers_of_whole_weights_are_planned_at_stage_0_alone(name, zero1):
    """Their states too; another stage is refused, with what to set."""
    chosen = tiny_recipe(f"optimizer.name={name}", "engine.deepspeed=auto")
    plan = make_plan(chosen, 1, find_data(chosen.data, 1000, 10), gpu_memory=GIB)
    assert (plan.stage, list(plan.memory)) == (0, [0])
    adamw = make_plan(tiny_recipe("optimizer.name=adamw", "engine.deepspeed=auto"), 1, plan.data)
    states = {of: one.memory[0].parts["optimizer states"] for of, one in ((name, plan), ("adamw", adamw))}
    assert states["adamw"] / 2 <= states[name] < states["adamw"]
    assert (states[name] * 2 == states["adamw"]) == (name == "lars")
    print_plan(plan, Screen(printed := io.StringIO(), width=160))
    assert "stage 1" not in printed.getvalue()
    refused = tiny_recipe(f"optimizer.name={name}", zero1)
    with pytest.raises(RecipeError, match=rf"{name} looks at whole weights, which ZeRO stage 1 parts"):
        make_plan(refused, 1, plan.data)


def test_views_on_the_device_are_part_of_the_plan():
    """The step's images, and a moment of its own that holds what rendering takes, measured on real photographs."""
    at = {
        where: make_plan(
            recipe := tiny_recipe(f"views.device={where}", "engine.deepspeed=auto"), 1, find_data(recipe.data, 1000, 10)
        )
        for where in ("cpu", "accelerator")
    }
    images = {where: plan.memory[0].parts["input images"] for where, plan in at.items()}
    assert images["accelerator"] == images["cpu"] * 2 * at["cpu"].layout.accumulation
    assert (at["cpu"].trace.views_peak, at["accelerator"].memory[0].moment) == (0, "views")
    size, count = 32, 8
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, (2 * size, 2 * size, 3), dtype=np.uint8)
    view = RawView(
        Box(0, 0, 2 * size, 2 * size, 2 * size, 2 * size, size).patch(image),
        tuple(instruction(each, size) for each in (Contrast(1.1), Blur(2.0))),
    )
    pixels = torch.from_numpy(np.concatenate([view.patch.pixels.ravel()] * count))
    render(pixels, raw_batch([view] * count), size, torch.device("cpu"))  # tables that are made once
    with LiveBytes([pixels]) as live:
        render(pixels, raw_batch([view] * count), size, torch.device("cpu"))
    planned = views_peak(count, size)
    assert live.peak + pixels.nbytes <= 1.15 * planned <= 1.6 * (live.peak + pixels.nbytes)


def test_what_is_offloaded_stands_under_the_total(tmp_path):
    """A row of its own, and in the JSON."""
    path = tmp_path / "zero2_offload.json"
    path.write_text('{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}')
    exact = "engine.precision=float32"
    recipe = tiny_recipe(f"engine.deepspeed={path}", "engine.activation_checkpointing=true", exact)
    plan = make_plan(recipe, 1, find_data(recipe.data, 1000, 10))
    printed = io.StringIO()
    print_plan(plan, Screen(printed, width=160))
    text = printed.getvalue()
    assert text.index("total") < text.index("offloaded, on the host")
    assert "float32, activation checkpointing" in text
    said = as_json(plan)
    assert said["memory"][2]["host"] == plan.memory[2].host > 0
    assert said["activation_checkpointing"]


def test_ranks_that_do_not_divide_the_step_are_refused_with_the_legal_ones(zero1):
    """And with the setting that makes them legal."""
    recipe = tiny_recipe(zero1)
    with pytest.raises(RecipeError, match=r"3 ranks .*legal numbers of ranks: 1, 2, 4.*step.micro_batches=6"):
        make_plan(recipe, 3, find_data(recipe.data, 1000, 10))


def test_a_micro_batch_of_one_is_refused(zero1):
    """BatchNorm would end the run at its first step: by the plan and by the training, which builds the same model."""
    recipe = tiny_recipe(zero1, "step.micro_batch=1")
    with pytest.raises(RecipeError, match=r"step.micro_batch is 1"):
        make_plan(recipe, 1, find_data(recipe.data, 1000, 10))
    with pytest.raises(RecipeError, match=r"step.micro_batch is 1"):
        build_model(recipe, Classes((100,) * 10, ()))


@pytest.mark.parametrize(
    ("images", "classes", "said"),
    [(1000, None, "--classes is missing"), (None, 10, "--images is missing"), (5, 10, "an image of each")],
)
def test_half_stated_data_is_refused(images, classes, said):
    """Both figures, and enough images."""
    with pytest.raises(UserError, match=said):
        find_data(tiny_recipe().data, images, classes)


def test_missing_shards_are_answered_with_the_way_to_plan_without(tmp_path):
    """The build is named too."""
    with pytest.raises(DataError, match=r"paco-build-shards.*--images N and --classes C"):
        find_data(tiny_recipe(f"data.shards={tmp_path / 'none'}").data, None, None)


def test_shards_are_read_from_their_manifest(striped_shards, zero1):
    """Counts, shards and a rank's share of them."""
    recipe = tiny_recipe(zero1, f"data.shards={striped_shards}")
    data = find_data(recipe.data, None, None)
    assert (data.images, data.class_counts) == (148, (80, 40, 20, 8))
    plan = make_plan(recipe, 4, data)
    assert plan.shards_per_rank is not None
    assert plan.cache_bytes is not None
    assert 1 <= plan.shards_per_rank <= len(data.shards)
    assert plan.steps_per_epoch == 148 // 32
    # 8 slots, windows of 4 and 2 steps ahead; a cache holds all shards of so small a set
    assert plan.window_bytes == pytest.approx(8 * (4 + 2) * sum(data.shard_bytes) / 148, abs=1)
    assert 0 < plan.cache_bytes <= sum(data.shard_bytes)
    printed = io.StringIO()
    print_plan(plan, Screen(printed, width=160))
    assert "of host memory a rank, for any number of workers: 8 slots x 4 images" in printed.getvalue()


def test_the_command_prints_tables_and_one_line_of_json(tmp_path, capsys, zero1):
    """Status 0 where it fits, 1 where it does not, 2 with one message where the input is wrong."""
    path = tmp_path / "tiny.yaml"
    write_tiny_recipe(path, zero1)
    common = ["--plan", "--recipe", str(path), "--images", "1000", "--classes", "10"]
    assert main([*common, "--ranks", "2", "--gpu-memory", "80GiB", "--images-per-second", "100"]) == 0
    printed = capsys.readouterr().out
    for phrase in ("optimizer states", "all_to_all", "legal ranks", "images/s", "FITS: stage 1 needs"):
        assert phrase in printed
    assert main([*common, "--ranks", "2", "--gpu-memory", "1GiB", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["verdict"] == "does not fit"
    with pytest.raises(SystemExit) as stopped:
        main([*common, "--ranks", "2", "--gpu-memory", "much"])
    assert stopped.value.code == 2
    assert "error: --gpu-memory 'much'" in capsys.readouterr().err
