"""What a sink is, and the file in the run directory by which a resumed run finds its own in the sink."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from paco_ds.files import replace_text


class Sink(Protocol):
    """Receives figures of the first rank. Whatever it raises, training goes on without it."""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Figures by name after `step` optimizer steps, as metrics.jsonl counts them."""

    def close(self) -> None:
        """Flush and end."""


def remembered(file: Path, make: Callable[[], str]) -> str:
    """The word in a file; made and written at the first time."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_text(file, make())
    return file.read_text(encoding="utf-8").strip()
