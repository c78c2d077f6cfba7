"""metrics.jsonl: a JSON line per optimizer step and per evaluation, cut and continued when a run resumes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from paco_ds.evaluation.accuracy import ShotAccuracy


@dataclass(frozen=True)
class StepRecord:
    """What one optimizer step has to tell.

    Attributes:
        step: optimizer steps done, this one included.
        epoch: the epoch under way, counted from 0 as in the order.
        loss: mean over the anchors of the global batch.
        lr: learning rate this step was taken with.
        grad_norm: L2 norm before clipping.
        images_per_second: of all ranks together.
        data_wait_seconds: time this rank waited for its images.
        step_seconds: wall time of the step, the wait included.
        queue_fill: filled share of the key queue, 0..1.
        center_probability: mean of p_c over the anchors of a shot; None for a shot without anchors in this step.
        center_probability_optimum: p_c* = beta / W_i (Remark 2, exact for the keys present), likewise.
        positive_probability: mean of p+, the geometric mean over an anchor's positives, over the anchors of a shot
            that have one; None for a shot without such anchors.
        positive_probability_optimum: p+* = alpha / W_i, likewise.
        parts: what the loss is made of, by name, of methods that say; means over the global batch.
        skipped: the step changed nothing, since something was not finite.
        bad_samples: images replaced in this step because they could not be read.
    """

    step: int
    epoch: int
    loss: float
    lr: float
    grad_norm: float
    images_per_second: float
    data_wait_seconds: float
    step_seconds: float
    queue_fill: float = 0.0
    center_probability: Mapping[str, float | None] = field(default_factory=dict)
    center_probability_optimum: Mapping[str, float | None] = field(default_factory=dict)
    positive_probability: Mapping[str, float | None] = field(default_factory=dict)
    positive_probability_optimum: Mapping[str, float | None] = field(default_factory=dict)
    parts: Mapping[str, float] = field(default_factory=dict)
    skipped: bool = False
    bad_samples: int = 0


class MetricsLog:
    """Appends to metrics.jsonl; with path None (every rank but 0) writes nothing.

    Floats are written so that reading gives the same bits; one that is not finite becomes null, as JSON has
    no other word for (a skipped step says `"skipped": true` beside it).
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._file = None if path is None else path.open("a", encoding="utf-8")

    def step(self, record: StepRecord) -> None:
        """Append {"kind": "step", ...}, flushed."""
        self._append({"kind": "step", **asdict(record)})

    def evaluation(self, step: int, epoch: int, split: str, accuracy: ShotAccuracy) -> None:
        """Append {"kind": "evaluation", ...} with top-1 and top-5 of the shots and All, balanced accuracy, macro F1 and
        calibration error, and with routers the mean number of experts asked, flushed.

        `epoch` is the number of epochs completed. Accuracies of single classes are left to metrics.json: with
        thousands of classes they would outgrow everything else here.
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
        self._append({"kind": "evaluation", "step": step, "epoch": epoch, "split": split, **figures})

    def cut_after(self, step: int) -> None:
        """Drop the lines of later steps and a last line torn by a crash; a resumed run writes them anew.

        The file is replaced as a whole or not at all. cut_after(-1) empties it, for a run that starts again.

        Raises:
            ValueError: a line before the last is not JSON.
        """
        if self._path is None or self._file is None:
            return
        self._file.close()
        part = self._path.with_name(self._path.name + ".part")
        with part.open("wb") as out:
            out.writelines(raw for raw, line in _lines(self._path) if line["step"] <= step)
            out.flush()
            os.fsync(out.fileno())
        part.replace(self._path)
        self._file = self._path.open("a", encoding="utf-8")

    def close(self) -> None:
        """Close the file; lines are flushed one by one, so nothing is lost without it."""
        if self._file is not None:
            self._file.close()

    def _append(self, line: Mapping[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(_nan_to_none(line), allow_nan=False) + "\n")
            self._file.flush()


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a metrics.jsonl in order, one at a time: a long run has more than memory should hold.

    A torn last line, of a run that is writing or was killed, is left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line before the last is not JSON.
    """
    for _, line in _lines(path):
        yield line


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, 1):
            # Without its newline a line is torn even where it happens to parse: {"step": 12 of 120 would.
            if not raw.endswith(b"\n"):
                return
            try:
                line = json.loads(raw)
            except ValueError as error:
                remedy = "restore the file, or move it away to start a new log"
                raise ValueError(f"{path}, line {number} is not JSON ({error}); {remedy}") from error
            yield raw, line


def _nan_to_none(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _nan_to_none(entry) for key, entry in value.items()}
    return value
