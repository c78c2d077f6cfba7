"""Which operations of a batch run together: each image has its own sequence, and a device wants few large steps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from paco_ds.data.stream.views.instructions import Kind
from paco_ds.data.stream.views.raw import RawBatch


@dataclass(frozen=True)
class Layer:
    """Operations of one kind, on some images of a batch: rows `members` of it, int64 [k].

    `numbers` float32 [k, P] and `tables` uint8 [k, 256] are those of `RawBatch`; tables are empty but for TABLE.
    """

    kind: Kind
    members: npt.NDArray[np.int64]
    numbers: npt.NDArray[np.float32]
    tables: npt.NDArray[np.uint8]


def schedule(batch: RawBatch) -> list[Layer]:
    """Layers that carry out the operations of each image in its own order.

    The next kind is the one that the largest share of those who still need it wait for, so that few layers are left.
    """
    images = np.arange(len(batch))
    kinds = np.pad(batch.kinds, ((0, 0), (0, 1)))
    place = np.zeros(len(batch), np.int64)
    left = (kinds[:, :, None] == np.arange(len(Kind))).sum(1)  # operations of each kind that an image still needs
    layers: list[Layer] = []
    while (waiting := kinds[images, place]).any():
        of_kind = np.bincount(waiting, minlength=len(Kind))
        of_kind[Kind.NOTHING] = 0
        kind = Kind(int(np.argmax(of_kind / np.maximum((left > 0).sum(0), 1))))
        members = np.flatnonzero(waiting == kind)
        at = members, place[members]
        tables = batch.tables[at] if kind is Kind.TABLE else np.empty((0, 256), np.uint8)
        layers.append(Layer(kind, members, batch.numbers[at], tables))
        place[members] += 1
        left[members, kind] -= 1
    return layers
