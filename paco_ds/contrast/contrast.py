"""Keys and queue of a run as one step uses them.

Shapes: G global batch, m micro-batch, D dimension of a key, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from paco_ds.contrast.key_encoder import KeyEncoder, Keys, PendingImages, PendingKeys
from paco_ds.contrast.key_queue import KeyQueue, QueueSnapshot
from paco_ds.distributed.ranks import MicroBatchLayout
from paco_ds.models.recogniser import split_experts


@dataclass(frozen=True)
class Contrast:
    """Keys and queue that queries are contrasted with.

    Attributes:
        queue: keys of earlier steps.
        key_encoder: makes the keys of a step; None where the query encoder makes them from a second view (GPaCo).
        scope: "micro_batch" (published) contrasts a query with the keys of its micro-batch, "global_batch" with those
            of the whole step.
        classes: C.
        experts: how many the model has; None without experts.
    """

    queue: KeyQueue
    key_encoder: KeyEncoder | None
    scope: Literal["micro_batch", "global_batch"]
    classes: int
    experts: int | None

    def begin_exchange(self, step: int, views: Sequence[Tensor]) -> PendingImages | None:
        """Begin to send the key views of a step to the ranks that make their keys; None without a key encoder."""
        return None if self.key_encoder is None else self.key_encoder.begin_exchange(step, views)

    def make_keys(self, step: int, images: PendingImages | None, labels: Sequence[Tensor]) -> PendingKeys | None:
        """Update the key encoder and make this step's keys; None without a key encoder."""
        if self.key_encoder is None:
            return None
        assert images is not None
        self.key_encoder.update(step)
        return self.key_encoder.keys(step, images, labels)

    def snapshot(self, keys: Keys | None) -> QueueSnapshot:
        """The queue before this step; for a global scope with this step's keys, which carry no gradient either."""
        newest = None if keys is None or self.scope == "micro_batch" else (keys.keys_GD, keys.labels_G)
        snapshot = self.queue.snapshot(self.classes, newest)
        return snapshot if self.experts is None else snapshot.experts(self.experts)

    def keys_of(self, micro_batch: int, keys: Keys | None, layout: MicroBatchLayout) -> Tensor | None:
        """Keys of one micro-batch, [m, D] or [E, m, D]; None where the snapshot has them, or without a key encoder."""
        if keys is None or self.scope == "global_batch":
            return None
        slots = layout.slots(micro_batch)
        return split_experts(keys.keys_GD[slots.start : slots.stop], self.experts)
