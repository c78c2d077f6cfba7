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

    A kind runs when no image waits for a cheaper one, so that images that need a dear one meet there.
    """
    images = np.arange(len(batch))
    kinds = np.pad(batch.kinds, ((0, 0), (0, 1)))
    place = np.zeros(len(batch), np.int64)
    layers: list[Layer] = []
    while (waiting := kinds[images, place]).any():
        kind = Kind(int(waiting[waiting > 0].min()))
        members = np.flatnonzero(waiting == kind)
        at = members, place[members]
        tables = batch.tables[at] if kind is Kind.TABLE else np.empty((0, 256), np.uint8)
        layers.append(Layer(kind, members, batch.numbers[at], tables))
        place[members] += 1
    return layers
