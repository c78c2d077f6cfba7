"""Settings that would make a plan fit into the memory of a GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from paco_ds.errors import RecipeError
from paco_ds.planning.memory import offloads, plan_memory
from paco_ds.planning.plan import Plan, judge
from paco_ds.planning.planned_rank import PlannedRank
from paco_ds.planning.trace import trace_step

SMALL_BUCKET = 20_000_000  # elements; DeepSpeed's default of 5e8 is 2 GB of float32


def find_remedies(plan: Plan) -> list[str]:
    """Settings that make it fit, of the first kind that works: another stage or smaller buckets; activation
    checkpointing or autocast; both; smaller micro-batches. It takes up to a minute.

    Returns:
        A line each; none for a plan that fits or without a GPU's memory.
    """
    if plan.gpu_memory is None or plan.verdict == "fits":
        return []
    search = _Search(plan)
    recomputed, autocast = plan.recipe.engine.activation_checkpointing, plan.autocast
    return (
        search.other_stages() + search.smaller_buckets()
        or search.less_activations([(True, autocast), (recomputed, True)])
        or search.less_activations([(True, True)])
        or search.smaller_micro_batch()
        or ["a smaller backbone, smaller images, or GPUs with more memory; no setting above is enough"]
    )


@dataclass(frozen=True)
class _Search:
    """What a plan could have instead."""

    plan: Plan

    @property
    def stages(self) -> list[int]:
        # compiled encoders cannot be partitioned, see paco_ds.models.execution
        return [stage for stage in self.plan.memory if stage < 3 or not self.plan.recipe.engine.compile]

    def fits(self, total: int) -> bool:
        assert self.plan.gpu_memory is not None
        return judge(total, self.plan.gpu_memory, self.plan.device) == "fits"

    def other_stages(self) -> list[str]:
        fitting = [s for s in self.stages if s != self.plan.stage and self.fits(self.plan.memory[s].total)]
        deepspeed = self.plan.recipe.engine.deepspeed
        if deepspeed == "auto":
            return [f"ZeRO stage {stage}: engine.deepspeed=zero{stage}" for stage in fitting]
        offloaded = offloads(self.plan.zero[self.plan.stage])
        return [
            f'ZeRO stage {stage}: "stage": {stage}'
            + (' without "offload_optimizer"' if stage == 0 and offloaded else "")
            + f' in "zero_optimization" of {deepspeed}'
            for stage in fitting
        ]

    def smaller_buckets(self) -> list[str]:
        plan = self.plan
        rank = PlannedRank(plan.recipe, plan.trace, len(plan.data.class_counts), plan.layout)
        for stage in self.stages[1:]:
            small = self._small_buckets(stage)
            if small is not plan.zero[stage] and self.fits(plan_memory(rank, small, plan.device).total):
                at = "" if stage == plan.stage else f' and "stage": {stage}'
                return [f'"reduce_bucket_size": {SMALL_BUCKET}{at} in "zero_optimization" of the DeepSpeed JSON']
        return []

    def less_activations(self, ways: list[tuple[bool, bool]]) -> list[str]:
        """Of ways to store less for backward, each whether activations are recomputed and autocast: those that fit."""
        now = (self.plan.recipe.engine.activation_checkpointing, self.plan.autocast)
        places = [(way, self._where(*way)) for way in ways if way != now]
        return [f"{self._in_words(*way)} {place}" for way, place in places if place]

    def smaller_micro_batch(self) -> list[str]:
        micro_batch = self.plan.recipe.step.micro_batch
        while micro_batch > 2:  # BatchNorm needs 2 images
            micro_batch = (micro_batch + 1) // 2
            if place := self._where(True, True, micro_batch):
                way = " and ".join(filter(None, [f"step.micro_batch={micro_batch}", self._in_words(True, True)]))
                return [f"{way} {place} (another model: BatchNorm and contrasts see {micro_batch})"]
        return []

    def _where(self, recomputed: bool, autocast: bool, micro_batch: int | None = None) -> str | None:
        """A stage at which it fits with small buckets, preferring the plan's."""
        recipe, counts = self.plan.recipe, self.plan.data.class_counts
        engine = {"activation_checkpointing": True, "compile": False} if recomputed else {}
        micro_batch = micro_batch or recipe.step.micro_batch
        sections = {
            "engine": recipe.engine.model_copy(update=engine),
            "step": recipe.step.model_copy(update={"micro_batch": micro_batch}),
        }
        changed = recipe.model_copy(update=sections)
        try:
            trace = trace_step(changed, counts, autocast)
        except RecipeError:  # a backbone without activation checkpointing
            if recomputed:
                return None
            raise
        rank = PlannedRank(changed, trace, len(counts), replace(self.plan.layout, micro_batch=micro_batch))
        for stage in sorted(self.stages, key=lambda stage: stage != self.plan.stage):
            small = self._small_buckets(stage)
            if self.fits(plan_memory(rank, small, self.plan.device).total):
                shrunk = small is not self.plan.zero[stage]
                return f"at ZeRO stage {stage}" + (f', "reduce_bucket_size": {SMALL_BUCKET}' if shrunk else "")
        return None

    def _small_buckets(self, stage: int) -> Any:
        """The plan's own settings where its buckets are small already, or where there are none."""
        zero = self.plan.zero[stage]
        small = stage == 0 or zero.reduce_bucket_size <= SMALL_BUCKET
        return zero if small else zero.model_copy(update={"reduce_bucket_size": SMALL_BUCKET})

    def _in_words(self, recomputed: bool, autocast: bool) -> str:
        """Settings for recomputation and autocast that the plan does not have yet."""
        engine = self.plan.recipe.engine
        ways = []
        if recomputed and not engine.activation_checkpointing:
            ways.append("engine.activation_checkpointing=true" + " engine.compile=false" * bool(engine.compile))
        if autocast and not self.plan.autocast:
            ways.append("bfloat16 autocast (engine.precision=bfloat16)")
        return " and ".join(ways)
