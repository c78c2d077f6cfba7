"""The optimum of SupCon and of PaCo from the largest class to the smallest: tables to print, pictures to draw."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure, FigureBase
from matplotlib.ticker import FuncFormatter, NullLocator
from rich.console import Console
from rich.table import Table

from paco_ds.data.manifest import SHOTS
from paco_ds.report.charts import FULL, GRID, GROUP_COLORS, INK, MUTED, Values, png, styled
from paco_ds.theory import LongTail, Optima, alpha_for, mean_optima, optima_by_equation_9

ALPHAS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
PUBLISHED_PULL = 4.5
"""alpha K of the largest class in the published runs on ImageNet-LT: .05 x 1280 / 115,846 x 8,255."""
MOST_NAMES = 12
DASHES = (0, (4, 2.5))


@dataclass(frozen=True)
class OptimaPage:
    """What the closed forms say of a data set with these settings.

    Args:
        tail: the training split.
        alpha: weight of a positive.
        queue_length: filled slots of the queue.
        micro_batch: m.
    """

    tail: LongTail
    alpha: float
    queue_length: int
    micro_batch: int

    def print(self, console: Console | None = None) -> None:
        """Two tables: the optima by shot, and p_c by alpha."""
        # A pipe or a log has no width of its own, and 80 columns would cut figures off.
        console = console or Console(width=None if Console().is_terminal else 120)
        tail = self.tail
        console.print(
            f"{tail.name}, {tail.split}: {tail.counts_C.sum():,} images of {len(tail.counts_C):,} classes, "
            f"{tail.counts_C[0]:,} to {tail.counts_C[-1]:,} each; alpha {self.alpha:g}, queue {self.queue_length:,}, "
            f"micro-batch {self.micro_batch:,}",
            markup=False,
            highlight=False,
        )
        if tail.empty:
            names = ", ".join(tail.empty[:5]) + (", ..." if len(tail.empty) > 5 else "")
            console.print(f"left out, without training images: {len(tail.empty):,} classes ({names})", markup=False)
        console.print(self._optima_table())
        console.print(self._alpha_table())
        console.print(self._advice(), markup=False, highlight=False)

    def draw(self, output: Path) -> list[Path]:
        """One picture of both charts into a .png, or a picture each, optima.png and alpha.png, into a folder."""
        if output.suffix == ".png":
            output.parent.mkdir(parents=True, exist_ok=True)
            _save(output, (self.draw_optima, 4.0), (self.draw_alphas, 3.4))
            return [output]
        output.mkdir(parents=True, exist_ok=True)
        paths = [output / "optima.png", output / "alpha.png"]
        _save(paths[0], (self.draw_optima, 4.0))
        _save(paths[1], (self.draw_alphas, 3.4))
        return paths

    def draw_optima(self, figure: FigureBase) -> None:
        """Left p+ of SupCon and of PaCo, right p_c of PaCo, class by class; dashed what Eq. (9) gives."""
        left, right = figure.subplots(1, 2)
        place = np.arange(len(self.tail.counts_C))
        mark = {"marker": "o", "ms": 4} if len(place) <= MOST_NAMES else {}
        curves = [
            (left, "SupCon", MUTED, self._mean.supcon_C, self._equation_9.supcon_C),
            (left, "PaCo", INK, self._mean.positive_AC[0], self._equation_9.positive_AC[0]),
            (right, "PaCo", INK, self._mean.center_AC[0], self._equation_9.center_AC[0]),
        ]
        for axes, _, color, mean, by_equation_9 in curves:
            axes.plot(place, by_equation_9, color=color, ls=DASHES, lw=1.1)
            axes.plot(place, mean, color=color, **mark)
        left.set_yscale("log")
        _plain_numbers(left.yaxis)
        right.set_ylim(0, 1.03)
        for number, (_, name, color, mean, _) in enumerate(curves[:2]):
            text = f"{name}: the smallest class has {_figure(mean[-1] / mean[0])} times the largest's"
            left.text(0.02, 0.92 - 0.08 * number, text, color=color, weight="bold", transform=left.transAxes)
        right.text(0.98, 0.05, "dashed: by Eq. 9", color=MUTED, ha="right", transform=right.transAxes)
        if self._equation_9.supcon_C[-1] > 1:
            left.axhline(1, color=GRID, lw=2.5, zorder=0)
        self._title(left, "Probability of each positive, p+")
        self._title(right, "Probability of the own center, p_c")
        for axes in (left, right):
            self._head_to_tail(axes)

    def draw_alphas(self, figure: FigureBase) -> None:
        """Left p_c by alpha and shot, right how much p+ differs between the largest and the smallest class."""
        left, right = figure.subplots(1, 2)
        alphas = np.geomspace(1e-4, 1, 81)
        mean, by_equation_9 = (of(self.tail.prior_C, alphas, *self._sizes) for of in (mean_optima, optima_by_equation_9))
        ends = []
        for shot in SHOTS:
            if shot not in self.tail.shots:
                continue
            color = GROUP_COLORS[shot]
            left.plot(alphas, self._by_anchor(by_equation_9.center_AC)[shot], color=color, ls=DASHES, lw=1.1)
            left.plot(alphas, self._by_anchor(mean.center_AC)[shot], color=color)
            ends.append((shot.capitalize(), color))
        for number, (name, color) in enumerate([*ends, ("dashed: by Eq. 9", MUTED)]):
            height = 0.05 + 0.08 * (len(ends) - number)
            left.text(0.03, height, name, color=color, weight="bold", transform=left.transAxes)
        left.set_ylim(0, 1.03)
        times = mean.positive_AC[:, -1] / mean.positive_AC[:, 0]
        supcon = mean.supcon_C[-1] / mean.supcon_C[0]
        right.axhline(supcon, color=MUTED, ls=DASHES, lw=1.1)
        right.text(alphas[0], 1.06 * supcon, "SupCon", color=MUTED, weight="bold", va="bottom")
        right.plot(alphas, times, color=INK)
        right.text(alphas[0], 1.15 * times[0], "PaCo", color=INK, weight="bold", va="bottom")
        right.set_yscale("log")
        _plain_numbers(right.yaxis)
        right.set_ylim(0.8, 2 * max(supcon, times.max()))
        self._title(left, "Probability of the own center, p_c, mean of a shot's anchors")
        self._title(right, "p+ of the smallest class over p+ of the largest")
        for axes in (left, right):
            axes.set_xscale("log")
            _plain_numbers(axes.xaxis)
            axes.axvline(self.alpha, color=GRID, lw=4, zorder=0)
            axes.set_xlabel(f"alpha (band: {self.alpha:g})")

    def _optima_table(self) -> Table:
        table = Table(
            title="Where the losses are smallest",
            caption="exact: mean over draws of queue and micro-batch, the own key always being a positive; Eq. 9 counts "
            "it\nas any other. A p+ above 1 shows where Eq. 9 does not hold. ratio: smallest class over largest.",
            title_justify="left",
            caption_justify="left",
        )
        table.add_column("anchors of", no_wrap=True)
        table.add_column("classes", justify="right")
        table.add_column("images", justify="right", no_wrap=True)
        for heading in ("positives K", "SupCon p+", "PaCo p+", "PaCo p_c"):
            table.add_column(f"{heading}\nexact", justify="right")
            table.add_column("\nEq. 9", justify="right", style="dim")
        rows = self._rows
        pairs = [
            (self._mean.positives_C, self._equation_9.positives_C),
            (self._mean.supcon_C, self._equation_9.supcon_C),
            (self._mean.positive_AC[0], self._equation_9.positive_AC[0]),
            (self._mean.center_AC[0], self._equation_9.center_AC[0]),
        ]
        for name, of_row in rows.items():
            counts = self.tail.counts_C[of_row]
            span = f"{counts.max():,}" if counts.max() == counts.min() else f"{counts.max():,} - {counts.min():,}"
            cells = [_figure(_over_anchors(v, counts, of_row)) for pair in pairs for v in pair]
            table.add_row(name, f"{len(counts):,}", span, *cells)
        table.add_section()
        ratios = [_figure(v[-1] / v[0]) for pair in pairs for v in pair]
        table.add_row("ratio", "", "", *ratios)
        return table

    def _alpha_table(self) -> Table:
        alphas = sorted({*ALPHAS, self.alpha})
        mean = mean_optima(self.tail.prior_C, alphas, *self._sizes)
        table = Table(
            title="Which alpha gives which p_c (exact)",
            caption="alpha K: weight of the largest class's positives together, its center having 1. \nratio of p+: "
            "smallest class over largest",
            title_justify="left",
            caption_justify="left",
        )
        for heading in ("alpha", "alpha K", *self._rows, "ratio of p+"):
            table.add_column(heading, justify="right")
        for a, alpha in enumerate(alphas):
            centers = (
                _figure(_over_anchors(mean.center_AC[a], self.tail.counts_C[row], row)) for row in self._rows.values()
            )
            table.add_row(
                f"{alpha:g}",
                _figure(alpha * mean.positives_C[0]),
                *centers,
                _figure(mean.positive_AC[a, -1] / mean.positive_AC[a, 0]),
                style="bold" if alpha == self.alpha else "",
            )
        return table

    def _advice(self) -> str:
        K = float(self._mean.positives_C[0])
        pull = self.alpha * K
        said = (
            f"alpha K of the largest class is {pull:.3g}; it is {PUBLISHED_PULL} in the published runs on ImageNet-LT. "
        )
        if pull <= 2 * PUBLISHED_PULL:
            return said.rstrip()
        said += (
            f"So far above, head classes learn from their centers little more than p_c = {1 / (1 + pull):.2g}: "
            f"alpha {PUBLISHED_PULL / K:.2g} with this queue"
        )
        queue = int((PUBLISHED_PULL / self.alpha - 1) / self.tail.prior_C[0]) - 2 * self.micro_batch + 2
        return said + (f", or a queue of {queue:,} with this alpha, gives {PUBLISHED_PULL}." if queue > 0 else " gives it.")

    @property
    def _sizes(self) -> tuple[int, int]:
        return self.queue_length, self.micro_batch

    @cached_property
    def _mean(self) -> Optima:
        return mean_optima(self.tail.prior_C, [self.alpha], *self._sizes)

    @cached_property
    def _equation_9(self) -> Optima:
        return optima_by_equation_9(self.tail.prior_C, [self.alpha], *self._sizes)

    @cached_property
    def _rows(self) -> Mapping[str, Values]:
        """Positions of the classes that each row of the tables is about."""
        shots = np.array(self.tail.shots)
        last = len(shots) - 1
        of_shots = {shot.capitalize(): np.flatnonzero(shots == shot) for shot in SHOTS if shot in self.tail.shots}
        return {"largest": np.array([0]), **of_shots, "smallest": np.array([last])}

    def _by_anchor(self, values_AC: Values) -> dict[str, Values]:
        """Mean over the anchors of each shot, for every alpha."""
        shots = np.array(self.tail.shots)
        return {
            shot: np.average(values_AC[:, shots == shot], axis=1, weights=self.tail.counts_C[shots == shot])
            for shot in set(self.tail.shots)
        }

    def _title(self, axes: Axes, text: str) -> None:
        axes.set_title(text, fontsize=9.5, weight="bold", pad=18)

    def _head_to_tail(self, axes: Axes) -> None:
        shots = self.tail.shots
        for shot in SHOTS:
            if members := [i for i, of in enumerate(shots) if of == shot]:
                axes.axvspan(members[0] - 0.5, members[-1] + 0.5, color=GROUP_COLORS[shot], alpha=0.07, lw=0)
                axes.text((members[0] + members[-1]) / 2, 1.02, shot.capitalize(), ha="center",
                          color=GROUP_COLORS[shot], weight="bold", transform=axes.get_xaxis_transform())  # fmt: skip
        if len(shots) <= MOST_NAMES:
            labels = [f"{name} ({n:,})" for name, n in zip(self.tail.classes, self.tail.counts_C, strict=True)]
            axes.set_xticks(range(len(shots)), labels, rotation=45, ha="right")
            axes.tick_params(axis="x", labelcolor=INK)
        else:
            axes.set_xlabel("classes, from the largest to the smallest")
        axes.set_xlim(-0.6, len(shots) - 0.4)


@styled
def _save(path: Path, *charts_and_heights: tuple[Callable[[FigureBase], None], float]) -> None:
    heights = [height for _, height in charts_and_heights]
    figure = Figure(figsize=(FULL, sum(heights)))
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, (draw, _) in zip(parts, charts_and_heights, strict=True):
        draw(part)
    png(figure, path)


def _plain_numbers(axis: Axis) -> None:
    """For a logarithmic axis, whose powers of ten are mathematics, which the charts' style switches off."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def _over_anchors(values_C: Values, counts: Values, classes: Values) -> float:
    return float(np.average(values_C[classes], weights=counts))


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
