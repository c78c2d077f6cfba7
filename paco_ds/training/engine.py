"""DeepSpeed: configuration, start of a rank, and the engine around the model."""

from __future__ import annotations

import difflib
import importlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from paco_ds.config.engine import EngineSettings
from paco_ds.config.optimizer import OptimizerSettings
from paco_ds.config.parse import brief, read_json
from paco_ds.config.recipe import StepSettings
from paco_ds.config.shipped import DEEPSPEED
from paco_ds.distributed.launch import environment_ranks, join_job
from paco_ds.distributed.load_deepspeed import compiler, deepspeed
from paco_ds.distributed.ranks import MicroBatchLayout, Ranks
from paco_ds.distributed.zero import begin_states
from paco_ds.errors import RecipeError, UserError
from paco_ds.models.compile_cache import mend_compile_cache
from paco_ds.models.execution import Hardware, choose, choose_kernels, prepare
from paco_ds.models.recogniser import Recogniser
from paco_ds.training.optimizer import make_optimizer
from paco_ds.training.skipping_optimizers import GuardedOptimizer

_ZERO, _TORCH_AUTOCAST = "zero_optimization", "torch_autocast"  # DeepSpeed keys that are read here
_OWNED = {  # DeepSpeed keys that the recipe decides: {key: recipe setting}
    "train_batch_size": "step.micro_batch and step.micro_batches",
    "train_micro_batch_size_per_gpu": "step.micro_batch",
    "gradient_accumulation_steps": "step.micro_batches (accumulation is computed from it and the ranks)",
    "gradient_clipping": "optimizer.clip_norm",
    "optimizer": "the optimizer section",
    "scheduler": "the schedule section",
}
_REFUSED = {
    "fp16": "its loss scaling never recovers with this step; use engine.precision=bfloat16",
    "bf16": "it casts the weights, which breaks BatchNorm; use engine.precision=bfloat16",
    "amp": "use engine.precision=bfloat16",
}
PlanStage = Callable[[EngineSettings, int], tuple[int, str]]
"""(ZeRO stage, why) for chosen settings and the bytes of a GPU."""

_AUTOCAST = {"dtype": "bfloat16", "lower_precision_safe_modules": []}  # gradients are reduced in float32


def read_deepspeed_config(path: str | Path) -> dict[str, Any]:
    """The DeepSpeed JSON a recipe names. For `auto` stage 1, which is what it is on CPU; see `choose_on_ranks`.

    Raises:
        RecipeError: it is missing, is not JSON, has a key that DeepSpeed would ignore, or sets what the recipe decides
            or what cannot work.
    """
    if path == "auto":
        return stage_config(1)
    path = Path(path)
    if not path.exists():
        raise RecipeError(f"engine.deepspeed: no file {path}; give auto, or zero0 to zero3")
    config = read_json(path, RecipeError)
    if not isinstance(config, dict):
        raise RecipeError(f"engine.deepspeed: {path} is not a DeepSpeed configuration: {brief(config)}")
    for key, setting in _OWNED.items():
        if key in config:
            raise RecipeError(f"engine.deepspeed: {path} sets {key!r}; remove it, the recipe decides it by {setting}")
    for key, why in _REFUSED.items():
        if key in config:
            raise RecipeError(f"engine.deepspeed: {path} has a {key!r} block: {why}")
    known = (_ZERO, _TORCH_AUTOCAST, *_OWNED, *_REFUSED)
    for key in config.keys() - set(known):
        if near := difflib.get_close_matches(key, known, n=1, cutoff=0.8):
            raise RecipeError(
                f"engine.deepspeed: {path} sets {key!r}, which DeepSpeed ignores; did you mean {near[0]!r}?"
            )
    autocast, zero = _block(path, config, _TORCH_AUTOCAST), _block(path, config, _ZERO)
    stage = zero.get("stage", 0)
    if type(stage) is not int or stage not in range(4):
        raise RecipeError(f"engine.deepspeed: {path}: {_ZERO}.stage is {brief(stage)}; set it to 0, 1, 2 or 3")
    if autocast.get("enabled") and autocast.get("dtype") != "bfloat16":
        raise RecipeError(f"engine.deepspeed: {path}: torch_autocast.dtype must be 'bfloat16'; {_REFUSED['fp16']}")
    _check_offload(path, zero, stage)
    return config


def _block(path: Path, settings: Mapping[str, Any], key: str) -> dict[str, Any]:
    """An entry that is an object of further ones; empty where there is none."""
    block = settings.get(key, {})
    if not isinstance(block, dict):
        raise RecipeError(f"engine.deepspeed: {path}: {key} is {brief(block)}, where an object in braces belongs")
    return block


def stage_config(stage: int) -> dict[str, Any]:
    """DeepSpeed's configuration of a ZeRO stage, as the shipped files have it."""
    zero: dict[str, Any] = {"stage": stage}
    if stage in (1, 2):  # gradients are sent during backward, in buckets of 25 MB
        zero |= {"overlap_comm": True, "reduce_bucket_size": 25 * 2**20 // 4}
    return {"zero_optimization": zero}


@dataclass(frozen=True)
class Chosen:
    """What was chosen for a run.

    Attributes:
        settings: nothing is left to `auto`.
        why_stage: what decided the ZeRO stage.
        changed_precision: (before, now) of a resumed run that goes on in another precision; else None.
        notes: lines for the user, where a setting is not what one might expect.
    """

    settings: EngineSettings
    why_stage: str
    changed_precision: tuple[str, str] | None = None
    notes: tuple[str, ...] = ()


def check_stage(optimizer: OptimizerSettings, stage: int) -> None:
    """Whether an optimizer works at a ZeRO stage.

    Raises:
        RecipeError: it looks at whole weights, which ZeRO partitions.
    """
    if stage > 0 and not optimizer.takes_parts:
        raise RecipeError(
            f"optimizer.name {optimizer.name} looks at whole weights, which ZeRO stage {stage} parts: set "
            "engine.deepspeed to auto or zero0, or optimizer.name to sgd or adamw"
        )


def choose_on_ranks(
    settings: EngineSettings,
    ranks: Ranks,
    trained_with: bool | None = None,
    plan_stage: PlanStage | None = None,
    optimizer: OptimizerSettings | None = None,
) -> Chosen:
    """Decide what is left to `auto`, alike on all ranks, which all call it.

    Args:
        optimizer: of the recipe, which may need a stage; None for one that does not.
        trained_with: whether the checkpoint that the run resumes from was trained with autocast, which
            `precision: auto` keeps; None for a new run.
        plan_stage: asked on the first rank for `deepspeed: auto` on CUDA; without it the stage is 0.

    Raises:
        RecipeError: see `read_deepspeed_config`, `choose` and `check_stage`; what `plan_stage` raises, on all ranks.
    """
    hardware = Hardware.least(ranks.gather_objects(Hardware.of(ranks.device)))
    config = read_deepspeed_config(settings.deepspeed)
    if optimizer is not None and settings.deepspeed != "auto":
        check_stage(optimizer, stage_in(config))
    said = autocast_of(config)
    chosen = choose(settings, hardware, trained_with if said is None else said)
    before = None if trained_with is None else ("bfloat16" if trained_with else "float32")
    changed = None if before in (None, chosen.precision) else (before, chosen.precision)
    notes = []
    if settings.precision == "auto" and (new := choose(settings, hardware, said).precision) != chosen.precision:
        notes.append(
            f"precision stays {chosen.precision}, in which the run was trained; a new run would have {new} here, and "
            f"--set engine.precision={new} changes this one"
        )
    if settings.compile != chosen.compile:
        notes.append(f"engine.compile={settings.compile} needs CUDA: the encoders are compiled in the default mode")
    if settings.deepspeed != "auto":
        return Chosen(chosen, Path(settings.deepspeed).name, changed, tuple(notes))
    stage, why = 1, "auto: ranks on CPU share the memory of their host"
    if optimizer is not None and not optimizer.takes_parts:
        stage, why = 0, f"auto: {optimizer.name} looks at whole weights"
    elif hardware.memory is not None:
        stage, why = 0, "auto: its memory was not planned"
        if plan_stage is not None:
            stage, why = _planned_once(plan_stage, chosen, hardware.memory, ranks)
    chosen = chosen.model_copy(update={"deepspeed": str(DEEPSPEED / f"zero{stage}.json")})
    return Chosen(chosen, why, changed, tuple(notes))


def _planned_once(plan_stage: PlanStage, chosen: EngineSettings, memory: int, ranks: Ranks) -> tuple[int, str]:
    """What the first rank plans: a plan runs the model once, on as many cores as it finds, and is the same for all."""
    planned: tuple[int, str] | UserError | None = None
    if ranks.first:
        try:
            planned = plan_stage(chosen, memory)
        except UserError as error:
            planned = error
    planned = ranks.gather_objects(planned)[0]
    if isinstance(planned, UserError):
        raise planned
    assert planned is not None
    return planned


def stage_in(config: Mapping[str, Any]) -> int:
    """The ZeRO stage of a DeepSpeed configuration."""
    return int(config.get(_ZERO, {}).get("stage", 0))


def autocast_of(config: Mapping[str, Any]) -> bool | None:
    """What a DeepSpeed JSON says about autocast; None where it says nothing, as the shipped ones."""
    return bool(config[_TORCH_AUTOCAST].get("enabled")) if _TORCH_AUTOCAST in config else None


def _check_offload(path: Path, zero: Mapping[str, Any], stage: int) -> None:
    """The optimizer's weights and states may be in host memory; other kinds of offload are not supported."""
    if "offload_param" in zero:
        raise RecipeError(
            f"engine.deepspeed: {path} has 'offload_param', with which the key encoder's moving average is not proven; "
            f"remove it, stage 3 with 'offload_optimizer' is what keeps the least on the device"
        )
    device = _block(path, zero, "offload_optimizer").get("device", "none")
    if device == "nvme":
        raise RecipeError(
            f"engine.deepspeed: {path} offloads the optimizer to nvme, with which checkpoints are not proven; "
            f"set zero_optimization.offload_optimizer.device to 'cpu'"
        )
    if device != "none" and stage == 0:
        raise RecipeError(
            f"engine.deepspeed: {path} has 'offload_optimizer', which DeepSpeed ignores at stage 0; "
            f"set zero_optimization.stage to 1, 2 or 3"
        )


def start(step: StepSettings, threads: int | None, expect_ranks: int | None = None) -> Ranks:
    """Join the job's process group: NCCL on CUDA, gloo on CPU, by the same code path.

    Raises:
        UserError: the job has another number of ranks than expected, or one that cannot share a step.
    """
    rank, world_size, _ = environment_ranks()
    if expect_ranks is not None and world_size != expect_ranks:
        raise UserError(
            f"this job has {world_size} ranks, --expect-ranks says {expect_ranks}. DeepSpeed falls back to one host "
            f"when it cannot read the hostfile: check the path given to --hostfile and its slots"
        )
    MicroBatchLayout(step.micro_batch, step.micro_batches, rank, world_size)  # refused before waiting
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return join_job(threads, init_distributed)


def init_distributed(backend: str) -> None:
    """DeepSpeed's process group, without the operation that it builds for collectives on CPU ranks.

    Only its inference with tensor parallelism uses that one. Building takes two minutes at the first start, a compiler
    and a HOME that can be written; its buffers are 66 MB of /dev/shm for each rank, which outlive the ranks.
    """
    deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(backend)


def import_muon_uncompiled() -> None:
    """Import DeepSpeed's Muon without compiling it, before DeepSpeed does.

    DeepSpeed imports it to ask whether ours is it, and decorates three functions with torch.compile on the way.
    That loads the compiler: 4 s of a core at the start of every rank, for functions that are not called.
    """
    compiled = compiler.compile
    compiler.compile = lambda **options: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        compiler.compile = compiled


def initialise(
    model: Recogniser,
    settings: OptimizerSettings,
    lr: float,
    execution: EngineSettings,
    config: Mapping[str, Any],
    layout: MicroBatchLayout,
) -> tuple[Any, GuardedOptimizer]:
    """(DeepSpeed engine around the model, the optimizer inside it). Load initial weights first: DeepSpeed copies them.

    Args:
        lr: peak learning rate.
        execution: precision, memory format, activation checkpointing, compilation; nothing is left to `auto`.
        config: of DeepSpeed, see :func:`read_deepspeed_config`; `execution.precision` decides about autocast.

    Raises:
        RecipeError: see `check_stage`, `prepare`, and `mend_compile_cache`.
    """
    stage = stage_in(config)
    check_stage(settings, stage)
    choose_kernels(execution)
    prepare(model, execution, stage)
    if execution.compile and not torch.cuda.is_available():
        mend_compile_cache()
    optimizer = make_optimizer(model, settings, lr, whole=stage == 0)
    complete = {
        **{key: value for key, value in config.items() if key != _TORCH_AUTOCAST},
        "train_micro_batch_size_per_gpu": layout.micro_batch,
        "gradient_accumulation_steps": layout.accumulation,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # offload with our optimizers, of which DeepSpeed has no CPU version
        "steps_per_print": 10**9,
        # its timer of throughput waits for the device three times a micro-batch
        "timers": {"throughput": {"enabled": False}},
        "wall_clock_breakdown": False,
        "communication_data_type": {"float32": "fp32", "bfloat16": "bf16"}[execution.gradients],
        # 0 is no clipping; left out, DeepSpeed clips at 1. Without ZeRO the optimizer clips, which knows the norm
        "gradient_clipping": (settings.clip_norm or 0.0) if stage > 0 else 0.0,
    }
    if execution.precision == "bfloat16":
        complete[_TORCH_AUTOCAST] = _AUTOCAST | config.get(_TORCH_AUTOCAST, {}) | {"enabled": True}
    import_muon_uncompiled()
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=complete)
    engine.enable_backward_allreduce = stage > 0  # see `GradientMean`
    begin_states(engine)  # DeepSpeed links those of all groups once, after the first step of the first group
    return engine, optimizer
