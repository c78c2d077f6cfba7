"""The groups whose accuracies are told, and how they are written; free of torch, which a page does not need."""

from __future__ import annotations

from paco_ds.data.manifest import SHOTS

GROUPS = (*SHOTS, "all")


def percent(fraction: float | None) -> str:
    """A fraction as percent with one decimal, a dash for None."""
    return "-" if fraction is None else f"{100 * fraction:.1f}"
