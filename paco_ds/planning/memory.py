"""Peak memory of one rank in a step, by part, for any ZeRO stage.

P is the bytes of trained weights (query encoder and centers, float32), Kp those of the key encoder, W ranks, A
micro-batches per rank. What a stage holds was read from DeepSpeed 0.19; tests compare it with real runs.

    stage   weights          momentum   copies of weights   gradients
    0       P + Kp           P          -                   P, and as much flat
    1       P + Kp           P / W      P / W               P, and a bucket
    2       P + Kp           P / W      P / W               P / W if A > 1, and a bucket
    3       (P + Kp) / W     P / W      P / W, and those    P / W, and a bucket
                                        gathered in use

If not all gradients fit into a bucket, stages 2 and 3 reduce it while activations are held, and stage 2 holds P / W of
reduced gradients. With `offload_optimizer`, momentum, weight copies and gradients of the rank's partition are in host
memory, see :func:`_offloaded`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from paco_ds.config.recipe import Recipe
from paco_ds.distributed.ranks import MicroBatchLayout
from paco_ds.planning.trace import StepTrace

FLOAT = 4
Device = Literal["cuda", "cpu"]

PARTS = (
    "query encoder, centers",
    "key encoder",
    "weights gathered",
    "own weights, copy",
    "momentum",
    "offloaded optimizer",
    "gradients",
    "reduction buckets",
    "update",
    "queue and keys",
    "input images",
    "saved for backward",
    "logits and contrasts",
    "working memory",
    "buffers",
)


@dataclass(frozen=True)
class Memory:
    """Bytes in use on a rank at the peak of a step.

    Attributes:
        moment: "keys", "forward and backward" or "reduction and update".
        parts: bytes by part, see `PARTS`.
        host: additional bytes of host memory for an offloaded optimizer; 0 for a CPU rank, whose parts include them.
    """

    moment: str
    parts: dict[str, int]
    host: int

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def zero_settings(config: dict[str, Any], stage: int | None = None) -> Any:
    """DeepSpeed's settings object for a configuration, with its defaults; for another stage if given."""
    zero = dict(config.get("zero_optimization", {}))
    return DeepSpeedZeroConfig(**(zero | ({} if stage is None else {"stage": stage})))


def plan_memory(
    recipe: Recipe, trace: StepTrace, classes: int, layout: MicroBatchLayout, zero: Any, device: Device
) -> Memory:
    """Memory of a rank.

    Args:
        zero: see :func:`zero_settings`.
        device: "cuda" counts what is allocated (`max_memory_allocated`); "cpu" what becomes resident, without
            pages of a bucket that are never touched.
    """
    static = _static(recipe, trace, classes, layout, zero, device)
    offloaded = _offloaded(trace, layout, zero)
    static["offloaded optimizer"] = offloaded if device == "cpu" else 0
    moments = {
        "keys": _while_keys_are_made(recipe, trace, layout, zero, device),
        "forward and backward": _while_queries_run(recipe, trace, layout, zero, device),
        "reduction and update": _while_weights_are_updated(trace, layout, zero, device),
    }
    every = {
        name: Memory(name, _merged(static, parts), offloaded if device == "cuda" else 0)
        for name, parts in moments.items()
    }
    return max(every.values(), key=lambda memory: memory.total)


def _static(
    recipe: Recipe, trace: StepTrace, classes: int, layout: MicroBatchLayout, zero: Any, device: Device
) -> dict[str, int]:
    W = layout.world_size
    trained, followed = FLOAT * sum(trace.trained), FLOAT * sum(trace.followed)
    own = _share(trace.trained, W)
    kept = 0 if offloads(zero) else own  # of the optimizer's partition
    parts = {"buffers": trace.buffers + 2 * FLOAT * trace.statistics, "momentum": trained if zero.stage == 0 else kept}
    if zero.stage < 3:
        parts |= {"query encoder, centers": trained, "key encoder": followed}
    else:
        persistent = sum(n for n in trace.trained + trace.followed if n < zero.param_persistence_threshold)
        parts |= {
            "query encoder, centers": own,
            "key encoder": _share(trace.followed, W),
            # on one rank the gathered weight is the partition
            "weights gathered": FLOAT * persistent if W > 1 else 0,
            "gradients": kept,
            "reduction buckets": _bucket(trained, zero, device),
        }
    if zero.stage > 0:
        parts["own weights, copy"] = kept
    if offloads(zero):
        parts["gradients"] = 3 * _largest(trace, layout, zero)  # a buffer, and its float64 copy for the norm
    images = _image_bytes(recipe)
    views = len(recipe.training_views)
    exchanges = _exchanges(recipe, layout)
    # on CUDA the images of this step, and of the next if key images are sent ahead, are on the host
    here = views * layout.accumulation * (2 if exchanges else 1) if device == "cpu" else 1
    # key images of the next step: rows sent and rows received
    parts["input images"] = images * (here + (2 * layout.accumulation if exchanges else 0))
    if recipe.keys_from:
        dim, row = recipe.model.key_dim, FLOAT * recipe.model.key_dim + 8
        ring = recipe.queue.length * row
        # contrasting with the keys of the whole step needs a copy of the queue
        copy = ring + layout.global_batch * row if recipe.loss.contrast_scope == "global_batch" else 0
        present = min(classes, recipe.queue.length)
        sums = (present + 1) * FLOAT * dim + classes * 16  # and the count and row of each class
        parts["queue and keys"] = ring + copy + sums + layout.global_batch * row
    return parts


def _while_keys_are_made(
    recipe: Recipe, trace: StepTrace, layout: MicroBatchLayout, zero: Any, device: Device
) -> dict[str, int]:
    if recipe.keys_from != "key_encoder" or recipe.key_encoder is None:
        return {}
    # in group order; with batch_norm local they stay on the host
    whole = recipe.key_encoder.batch_norm == "local"
    moving = 0 if whole and device == "cuda" else layout.accumulation * _image_bytes(recipe)
    return {
        "input images": moving,
        "working memory": trace.key_peak,
        "weights gathered": _gathered(trace.followed, layout, zero),
    }


def _exchanges(recipe: Recipe, layout: MicroBatchLayout) -> bool:
    """Whether key images are exchanged between ranks, one step ahead."""
    encoder = recipe.key_encoder if recipe.keys_from else None
    return encoder is not None and encoder.batch_norm == "shuffle" and layout.world_size > 1


def _while_queries_run(
    recipe: Recipe, trace: StepTrace, layout: MicroBatchLayout, zero: Any, device: Device
) -> dict[str, int]:
    trained, own = FLOAT * sum(trace.trained), _share(trace.trained, layout.world_size)
    in_bucket = _in_bucket(trained, zero)
    accumulates = layout.accumulation > 1
    early = zero.stage >= 2 and in_bucket < trained  # a full bucket is reduced during backward
    peak, gradients, buckets = trace.peak, 0, 0
    if zero.stage in (0, 1):
        gradients = trained if accumulates else 0
        peak = trace.peak if accumulates else trace.peak_with_gradients
    if zero.stage == 2:
        gradients = 0 if offloads(zero) else own * (accumulates + early)
        # gradients are copied into the bucket during backward, which touches its pages
        peak = trace.peak_with_gradients if device == "cpu" and not early else trace.peak
    if zero.stage in (1, 2) and (device == "cuda" or early):
        buckets = _bucket(trained, zero, device)
    if early:
        buckets += in_bucket  # flattened copy
    return {
        "gradients": gradients,
        "reduction buckets": buckets,
        "weights gathered": _gathered(trace.trained, layout, zero),
        "saved for backward": trace.saved - trace.logits,
        "logits and contrasts": trace.logits,
        "working memory": max(peak - trace.saved, 0),
    }


def _while_weights_are_updated(trace: StepTrace, layout: MicroBatchLayout, zero: Any, device: Device) -> dict[str, int]:
    trained, own = FLOAT * sum(trace.trained), _share(trace.trained, layout.world_size)
    if zero.stage == 0:
        # flattened to be reduced, on one rank too, whatever `reduce_bucket_size` says
        return {"gradients": trained, "reduction buckets": trained}
    in_bucket = _in_bucket(trained, zero)
    kept = 0 if offloads(zero) else own
    held = {1: trained - in_bucket, 2: kept if layout.accumulation > 1 else 0, 3: 0}[zero.stage]
    # a flattened copy of the bucket is reduced; the update holds the partition's gradients and a copy with weight decay
    return {
        "gradients": held,
        "reduction buckets": in_bucket if zero.stage == 3 else _bucket(trained, zero, device) + in_bucket,
        "update": max(2 * kept - in_bucket, 0),
        "weights gathered": _gathered(trace.trained, layout, zero),
    }


def offloads(zero: Any) -> bool:
    """Whether the optimizer is offloaded to host memory."""
    return zero.stage > 0 and zero.offload_optimizer is not None and zero.offload_optimizer.device != "none"


def _offloaded(trace: StepTrace, layout: MicroBatchLayout, zero: Any) -> int:
    """Bytes on the host: weights, momentum and gradients of the rank's partition and a buffer of its size; at stage 2
    also accumulated gradients. Below stage 3 gradients pass through a buffer of one parameter."""
    if not offloads(zero):
        return 0
    shares = 5 if zero.stage == 2 and layout.accumulation > 1 else 4
    passing = _largest(trace, layout, zero) if zero.stage < 3 else 0
    return shares * _share(trace.trained, layout.world_size) + passing


def _largest(trace: StepTrace, layout: MicroBatchLayout, zero: Any) -> int:
    """Bytes of the largest gradient on a rank."""
    return _share((max(trace.trained),), layout.world_size if zero.stage == 3 else 1)


def _bucket(trained: int, zero: Any, device: Device) -> int:
    if device == "cpu":
        return _in_bucket(trained, zero)  # pages that are never written are not resident
    return FLOAT * int(zero.reduce_bucket_size) * (2 if zero.overlap_comm and zero.stage < 3 else 1)


def _in_bucket(trained: int, zero: Any) -> int:
    return min(trained, FLOAT * int(zero.reduce_bucket_size))


def _gathered(parameters: tuple[int, ...], layout: MicroBatchLayout, zero: Any) -> int:
    if zero.stage < 3 or layout.world_size == 1:
        return 0
    partitioned = sum(n for n in parameters if n >= zero.param_persistence_threshold)
    return FLOAT * min(partitioned, int(zero.max_live_parameters))


def _share(parameters: tuple[int, ...], world_size: int) -> int:
    return FLOAT * -(-sum(parameters) // world_size)


def _image_bytes(recipe: Recipe) -> int:
    return recipe.step.micro_batch * 3 * recipe.views.query.size**2


def _merged(first: dict[str, int], second: dict[str, int]) -> dict[str, int]:
    return {part: first.get(part, 0) + second.get(part, 0) for part in PARTS}
