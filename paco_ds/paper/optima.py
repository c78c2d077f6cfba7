"""Tables and charts of the optima of SupCon and PaCo, from the largest class to the smallest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure, FigureBase
from matplotlib.ticker import FuncFormatter, NullLocator
from numpy.typing import NDArray
from rich.table import Table

from paco_ds.command import Screen
from paco_ds.data.manifest import SHOTS
from paco_ds.paper.equations import Floats, Optima, mean_optima, optima_by_equation_9
from paco_ds.report.charts import FULL, GRID, GROUP_COLORS, INK, MUTED, Values, png, styled

ALPHAS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
PUBLISHED_PULL = 4.5
"""alpha K of the largest class in the published runs on ImageNet-LT: .05 x 1280 / 115,846 x 8,255, rounded down."""
MOST_NAMES = 12
DASHES = (0, (4, 2.5))
OPTIMA_INCHES, ALPHA_INCHES = 4.0, 3.2


@dataclass(frozen=True)
class LongTail:
    """A training split as the closed forms see it, classes from the largest to the smallest.

    Attributes:
        classes, shots: name and shot of each class.
        counts_C: its training images, int64, none of them 0.
        empty: classes left out for want of training images: there is no anchor of them.
    """

    name: str
    split: str
    classes: tuple[str, ...]
    shots: tuple[str, ...]
    counts_C: NDArray[np.int64]
    empty: tuple[str, ...] = ()

    @property
    def prior_C(self) -> Floats:
        """q(y) of each class."""
        return self.counts_C / self.counts_C.sum()


@dataclass(frozen=True)
class OptimaPage:
    """The closed-form optima of a data set with these settings.

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

    def show(self, console: Screen) -> None:
        """Print the optima by shot, p_c by alpha, and advice on alpha."""
        tail = self.tail
        said = [
            f"{tail.name}, {tail.split}: {tail.counts_C.sum():,} images of {len(tail.counts_C):,} classes, "
            f"{tail.counts_C[0]:,} to {tail.counts_C[-1]:,} each; alpha {self.alpha:g}, queue {self.queue_length:,}, "
            f"micro-batch {self.micro_batch:,}"
        ]
        if tail.empty:
            names = ", ".join(tail.empty[:5]) + (", ..." if len(tail.empty) > 5 else "")
            said.append(f"left out, without training images: {len(tail.empty):,} classes ({names})")
        console.print("\n".join(said), highlight=False)
        console.print(self._optima_table())
        console.print(self._alpha_table())
        console.print(self._advice(), highlight=False)

    def draw(self, output: Path) -> list[Path]:
        """One picture of both charts if `output` is a .png; else a folder with one each, optima.png and alpha.png."""
        optima, alpha = (self.draw_optima, OPTIMA_INCHES), (self.draw_alphas, ALPHA_INCHES)
        pictures = (
            {output: [optima, alpha]}
            if output.suffix == ".png"
            else {output / "optima.png": [optima], output / "alpha.png": [alpha]}
        )
        for path, charts in pictures.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            _save(path, charts)
        return list(pictures)

    def draw_optima(self, figure: FigureBase) -> None:
        """Left p+ of SupCon and PaCo, right p_c of PaCo, by class; dashed: with K_y of Eq. (9)."""
        left, right = figure.subplots(1, 2)
        place = self._places
        mark = {"marker": "o", "ms": 4} if self._named else {}
        for axes, color, mean, by_equation_9 in (
            (left, MUTED, self._mean.supcon_C, self._by_equation_9.supcon_C),
            (left, INK, self._mean.positive_AC[0], self._by_equation_9.positive_AC[0]),
            (right, INK, self._mean.center_AC[0], self._by_equation_9.center_AC[0]),
        ):
            axes.plot(place, by_equation_9, color=color, ls=DASHES, lw=1.1)
            axes.plot(place, mean, color=color, **mark)
        left.set_yscale("log")
        _plain_numbers(left.yaxis)
        bottom, top = left.get_ylim()
        left.set_ylim(bottom, top * (top / bottom) ** 0.22)  # room for the names
        if self._by_equation_9.supcon_C[-1] > 1:  # no probability is above 1
            left.axhline(1, color=GRID, lw=2.5, zorder=0)
        right.set_ylim(0, 1.03)
        ratios = (self._mean.supcon_C, "SupCon", MUTED), (self._mean.positive_AC[0], "PaCo", INK)
        for height, (p_C, name, color) in zip((0.92, 0.84), ratios, strict=True):
            text = f"{name}: the smallest class has {_figure(p_C[-1] / p_C[0])} times the largest's"
            left.text(0.02, height, text, color=color, weight="bold", transform=left.transAxes)
        right.text(0.98, 0.05, "dashed: by Eq. 9", color=MUTED, ha="right", transform=right.transAxes)
        for axes, title in ((left, "Probability of each positive, p+"), (right, "Probability of the own center, p_c")):
            axes.set_title(title, fontsize=9.5, weight="bold", pad=18)
            self._head_to_tail(axes)

    def draw_alphas(self, figure: FigureBase) -> None:
        """Left p_c by alpha and shot, right how much p+ differs between the largest and the smallest class."""
        left, right = figure.subplots(1, 2)
        alphas = np.geomspace(1e-4, 1, 81)
        mean, by_equation_9 = self._of(mean_optima, alphas), self._of(optima_by_equation_9, alphas)
        names = [("dashed: by Eq. 9", MUTED)]
        for shot in reversed(SHOTS):
            if shot in self.tail.shots:
                members = self._rows[shot.capitalize()]
                color = GROUP_COLORS[shot]
                left.plot(alphas, self._over_anchors(by_equation_9.center_AC, members), color=color, ls=DASHES, lw=1.1)
                left.plot(alphas, self._over_anchors(mean.center_AC, members), color=color)
                names.append((shot.capitalize(), color))
        for number, (name, color) in enumerate(names):
            left.text(0.03, 0.05 + 0.08 * number, name, color=color, weight="bold", transform=left.transAxes)
        left.set_ylim(0, 1.03)
        times_A = mean.positive_AC[:, -1] / mean.positive_AC[:, 0]
        supcon = mean.supcon_C[-1] / mean.supcon_C[0]
        right.axhline(supcon, color=MUTED, lw=1.7)
        right.plot(alphas, times_A, color=INK)
        right.text(alphas[0], 1.06 * supcon, "SupCon", color=MUTED, weight="bold", va="bottom")
        right.text(alphas[0], 1.15 * times_A[0], "PaCo", color=INK, weight="bold", va="bottom")
        right.set_yscale("log")
        _plain_numbers(right.yaxis)
        right.set_ylim(0.8, 2 * supcon)
        left.set_title("Probability of the own center, p_c, mean of a shot's anchors", fontsize=9.5, weight="bold")
        right.set_title("p+ of the smallest class over p+ of the largest", fontsize=9.5, weight="bold")
        for axes in (left, right):
            axes.set_xscale("log")
            _plain_numbers(axes.xaxis)
            axes.axvline(self.alpha, color=GRID, lw=4, zorder=0)
            axes.set_xlabel(f"alpha (band: {self.alpha:g})")

    def _optima_table(self) -> Table:
        table = Table(
            title="Where the losses are smallest",
            caption="exact: mean over draws of queue and micro-batch, the own key always being a positive; Eq. 9\n"
            "counts it as any other. A p+ above 1 shows where Eq. 9 does not hold. ratio: smallest class over largest.",
            title_justify="left",
            caption_justify="left",
        )
        table.add_column("anchors of", no_wrap=True)
        table.add_column("classes", justify="right")
        table.add_column("images", justify="right", no_wrap=True)
        for heading in ("positives K", "SupCon p+", "PaCo p+", "PaCo p_c"):
            table.add_column(f"{heading}\nexact", justify="right")
            table.add_column("\nEq. 9", justify="right", style="dim")
        mean, by_equation_9 = self._mean, self._by_equation_9
        columns = [
            *(mean.positives_C, by_equation_9.positives_C),
            *(mean.supcon_C, by_equation_9.supcon_C),
            *(mean.positive_AC[0], by_equation_9.positive_AC[0]),
            *(mean.center_AC[0], by_equation_9.center_AC[0]),
        ]
        for name, members in self._rows.items():
            counts = self.tail.counts_C[members]
            span = f"{counts.max():,} - {counts.min():,}" if counts.max() > counts.min() else f"{counts.max():,}"
            cells = (_figure(self._over_anchors(column, members)) for column in columns)
            table.add_row(name, f"{len(counts):,}", span, *cells)
        table.add_section()
        table.add_row("ratio", "", "", *(_figure(column[-1] / column[0]) for column in columns))
        return table

    def _alpha_table(self) -> Table:
        table = Table(
            title="Which alpha gives which p_c (exact)",
            caption="alpha K: weight of the largest class's positives together, its center having 1.\n"
            "ratio of p+: smallest class over largest",
            title_justify="left",
            caption_justify="left",
        )
        for heading in ("alpha", "alpha K", *self._rows, "ratio of p+"):
            table.add_column(heading, justify="right")
        alphas = np.array(sorted({*ALPHAS, self.alpha}))
        mean = self._of(mean_optima, alphas)
        for alpha, center_C, positive_C in zip(alphas, mean.center_AC, mean.positive_AC, strict=True):
            table.add_row(
                f"{alpha:g}",
                _figure(alpha * mean.positives_C[0]),
                *(_figure(self._over_anchors(center_C, members)) for members in self._rows.values()),
                _figure(positive_C[-1] / positive_C[0]),
                style="bold" if alpha == self.alpha else "",
            )
        return table

    def _advice(self) -> str:
        """alpha K of the largest class, and the alpha or queue that would give the published value."""
        K = float(self._mean.positives_C[0])
        pull = self.alpha * K
        said = (
            f"alpha K of the largest class is {pull:.3g}; in the published runs on ImageNet-LT it is {PUBLISHED_PULL}."
        )
        if pull <= 2 * PUBLISHED_PULL:
            return said
        said += f" This leaves its center about p_c = {1 / (1 + pull):.2g}. It is {PUBLISHED_PULL} with alpha "
        said += f"{PUBLISHED_PULL / K:.2g} and this queue"
        # K = 1 + q (queue + 2 m - 2)
        queue = int((PUBLISHED_PULL / self.alpha - 1) / self.tail.prior_C[0]) - 2 * self.micro_batch + 2
        return said + (f", or with this alpha and a queue of {queue:,}." if queue > 0 else ".")

    @cached_property
    def _mean(self) -> Optima:
        return self._of(mean_optima, np.array([self.alpha]))

    @cached_property
    def _by_equation_9(self) -> Optima:
        return self._of(optima_by_equation_9, np.array([self.alpha]))

    def _of(self, optima: Callable[[Values, Values, int, int], Optima], alphas: Values) -> Optima:
        return optima(self.tail.prior_C, alphas, self.queue_length, self.micro_batch)

    @cached_property
    def _rows(self) -> Mapping[str, Values]:
        """Indices of the classes of each row of the tables."""
        shots = np.array(self.tail.shots)
        of_shots = {shot.capitalize(): np.flatnonzero(shots == shot) for shot in SHOTS if shot in self.tail.shots}
        return {"largest": np.array([0]), **of_shots, "smallest": np.array([len(shots) - 1])}

    def _over_anchors(self, values_xC: Values, members: Values) -> Values:
        """Mean over the anchors of these classes, weighted by their training images."""
        return np.average(values_xC[..., members], axis=-1, weights=self.tail.counts_C[members])

    @property
    def _named(self) -> bool:
        """Whether there is room for the names of the classes."""
        return len(self.tail.classes) <= MOST_NAMES

    @property
    def _places(self) -> Values:
        """Positions of the classes on the axis: equally spaced or, without names, by their size."""
        return np.arange(float(len(self.tail.classes))) if self._named else self.tail.counts_C.astype(np.float64)

    def _head_to_tail(self, axes: Axes) -> None:
        """The axis of the classes and the bands of the shots."""
        place, shots = self._places, self.tail.shots
        if self._named:
            labels = [f"{name} ({n:,})" for name, n in zip(self.tail.classes, self.tail.counts_C, strict=True)]
            axes.set_xticks(place, labels, rotation=45, ha="right")
            axes.tick_params(axis="x", labelcolor=INK)
            axes.set_xlim(-0.6, len(shots) - 0.4)
        else:
            axes.set_xlabel("training images of the class")
            axes.set_xscale("log")
            axes.set_xlim(1.2 * place[0], place[-1] / 1.2)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
            axes.xaxis.set_minor_locator(NullLocator())
        to_axes = axes.transData + axes.transAxes.inverted()
        for shot in SHOTS:
            if members := [i for i, of in enumerate(shots) if of == shot]:
                first, last = members[0], members[-1]
                limits = axes.get_xlim()
                ends = [
                    limits[0] if first == 0 else place[first - 1 : first + 1].mean(),
                    limits[1] if last == len(place) - 1 else place[last : last + 2].mean(),
                ]
                left, right = to_axes.transform([(end, 1.0) for end in ends])[:, 0].clip(0, 1)
                color, whole = GROUP_COLORS[shot], axes.transAxes
                axes.axvspan(*ends, color=color, alpha=0.07, lw=0)
                if right - left > 0.08:  # else the name would run into the next
                    middle = (left + right) / 2
                    axes.text(middle, 1.02, shot.capitalize(), ha="center", color=color, weight="bold", transform=whole)


@styled
def _save(path: Path, charts: Sequence[tuple[Callable[[FigureBase], None], float]]) -> None:
    """Draw charts one above the other; each is a function and its height in inches."""
    heights = [height for _, height in charts]
    figure = Figure(figsize=(FULL, sum(heights)))
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, (draw, _) in zip(parts, charts, strict=True):
        draw(part)
    png(figure, path)


def _plain_numbers(axis: Axis) -> None:
    """Plain numbers on a logarithmic axis: the style does not parse the default mathtext."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def _figure(value: float | Values) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
