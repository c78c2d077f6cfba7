"""What differs first between the files that two versions of the code made; compare_versions.py asks.

Each `difference_of_...` returns a line that names it, or nothing if all is equal.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

STATE = Path("state.json")
WALL_TIMES = ("images_per_second", "data_wait_seconds", "step_seconds", "seconds")  # of metrics.jsonl
NEW_FIELDS = ("grad_norm_ratio",)  # of metrics.jsonl, younger than the older version
VERSION_FIELDS = (
    "versions",
    "version",
    "state_sha256",
    "usual_norm",
    "log_window",
    "data",
)  # of state.json; the digest is of all others
NEW_SETTINGS: dict[str, Any] = {  # younger than the older version: dotted key in state.json's "meaning" -> its default
    "key_encoder.shuffle_block": None,
    "step.lr_scaling": "linear",
}


def difference_of_folders(old: Path, new: Path, ignored: frozenset[Path] = frozenset()) -> str:
    """What differs first between all files of two folders, or the contents of all but `ignored`; empty if nothing."""
    before, after = ({p.relative_to(top) for p in top.rglob("*") if p.is_file()} for top in (old, new))
    if odd := sorted(before ^ after):
        return f"{odd[0]} is of the {'older' if odd[0] in before else 'newer'} version alone"
    found = (difference_of_files(old / name, new / name) for name in sorted(before - ignored))
    return next(filter(None, found), "") if before else f"{old} holds no file"


def difference_of_files(old: Path, new: Path) -> str:
    """The first byte that differs, and of safetensors the first tensor; empty if none does."""
    before, after = old.read_bytes(), new.read_bytes()
    if before == after:
        return ""
    if old.suffix == ".safetensors":
        tensors, others = load_file(old), load_file(new)
        for name in sorted(tensors.keys() | others.keys()):
            a, b = tensors.get(name), others.get(name)
            if a is None or b is None or (a.dtype, a.shape, a.tobytes()) != (b.dtype, b.shape, b.tobytes()):
                return f"{old.name}: {name} differs"
    place = next(i for i, (a, b) in enumerate(zip_longest(before, after)) if a != b)
    return f"{old.name}: byte {place} of {len(before)} differs"


def difference_of_logs(old: Path, new: Path, steps: int) -> str:
    """The first value that differs between two runs' metrics.jsonl, but for WALL_TIMES and NEW_FIELDS; or ''."""
    before, after = log_lines(old), log_lines(new)
    for lines, version in ((before, "older"), (after, "newer")):
        if (logged := sum(line["kind"] == "step" for line in lines)) != steps:
            return f"metrics.jsonl of the {version} version has {logged} steps, not {steps}"
    for a, b in zip(before, after, strict=False):
        if found := difference_of_values(a, b, (*WALL_TIMES, *NEW_FIELDS)):
            return f"{a['kind']} {a['step']}: {found}"
    return "" if len(before) == len(after) else f"metrics.jsonl: {len(before)} lines are now {len(after)}"


def log_lines(run: Path) -> list[dict[str, Any]]:
    """Without the lines that say when a run was started and saved, which older versions do not write."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] not in ("start", "restart", "checkpoint")]


def difference_of_checkpoints(old: Path, new: Path) -> str:
    """What differs first between two checkpoint folders; empty if nothing does but what may."""
    if not (new / STATE).exists():
        return f"the newer version has no checkpoint {new.name}"
    return difference_of_folders(old, new, frozenset([STATE])) or difference_of_states(old / STATE, new / STATE)


def difference_of_states(old: Path, new: Path) -> str:
    """The first field that differs between two state.json; VERSION_FIELDS may, and NEW_SETTINGS at their defaults."""
    before, after = (json.loads(path.read_text()) for path in (old, new))
    after["meaning"] = {k: v for k, v in after["meaning"].items() if k not in NEW_SETTINGS or v != NEW_SETTINGS[k]}
    found = difference_of_values(before.pop("meaning"), after.pop("meaning"))
    found = found or difference_of_values(before, after, VERSION_FIELDS)
    return found and f"{old.name}: {found}"


def difference_of_values(old: dict[str, Any], new: dict[str, Any], ignored: Sequence[str] = ()) -> str:
    """The first key whose values differ or that one side lacks; as JSON text, in which 0.0 and -0.0 differ."""
    for key in dict.fromkeys([*old, *new]):
        a, b = (json.dumps(side[key]) if key in side else "missing" for side in (old, new))
        if a != b and key not in ignored:
            return f"{key} {a} is now {b}"
    return ""


def distances(old: Path, new: Path, last: int) -> tuple[float, float]:
    """How far two runs with checkpoints of step 1 and `last` are apart; NaN where one is not finite or lacks a tensor.

    Returns:
        (largest difference of a step's losses, largest ||w_new - w_old|| / ||w_old - w_first|| of a part of the model
        or of all running statistics, w_first being the older run's weights after the first step).
    """
    losses = [[line["loss"] for line in log_lines(run) if line["kind"] == "step"] for run in (old, new)]
    steps = (old, 1), (old, last), (new, last)
    weights = (load_file(run / "checkpoints" / f"step-{step:08d}" / "model.safetensors") for run, step in steps)
    first, before, after = weights
    parts: dict[str, list[str]] = {}
    for name in (name for name, value in before.items() if value.dtype.kind == "f"):
        parts.setdefault("running" if "running" in name else name.split(".")[0], []).append(name)

    def norm(a: dict[str, Any], b: dict[str, Any], names: list[str]) -> float:
        return float(np.linalg.norm(np.concatenate([(a.get(n, np.nan) - b[n]).ravel() for n in names])))

    shares = [norm(after, before, names) / max(norm(before, first, names), 1e-30) for names in parts.values()]
    return float(np.max(np.abs(np.subtract(*np.array(losses, dtype=float))))), float(np.max(shares))
