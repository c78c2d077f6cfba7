"""Owns the check of a directory of shards: every byte against the manifest, every bad shard and sample named."""

from __future__ import annotations

import numpy as np
from rich.console import Console

from paco_ds.data.manifest import Manifest, Split
from paco_ds.data.pack.progress import ShardProgress
from paco_ds.data.pack.workers import Report, Workers
from paco_ds.data.shard import ShardReader, check_shard, load_index
from paco_ds.data.storage import MissingFile, Storage
from paco_ds.errors import DataError

_Job = tuple[int, str, int]  # place in the manifest, split, shard


def check_shards(manifest: Manifest, *, workers: int = 1, console: Console | None = None) -> list[str]:
    """All damage of the shards of a manifest, a line each, in its order; an empty list if there is none."""
    jobs: list[_Job] = [(0, split.name, n) for split in manifest.splits.values() for n in range(len(split.shards))]
    jobs = [(place, split, number) for place, (_, split, number) in enumerate(jobs)]
    images = sum(split.samples for split in manifest.splits.values())
    size = sum(split.bytes for split in manifest.splits.values())
    with (
        Workers(min(workers, len(jobs)), __name__) as processes,
        ShardProgress(console or Console(quiet=True), "checking", images, size) as progress,
    ):
        settings = (manifest.storage, dict(manifest.splits))
        found = dict(processes.run(_check, settings, jobs, progress))
    problems = [line for place in range(len(jobs)) for line in found[place]]
    if not problems:
        for split in manifest.splits.values():
            counts = np.bincount(ShardReader(manifest.storage, split).labels(), minlength=len(manifest.classes))
            if tuple(counts) != split.class_counts:
                problems.append(f"split {split.name}: class_counts of the manifest are not those of the indexes")
    return problems


def _check(settings: tuple[Storage, dict[str, Split]], job: _Job, report: Report) -> tuple[int, list[str]]:
    storage, splits = settings
    place, split, number = job
    problems = check_shard(storage, splits[split], number) + _energon_problems(storage, splits[split], number)
    shard = splits[split].shards[number]
    report(shard.samples, shard.bytes, len(problems))
    return place, problems


def _energon_problems(storage: Storage, split: Split, number: int) -> list[str]:
    """The offsets beside a shard are for other readers: they may be gone, as in older builds, but not be wrong."""
    shard = split.shards[number]
    try:
        stored = storage.read(shard.energon_file)
        index = load_index(storage, shard)
    except MissingFile:
        return []
    except DataError:
        return []  # the index itself is named already
    end = index["offset"][-1:] + index["size"][-1:]
    if stored != np.concatenate((index["offset"], end)).astype("<u8").tobytes():
        return [f"{shard.energon_file} does not fit {shard.file}: remove it, only other readers use it"]
    return []
