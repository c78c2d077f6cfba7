"""The order of an epoch as arithmetic: which sample stands where, with no shuffle buffer and no state.

For (seed, epoch): the shards are shuffled and their ids laid end to end; this line is rotated by a drawn offset and
cut into G equal slots (G the global batch; the fewer than G ids at its end are left out, other ones each epoch);
inside a slot, windows of consecutive ids are permuted. Step b takes id b of every slot.

A window is one contiguous stretch of a shard (two where a shard ends), so it is also the unit of reading. Without
the rotation a data set of one shard would leave out the same ids in every epoch.

A sampler gives another line, of as many places, in which ids occur more or less often (`sampler`); the rest is the
same, and so are the meanings of resuming and of other numbers of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from paco_ds.errors import RecipeError
from paco_ds.randomness import DrawPurpose, generator, permutation


class EpochOrder:
    """Sample ids of one epoch, by step and slot; O(shards) to make, O(1) at any position.

    Args:
        counts: samples of each shard; ids run through the shards in this order.
        global_batch: G, the number of slots.
        seed, epoch: what the order is a function of.
        window: ids of a slot that are permuted among themselves.
        line: ids as a sampler lays them end to end, int [samples]; by default the shuffled shards.

    Raises:
        RecipeError: there are fewer samples than slots.
    """

    def __init__(
        self,
        counts: Sequence[int],
        global_batch: int,
        *,
        seed: int,
        epoch: int,
        window: int = 64,
        line: npt.NDArray[np.integer] | None = None,
    ) -> None:
        sizes = np.asarray(counts, dtype=np.int64)
        self.samples = int(sizes.sum())
        if self.samples < global_batch:
            raise RecipeError(
                f"a global batch of {global_batch} images is more than the {self.samples} samples there are; "
                f"lower step.micro_batch or step.micro_batches"
            )
        self.seed, self.epoch, self.window = seed, epoch, window
        self.steps = self.samples // global_batch
        self._line = line
        shuffled = permutation(len(sizes), DrawPurpose.SHARDS, seed, epoch)
        self._end = np.cumsum(sizes[shuffled])  # of each shard on the line
        self._first_id = (np.cumsum(sizes) - sizes)[shuffled]
        self._first_place = self._end - sizes[shuffled]
        self._rotation = int(generator(DrawPurpose.ROTATION, seed, epoch).integers(self.samples))

    def batch(self, step: int, slots: Sequence[int]) -> np.ndarray:
        """Ids that `slots` give at `step`: int64 [len(slots)]."""
        number, place = divmod(step, self.window)
        return self.window_ids(number, slots)[:, place]

    def window_ids(self, number: int, slots: Sequence[int]) -> np.ndarray:
        """Ids of the number-th window of `slots`, in the order they are taken: int64 [len(slots), steps of it]."""
        start = number * self.window
        length = min(self.window, self.steps - start)
        if length <= 0:
            raise IndexError(f"window {number} starts at step {start}, the epoch has {self.steps}")
        offsets = np.stack(
            [permutation(length, DrawPurpose.WINDOW, self.seed, self.epoch, slot, number) for slot in slots]
        )
        lane_starts = np.asarray(slots, dtype=np.int64)[:, None] * self.steps
        return self._ids(lane_starts + start + offsets)

    def _ids(self, places: np.ndarray) -> np.ndarray:
        places = (places + self._rotation) % self.samples
        if self._line is not None:
            return self._line[places].astype(np.int64)
        shard = np.searchsorted(self._end, places, side="right")
        return self._first_id[shard] + places - self._first_place[shard]


def position_of(step: int, slot: int, global_batch: int) -> int:
    """A sample's place in the epoch's plan: what its random view is a function of."""
    return step * global_batch + slot
