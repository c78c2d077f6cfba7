"""metrics.jsonl: a JSON line per window of optimizer steps and per evaluation; cut and continued when a run resumes."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from paco_ds.files import storage_errors
from paco_ds.metrics.steps import StepRecord, StepWindow, skips_of, steps_of

if TYPE_CHECKING:
    from paco_ds.evaluation.accuracy import ShotAccuracy  # with torch, which readers of a log do not need

logger = logging.getLogger(__name__)

_KINDS = ("start", "step", "evaluation", "checkpoint", "changed_setting", "restart")
_LONGEST = 2**20  # bytes of a line; ours have a few hundred
_BLOCK = 2**16  # bytes read at a time from the end


class MetricsLog:
    """Appends to metrics.jsonl; with path None (every rank but 0) writes nothing.

    Steps are written in windows, which end after every `every`-th step of the run and after every epoch. The line of a
    window of one step is its record; that of several steps has means and extremes in few digits, see `StepWindow.line`.
    Other floats are written so that reading gives the same bits. JSON has no NaN or infinity: these become null.

    Args:
        also: called with each line after it was written; not with that of an unfinished window.
        every: steps of a window.
        steps_per_epoch: where windows end, too; None: nowhere.
    """

    def __init__(
        self,
        path: Path | None,
        also: Callable[[Mapping[str, Any]], None] = lambda line: None,
        *,
        every: int = 1,
        steps_per_epoch: int | None = None,
    ) -> None:
        self._path, self._also, self._ends = path, also, (every, steps_per_epoch or every)
        self._window = StepWindow()
        self._open()
        self.restarts = 0  # lines {"kind": "restart", ...} that `cut_after` kept, and written since

    def _open(self) -> None:
        # unbuffered: after a failed write nothing is left that closing would try to write again
        self._file: FileIO | None = None
        if self._path is not None:
            with storage_errors(self._path):
                self._file = self._path.open("ab", buffering=0)

    def step(self, record: StepRecord, skipped: str | None = None) -> None:
        """Add the next step to its window and, if it ends that, append {"kind": "step", ...}, flushed.

        Args:
            skipped: why the step changed nothing, if so.
        """
        ends = any(record.step % steps == 0 for steps in self._ends)
        if ends and not self._window.steps:
            skips = skips_of(record.skipped, [(record.step, skipped or "")])
            self._append({"kind": "step", **asdict(record), **skips})
            return
        self._window.add(record, skipped)
        if ends:
            self._append({"kind": "step", **self._window.line()})
            self._window = StepWindow()

    def window(self) -> dict[str, Any] | None:
        """The unfinished window, for a checkpoint and `cut_after`; None if none has begun."""
        return self._window.state() if self._window.steps else None

    def end_window(self) -> None:
        """Append the line of an unfinished window, for who reads the log of a run that stopped. `cut_after` removes it:
        the resumed run writes that of the whole window."""
        window, self._window = self._window, StepWindow()
        if window.steps:
            self._write({"kind": "step", **window.line()})

    def start(self, step: int, about: Mapping[str, Any]) -> None:
        """Append {"kind": "start", ...}: a process begins or resumes the run after `step` steps, see
        `results.about_process`."""
        self._append({"kind": "start", "step": step, **about})

    def checkpoint(self, step: int, seconds: float) -> None:
        """Append {"kind": "checkpoint", ...}: training waited for so many seconds."""
        self._append({"kind": "checkpoint", "step": step, "seconds": seconds})

    def evaluation(
        self, step: int, epoch: int, split: str, accuracy: ShotAccuracy, seconds: float | None = None
    ) -> None:
        """Append {"kind": "evaluation", ...} with top-1 and top-5 of the shots and All, balanced accuracy, macro F1 and
        calibration error, and with routers the mean number of experts used, flushed.

        `epoch` is the number of completed epochs. Accuracies of single classes are only in metrics.json: with thousands
        of classes they would dominate this file.
        """
        figures: dict[str, Any] = {**accuracy.top1(), "top5": dict(accuracy.top5)}
        if accuracy.detail is not None:
            figures |= {
                "balanced": accuracy.detail.balanced,
                "macro_f1": accuracy.detail.macro_f1,
                "calibration_error": accuracy.detail.calibration_error,
            }
        if accuracy.experts_used is not None:
            figures["experts_used"] = accuracy.experts_used
        if accuracy.left_out:
            figures["left_out"] = len(accuracy.left_out)
        if seconds is not None:
            figures["seconds"] = seconds
        self._append({"kind": "evaluation", "step": step, "epoch": epoch, "split": split, **figures})

    def changed_setting(self, step: int, key: str, before: object, now: object) -> None:
        """Append {"kind": "changed_setting", ...}: a run resumed with another value after `step` steps."""
        self._append({"kind": "changed_setting", "step": step, "setting": key, "before": before, "now": now})

    def restart(self, step: int, reason: str) -> None:
        """Append {"kind": "restart", ...}: the run was started again after `step` steps; the reason is how it ended
        before."""
        self.restarts += 1
        time = datetime.now(UTC).isoformat(timespec="seconds")
        self._append({"kind": "restart", "step": step, "number": self.restarts, "reason": reason, "time": time})

    def cut_after(self, step: int, window: object = None) -> None:
        """Remove the lines of later steps, and what a crash left after them; a resumed run writes them again.

        Reads from the end of the file, only what is removed. Damaged lines before stay, and readers pass over them.
        cut_after(-1) empties the file, for a run that starts again.

        Args:
            window: the unfinished window of the checkpoint after `step` steps, which goes on.

        Raises:
            CheckpointError: the window is not what `window` returned.
        """
        self._window = StepWindow() if window is None else StepWindow.from_state(window)
        begun = step - self._window.steps  # the last step that no unfinished window has
        if self._path is None or self._file is None:
            return
        self._file.close()
        end, damaged = 0, 0
        with storage_errors(self._path), self._path.open("r+b") as file:
            for after, line in _from_end(file):
                if step < 0:
                    break  # damage does not matter in a file that is emptied
                if line is not None and line["step"] <= (begun if line["kind"] == "step" else step):
                    end = after
                    break
                damaged += line is None
            file.truncate(end)
            os.fsync(file.fileno())
            self.restarts = _last_restart(file, end)
        if damaged:
            logger.warning("%s: %d damaged lines at its end were removed", self._path, damaged)
        self._open()

    def evaluation_of(self, step: int) -> dict[str, Any] | None:
        """The evaluation after `step`, if no later step follows; None otherwise, and on ranks that write nothing."""
        if self._path is None:
            return None
        with self._path.open("rb") as file:
            for _, line in _from_end(file):
                if line is not None and line["kind"] == "evaluation" and line["step"] == step:
                    return line
                if line is not None and line["kind"] == "step":
                    return None
        return None

    def close(self) -> None:
        """Close the file. Every line was flushed, so nothing is lost without it."""
        if self._file is not None:
            self._file.close()

    def _append(self, line: Mapping[str, Any]) -> None:
        self._write(line)
        if self._file is not None:
            self._also(_nan_to_none(line))

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._file is None or self._path is None:
            return
        spaces = (",", ":") if steps_of(line) > 1 else None  # nearly all of a long log
        with storage_errors(self._path):
            text = json.dumps(_nan_to_none(line), allow_nan=False, separators=spaces)
            rest = memoryview(text.encode() + b"\n")
            while rest:
                rest = rest[self._file.write(rest) :]


class Lines:
    """The lines of a metrics.jsonl in order, one at a time, since a long run has many.

    Damaged lines, such as the zero bytes of a crash, are passed over with one warning. A torn last line, of a run that
    is writing or was killed, is left out.

    Attributes:
        damaged: lines passed over so far.
    """

    def __init__(self, path: Path) -> None:
        self._path, self.damaged = path, 0
        self._end = self._number = 0  # bytes and lines read so far

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self._end = self._number = self.damaged = 0
        return self.more()

    def more(self) -> Iterator[dict[str, Any]]:
        """The lines after those read so far; what stands before is only added to."""
        first, before = 0, self.damaged
        with self._path.open("rb") as file:
            file.seek(self._end)
            for raw in _bounded_lines(file):
                self._number += 1
                self._end = file.tell()
                if (line := _parsed(raw)) is not None:
                    yield line
                else:
                    self.damaged += 1
                    first = first or self._number
        if self.damaged > before:
            logger.warning(
                "%s: %d damaged lines were passed over, the first is line %d", self._path, self.damaged - before, first
            )


def read(path: Path) -> Lines:
    """The lines of a metrics.jsonl; FileNotFoundError, once they are read, if there is no such file."""
    return Lines(path)


def _parsed(raw: bytes) -> dict[str, Any] | None:
    """A line's record; None if it is damaged."""
    if len(raw) >= _LONGEST:
        return None
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    known = isinstance(line, dict) and line.get("kind") in _KINDS
    return line if known and type(line.get("step")) is int and 0 <= line["step"] < 2**53 else None


def _bounded_lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines that end in a newline, even if they would parse without; of a longer one its first `_LONGEST` bytes."""
    while raw := file.readline(_LONGEST):
        rest = raw
        while len(rest) == _LONGEST and not rest.endswith(b"\n"):
            rest = file.readline(_LONGEST)
        if rest.endswith(b"\n"):
            yield raw


def _from_end(file: BinaryIO) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """(byte after the line, its record or None if it is damaged) of each whole line, the last first."""
    rest = b""
    start = after = file.seek(0, os.SEEK_END)  # of the bytes read so far; of the line before that one
    torn = True  # what follows the last newline
    while start:
        block = min(_BLOCK, start)
        start -= block
        file.seek(start)
        text = file.read(block) + rest
        stop = len(text)
        while (newline := text.rfind(b"\n", 0, stop)) >= 0 or not start:
            raw, stop = text[newline + 1 : stop], max(newline, 0)
            if raw and not torn:
                yield after, _parsed(raw)
            torn, after = False, start + newline + 1
            if newline < 0:
                return
        rest = text[: min(stop, _LONGEST)]  # what follows in a longer line is damage


def _last_restart(file: BinaryIO, end: int) -> int:
    """The number of the last restart before byte `end`; 0 without one. Bytes are searched, not parsed."""
    mark, block = b'{"kind": "restart"', 2**24
    for start in range(end - block, -block, -block):
        file.seek(max(start, 0))
        text = file.read(block + _LONGEST if start > 0 else block + start + _LONGEST)
        at = text.rfind(mark, 0, block + len(mark))
        if at >= 0:
            line = _parsed(text[at:].partition(b"\n")[0])
            return int(line["number"]) if line is not None and type(line.get("number")) is int else 0
    return 0


def _nan_to_none(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _nan_to_none(entry) for key, entry in value.items()}
    return value
