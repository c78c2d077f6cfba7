"""Owns what a long command over shards shows while it runs: images, rates, time left, bad images so far."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

MB = 1e6
_LINE_EVERY = 10  # seconds, where no terminal shows a bar


class ShardProgress:
    """A bar on a terminal, and a line now and then elsewhere.

    Args:
        title: what is done.
        images: in all.
        size: bytes in all, what time left is reckoned by.
    """

    def __init__(self, console: Console, title: str, images: int, size: int) -> None:
        self._console, self._title, self._images, self._size = console, title, images, size
        self._done = [0, 0, 0]
        self._skipped = 0
        self._started = self._said = time.monotonic()
        self._bar = Progress(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[figures]}"))
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

    def skip(self, images: int, size: int) -> None:
        """These were done by an earlier run: they count, but not as speed."""
        self._skipped += size
        self.add(images, size, 0)

    def add(self, images: int, size: int, bad: int) -> None:
        """More images done, of so many bytes, of which so many were bad."""
        for place, more in enumerate((images, size, bad)):
            self._done[place] += more
        self._bar.update(self._task, completed=self._done[1], figures=self.figures())
        now = time.monotonic()
        if self._bar.disable and now - self._said >= _LINE_EVERY:
            self._said = now
            self._console.print(f"{self._title}: {self.figures()}", markup=False, highlight=False)

    def figures(self) -> str:
        """What a line says."""
        images, size, bad = self._done
        seconds = max(time.monotonic() - self._started, 1e-3)
        rate = (size - self._skipped) / seconds
        share = images / size if size else 0
        left = f"{_clock((self._size - size) / rate)} left" if rate and size < self._size else "0:00 left"
        return (
            f"{images:,} of {self._images:,} images, {rate * share:,.0f} images/s, {rate / MB:,.0f} MB/s, {left}"
            f", {bad:,} bad"
        )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
