"""The order of an epoch, computed from (seed, epoch) without a shuffle buffer or state.

The shards are shuffled and their ids concatenated. The sequence is rotated by a random offset and cut into G equal
parts, the batch slots (G is the global batch; the remainder, fewer than G ids, is left out). In a batch slot, windows
of consecutive ids are permuted. Step b takes the b-th id of every batch slot.

A window is a contiguous stretch of a shard (two where a shard ends), so it is also the unit of reading. Without the
rotation, a data set of one shard would leave out the same ids in every epoch.

A sampler supplies another sequence of the same length, in which ids occur more or less often (`sampler`). Steps,
resuming and elasticity stay the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from paco_ds.errors import RecipeError
from paco_ds.randomness import DrawPurpose, generator, permutation


class EpochOrder:
    """Sample ids of one epoch, by step and batch slot; O(shards) to construct, O(1) at any position.

    Args:
        counts: samples of each shard; ids run through the shards in this order.
        global_batch: G, the number of batch slots.
        seed, epoch: determine the order.
        window: length of the runs of ids that are permuted.
        sequence: ids of a sampler, int [samples]; by default those of the shuffled shards.

    Raises:
        RecipeError: there are fewer samples than batch slots.
    """

    def __init__(
        self,
        counts: Sequence[int],
        global_batch: int,
        *,
        seed: int,
        epoch: int,
        window: int = 64,
        sequence: npt.NDArray[np.integer] | None = None,
    ) -> None:
        sizes = np.asarray(counts, dtype=np.int64)
        self.samples = int(sizes.sum())
        if self.samples < global_batch:
            raise RecipeError(
                f"the global batch of {global_batch} images exceeds the {self.samples} samples of the data set; "
                f"lower step.micro_batch or step.micro_batches"
            )
        self.seed, self.epoch, self.window = seed, epoch, window
        self.steps = self.samples // global_batch
        self._sequence = sequence
        shuffled = permutation(len(sizes), DrawPurpose.SHARDS, seed, epoch)
        self._end = np.cumsum(sizes[shuffled])  # of each shard in the sequence
        self._first_id = (np.cumsum(sizes) - sizes)[shuffled]
        self._first_place = self._end - sizes[shuffled]
        self._rotation = int(generator(DrawPurpose.ROTATION, seed, epoch).integers(self.samples))

    def batch(self, step: int, slots: Sequence[int]) -> np.ndarray:
        """Ids of these batch slots at `step`: int64 [len(slots)]."""
        number, place = divmod(step, self.window)
        return self.window_ids(number, slots)[:, place]

    def window_ids(self, number: int, slots: Sequence[int]) -> np.ndarray:
        """Ids of the number-th window of these batch slots, in the order of the steps: int64 [len(slots), steps]."""
        start = number * self.window
        length = min(self.window, self.steps - start)
        if length <= 0:
            raise IndexError(f"window {number} starts at step {start}, the epoch has {self.steps}")
        offsets = np.stack(
            [permutation(length, DrawPurpose.WINDOW, self.seed, self.epoch, slot, number) for slot in slots]
        )
        slot_starts = np.asarray(slots, dtype=np.int64)[:, None] * self.steps
        return self._ids(slot_starts + start + offsets)

    def _ids(self, places: np.ndarray) -> np.ndarray:
        places = (places + self._rotation) % self.samples
        if self._sequence is not None:
            return self._sequence[places].astype(np.int64)
        shard = np.searchsorted(self._end, places, side="right")
        return self._first_id[shard] + places - self._first_place[shard]


def position_of(step: int, slot: int, global_batch: int) -> int:
    """A sample's position in the epoch; its random views are a function of it."""
    return step * global_batch + slot
