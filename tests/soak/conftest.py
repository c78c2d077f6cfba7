"""The record of a soak: what was run and what came out, in runs/soak.md; `make soak` puts a whole one into docs/."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from paco_ds.evaluation.results import now, versions

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def record() -> Iterator[Callable[[str, str, bool], None]]:
    """`record(what, figure, holds)`: one line of the table in runs/soak.md, which is written anew with each: a soak
    that was cut off leaves what it has seen, and says that it did not end."""
    lines: list[tuple[str, str, bool]] = []
    started = now()

    def add(what: str, figure: str, holds: bool) -> None:
        lines.append((what, figure, holds))
        _write(lines, started, f"not ended by {now()}")

    yield add
    _write(lines, started, f"ended {now()}")


def _write(lines: list[tuple[str, str, bool]], started: str, ended: str) -> None:
    found = ", ".join(f"{name} {version}" for name, version in versions().items())
    rows = "\n".join(f"| {what} | {figure} | {'yes' if holds else '**no**'} |" for what, figure, holds in lines)
    path = ROOT / "runs" / "soak.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        f"# Last soak\n\nWritten by `make soak`; started {started}, {ended}, {os.cpu_count()} cores "
        f"({platform.machine()}), {found}.\n\n| what | figure | holds |\n|---|---|---|\n{rows}\n"
    )
