#!/usr/bin/env python3
"""Run the long tests and write their record, runs/soak.md.

    python tools/soak.py [TESTS ...]

Tests that time something run first and one by one, the others two at a time: many of them wait. Ends with 1 if a test
failed; the record then names it.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "runs" / "soak"
PARTS = {
    "alone": ("-m", "soak and alone"),
    "others": ("-m", "soak and not alone", "-n", "2", "--dist", "loadscope", "--no-loadscope-reorder"),
}
FIRST = ("kills", "hosts", "prometheus", "hangs", "plan_memory", "families")  # long ones: no core is idle at the end


def outcomes(report: Path) -> dict[str, list[str]]:
    """{outcome: names of the tests} of a JUnit report."""
    found: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}
    for case in ElementTree.parse(report).iter("testcase") if report.exists() else ():
        kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
        outcome = "passed" if not kinds else "skipped" if kinds == {"skipped"} else "failed"
        found[outcome].append(f"{case.get('classname')}::{case.get('name')}")
    return found


def page(started: str, minutes: float, found: dict[str, list[str]], command: str) -> str:
    """The record, in Markdown."""
    from paco_ds.evaluation.results import versions

    rows_file = FOLDER / "rows.jsonl"
    lines = rows_file.read_text(encoding="utf-8").splitlines() if rows_file.exists() else []
    rows = [json.loads(line) for line in lines]
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    said = [
        f"# Last soak\n\n`{command}`, started {started}, {minutes:.0f} min, {os.cpu_count()} cores "
        f"({platform.machine()}), {packages}.\n\n"
        f"Tests: {', '.join(f'{len(tests)} {outcome}' for outcome, tests in found.items())}.\n"
    ]
    said += [f"\n{outcome}: {', '.join(found[outcome])}\n" for outcome in ("failed", "skipped") if found[outcome]]
    said.append("\n| what | figure | holds |\n|---|---|---|\n")
    said += [f"| {row['what']} | {row['figure']} | {'yes' if row['holds'] else '**no**'} |\n" for row in rows]
    return "".join(said)


def test_files() -> list[str]:
    """Folders and files of all long tests, the longest first."""
    first = [f"tests/soak/test_{name}.py" for name in FIRST]
    others = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests" / "soak").glob("test_*.py"))
    rooms = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").iterdir() if path.is_dir())
    rooms = [room for room in rooms if room not in ("tests/soak", "tests/gpu") and "__" not in room]
    return [*first, *(path for path in others if path not in first), *rooms]


def main(argv: Sequence[str]) -> int:
    """Run, record; the record is written anew after each part."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    command = " ".join(("python tools/soak.py", *argv)) if argv else "make soak"
    started, began, failed = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic(), False
    found: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}
    for name, options in PARTS.items():
        report = FOLDER / f"{name}.xml"
        words = [sys.executable, "-m", "pytest", *options, f"--junit-xml={report}", *(argv or test_files())]
        status = subprocess.run(words, cwd=ROOT, check=False).returncode
        failed |= status not in (0, 5)  # 5: no test of this part is among those asked for
        for outcome, tests in outcomes(report).items():
            found[outcome] += tests
        text = page(started, (time.monotonic() - began) / 60, found, command)
        (FOLDER.parent / "soak.md").write_text(text, encoding="utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # a checkout need not be installed
    sys.exit(main(sys.argv[1:]))
