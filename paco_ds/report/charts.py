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
from statistics import fmean

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from paco_ds.evaluation.groups import GROUPS
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

FULL = 11.3  # inches: width of the page
Values = np.ndarray


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
                middle = fmean(values)  # as in the table beside it: np.mean may round 83.45 to the other side
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
    text = re.sub(r"<svg[^>]*>", lambda _: head, text, count=1)  # a title may have backslashes
    used = set(re.findall(r'(?:url\(#|xlink:href="#)([^)"]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r'(url\(#|xlink:href="#)', rf"\g<1>{name}-", text)
    for color, variable in CSS_VARIABLES.items():
        text = text.replace(color, f"var(--{variable})")
    return text


def inline(figure: Figure, name: str, description: str) -> Markup:
    """A chart for a template: markup that is not escaped, since matplotlib escapes its texts."""
    return Markup(svg(figure, name, description))


@styled
def png(figure: Figure, path: Path) -> None:
    """Write the figure on white at 160 dots per inch, atomically."""
    with whole_file(path) as file:
        figure.savefig(file, format="png", dpi=160, facecolor="white")
