"""The record of a soak: what was run, what came out, written to docs/soak.md when the last test is over."""

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
    """`record(what, figure, holds)`: one line of the table in docs/soak.md."""
    lines: list[tuple[str, str, bool]] = []
    started = now()
    yield lambda what, figure, holds: lines.append((what, figure, holds))
    found = ", ".join(f"{name} {version}" for name, version in versions().items())
    rows = "\n".join(f"| {what} | {figure} | {'yes' if holds else '**no**'} |" for what, figure, holds in lines)
    (ROOT / "docs" / "soak.md").write_text(
        f"# Last soak\n\nWritten by `make soak`; started {started}, ended {now()}, {os.cpu_count()} cores "
        f"({platform.machine()}), {found}.\n\n| what | figure | holds |\n|---|---|---|\n{rows}\n"
    )
