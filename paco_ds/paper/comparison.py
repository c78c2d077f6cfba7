"""Compare methods: means over seeds with their spread, and whether a difference exceeds it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.table import Table

from paco_ds.command import Screen
from paco_ds.evaluation.groups import GROUPS
from paco_ds.files import replace_text
from paco_ds.paper.intervals import Correct, Difference, paired_difference
from paco_ds.paper.tables import method_key
from paco_ds.paper.text_tables import as_markdown
from paco_ds.report import charts
from paco_ds.report.page import render

SUBJECT = "paco"
RIVALS = ("cross_entropy", "balanced_softmax")
NAMES = {"paco": "PaCo", "cross_entropy": "cross-entropy", "balanced_softmax": "Balanced Softmax"}


@dataclass(frozen=True)
class SeedResult:
    """Top-1 accuracies of one run as fractions, None for a shot without classes; which images were right, if known."""

    seed: int
    many: float | None
    medium: float | None
    few: float | None
    all: float
    correct: Correct | None = None

    def group(self, name: str) -> float | None:
        """The figure of many, medium, few or all."""
        return {"many": self.many, "medium": self.medium, "few": self.few, "all": self.all}[name]


@dataclass(frozen=True)
class MethodResults:
    """One method's runs.

    Attributes:
        method: its name in recipes (paco, balanced_softmax, ...) or any other name.
        seeds: at least one run.
        paper: the paper's figures as fractions by many, medium, few, all, where it has them.
        backbone: if several backbones are compared; PaCo is compared with methods on the same backbone.
        deviation: in which the runs differ from the published one, in words, or None.
        trials: settings of the method that were tried on the validation split.
    """

    method: str
    seeds: Sequence[SeedResult]
    paper: Mapping[str, float] | None = None
    backbone: str | None = None
    deviation: str | None = None
    trials: int = 0

    @property
    def key(self) -> str:
        """See `method_key`."""
        return method_key(self.method)

    @property
    def name(self) -> str:
        """Its name in text."""
        return NAMES.get(self.key, self.method)

    @property
    def label(self) -> str:
        """Its capitalised name, or with its backbone."""
        return f"{self.backbone}, {self.name}" if self.backbone else self.name[0].upper() + self.name[1:]

    def percents(self, group: str) -> list[float]:
        """The seeds' figures of a group in percent."""
        figures = (seed.group(group) for seed in self.seeds)
        return [100 * figure for figure in figures if figure is not None]


def write_comparison(
    rows: Sequence[MethodResults],
    path_html: Path,
    path_png: Path,
    *,
    title: str = "Comparison",
    console: Screen | None = None,
) -> list[str]:
    """Print the table, write the page, its picture and, beside the page, the numbers (.json) and the table (.md).

    Returns:
        The sentences of `verdicts` and a row's deviation, which are also printed and in the page.

    Raises:
        ValueError: there is no method, one has no runs, or two have the same name.
    """
    if not rows:
        raise ValueError("nothing to compare: no method was given")
    for row in rows:
        if not row.seeds:
            raise ValueError(f"method {row.method!r} has no runs to compare; train it or leave it out")
    if len({(row.backbone, row.key) for row in rows}) < len(rows):
        raise ValueError(f"two methods share a name among {', '.join(row.method for row in rows)}; rename one")
    leads = [_lead(rows, row) for row in rows]
    sentences = verdicts(rows) + [f"{row.label}: run in {row.deviation}." for row in rows if row.deviation]
    console = Screen() if console is None else console
    console.print(_table(rows, leads, title))
    for sentence in sentences:
        console.print(sentence, highlight=False)

    def figure() -> charts.Figure:
        seeds = {group: [row.percents(group) for row in rows] for group in GROUPS}
        return charts.comparison_chart([row.label for row in rows], seeds, _paper(rows))

    charts.png(figure(), path_png)
    page = render(
        "comparison.html.j2",
        {
            "title": title,
            "groups": GROUPS,
            "rows": rows,
            "sentences": sentences,
            "cells": {row.label: [_cell(row, group) for group in GROUPS] for row in rows},
            "leads": {row.label: lead for row, lead in zip(rows, leads, strict=True)},
            "with_leads": any(leads),
            "with_trials": any(row.trials for row in rows),
            "with_paper": any(row.paper for row in rows),
            "chart": charts.inline(figure(), "comparison", f"{title}: every seed and the mean of each method"),
        },
    )
    described = [_as_json(row) | {"lead": lead and asdict(lead)} for row, lead in zip(rows, leads, strict=True)]
    figures = {"title": title, "rows": described, "sentences": sentences}
    for path, text in (
        (path_html, page),
        (path_html.with_suffix(".json"), json.dumps(figures, indent=2) + "\n"),
        (path_html.with_suffix(".md"), _markdown(rows, leads) + "\n"),
    ):
        replace_text(path, text)
    return sentences


def _as_json(row: MethodResults) -> dict[str, Any]:
    found = asdict(row)
    for seed in found["seeds"]:
        seed.pop("correct")
    return found


def verdicts(rows: Sequence[MethodResults]) -> list[str]:
    """Sentences that compare PaCo, on each backbone, with cross-entropy, Balanced Softmax and the best other method:
    the gap of the means of All, and whether it exceeds the spread.

    The spread is the larger of the two methods' ranges over seeds (maximum - minimum); a smaller gap may be noise.
    """
    subjects = [row for row in rows if row.key == SUBJECT]
    if not subjects:
        return [f"{NAMES[SUBJECT]} is not among the methods, so there is no comparison."]
    sentences = [
        f"{NAMES[rival]} is not among the methods, so PaCo is not compared with it."
        for rival in RIVALS
        if rival not in {row.key for row in rows}
    ]
    for subject in subjects:
        others = {row.key: row for row in rows if row.backbone == subject.backbone and row is not subject}
        rivals = [others[rival] for rival in RIVALS if rival in others]
        if others:
            best = max(others.values(), key=lambda row: fmean(row.percents("all")))
            rivals += [best] if best not in rivals else []
        sentences += [_verdict(subject, rival) for rival in rivals]
    return sentences


def _verdict(ours: MethodResults, rival: MethodResults) -> str:
    mine, theirs = ours.percents("all"), rival.percents("all")
    # rounded first, so that the gap matches the printed numbers
    here, there = round(fmean(mine), 1), round(fmean(theirs), 1)
    gap = round(here - there, 1)
    side = f"{abs(gap):.1f} points {'above' if gap > 0 else 'below'}" if gap else "equal to"
    place = f"{ours.backbone}: " if ours.backbone else ""
    start = f"{place}{ours.name}'s mean All is {here:.1f} %, {side} {rival.name}'s {there:.1f} %"
    if min(len(mine), len(theirs)) < 2:
        return f"{start}; with a single seed the spread is unknown, so this is not conclusive."
    if (interval := _interval(ours, rival)) is not None:
        start += f" ({interval})"
    spread = round(max(max(values) - min(values) for values in (mine, theirs)), 1)
    if abs(gap) > spread:
        return f"{start}; the gap exceeds the seeds' spread of {spread:.1f} points."
    return f"{start}; the gap is within the seeds' spread of {spread:.1f} points: neither is shown to be better."


def _interval(ours: MethodResults, rival: MethodResults) -> Difference | None:
    """Of the difference in All, if all runs say which images were right and there are common seeds."""
    mine, theirs = ({s.seed: s.correct for s in row.seeds if s.correct is not None} for row in (ours, rival))
    if len(mine) < len(ours.seeds) or len(theirs) < len(rival.seeds) or not mine.keys() & theirs.keys():
        return None
    return paired_difference(mine, theirs)


def _lead(rows: Sequence[MethodResults], row: MethodResults) -> Difference | None:
    """PaCo's difference in All from another row of its backbone, if all runs say which images were right."""
    ours = next((each for each in rows if each.key == SUBJECT and each.backbone == row.backbone), row)
    return None if ours is row else _interval(ours, row)


def _table(rows: Sequence[MethodResults], leads: Sequence[Difference | None], title: str) -> Table:
    heading = f"{title}: top-1 accuracy, %, mean and range over seeds"
    table = Table(title=heading, title_justify="left")
    table.add_column("method", overflow="fold")
    table.add_column("seeds", justify="right", no_wrap=True)
    for group in GROUPS:
        table.add_column(group.capitalize(), justify="right", min_width=len("67.4-74.0"))
    if any(leads):
        table.add_column("PaCo's lead, 95 %", justify="right", min_width=len("+0.4 to +2.1"))
    for row, lead in zip(rows, leads, strict=True):
        cells = ["\n".join(part for part in _cell(row, group)[:2] if part) for group in GROUPS]
        cells += ["\n".join(lead.parts()) if lead else "-"] if any(leads) else []
        table.add_row(row.label, str(len(row.seeds)), *cells)
        if row.paper:
            published = (_cell(row, group)[2] for group in GROUPS)
            table.add_row("  in the paper", "", *published, style="dim")
    return table


def _markdown(rows: Sequence[MethodResults], leads: Sequence[Difference | None]) -> str:
    """The table for a page: means, All with its range over seeds, PaCo's lead with its interval."""
    optional = {
        "trials": [str(row.trials) for row in rows] if any(row.trials for row in rows) else [],
        "PaCo's lead": ["{} ({})".format(*lead.parts()) if lead else "-" for lead in leads] if any(leads) else [],
        "the paper's All": [_cell(row, "all")[2] or "-" for row in rows] if any(row.paper for row in rows) else [],
    }
    columns = {
        "method": [row.label for row in rows],
        "seeds": [str(len(row.seeds)) for row in rows],
        **{group.capitalize(): [_mean_and_range(row, group) for row in rows] for group in GROUPS},
        **{name: cells for name, cells in optional.items() if cells},
    }
    return as_markdown(list(columns), list(zip(*columns.values(), strict=True)))


def _mean_and_range(row: MethodResults, group: str) -> str:
    middle, between, _ = _cell(row, group)
    return f"{middle} ({between})" if between and group == "all" else middle


def _cell(row: MethodResults, group: str) -> tuple[str, str, str]:
    """Mean, range over seeds, and the paper's figure."""
    values = row.percents(group)
    published = (row.paper or {}).get(group)
    return (
        f"{fmean(values):.1f}" if values else "-",
        f"{min(values):.1f}-{max(values):.1f}" if len(values) > 1 else "",
        "" if published is None else f"{100 * published:.1f}",
    )


def _paper(rows: Sequence[MethodResults]) -> dict[str, list[float | None]]:
    return {
        group: [100 * row.paper[group] if row.paper and group in row.paper else None for row in rows]
        for group in GROUPS
    }
