"""What the ranks of a pool run in the tests of the step: optimizer steps on made images, faults injected by name."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from paco_ds.config.recipe import Recipe
from paco_ds.data.stream.batches import MicroBatch
from paco_ds.distributed.parts import Parts
from paco_ds.distributed.ranks import ByteCounter, Ranks
from paco_ds.distributed.zero import own_model, own_states, set_states, whole_model, whole_states
from paco_ds.errors import RecipeError, TrainingError
from paco_ds.losses.base import Anchors, LossOutput
from paco_ds.training.agreement import check_replicas_equal
from paco_ds.training.build import Classes, build_model, build_step
from paco_ds.training.optimizer import UsualNorm
from paco_ds.training.step import Step
from paco_ds.training.step_result import StepResult
from tests.recipes import tiny_recipe

CLASS_COUNTS = (80, 40, 20, 8)
NORMALIZATION = ((0.4, 0.4, 0.4), (0.25, 0.25, 0.25))
SHOTS = ("many", "medium", "medium", "few")
TOTAL_STEPS = 20  # of a schedule


@dataclass
class Outcome:
    """Losses of the steps, the model before and after, the optimizer's states, queue, and what a test asks for."""

    losses: list[float]
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    states: dict[str, Tensor]
    queue: dict[str, Tensor]
    skipped: list[str | None] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    bytes_sent: dict[str, int] = field(default_factory=dict)


def made_micro_batch(recipe: Recipe, step: int, j: int) -> MicroBatch:
    """Micro-batch j of a step: noise with a bright stripe by class, the same whoever asks."""
    generator = torch.Generator().manual_seed(1000 * step + j)
    m, size = recipe.step.micro_batch, recipe.views.query.size
    labels = torch.multinomial(torch.tensor(CLASS_COUNTS).float(), m, replacement=True, generator=generator)
    views = []
    for _ in range(2):
        images = torch.randint(0, 150, (m, 3, size, size), generator=generator, dtype=torch.uint8)
        for image, label in zip(images, labels, strict=True):
            image[:, 3 * label : 3 * label + 3] += 100
        views.append(images)
    return MicroBatch(views[0], views[1], labels, torch.arange(m), torch.ones(m, dtype=torch.bool))


def deepspeed_config(stage: int, autocast: bool, **zero: Any) -> dict[str, Any]:
    """What the files in ds_configs/ say, with further zero_optimization settings, and the precision of the step."""
    autocasting = {"enabled": autocast, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return {"zero_optimization": {"stage": stage, **zero}, "torch_autocast": autocasting}


CLASSES = Classes(CLASS_COUNTS, SHOTS, None, *NORMALIZATION)


def make_step(ranks: Ranks, recipe: Recipe, config: dict[str, Any], state: dict[str, Tensor] | None = None) -> Step:
    """A step of a fresh engine, as the trainer builds it."""
    model = build_model(recipe, CLASSES)
    if state:
        model.load_state_dict(state)
    return build_step(
        recipe,
        model,
        CLASSES,
        config,
        ranks,
        total_steps=TOTAL_STEPS,
        steps_per_epoch=TOTAL_STEPS // recipe.schedule.epochs,
    )


def check_equal(step: Step) -> None:
    """The trainer's comparison of ranks."""
    check_replicas_equal(step.engine.module, step.contrast.queue if step.contrast else None, step.ranks)


def _on_cpu(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in named}


def outcome_of(step: Step, before: dict[str, Tensor], results: list[StepResult]) -> Outcome:
    return Outcome(
        losses=[r.loss for r in results],
        before=before,
        after=_on_cpu(whole_model(step.engine)),
        states=_on_cpu(whole_states(step.engine)),
        queue=_on_cpu(step.contrast.queue.state_dict().items()) if step.contrast else {},
        skipped=[r.skipped for r in results],
        grad_norms=[r.grad_norm for r in results],
    )


def run_steps(
    ranks: Ranks,
    overrides: tuple[str, ...] = (),
    stage: int = 0,
    autocast: bool = False,
    steps: int = 3,
    fault: str = "",
    fault_rank: int = 0,
    fault_step: int = 1,
    zero: dict[str, Any] | None = None,
    ahead: bool = False,
    state: dict[str, Tensor] | None = None,
) -> Outcome:
    """`steps` optimizer steps at the recipe's learning rate, with a fault of `FAULTS` injected.

    They start from the recipe's initial weights or those of `state`. With `ahead` key images are under way a step
    ahead, as the trainer has them.
    """
    recipe = tiny_recipe(*overrides)
    step = make_step(ranks, recipe, deepspeed_config(stage, autocast, **(zero or {})), state)
    before = _on_cpu(whole_model(step.engine))
    counter = ByteCounter()
    ranks.on_bytes = counter
    every = [[made_micro_batch(recipe, number, j) for j in step.layout.own] for number in range(steps)]
    results, images = [], None
    for number, batches in enumerate(every):
        if fault and (ranks.rank == fault_rank or fault in EVERYWHERE):
            FAULTS[fault](step, number == fault_step)
        arriving = images
        images = step.begin_exchange(number + 1, every[number + 1]) if ahead and number + 1 < steps else None
        results.append(step(number, batches, recipe.lr, arriving))
    ranks.on_bytes = ByteCounter()
    if fault not in EVERYWHERE:
        check_equal(step)
    outcome = outcome_of(step, before, results)
    outcome.bytes_sent = dict(counter.sent)
    step.engine.destroy()
    return outcome


def state_around_a_fault(
    ranks: Ranks,
    stage: int,
    fault: str,
    fault_rank: int,
    overrides: tuple[str, ...] = (),
    zero: dict[str, Any] | None = None,
) -> tuple[Outcome, Outcome, Outcome]:
    """The state before a step in which one rank makes something not finite, after it, and after one more step."""
    recipe = tiny_recipe(*overrides)
    step = make_step(ranks, recipe, deepspeed_config(stage, autocast=False, **(zero or {})))
    initial = _on_cpu(whole_model(step.engine))
    states = []
    for number in range(4):
        broken = number == 2
        if ranks.rank == fault_rank or fault == "outlier":
            FAULTS[fault](step, broken)
        batches = [made_micro_batch(recipe, number, j) for j in step.layout.own]
        result = step(number, batches, recipe.lr)
        if number:
            states.append(outcome_of(step, initial, [result]))
    check_equal(step)
    step.engine.destroy()
    return states[0], states[1], states[2]


def parts_beside_wholes(
    ranks: Ranks, stage: int, overrides: tuple[str, ...] = (), zero: dict[str, Any] | None = None
) -> list[tuple[str, int]]:
    """After two steps, twice: (name, values that differ) of each tensor that is put together from the ranks' parts,
    beside DeepSpeed's own gathering. Names alone on ranks but the first."""
    recipe = tiny_recipe(*overrides)
    step = make_step(ranks, recipe, deepspeed_config(stage, autocast=False, **(zero or {})))
    together, found = Parts(ranks), []
    for number in range(2):
        step(number, [made_micro_batch(recipe, number, j) for j in step.layout.own], recipe.lr)
        for own, whole in ((own_model, whole_model), (own_states, whole_states)):
            parts, expected = together.whole(dict(own(step.engine))), dict(whole(step.engine))
            assert not ranks.first or parts.keys() == expected.keys()
            found += [(name, int((parts[name].cpu() != expected[name].cpu()).sum())) for name in parts]
    step.engine.destroy()
    return found


def message_after_a_flipped_bit(ranks: Ranks, what: str, rank: int) -> str:
    """What `check_replicas_equal` says when one bit of the queue, or of a running statistic, differs on a rank."""
    step = make_step(ranks, tiny_recipe(), deepspeed_config(0, autocast=False))
    recipe = tiny_recipe()
    step(0, [made_micro_batch(recipe, 0, j) for j in step.layout.own], recipe.lr)
    if ranks.rank == rank:
        changed = step.contrast.queue.keys_KD if what == "queue" else step.statistics.flat
        changed.view(torch.int32).view(-1)[42] ^= 1
    try:
        check_equal(step)
    except TrainingError as error:
        return str(error)
    finally:
        step.engine.destroy()
    return ""


def error_of_compile_at_stage_3(ranks: Ranks) -> str:
    """What making a step says to compiled encoders at stage 3."""
    try:
        make_step(ranks, tiny_recipe("engine.compile=true"), deepspeed_config(3, autocast=False))
    except RecipeError as error:
        return str(error)
    return ""


def states_there_and_back(
    ranks: Ranks, stage: int, overrides: tuple[str, ...] = (), zero: dict[str, Any] | None = None
) -> bool:
    """True if the optimizer's states put into a fresh engine read back bit for bit, and are zero before that."""
    recipe = tiny_recipe(*overrides)
    step = make_step(ranks, recipe, deepspeed_config(stage, autocast=False, **(zero or {})))
    fresh = _on_cpu(whole_states(step.engine))
    generator = torch.Generator().manual_seed(0)
    wanted = {name: torch.randn(t.shape, generator=generator) for name, t in fresh.items()}
    set_states(step.engine, wanted)
    read = dict(whole_states(step.engine))
    step.engine.destroy()
    return all(not t.any() for t in fresh.values()) and all(torch.equal(read[n], wanted[n]) for n in wanted)


# --- faults, by name ------------------------------------------------------------------------------------------


class _NotFiniteBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * float("nan")


def _change_loss(step: Any, active: bool, change: Any) -> None:
    if not hasattr(step, "whole_loss"):
        step.whole_loss = step.forward.loss
    loss = step.whole_loss

    def changed(anchors: Anchors) -> LossOutput:
        output = loss(anchors)
        return replace(output, loss=change(output.loss))

    step.forward.loss = changed if active else loss


def _keys_not_finite(step: Any, active: bool) -> None:
    encoder = step.contrast.key_encoder
    plain = type(encoder)._encode

    def broken(images: Tensor) -> Tensor:
        keys = plain(encoder, images).clone()
        keys[0, 0] = float("inf")
        return keys

    encoder._encode = broken if active else lambda images: plain(encoder, images)


def _gradients_doubled(step: Step, active: bool) -> None:
    _change_loss(step, True, lambda loss: 2 * loss - loss.detach())


def _micro_batch_lost(step: Step, active: bool) -> None:
    seen = []

    def drop_first(loss: Tensor) -> Tensor:
        seen.append(1)
        return loss - loss + loss.detach() if len(seen) == 1 else loss

    _change_loss(step, True, drop_first)


def _statistics_not_averaged(step: Any, active: bool) -> None:
    step.statistics.finish_step = lambda micro_batches, number, applied: None


def _second_view_detached(step: Step, active: bool) -> None:
    loss = step.forward.loss

    def detached(anchors: Anchors) -> LossOutput:
        first, second = anchors.queries.chunk(2)
        return loss(replace(anchors, queries=torch.cat([first, second.detach()])))

    step.forward.loss = detached


def _no_moving_average(step: Step, active: bool) -> None:
    step.contrast.key_encoder.update = lambda number: None


def _statistics_not_finite(step: Any, active: bool) -> None:
    """As of a variance that overflows, where normalised activations and the loss stay finite."""
    plain = type(step.statistics).sums

    def overflown() -> Tensor:
        sums = plain(step.statistics)
        sums[3] = float("inf")
        return sums

    step.statistics.sums = overflown if active else lambda: plain(step.statistics)


def _gradient_far_off(step: Any, active: bool) -> None:
    """The norms of the steps before were a thousandth; every rank knows them alike."""
    step.usual_norm = UsualNorm(math.log(1e-3), 100) if active else UsualNorm()


FAULTS = {
    "statistics": _statistics_not_finite,
    "outlier": _gradient_far_off,
    "keys": _keys_not_finite,
    "loss": lambda step, active: _change_loss(step, active, lambda loss: loss * float("nan")),
    "gradient": lambda step, active: _change_loss(step, active, _NotFiniteBackward.apply),
    "gradients doubled": _gradients_doubled,
    "micro-batch lost": _micro_batch_lost,
    "statistics not averaged": _statistics_not_averaged,
    "no moving average": _no_moving_average,
    "second view detached": _second_view_detached,
}
EVERYWHERE = ("gradients doubled", "statistics not averaged", "no moving average", "second view detached")


def stop_heard_in_a_refused_step(ranks: Ranks, fault: str, stage: int) -> tuple[str | None, bool]:
    """(refusal, stop) of a step with a fault on rank 1, in which rank 1 alone is asked to stop."""
    recipe = tiny_recipe()
    step = make_step(ranks, recipe, deepspeed_config(stage, autocast=False))
    step.stop_requested = lambda: ranks.rank == 1
    if ranks.rank == 1:
        FAULTS[fault](step, True)
    result = step(0, [made_micro_batch(recipe, 0, j) for j in step.layout.own], recipe.lr)
    step.engine.destroy()
    return result.skipped, result.stop
