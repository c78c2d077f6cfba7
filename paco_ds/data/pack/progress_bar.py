"""Progress of a long command over shards: images, rates, time left, bad images so far."""

from __future__ import annotations

import resource
import time
from collections import deque
from types import TracebackType
from typing import Self

from rich.progress import BarColumn, Progress, TextColumn

from paco_ds.command import Screen

MB = 1e6
_RECENT = 30  # seconds over which rates are averaged: shards of an earlier run pass faster than new ones
_LINE_EVERY = 10  # seconds between lines without a terminal


class ShardProgress:
    """A bar on a terminal; elsewhere a line every 10 s.

    Args:
        title: name of the work.
        images: total number.
        size: total bytes; the time left is estimated from them.
    """

    def __init__(self, console: Screen, title: str, images: int, size: int) -> None:
        self._console, self._title, self._images, self._size = console, title, images, size
        self._done = [0, 0, 0]
        self._worker_peak = 0
        self._said = time.monotonic()
        self._recent = deque([(self._said, 0, 0)])
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
            disable=not console.is_terminal or console.quiet,
        )
        self._task = self._bar.add_task(title, total=size, figures="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def add(self, images: int, size: int, bad: int) -> None:
        """Report images done, their bytes, and how many of them were bad."""
        for place, more in enumerate((images, size, bad)):
            self._done[place] += more
        now = time.monotonic()
        self._recent.append((now, self._done[0], self._done[1]))
        while len(self._recent) > 2 and now - self._recent[0][0] > _RECENT:
            self._recent.popleft()
        self._bar.update(self._task, completed=self._done[1], figures=self.figures())
        if self._bar.disable and now - self._said >= _LINE_EVERY:
            self._said = now
            self._console.print(f"{self._title}: {self.figures()}", highlight=False)

    def note_peak(self, size: int) -> None:
        """Record the peak memory of another process, in bytes."""
        self._worker_peak = max(self._worker_peak, size)

    def memory(self) -> str:
        """Peak memory of this process and of the largest worker, in words."""
        worker = f", {self._worker_peak / MB:,.0f} MB in the largest worker" if self._worker_peak else ""
        return f"peak memory {peak_of_process() / MB:,.0f} MB{worker}"

    def figures(self) -> str:
        """The figures of a line."""
        images, size, bad = self._done
        (then, images_then, size_then), (now, *_) = self._recent[0], self._recent[-1]
        seconds = max(now - then, 1e-3)
        rate = (size - size_then) / seconds
        left = _clock((self._size - size) / rate) if rate else "?"
        return (
            f"{images:,} of {self._images:,} images, {(images - images_then) / seconds:,.0f} images/s, "
            f"{rate / MB:,.0f} MB/s, {left} left, {bad:,} bad"
        )


def peak_of_process() -> int:
    """Peak memory of this process, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
