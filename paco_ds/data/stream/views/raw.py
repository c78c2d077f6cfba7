"""What a loader process leaves to a device: parts of decoded images, and what becomes of them as numbers.

A part is what its view shows of the image and has at most twice the view's pixels in one direction, so it is about as
large as the image was decoded. The draws are those of views that are made on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from paco_ds.data.shard import RawSample
from paco_ds.data.stream.views.crop import Part
from paco_ds.data.stream.views.instructions import Instruction, instruction
from paco_ds.data.stream.views.pair import draw_and_decode
from paco_ds.data.stream.views.view import Drawn, Pixels, View
from paco_ds.errors import RecipeError

_KEPT = 4  # a whole image stays in memory for its part only if it is at most so many times as large


@dataclass(frozen=True)
class RawView:
    """A view before it is rendered: a part of the image, how it is sampled, and the operations after that."""

    part: Part
    instructions: tuple[Instruction, ...]


@dataclass(frozen=True)
class MakeRawViews:
    """Raw views of an encoded image; called as `MakeViews`. `size` is the side of the views in pixels."""

    views: tuple[View, ...]
    max_pixels: int
    size: int

    def __call__(self, sample: RawSample, *rngs: np.random.Generator) -> tuple[RawView, ...]:
        """One for each view, drawn by its own generator.

        Raises:
            BadSample: the image cannot be decoded, or has more than `max_pixels`.
            RecipeError: a view cannot be made on a device.
        """
        image, drawn = draw_and_decode(self.views, self.max_pixels, sample, rngs, quick=True)
        return tuple(self._raw(each, image) for each in drawn)

    def _raw(self, drawn: Drawn, image: Pixels) -> RawView:
        part_of = getattr(drawn.sampling, "part", None)
        if part_of is None:
            raise RecipeError(
                f"views.device: accelerator has no {type(drawn.sampling).__name__}, which a view of this recipe draws; "
                f"set views.device to cpu"
            )
        part = _shrunk(part_of(image))
        if part.pixels.nbytes * _KEPT < image.nbytes:
            part = Part(part.pixels.copy(), part.rows, part.columns)
        return RawView(part, tuple(instruction(operation, self.size) for operation in drawn.operations))


def _shrunk(part: Part) -> Part:
    """A part with at least two pixels for each of the view is averaged over 2 x 2 or more, as JPEG decoders do."""
    by = int(min(part.rows.step, part.columns.step))
    if by < 2 or not part.rows.support:
        return part
    height, width = (side // by for side in part.pixels.shape[:2])
    # only whole squares, which OpenCV averages in a tenth of the time: less than a pixel of the view is left out
    pixels = cv2.resize(part.pixels[: height * by, : width * by], (width, height), interpolation=cv2.INTER_AREA)
    return Part(pixels, part.rows.shrunk(by), part.columns.shrunk(by))


@dataclass(frozen=True)
class RawBatch:
    """Views of several images that are yet to be rendered, but for their pixels, which lie one after the other.

    Attributes:
        sides: int64 [n, 2], height and width of each part.
        axes: float64 [n, 2, 3], first, step and support of its rows and columns.
        kinds: int8 [n, K], what is done to each view, in order; `Kind.NOTHING` after the last.
        numbers: float32 [n, K, P].
        tables: uint8 [n, K, 256].
    """

    sides: npt.NDArray[np.int64]
    axes: npt.NDArray[np.float64]
    kinds: npt.NDArray[np.int8]
    numbers: npt.NDArray[np.float32]
    tables: npt.NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.kinds)

    @property
    def bytes(self) -> int:
        """Of all pixels."""
        return int(3 * self.sides.prod(1).sum())


def raw_batch(views: Sequence[RawView]) -> RawBatch:
    """The numbers of some views."""
    count = len(views)
    most = max((len(view.instructions) for view in views), default=0)
    longest = max((len(each.numbers) for view in views for each in view.instructions), default=0)
    kinds = np.zeros((count, most), np.int8)
    numbers, tables = np.zeros((count, most, longest), np.float32), np.zeros((count, most, 256), np.uint8)
    for row, view in enumerate(views):
        for place, each in enumerate(view.instructions):
            kinds[row, place] = each.kind
            numbers[row, place, : len(each.numbers)] = each.numbers
            if each.table is not None:
                tables[row, place] = each.table
    return RawBatch(
        sides=np.array([view.part.pixels.shape[:2] for view in views], np.int64),
        axes=np.array([[view.part.rows, view.part.columns] for view in views]),
        kinds=kinds,
        numbers=numbers,
        tables=tables,
    )


def concatenated(batches: Sequence[RawBatch]) -> RawBatch:
    """The views of several batches, one after the other."""
    most = max(batch.kinds.shape[1] for batch in batches)
    longest = max(batch.numbers.shape[2] for batch in batches)

    def padded(array: np.ndarray, *sides: int) -> np.ndarray:
        return np.pad(array, [(0, 0), *((0, side - now) for side, now in zip(sides, array.shape[1:], strict=True))])

    return RawBatch(
        sides=np.concatenate([batch.sides for batch in batches]),
        axes=np.concatenate([batch.axes for batch in batches]),
        kinds=np.concatenate([padded(batch.kinds, most) for batch in batches]),
        numbers=np.concatenate([padded(batch.numbers, most, longest) for batch in batches]),
        tables=np.concatenate([padded(batch.tables, most, 256) for batch in batches]),
    )
