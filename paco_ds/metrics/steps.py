"""The record of an optimizer step, and the window of steps that becomes one line of metrics.jsonl."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError

from paco_ds.errors import CheckpointError

RANGED = ("loss", "grad_norm", "grad_norm_ratio", "data_wait_seconds", "step_seconds")
"""Figures whose lowest and highest value of a window are kept beside the mean."""

_LAST = ("step", "epoch", "lr", "queue_fill")  # a window has those of its last step
_BY_NAME = (
    "center_probability",
    "center_probability_optimum",
    "positive_probability",
    "positive_probability_optimum",
    "parts",
)
_DIGITS = 5  # of a window's figures
_MOST_SKIPS = 100  # that a window names; all are counted


@dataclass(frozen=True)
class StepRecord:
    """The record of one optimizer step.

    Attributes:
        step: optimizer steps done, this one included.
        epoch: the current epoch, counted from 0.
        loss: mean over the anchors of the global batch.
        lr: learning rate of the step.
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
        parts: parts of the loss by name, for methods with several; means over the global batch.
        skipped: the step changed nothing, since a value was not finite or the gradient norm far off.
        bad_samples: samples replaced in this step because they could not be read.
        grad_norm_ratio: `grad_norm` over its usual value in recent steps; None in the first steps.
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
    grad_norm_ratio: float | None = None


@dataclass(slots=True)
class Spread:
    """Count, sum and extremes of the finite values among those added."""

    count: int = 0
    total: float = 0.0
    low: float = 0.0
    high: float = 0.0

    @property
    def mean(self) -> float | None:
        """None without a value."""
        return self.total / self.count if self.count else None

    def add(self, value: float | None) -> None:
        if value is None or not math.isfinite(value):
            return
        if not self.count or value < self.low:
            self.low = value
        if not self.count or value > self.high:
            self.high = value
        self.count += 1
        self.total += value


@dataclass
class StepWindow:
    """The steps since the last line of the log: means, extremes, and what was skipped, in bounded memory.

    A checkpoint carries it, so that a run which resumes inside a window writes the line it would have written.

    Attributes:
        steps, skipped, bad_samples: their numbers.
        images: of all ranks together.
        last: figures of which the last step's count.
        figures: by section of a record ("" for `RANGED`, of none) and name.
        skips: (step, why) of the first skipped steps.
    """

    steps: int = 0
    skipped: int = 0
    bad_samples: int = 0
    images: float = 0.0
    last: dict[str, int | float] = field(default_factory=dict)
    figures: dict[str, dict[str, Spread]] = field(default_factory=dict)
    skips: list[tuple[int, str]] = field(default_factory=list)

    @classmethod
    def from_state(cls, state: object) -> StepWindow:
        """The window of a checkpoint; raises CheckpointError if it is not as `state` gives it."""
        try:
            return _WINDOW.validate_python(state)
        except ValidationError as error:
            place = ".".join(map(str, error.errors()[0]["loc"]))
            raise CheckpointError(
                f"the checkpoint's state.json: log_window.{place} is not as a run writes it; restore the file, or move "
                f"this checkpoint away to resume from the one before"
            ) from None

    def state(self) -> dict[str, Any]:
        """All of it, as JSON takes it; floats keep their bits."""
        return asdict(self)

    def add(self, record: StepRecord, skipped: str | None = None) -> None:
        """Add the next step; `skipped` says why it changed nothing."""
        self.steps += 1
        self.skipped += record.skipped
        self.bad_samples += record.bad_samples
        if record.skipped and len(self.skips) < _MOST_SKIPS:
            self.skips.append((record.step, skipped or ""))
        if math.isfinite(images := record.images_per_second * record.step_seconds):
            self.images += images
        self.last = {name: getattr(record, name) for name in _LAST}
        self._add("", {name: getattr(record, name) for name in RANGED})
        for section in _BY_NAME:
            self._add(section, getattr(record, section))

    def _add(self, section: str, values: Mapping[str, float | None]) -> None:
        figures = self.figures.setdefault(section, {})
        for name, value in values.items():
            if name not in figures:
                figures[name] = Spread()
            figures[name].add(value)

    def line(self) -> dict[str, Any]:
        """The line of the log, with the keys of a single step's: means over the steps that have a finite value (null if
        none has), of `_LAST` the last step's values, `images_per_second` over the whole window. Beside them `steps`,
        their number, `range`, [lowest, highest] of `RANGED`; and `skipped`, `skips` and `bad_samples` where there are
        any."""
        of_steps = self.figures[""]
        seconds = of_steps["step_seconds"].total
        line: dict[str, Any] = {"step": self.last["step"], "steps": self.steps, **self.last}
        line |= {name: spread.mean for name, spread in of_steps.items()}
        line["images_per_second"] = self.images / seconds if seconds else None
        line |= {section: {n: s.mean for n, s in self.figures[section].items()} for section in _BY_NAME}
        line["range"] = {name: [spread.low, spread.high] for name, spread in of_steps.items() if spread.count}
        if self.bad_samples:
            line["bad_samples"] = self.bad_samples
        return _shortened(line) | skips_of(self.skipped, self.skips)


def skips_of(number: int, skips: list[tuple[int, str]]) -> dict[str, Any]:
    """What a line says of skipped steps; nothing if there are none."""
    return {"skipped": number, "skips": [list(skip) for skip in skips]} if number else {}


def steps_of(line: Mapping[str, Any]) -> int:
    """How many steps a line of the log is about: 0 for other kinds."""
    if line["kind"] != "step":
        return 0
    steps = line.get("steps", 1)
    return steps if type(steps) is int and 1 <= steps <= line["step"] else 1


_WINDOW = TypeAdapter(StepWindow)


def _shortened(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, dict):
        return {key: _shortened(each) for key, each in value.items()}
    return [_shortened(each) for each in value] if isinstance(value, list) else value
