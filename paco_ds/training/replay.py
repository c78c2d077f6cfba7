"""A step that could not be applied, kept to be run again: its images, the weights before it, and the recipe.

When a run ends since its steps are skipped, each rank writes the images of the last one and the first rank the state
before it. `paco-train --replay FOLDER` runs that step on one rank and says what is not finite, and where it begins.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from paco_ds.checkpoint import MODEL, OPTIMIZER, QUEUE, write_tensors
from paco_ds.checkpoint.read import MOMENTUM, states_of_momentum
from paco_ds.checkpoint.tensors import load_tensors
from paco_ds.config.load import load_recipe
from paco_ds.config.parse import read_json
from paco_ds.config.recipe import Recipe
from paco_ds.data.manifest import open_data
from paco_ds.data.shard import ShardReader
from paco_ds.data.stream.batches import MicroBatch
from paco_ds.distributed.ranks import Ranks
from paco_ds.distributed.zero import set_states, whole_model, whole_states
from paco_ds.errors import CheckpointError
from paco_ds.files import replace_text, sha256_file
from paco_ds.models.output import ModelOutput
from paco_ds.training.build import Classes, build_model, build_step
from paco_ds.training.engine import read_deepspeed_config
from paco_ds.training.optimizer import UsualNorm
from paco_ds.training.step import Step
from paco_ds.training.step_result import StepResult
from paco_ds.training.teacher import Teacher

ABOUT, RECIPE = "step.json", "recipe.yaml"


def keep_step(
    folder: Path,
    step: Step,
    micro_batches: Sequence[MicroBatch],
    ranks: Ranks,
    *,
    recipe: str,
    reader: ShardReader,
    about: Mapping[str, Any],
) -> None:
    """Write what `replay` needs; a collective, on storage that all hosts share.

    Args:
        step: whose last step was skipped, so that its engine and queue hold the state before it.
        micro_batches: of this rank in that step.
        recipe: its YAML.
        reader: of the training split, for the keys of the samples.
        about: step, steps_per_epoch, total_steps, lr, and the reason.
    """
    if ranks.first:
        folder.mkdir(parents=True, exist_ok=True)
    ranks.wait_for_all()
    for j, batch in zip(step.layout.own, micro_batches, strict=True):
        tensors = {"query": batch.query, "labels": batch.labels, "ids": batch.ids}
        if batch.key is not None:
            tensors["key"] = batch.key
        contiguous = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        write_tensors(folder / f"micro-batch-{j:05d}.safetensors", contiguous)
    files: dict[str, Iterable[tuple[str, Tensor]]] = {
        MODEL: whole_model(step.engine),
        OPTIMIZER: whole_states(step.engine),
    }
    if step.contrast is not None:
        files[QUEUE] = step.contrast.queue.state_dict().items()
    for name, named in files.items():
        # every rank iterates, since that is a collective
        whole = {key: tensor.detach().cpu().contiguous() for key, tensor in named}
        if ranks.first:
            write_tensors(folder / name, whole)
    keys = [[reader.key_of(int(i)) for i in batch.ids] for batch in micro_batches]
    of_ranks = ranks.gather_objects(dict(zip(step.layout.own, keys, strict=True)))
    about = {**about, "usual_norm": step.usual_norm.state()}
    if ranks.first:
        replace_text(folder / RECIPE, recipe)
        samples = {str(j): names for j, names in sorted(pair for of_rank in of_ranks for pair in of_rank.items())}
        digests = {path.name: sha256_file(path) for path in sorted(folder.glob("*.safetensors"))}
        replace_text(folder / ABOUT, json.dumps({**about, "sha256": digests, "samples": samples}, indent=1))
    ranks.wait_for_all()


@dataclass(frozen=True)
class Replayed:
    """What `replay` found.

    Attributes:
        result: of the step on one rank.
        losses: of each micro-batch, in order.
        first: name of the first module whose output was not finite, and the micro-batch; None if none was.
        weights: names of weights, buffers or states of the optimizer that were not finite before the step.
        gradients: names of parameters whose gradient is not finite, and the largest norms of the others.
    """

    about: Mapping[str, Any]
    result: StepResult
    losses: Sequence[float]
    first: tuple[str, int] | None
    weights: Sequence[str]
    gradients: Sequence[tuple[str, float]]

    def lines(self) -> list[str]:
        """In words."""
        about = self.about
        say = [f"step {about['step'] + 1}, skipped by {about['world_size']} ranks: {about['reason']}"]
        if self.weights:
            say.append(f"not finite before the step: {', '.join(self.weights[:5])} ({len(self.weights)} tensors)")
        for j, loss in enumerate(self.losses):
            if not math.isfinite(loss):
                names = about["samples"][str(j)]
                few = ", ".join(names[:8]) + (" ..." if len(names) > 8 else "")
                say.append(f"micro-batch {j}: the loss is {loss}; samples {few}")
        if self.first is not None:
            name, j = self.first
            say.append(f"the first output that is not finite: {name or 'the model'}, micro-batch {j}")
        say += [f"gradient of {name}: norm {norm:.4g}" for name, norm in self.gradients[:5]]
        losses = ", ".join(f"{loss:.4g}" for loss in self.losses)
        skipped = self.result.skipped
        said = f"skipped ({skipped})" if skipped else "applied: nothing is wrong with it on one rank"
        return [*say, f"here the step is {said}; losses {losses}; gradient norm {self.result.grad_norm:.4g}"]


@dataclass(frozen=True)
class KeptStep:
    """What `keep_step` wrote. `state` has the tensors of each file of a checkpoint."""

    about: Mapping[str, Any]
    recipe: Recipe
    micro_batches: Sequence[MicroBatch]
    state: Mapping[str, Mapping[str, Tensor]]


def read_kept_step(folder: Path) -> KeptStep:
    """Read and verify a kept step.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    try:
        about = read_json(folder / ABOUT, CheckpointError)
        recipe = load_recipe(folder / RECIPE)
        paths = [folder / f"micro-batch-{j:05d}.safetensors" for j in range(recipe.step.micro_batches)]
        batches = [_micro_batch(load_tensors(path)) for path in paths]
        digests = about["sha256"]
        state = {name: load_tensors(folder / name) for name in (MODEL, OPTIMIZER, MOMENTUM, QUEUE) if name in digests}
        read = [*state, *(path.name for path in paths)]
        damaged = [name for name in read if sha256_file(folder / name) != digests.get(name)]
    except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} is not a whole kept step ({error}): give the folder that the run named"
        ) from None
    if damaged:
        raise CheckpointError(f"{folder}: {', '.join(damaged)} is damaged: its digest is not that in {ABOUT}")
    if MOMENTUM in state:
        state[OPTIMIZER] = states_of_momentum(state.pop(MOMENTUM))
    return KeptStep(about, recipe, batches, state)


def replay(kept: KeptStep, ranks: Ranks) -> Replayed:
    """Run a kept step on one rank, without ZeRO, in the precision of the run.

    Raises:
        RecipeError, DataError: the recipe, its shards or its teacher do not fit.
    """
    about, recipe, state = kept.about, kept.recipe, kept.state
    config = read_deepspeed_config(recipe.engine.deepspeed)
    config["zero_optimization"] = {"stage": 0}
    manifest = open_data(recipe.data, {recipe.data.train_split})
    classes = Classes.of(manifest, recipe.data.train_split)
    model = build_model(recipe, classes)
    model.load_state_dict(state[MODEL])
    distill = recipe.loss.distill
    step = build_step(
        recipe,
        model,
        classes,
        config,
        ranks,
        total_steps=about["total_steps"],
        steps_per_epoch=about["steps_per_epoch"],
        teacher=None if distill is None else Teacher(distill, manifest, ranks.device),
    )
    step.usual_norm = UsualNorm(**about.get("usual_norm", {}), device=ranks.device)
    set_states(step.engine, state[OPTIMIZER])
    if step.contrast is not None:
        step.contrast.queue.load_state_dict(state[QUEUE])
    losses: list[float] = []
    first = _watch(step, losses)
    gradients: list[tuple[str, float]] = []
    step.optimizer.register_step_pre_hook(lambda *_: gradients.extend(_norms(step.engine.module)))
    result = step(about["step"], kept.micro_batches, about["lr"])
    weights = [name for name, t in [*state[MODEL].items(), *state[OPTIMIZER].items()] if not torch.isfinite(t).all()]
    step.engine.destroy()
    return Replayed(about, result, losses, first[0] if first else None, weights, gradients)


def _micro_batch(tensors: Mapping[str, Tensor]) -> MicroBatch:
    labels = tensors["labels"]
    return MicroBatch(tensors["query"], tensors.get("key"), labels, tensors["ids"], torch.ones_like(labels).bool())


def _watch(step: Step, losses: list[float]) -> list[tuple[str, int]]:
    """Record the loss of each micro-batch, and the first module whose output is not finite."""
    first: list[tuple[str, int]] = []
    run_loss = step.forward.run_loss

    def run_and_keep(*args: Any, **kwargs: Any) -> Any:
        output = run_loss(*args, **kwargs)
        losses.append(float(output.loss.detach()))
        return output

    def hook(name: str) -> Callable[..., None]:
        def look(module: nn.Module, inputs: object, output: object) -> None:
            tensors = output if isinstance(output, tuple | ModelOutput) else (output,)
            if not first and any(isinstance(t, Tensor) and not torch.isfinite(t).all() for t in tensors):
                first.append((name, len(losses)))

        return look

    step.forward.run_loss = run_and_keep  # type: ignore[method-assign]
    for name, module in step.engine.module.named_modules():
        module.register_forward_hook(hook(name))
    return first


def _norms(model: nn.Module) -> list[tuple[str, float]]:
    """Gradient norms by parameter: those not finite first, then the largest."""
    norms = [(name, float(p.grad.norm())) for name, p in model.named_parameters() if p.grad is not None]
    return sorted(norms, key=lambda pair: -pair[1] if math.isfinite(pair[1]) else -math.inf)
