"""Random damage to a directory of shards, and what must come of it: an error, or every harmed sample counted."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np

from paco_ds.data.manifest import load_manifest
from paco_ds.data.shard import BadSample, RawSample, ShardReader
from paco_ds.errors import DataError

KINDS = ("flip", "flip many", "zero a block", "cut", "grow", "remove", "swap", "shift", "edit the manifest")


def mutate(directory: Path, rng: np.random.Generator) -> str:
    """Damage one tar or index of the training split, or the manifest; returns what was done."""
    kind = str(rng.choice(KINDS))
    path = Path(rng.choice(sorted([*directory.glob("train-*.tar"), *directory.glob("train-*.npy")])))
    data = bytearray(path.read_bytes())
    if kind in ("flip", "flip many"):
        for _ in range(1 if kind == "flip" else int(rng.integers(2, 50))):
            data[int(rng.integers(len(data)))] ^= int(rng.integers(1, 256))
    elif kind == "zero a block":
        start = int(rng.integers(len(data)))
        data[start : start + 512] = bytes(len(data[start : start + 512]))
    elif kind == "cut":
        del data[int(rng.integers(len(data))) :]
    elif kind == "grow":
        data += rng.bytes(int(rng.integers(1, 2000)))
    elif kind == "shift":  # same size, everything after a place moved by a byte
        start = int(rng.integers(len(data)))
        data[start:] = data[start:-1][:0] + b"\0" + data[start:-1]
    elif kind == "remove":
        path.unlink()
        return f"{kind} {path.name}"
    elif kind == "swap":
        other = Path(rng.choice(sorted(directory.glob(f"train-*{''.join(path.suffixes)}"))))
        data, moved = bytearray(other.read_bytes()), bytes(data)
        other.write_bytes(moved)
    else:
        return f"{kind}: {_edit(directory / 'manifest.json', rng)}"
    path.write_bytes(data)
    return f"{kind} {path.name}"


def _edit(path: Path, rng: np.random.Generator) -> str:
    """Change one value somewhere in manifest.json."""
    tree = json.loads(path.read_text())
    node, place = tree, []
    while isinstance(node, dict | list) and node:
        key = rng.choice(sorted(node)) if isinstance(node, dict) else int(rng.integers(len(node)))
        parent, node = node, node[key]
        place.append(str(key))
    values = [0, -1, 1, 10**12, "", "../../etc/passwd", "pipe:true", None, [], {}, True, 0.5]
    parent[key] = values[int(rng.integers(len(values)))]
    path.write_text(json.dumps(tree))
    return f"{'.'.join(place)} = {parent[key]!r}"


def read_all(directory: Path, together: int = 16) -> tuple[dict[int, RawSample], Counter[str]]:
    """Every training sample as the stream reads it, and how many were bad by reason; DataError where a run ends."""
    manifest = load_manifest(directory)
    manifest.check_files("train")
    split = manifest.split("train")
    found, bad = {}, Counter()
    with ShardReader(directory, split) as reader:
        for first in range(0, split.samples, together):
            for stored in reader.read_window(range(first, min(first + together, split.samples))):
                try:
                    found[stored.sample_id] = stored.sample()
                except BadSample as error:
                    bad[error.reason] += 1
    return found, bad


def fuzz(directory: Path, times: int, seed: int) -> Counter[str]:
    """Mutate, read, restore, so many times; outcomes counted. Fails where damage passes unseen."""
    rng = np.random.default_rng(seed)
    kept = {path: path.read_bytes() for path in directory.iterdir()}
    samples, none = read_all(directory)
    assert not none
    outcomes: Counter[str] = Counter()
    for number in range(times):
        what, refusal = mutate(directory, rng), ""
        try:
            found, bad = read_all(directory)
        except DataError as error:
            refusal = str(error)
        if refusal:
            outcomes["the run ends"] += 1
            assert str(directory) in refusal, (seed, number, what, refusal)  # it names the place
        else:
            assert len(found) + sum(bad.values()) == len(samples), (seed, number, what)
            assert all(samples[i] == sample for i, sample in found.items()), (seed, number, what)
            outcomes["samples are bad" if bad else "nothing changed"] += 1
            if what.startswith(("flip", "zero", "cut", "grow", "remove", "shift")) and not bad:
                unchanged = all(path.exists() and path.read_bytes() == raw for path, raw in kept.items())
                padding = what.startswith(("flip", "zero", "shift")) and what.endswith(".tar")
                assert unchanged or padding, (seed, number, what)
        for path, raw in kept.items():
            if not path.exists() or path.read_bytes() != raw:
                path.write_bytes(raw)
    return outcomes
