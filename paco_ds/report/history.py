"""What metrics.jsonl tells of a run, in bounded memory: curves are thinned while they are read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from paco_ds.data.manifest import SHOTS
from paco_ds.metrics import log
from paco_ds.metrics.steps import steps_of

POINTS = 200  # a curve has at most twice as many
MOST_LINES = 2000  # evaluations, starts and restarts that are kept, the newest

CURVES = ("loss", "lr", "grad_norm", "images_per_second", "queue_fill")
# curve by shot: key in a line of the log
BY_SHOT = {
    "center": "center_probability",
    "center_optimum": "center_probability_optimum",
    "positive": "positive_probability",
    "positive_optimum": "positive_probability_optimum",
}


class Curve:
    """Values over steps: mean, minimum and maximum of groups of neighbours, so that a single outlier stays visible.

    Attributes:
        width: most values of a group that is still joined; it at least doubles when there are 2 * `POINTS` groups.
    """

    def __init__(self) -> None:
        self.width = 1
        self._groups: list[_Group] = []

    def add(self, x: float, y: float, count: int = 1, low: float = math.nan, high: float = math.nan) -> None:
        """Add the mean of `count` neighbouring values, and their extremes where they are known; means that are not
        finite are left out."""
        if not math.isfinite(y):
            return
        low, high = low if low < y else y, high if high > y else y
        groups = self._groups
        if groups:
            last = groups[-1]
            if last[0] + count <= self.width:  # a long log's usual case, in place
                last[0] += count
                last[1] += count * x
                last[2] += count * y
                if low < last[3]:
                    last[3] = low
                if high > last[4]:
                    last[4] = high
                return
        if len(groups) == 2 * POINTS:
            halves = zip(groups[::2], groups[1::2], strict=True)
            self._groups = [_joined(*pair) for pair in halves]
            self.width = max(2 * self.width, *(int(group[0]) for group in self._groups))
        self._groups.append([count, count * x, count * y, low, high])

    def __len__(self) -> int:
        return len(self._groups)

    def points(self) -> Iterator[tuple[float, float, float, float]]:
        """(mean x, mean y, lowest y, highest y) of each group."""
        for count, x, y, low, high in self._groups:
            yield x / count, y / count, low, high


class History:
    """The log of a run so far. `read_on` adds what was written since, so that a page can be made often.

    Attributes:
        curves: by name: those of `CURVES`, wait (share of a step, 0..1), center_many and so on, part_NAME.
        seconds: of data waits and steps of rank 0, evaluations, and checkpoints (for as long as training waited).
        steps, skipped, bad_samples: their numbers; `last` is the last step's number, `epochs` those begun.
        evaluations, starts, restarts: their lines, in order.
        skips: numbers of the first skipped steps.
    """

    def __init__(self, path: Path) -> None:
        self._lines = log.read(path)
        self.curves: dict[str, Curve] = {}
        self.seconds = {"wait": 0.0, "step": 0.0, "evaluation": 0.0, "checkpoint": 0.0}
        self.steps = self.skipped = self.bad_samples = self.last = self.epochs = 0
        self.skips: list[int] = []
        self.evaluations: list[dict[str, Any]] = []
        self.starts: list[dict[str, Any]] = []
        self.restarts: list[dict[str, Any]] = []
        self._first: tuple[float, float] | None = None  # step and epoch of the first step line
        self._newest = (0.0, 0.0)  # first step of the newest epoch, and that epoch

    @property
    def damaged(self) -> int:
        """Lines that were passed over."""
        return self._lines.damaged

    def read_on(self) -> History:
        """Read what was written since the last call; returns self."""
        of_kind = {"evaluation": self.evaluations, "start": self.starts, "restart": self.restarts}
        for line in self._lines.more():
            kind = line["kind"]
            if kind == "step":
                self._step(line)
            elif kind in of_kind:
                of_kind[kind].append(line)
                del of_kind[kind][:-MOST_LINES]
            if kind in ("evaluation", "checkpoint"):
                self.seconds[kind] += _finite(line.get("seconds"))
        return self

    @property
    def x_scale(self) -> tuple[float, str]:
        """Steps per epoch and "epoch" once two epochs have begun, else 1 and "step"; all charts share this axis."""
        if self._first is None or self._newest[1] <= self._first[1]:
            return 1.0, "step"
        return (self._newest[0] - self._first[0]) / (self._newest[1] - self._first[1]) or 1.0, "epoch"

    def rows(self, name: str) -> list[list[float]]:
        """[x, mean, lowest, highest] of each group of a curve, in six digits; none if nothing was logged."""
        scale = self.x_scale[0]
        curve = self.curves.get(name)
        return [] if curve is None else [[_short(x / scale), *map(_short, ys)] for x, *ys in curve.points()]

    def _step(self, line: Mapping[str, Any]) -> None:
        step, epoch, steps = line["step"], number(line.get("epoch")), steps_of(line)
        if math.isfinite(epoch):
            began = (step - steps + 1, epoch)
            if self._first is None:
                self._first = self._newest = began
            elif epoch > self._newest[1]:
                self._newest = began
            self.epochs = int(epoch) + 1
        self.steps += steps
        self.last = step
        self.bad_samples += int(_finite(line.get("bad_samples")))
        self._skipped(line)
        middle, ranges = step - (steps - 1) / 2, _ranges(line)
        for name in CURVES:
            self._add(name, step if name in _LAST else middle, line.get(name), steps, ranges.get(name, ()))
        wait, took = _finite(line.get("data_wait_seconds")), _finite(line.get("step_seconds"))
        self.seconds["wait"] += wait * steps
        self.seconds["step"] += took * steps
        if took:
            self._add("wait", middle, wait / took, steps)
        for key, curves in _OF_SHOTS:
            of_shot = section(line, key)
            for shot, name in curves:
                self._add(name, middle, of_shot.get(shot), steps)
        for name, value in section(line, "parts").items():
            if f"part_{name}" in self.curves or len(self.curves) < _MOST_CURVES:
                self._add(f"part_{name}", middle, value, steps)

    def _skipped(self, line: Mapping[str, Any]) -> None:
        """Count the skipped steps of a line and keep the numbers of the first; older logs have no list of them."""
        skipped = int(_finite(line.get("skipped")))
        self.skipped += skipped
        skips = line.get("skips") if isinstance(line.get("skips"), list) else [[line["step"]]] * (skipped == 1)
        steps = [skip[0] for skip in skips or () if isinstance(skip, list) and skip and type(skip[0]) is int]
        self.skips += steps[: max(POINTS - len(self.skips), 0)]

    def _add(self, name: str, x: float, value: Any, count: int, extremes: Sequence[Any] = ()) -> None:
        if value is None:
            return
        curve = self.curves.get(name)
        if curve is None:
            curve = self.curves[name] = Curve()
        # the innermost line of a long log: floats, nearly all, are taken as they are
        curve.add(x, value if type(value) is float else number(value), count, *map(number, extremes))


_MOST_CURVES = 50
_OF_SHOTS = [(key, [(shot, f"{name}_{shot}") for shot in SHOTS]) for name, key in BY_SHOT.items()]
_LAST = ("lr", "queue_fill")  # a line of several steps has that of the last one


def _ranges(line: Mapping[str, Any]) -> dict[str, list[Any]]:
    """[lowest, highest] by figure, of a line of several steps."""
    found = section(line, "range").items()
    ranges = {name: pair for name, pair in found if isinstance(pair, list) and len(pair) == 2}
    images = number(line.get("images_per_second")) * number(line.get("step_seconds"))  # the same in every step
    seconds = [number(each) for each in ranges.get("step_seconds", ())]
    if seconds and all(seconds):
        ranges["images_per_second"] = [images / seconds[1], images / seconds[0]]
    return ranges


def section(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The values under a key; none where it has another kind of value."""
    found = values.get(key)
    return found if isinstance(found, Mapping) else {}


def number(value: Any) -> float:
    """A figure of the log; NaN for null, and for what is no figure."""
    try:
        return float("nan") if value is None else float(value)
    except (TypeError, ValueError, OverflowError):
        return float("nan")


def _finite(value: Any) -> float:
    figure = number(value)
    return figure if math.isfinite(figure) else 0.0


def _short(value: float) -> float:
    return float(f"{value:.6g}")


_Group = list[float]  # values, sum of x, sum of y, lowest and highest y


def _joined(a: _Group, b: _Group) -> _Group:
    return [a[0] + b[0], a[1] + b[1], a[2] + b[2], min(a[3], b[3]), max(a[4], b[4])]
