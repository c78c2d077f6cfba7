"""The micro-batches of each step, with the key images of the next step already on their way between ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from paco_ds.contrast.key_encoder import PendingImages
from paco_ds.data.stream.batches import MicroBatch


@dataclass(frozen=True)
class StepImages:
    """A step's micro-batches of this rank, and its key images in flight where there is a key encoder.

    `waited` is the time in seconds that this step spent waiting for the stream.
    """

    micro_batches: Sequence[MicroBatch]
    keys: PendingImages | None
    waited: float = 0.0


class ImagesAhead:
    """Iterates over steps; key images of step k + 1 are exchanged while step k computes.

    Args:
        stream: gives this rank's micro-batches of one step after the other.
        begin_exchange: (step, its micro-batches) to its key images in flight.
        look_ahead: whether to ask for the images of the step after so many steps.
        start: the first step.
    """

    def __init__(
        self,
        stream: Iterator[Sequence[MicroBatch]],
        begin_exchange: Callable[[int, Sequence[MicroBatch]], PendingImages | None],
        look_ahead: Callable[[int], bool],
        start: int,
    ) -> None:
        self._stream, self._begin_exchange, self._look_ahead = stream, begin_exchange, look_ahead
        self._step = start
        self._next: StepImages | None = None

    def __iter__(self) -> Iterator[StepImages]:
        return self

    def __next__(self) -> StepImages:
        images, waited = self._next, 0.0
        if images is None:
            images = self._fetch()
            waited = images.waited
        self._step += 1
        self._next = None
        if self._look_ahead(self._step):
            self._next = self._fetch()
            waited += self._next.waited
        return StepImages(images.micro_batches, images.keys, waited)

    def drain(self) -> None:
        """Receive images in flight, so that no rank leaves while another still sends to it."""
        if self._next is not None and self._next.keys is not None:
            self._next.keys.take()
        self._next = None

    def _fetch(self) -> StepImages:
        """The next of the stream, for step `self._step`."""
        began = time.perf_counter()
        micro_batches = next(self._stream)
        waited = time.perf_counter() - began
        return StepImages(micro_batches, self._begin_exchange(self._step, micro_batches), waited)
