"""Progress on the screen of rank 0: a bar on a terminal, plain lines elsewhere, nothing on other ranks."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from typing import Protocol, TextIO

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from paco_ds.command import Screen
from paco_ds.metrics.steps import StepRecord


class ProgressView(Protocol):
    """Shows the progress of training to a person."""

    def update(self, record: StepRecord) -> None:
        """Show a finished step."""

    def message(self, what: str | Table) -> None:
        """Print a line or a table, such as that of an evaluation."""

    def close(self) -> None:
        """Remove the progress display."""


def progress_view(
    rank: int,
    *,
    total_steps: int,
    first_step: int,
    epochs: int,
    every: int = 50,
    stream: TextIO | None = None,
) -> ProgressView:
    """The view for this rank: none except on rank 0, a bar on a terminal, else a line every `every` steps.

    Args:
        total_steps: optimizer steps of the whole run.
        first_step: steps done before; the time left is estimated from this process's steps only.
        epochs: epochs of the whole run.
        every: steps between plain lines.
        stream: where to write, standard output by default.
    """
    if rank != 0:
        return NullProgress()
    console = Screen(sys.stdout if stream is None else stream)
    if console.is_terminal:
        return BarProgress(total_steps, first_step, epochs, console)
    return LineProgress(total_steps, first_step, epochs, every, console)


class NullProgress:
    """Shows nothing."""

    def update(self, record: StepRecord) -> None: ...

    def message(self, what: str | Table) -> None: ...

    def close(self) -> None: ...


class BarProgress:
    """A progress bar that is redrawn in place."""

    def __init__(self, total_steps: int, first_step: int, epochs: int, console: Screen) -> None:
        self._progress = Progress(
            TextColumn("[bold]epoch {task.fields[epoch]}/{task.fields[epochs]}"),
            BarColumn(bar_width=None),
            TextColumn("step"),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            expand=True,
        )
        self._task = self._progress.add_task(
            "train", total=total_steps, completed=first_step, epoch="-", epochs=epochs, figures=""
        )
        self._progress.start()

    def update(self, record: StepRecord) -> None:
        self._progress.update(
            self._task, completed=record.step, epoch=record.epoch + 1, figures=_figures(record), refresh=False
        )

    def message(self, what: str | Table) -> None:
        self._progress.console.print(what, highlight=False)

    def close(self) -> None:
        self._progress.stop()


class LineProgress:
    """Plain lines, for log files and pipes: the first step, every N-th, and the last."""

    def __init__(self, total_steps: int, first_step: int, epochs: int, every: int, console: Screen) -> None:
        self._total_steps, self._first_step, self._epochs = total_steps, first_step, epochs
        self._every, self._console = every, console
        self._started = time.monotonic()

    def update(self, record: StepRecord) -> None:
        done = record.step - self._first_step
        # a skipped step is shown at once, not only at the next line
        if done != 1 and record.step % self._every and record.step != self._total_steps and not record.skipped:
            return
        seconds = (time.monotonic() - self._started) / max(done, 1) * (self._total_steps - record.step)
        self.message(
            f"epoch {record.epoch + 1}/{self._epochs}  step {record.step}/{self._total_steps}  "
            f"{_figures(record)}  {timedelta(seconds=round(seconds))} left"
        )

    def message(self, what: str | Table) -> None:
        self._console.print(what, highlight=False, soft_wrap=True)

    def close(self) -> None: ...


def _figures(record: StepRecord) -> str:
    skipped = "  skipped" if record.skipped else ""
    wait = record.data_wait_seconds / record.step_seconds if record.step_seconds else 0.0
    waited = f"data wait {100 * wait:.0f} %  " if wait >= 0.01 else ""
    return f"{record.images_per_second:.0f} images/s  {waited}loss {record.loss:.4f}  lr {record.lr:.3g}{skipped}"
