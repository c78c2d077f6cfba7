"""Charts of the HTML pages: one style, one color per shot, drawn by matplotlib without global state.

Colors in the SVG are CSS variables, so that a page can switch between light and dark.
"""

from __future__ import annotations

import html
import io
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from paco_ds.evaluation.accuracy import GROUPS, SHOTS
from paco_ds.files import whole_file

INK, MUTED, GRID, ALARM = "#1c2530", "#66727e", "#e4e8ec", "#d03b2f"
# They differ in hue and lightness, for any color vision. All is ink, since it is not a shot.
GROUP_COLORS = {"many": "#2b6cb8", "medium": "#c98509", "few": "#b02a5f", "all": INK}
CSS_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", ALARM: "alarm"} | {
    color: group for group, color in GROUP_COLORS.items() if group != "all"
}
styled = matplotlib.rc_context(
    {
        "axes.axisbelow": True,
        "axes.edgecolor": GRID,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.labelcolor": MUTED,
        "axes.labelsize": 8.5,
        "axes.spines.left": False,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlelocation": "left",
        "figure.constrained_layout.use": True,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "font.size": 8.5,
        "grid.color": GRID,
        "grid.linewidth": 0.7,
        "lines.linewidth": 1.7,
        "lines.solid_capstyle": "round",
        "svg.fonttype": "none",
        "svg.hashsalt": "paco_ds",
        "text.color": INK,
        "text.parse_math": False,  # class names may contain a $
        "xtick.color": MUTED,
        "xtick.major.size": 0,
        "ytick.color": MUTED,
        "ytick.major.size": 0,
    }
)

HALF, FULL = 5.5, 11.3  # inches: half or full width of the page
MOST_BARS = 40  # more classes than this are drawn as dots
Values = np.ndarray


@styled
def loss_chart(x: Values, loss: Values, skipped: Values, x_label: str) -> Figure:
    """Training loss: mean and range of neighbouring steps; skipped steps are marked at the bottom."""
    figure, (axes,) = _panels(HALF, 2.9)
    _curve(axes, x, loss, INK, band=True)
    if skipped.any():
        foot = axes.get_xaxis_transform()
        axes.plot(x[skipped], np.full(skipped.sum(), 0.02), "^", color=ALARM, ms=5, transform=foot)
    axes.set_ylabel("loss")
    axes.set_xlabel(x_label)
    return figure


@styled
def parts_chart(x: Values, parts: Mapping[str, Values], x_label: str) -> Figure:
    """Parts of the loss: one panel per part with its own scale, four in a row."""
    columns = min(len(parts), 4)
    rows = -(-len(parts) // columns)
    figure = Figure(figsize=(FULL, 2.2 * rows))
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True).flat
    for axes, (name, values) in zip(panels, parts.items(), strict=False):
        _curve(axes, x, values, INK, band=True)
        axes.set_title(name.replace("_", " "), weight="bold", fontsize=9)
        axes.set_xlabel(x_label)
        axes.yaxis.set_major_locator(MaxNLocator(4))
    for axes in panels:
        axes.set_axis_off()
    return figure


@styled
def accuracy_chart(x: Sequence[float], figures: Mapping[str, Sequence[float | None]], x_label: str) -> Figure:
    """Top-1 accuracy of Many, Medium, Few and All over training, labelled at the last point."""
    figure, (axes,) = _panels(HALF, 2.9)
    ends = {}
    for group in GROUPS:
        y = 100 * as_floats(figures[group])
        if np.isfinite(y).any():
            axes.plot(x, y, color=GROUP_COLORS[group], marker="o", ms=3.2, lw=2.4 if group == "all" else 1.5)
            ends[group] = float(y[np.isfinite(y)][-1])
    axes.set_ylim(0, 102)
    axes.set_xlim(left=0)
    _name_ends(axes, ends)
    axes.set_ylabel("top-1 accuracy, %")
    axes.set_xlabel(x_label)
    return figure


@styled
def class_chart(
    names: Sequence[str], counts: Sequence[int], shots: Sequence[str], accuracy: Sequence[float | None]
) -> Figure:
    """Accuracy of each class above, its training images below, head to tail; dots if there are many classes."""
    figure, (top, bottom) = _panels(FULL, 4.4, ratios=(2.3, 1))
    order = sorted(range(len(names)), key=lambda c: -counts[c])
    place = np.arange(len(order))
    percent = 100 * as_floats([accuracy[c] for c in order])
    images = np.array([max(counts[c], 1) for c in order])
    shot_of = [shots[c] for c in order]
    colors = [GROUP_COLORS[shot] for shot in shot_of]
    if len(order) <= MOST_BARS:
        top.bar(place, np.nan_to_num(percent), color=colors, width=0.68)
        bottom.bar(place, images, color=colors, width=0.68, alpha=0.45)
        for i, value in enumerate(percent):
            top.text(i, np.nan_to_num(value) + 1.5, _number(value), ha="center", fontsize=8.5)
            bottom.text(i, images[i] * 1.15, f"{counts[order[i]]:,}", ha="center", fontsize=8, color=MUTED)
        crowded = len(order) > 12
        labels = [names[c] if crowded else textwrap.fill(names[c], 12) for c in order]
        bottom.set_xticks(place, labels, rotation=45 if crowded else 0, ha="right" if crowded else "center")
        bottom.tick_params(axis="x", labelcolor=INK)
    else:
        top.scatter(place, percent, c=colors, s=7, alpha=0.55, lw=0, rasterized=len(order) > 1500)
        known, near = percent[np.isfinite(percent)], max(len(order) // 40, 5)
        mean = [known[max(i - near, 0) : i + near].mean() for i in range(len(known))]
        top.plot(place[np.isfinite(percent)], mean, color=INK, lw=1.6)
        for shot in SHOTS:
            bottom.fill_between(
                place,
                images,
                1,
                where=[s == shot for s in shot_of],
                color=GROUP_COLORS[shot],
                alpha=0.45,
                lw=0,
            )
        bottom.set_xlabel("classes, from the largest to the smallest")
    for shot in SHOTS:
        if members := [i for i, of in enumerate(shot_of) if of == shot]:
            top.axvspan(members[0] - 0.5, members[-1] + 0.5, color=GROUP_COLORS[shot], alpha=0.07, lw=0)
            middle = (members[0] + members[-1]) / 2
            top.text(middle, 109, shot.capitalize(), ha="center", color=GROUP_COLORS[shot], weight="bold")
    top.set_ylim(0, 116)
    top.set_yticks(range(0, 101, 25))
    top.set_ylabel("top-1 accuracy, %")
    top.set_xticks([])
    bottom.set_yscale("log")
    bottom.set_ylim(1, images.max() * 3)
    bottom.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    bottom.yaxis.set_minor_locator(NullLocator())
    bottom.set_ylabel("training images")
    for axes in (top, bottom):
        axes.set_xlim(-0.6, len(order) - 0.4)
    return figure


@styled
def probability_chart(
    x: Values, seen: Mapping[str, Values], optimum: Mapping[str, Values], x_label: str, *, top: float | None = None
) -> Figure:
    """A probability over training, a panel per shot, with its optimum (dashed); `top` limits the axis."""
    figure = Figure(figsize=(FULL, 2.5))
    panels = figure.subplots(1, len(SHOTS), sharey=True)
    for axes, shot in zip(panels, SHOTS, strict=True):
        _curve(axes, x, optimum[shot], MUTED, dashes=(4, 2.5))
        _curve(axes, x, seen[shot], GROUP_COLORS[shot], band=True)
        axes.set_title(shot.capitalize(), color=GROUP_COLORS[shot], weight="bold", fontsize=9)
        axes.set_xlabel(x_label)
    panels[0].set_ylim(0, top)  # of all panels, after the last is drawn: the limit follows the largest value
    panels[0].set_ylabel("probability")
    return figure


@styled
def two_panel_chart(x: Values, panels: Sequence[tuple[str, Values]], x_label: str, *, from_zero: bool = True) -> Figure:
    """Two quantities over the same steps, one above the other; each is (axis label, values)."""
    figure, both = _panels(HALF, 3.1, ratios=(1, 1), share_x=True)
    for axes, (label, y) in zip(both, panels, strict=True):
        _curve(axes, x, y, INK, band=True)
        axes.set_ylabel(label)
        axes.yaxis.set_major_locator(MaxNLocator(4))
        if from_zero:
            axes.set_ylim(bottom=0)
    both[-1].set_xlabel(x_label)
    figure.align_ylabels(both)
    return figure


@styled
def comparison_chart(
    methods: Sequence[str],
    seeds: Mapping[str, Sequence[Sequence[float]]],
    paper: Mapping[str, Sequence[float | None]],
) -> Figure:
    """One panel per group: a dot per seed, a bar at the mean, a diamond at the paper's value, with numbers.

    Args:
        methods: names from top to bottom.
        seeds: for each of many, medium, few, all: for each method, the percentages of its seeds.
        paper: for each group and method the paper's percentage, or None.
    """
    figure = Figure(figsize=(FULL, 1.15 + 0.5 * len(methods)))
    panels = figure.subplots(1, len(GROUPS), sharey=True)
    for axes, group in zip(panels, GROUPS, strict=True):
        color = GROUP_COLORS[group]
        for row, values in enumerate(seeds[group]):
            if len(values):
                middle = float(np.mean(values))
                axes.plot([min(values), max(values)], [row, row], color=color, lw=7, alpha=0.16)
                axes.plot(values, [row] * len(values), "o", color=color, ms=5, alpha=0.6, mew=0)
                axes.plot([middle, middle], [row - 0.27, row + 0.27], color=color, lw=2.6)
                axes.text(middle, row - 0.36, f"{middle:.1f}", ha="center", fontsize=8.5, color=INK)
            if (published := paper[group][row]) is not None:
                axes.plot([published], [row], "D", mfc="none", mec=MUTED, ms=6)
                axes.text(published, row + 0.23, f"{published:.1f}", ha="center", va="top", fontsize=7, color=MUTED)
        axes.set_title(group.capitalize(), color=color, weight="bold", fontsize=10)
        axes.grid(axis="x")
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.margins(x=0.18)
        axes.set_xlabel("top-1 accuracy, %")
    panels[0].set_yticks(range(len(methods)), [textwrap.fill(name, 34, break_on_hyphens=False) for name in methods])
    panels[0].tick_params(axis="y", labelcolor=INK, labelsize=9.5)
    panels[0].set_ylim(len(methods) - 0.5, -0.7)
    return figure


@styled
def svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an inline <svg> with CSS-variable colors; `name` makes its ids unique on the page."""
    out = io.StringIO()
    figure.savefig(out, format="svg", dpi=200, metadata={"Date": None})
    text = out.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    view = re.search(r'viewBox="([^"]*)"', text)
    assert view is not None
    head = f'<svg viewBox="{view[1]}" role="img" aria-label="{html.escape(description)}">'
    text = re.sub(r"<svg[^>]*>", head, text, count=1)
    used = set(re.findall(r'(?:url\(#|xlink:href="#)([^)"]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r'(url\(#|xlink:href="#)', rf"\g<1>{name}-", text)
    for color, variable in CSS_VARIABLES.items():
        text = text.replace(color, f"var(--{variable})")
    return text


@styled
def png(figure: Figure, path: Path) -> None:
    """Write the figure on white at 160 dots per inch, atomically."""
    with whole_file(path) as file:
        figure.savefig(file, format="png", dpi=160, facecolor="white")


def as_floats(values: Sequence[float | None]) -> Values:
    """float64 array with NaN for None."""
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def binned(x: Values, y: Values, bins: int = 150) -> tuple[Values, Values, Values, Values]:
    """Mean x, and mean, minimum and maximum y, of at most `bins` groups of neighbours; NaN is left out.

    A run of a million steps is drawn as fast as one of a hundred, and a single outlier stays visible.
    """
    known = np.isfinite(y)
    x, y = x[known], y[known]
    parts = np.array_split(np.arange(len(y)), max(min(bins, len(y)), 1)) if len(y) else []
    rows = [(x[part].mean(), y[part].mean(), y[part].min(), y[part].max()) for part in parts]
    columns = np.array(rows, dtype=np.float64).reshape(-1, 4).T
    return columns[0], columns[1], columns[2], columns[3]


def _panels(
    width: float, height: float, ratios: Sequence[float] = (1,), share_x: bool = False
) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height))
    rows = figure.subplots(len(ratios), 1, squeeze=False, sharex=share_x, height_ratios=ratios)
    return figure, list(rows[:, 0])


def _curve(
    axes: Axes,
    x: Values,
    y: Values,
    color: str,
    band: bool = False,
    dashes: tuple[float, float] | None = None,
) -> None:
    at, mean, low, high = binned(x, y)
    if band:
        axes.fill_between(at, low, high, color=color, alpha=0.14, lw=0)
    axes.plot(at, mean, color=color, ls=(0, dashes) if dashes else "-", lw=1.3 if dashes else 1.7)


def _name_ends(axes: Axes, ends: Mapping[str, float], gap: float = 8.5) -> None:
    """Label each line at the right edge, at least `gap` units apart so that labels do not overlap."""
    groups = sorted(ends, key=lambda group: ends[group])
    places: list[float] = []
    for group in groups:
        places.append(max(ends[group], places[-1] + gap) if places else ends[group])
    shift = max(places[-1] - max(ends.values()), 0) / 2 if places else 0
    for group, place in zip(groups, places, strict=True):
        axes.text(
            1.02,
            place - shift,
            f"{group.capitalize()} {ends[group]:.1f}",
            color=GROUP_COLORS[group],
            weight="bold",
            va="center",
            transform=axes.get_yaxis_transform(),
        )


def _number(value: float) -> str:
    return f"{value:.1f}" if np.isfinite(value) else "no images"
