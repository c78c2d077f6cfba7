"""Every bench runs to its end from its command line, and prints its bars as lines of JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
QUICK = {
    "loss": ["--repeats", "3"],
    "key_encoder": ["--repeats", "3"],
    "key_queue": ["--repeats", "3", "--keys", "100000"],
    "log": ["--steps", "20000"],
    "watching": ["--repeats", "5"],
    "saving": ["--repeats", "3"],
    "scale": [],
    "shards": ["--only", "speed", "--images", "2000", "--repeats", "1"],
    "shuffle": [],
    "stream": ["--images", "1024", "--repeats", "2", "--memory-workers", "0", "2"],
    "inference": ["--batch", "4", "--rounds", "1", "--only", "RIDEResNet, 3"],
    "views": ["--images", "16", "--repeats", "3"],
    "step": ["--only", "cifar_resnet32", "--bars-only", "--rounds", "3"],
}


@pytest.mark.soak
@pytest.mark.alone
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", QUICK)
def test_bench_runs_to_its_end(name, record):
    """Its bars hold or not: that is recorded, and for the results page."""
    command = [sys.executable, f"tools/bench/{name}.py", *QUICK[name], "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    bars = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert bars
    held = [f"{bar['name']} {bar['ratio']:.3g} {'' if bar['holds'] else 'not '}{bar['bar']}" for bar in bars]
    record(f"bench {name}", "; ".join(held), all(bar["holds"] for bar in bars))
