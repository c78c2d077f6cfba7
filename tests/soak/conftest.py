"""The record of a soak: what was run and what came out, a line of runs/soak/rows.jsonl each; see tools/soak.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

ROWS = Path(__file__).parents[2] / "runs" / "soak" / "rows.jsonl"


@pytest.fixture(scope="session")
def record() -> Callable[[str, str, bool], None]:
    """`record(what, figure, holds)`: one line of the table. A soak that was cut off leaves what it has seen."""
    ROWS.parent.mkdir(parents=True, exist_ok=True)

    def add(what: str, figure: str, holds: bool) -> None:
        with ROWS.open("a", encoding="utf-8") as file:  # several tests run at a time: one write a line
            file.write(json.dumps({"what": what, "figure": figure, "holds": bool(holds)}) + "\n")

    return add
