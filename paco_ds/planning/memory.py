"""Peak memory of one rank in a step, by part, for any ZeRO stage.

P is the bytes of trained weights (query encoder and centers, float32), Kp those of the key encoder, of frozen weights
and of averages, W ranks, A micro-batches per rank. s is the optimizer's states of a weight: 1 of SGD with momentum and
of LARS, 2 of AdamW, and of Muon 1 of matrices and 2 of others. What a stage holds was read from DeepSpeed 0.19; tests
compare it with real runs.

    stage   weights          states     copies of weights   gradients
    0       P + Kp           s P        -                   P, and as much flat
    1       P + Kp           s P / W    P / W               P, and a bucket
    2       P + Kp           s P / W    P / W               P / W if A > 1, and a bucket
    3       (P + Kp) / W     s P / W    P / W, and those    P / W, and a bucket
                                        gathered in use

If not all gradients fit into a bucket, stages 2 and 3 reduce it while activations are held, and stage 2 holds P / W of
reduced gradients. With `offload_optimizer`, states, weight copies and gradients of the rank's partition are in host
memory, see `_RankMemory.offloaded`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from paco_ds.distributed.load_deepspeed import DeepSpeedZeroConfig
from paco_ds.planning.planned_rank import FLOAT, PlannedRank

Device = Literal["cuda", "cpu"]

PARTS = (
    "query encoder, centers",
    "key encoder",
    "weights gathered",
    "own weights, copy",
    "optimizer states",
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
        moment: "views", "keys", "forward and backward" or "reduction and update".
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


def offloads(zero: Any) -> bool:
    """Whether the optimizer is offloaded to host memory."""
    return zero.stage > 0 and zero.offload_optimizer is not None and zero.offload_optimizer.device != "none"


def plan_memory(rank: PlannedRank, zero: Any, device: Device) -> Memory:
    """Memory of a rank.

    Args:
        zero: see :func:`zero_settings`.
        device: "cuda" counts what is allocated (`max_memory_allocated`); "cpu" what becomes resident, without
            pages of a bucket that are never touched.
    """
    parts = _RankMemory(rank, zero, device)
    static, offloaded = parts.static(), parts.offloaded()
    static["offloaded optimizer"] = offloaded if device == "cpu" else 0
    moments = {
        "views": {"working memory": rank.trace.views_peak},  # before a step, where they are rendered on the device
        "keys": parts.while_keys_are_made(),
        "forward and backward": parts.while_queries_run(),
        "reduction and update": parts.while_weights_are_updated(),
    }
    every = [
        Memory(name, _merged(static, added), offloaded if device == "cuda" else 0) for name, added in moments.items()
    ]
    return max(every, key=lambda memory: memory.total)


@dataclass(frozen=True)
class _RankMemory:
    """Bytes of the parts of a rank's memory: those that stay, and those of each moment of a step."""

    rank: PlannedRank
    zero: Any
    device: Device

    def static(self) -> dict[str, int]:
        """What is held during the whole step."""
        recipe, trace, layout, zero = self.rank.recipe, self.rank.trace, self.rank.layout, self.zero
        W, trained, followed = layout.world_size, self.rank.trained_bytes, FLOAT * sum(trace.followed)
        kept = 0 if offloads(zero) else self._own  # of the optimizer's partition
        parts = {
            "buffers": trace.buffers + 2 * FLOAT * trace.statistics,
            "optimizer states": FLOAT * trace.states if zero.stage == 0 else recipe.optimizer.states_of() * kept,
        }
        if zero.stage < 3:
            parts |= {"query encoder, centers": trained, "key encoder": followed}
        else:
            persistent = sum(n for n in trace.trained + trace.followed if n < zero.param_persistence_threshold)
            parts |= {
                "query encoder, centers": self._own,
                "key encoder": _share(trace.followed, W),
                # on one rank the gathered weight is the partition
                "weights gathered": FLOAT * persistent if W > 1 else 0,
                "gradients": kept,
                "reduction buckets": self._bucket,
            }
        if zero.stage > 0:
            parts["own weights, copy"] = kept
        if offloads(zero):
            parts["gradients"] = 3 * self._largest_gradient  # a buffer, and its float64 copy for the norm
        views = len(recipe.training_views)
        ahead = self.rank.exchanges_images
        # on CUDA the images of this step, and of the next if key images are sent ahead, are on the host unless the
        # device rendered them
        on_host = self.device == "cuda" and recipe.views.device == "cpu"
        here = 1 if on_host else views * layout.accumulation * (2 if ahead else 1)
        # key images of the next step: rows sent and rows received
        parts["input images"] = self._view_bytes * (here + (2 * layout.accumulation if ahead else 0))
        if recipe.keys_from:
            dim, row = recipe.model.key_dim, FLOAT * recipe.model.key_dim + 8
            ring = recipe.queue.length * row
            # contrasting with the keys of the whole step needs a copy of the queue
            copy = ring + layout.global_batch * row if recipe.loss.contrast_scope == "global_batch" else 0
            present = min(self.rank.classes, recipe.queue.length)
            sums = (present + 1) * FLOAT * dim + self.rank.classes * 16  # and the count and row of each class
            parts["queue and keys"] = ring + copy + sums + layout.global_batch * row
        return parts

    def while_keys_are_made(self) -> dict[str, int]:
        """Besides, in the forward of the key encoder; empty without one."""
        recipe, trace = self.rank.recipe, self.rank.trace
        if recipe.keys_from != "key_encoder" or recipe.key_encoder is None:
            return {}
        # in group order; with batch_norm local they stay on the host
        whole = not trace.shuffles_keys
        moving = 0 if whole and self.device == "cuda" else self.rank.layout.accumulation * self._view_bytes
        return {
            "input images": moving,
            "working memory": trace.key_peak,
            "weights gathered": self._gathered(trace.followed),
        }

    def while_queries_run(self) -> dict[str, int]:
        """Besides, at the peak of forward, loss and backward of the last micro-batch."""
        trace, zero, trained = self.rank.trace, self.zero, self.rank.trained_bytes
        accumulates = self.rank.layout.accumulation > 1
        early = zero.stage >= 2 and self._in_bucket < trained  # a full bucket is reduced during backward
        peak, gradients, buckets = trace.peak, 0, 0
        if zero.stage in (0, 1):
            gradients = trained if accumulates else 0
            peak = trace.peak if accumulates else trace.peak_with_gradients
        if zero.stage == 2:
            gradients = 0 if offloads(zero) else self._own * (accumulates + early)
            # gradients are copied into the bucket during backward, which touches its pages
            peak = trace.peak_with_gradients if self.device == "cpu" and not early else trace.peak
        if zero.stage in (1, 2) and (self.device == "cuda" or early):
            buckets = self._bucket
        if early:
            buckets += self._in_bucket  # flattened copy
        return {
            "gradients": gradients,
            "reduction buckets": buckets,
            "weights gathered": self._gathered(trace.trained),
            "saved for backward": trace.saved - trace.logits,
            "logits and contrasts": trace.logits,
            "working memory": max(peak - trace.saved, 0),
        }

    def while_weights_are_updated(self) -> dict[str, int]:
        """Besides, when gradients are reduced and the optimizer steps."""
        zero, trained = self.zero, self.rank.trained_bytes
        if zero.stage == 0:
            # joined to be sent, in buckets of our own; alone there is nobody to send to
            # of Muon each update is made beside its gradient: two float32 matrices and half as much in bfloat16
            matrix = FLOAT * max(self.rank.trace.trained) if self.rank.recipe.optimizer.name == "muon" else 0
            buckets = trained if self.rank.layout.world_size > 1 else 0
            return {"gradients": trained, "reduction buckets": buckets, "update": 4 * matrix}
        kept = 0 if offloads(zero) else self._own
        held = {1: trained - self._in_bucket, 2: kept if self.rank.layout.accumulation > 1 else 0, 3: 0}[zero.stage]
        # a flattened copy of the bucket is reduced; an update holds its gradients and a copy with weight decay
        return {
            "gradients": held,
            "reduction buckets": self._in_bucket + (0 if zero.stage == 3 else self._bucket),
            "update": max(2 * kept - self._in_bucket, 0),
            "weights gathered": self._gathered(self.rank.trace.trained),
        }

    def offloaded(self) -> int:
        """Bytes on the host: weights, states and gradients of the rank's partition and a buffer of its size; at stage 2
        also accumulated gradients. Below stage 3 gradients pass through a buffer of one parameter."""
        if not offloads(self.zero):
            return 0
        shares = (
            3 + self.rank.recipe.optimizer.states_of() + (self.zero.stage == 2 and self.rank.layout.accumulation > 1)
        )
        passing = self._largest_gradient if self.zero.stage < 3 else 0
        return shares * self._own + passing

    @property
    def _own(self) -> int:
        """The rank's partition of the trained weights."""
        return _share(self.rank.trace.trained, self.rank.layout.world_size)

    @property
    def _largest_gradient(self) -> int:
        return _share((max(self.rank.trace.trained),), self.rank.layout.world_size if self.zero.stage == 3 else 1)

    @property
    def _in_bucket(self) -> int:
        return min(self.rank.trained_bytes, FLOAT * int(self.zero.reduce_bucket_size))

    @property
    def _bucket(self) -> int:
        if self.device == "cpu":
            return self._in_bucket  # pages that are never written are not resident
        doubled = self.zero.overlap_comm and self.zero.stage < 3
        return FLOAT * int(self.zero.reduce_bucket_size) * (2 if doubled else 1)

    def _gathered(self, parameters: tuple[int, ...]) -> int:
        if self.zero.stage < 3 or self.rank.layout.world_size == 1:
            return 0
        partitioned = sum(n for n in parameters if n >= self.zero.param_persistence_threshold)
        return FLOAT * min(partitioned, int(self.zero.max_live_parameters))

    @property
    def _view_bytes(self) -> int:
        """One view of a micro-batch's images."""
        return self.rank.layout.micro_batch * self.rank.image_bytes


def _share(parameters: tuple[int, ...], world_size: int) -> int:
    return FLOAT * -(-sum(parameters) // world_size)


def _merged(first: dict[str, int], second: dict[str, int]) -> dict[str, int]:
    return {part: first.get(part, 0) + second.get(part, 0) for part in PARTS}
