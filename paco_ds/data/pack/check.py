"""Check a directory of shards: compare every byte with the manifest, list every damaged shard and sample."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from paco_ds.command import Screen
from paco_ds.data.manifest import Manifest, Split
from paco_ds.data.pack.progress_bar import ShardProgress
from paco_ds.data.pack.workers import Report, Workers
from paco_ds.data.shard import ShardReader, Stored, check_shard, load_index
from paco_ds.data.storage import MissingFile, Storage
from paco_ds.errors import DataError

ShardOf = tuple[str, int]  # split, number of the shard
Result = TypeVar("Result")
_Settings = tuple[Storage, dict[str, Split]]


def over_shards(
    manifest: Manifest,
    function: Callable[[_Settings, ShardOf, Report], tuple[ShardOf, Result]],
    title: str,
    workers: int,
    console: Screen | None,
) -> dict[ShardOf, Result]:
    """What a module-level function finds in each shard of a manifest, in its order, by worker processes."""
    jobs = [(split.name, number) for split in manifest.splits.values() for number in range(len(split.shards))]
    images = sum(split.samples for split in manifest.splits.values())
    size = sum(split.bytes for split in manifest.splits.values())
    with (
        Workers(min(workers, len(jobs)), function.__module__) as processes,
        ShardProgress(console or Screen(quiet=True), title, images, size) as progress,
    ):
        found = dict(processes.run(function, (manifest.storage, dict(manifest.splits)), jobs, progress))
    return {job: found[job] for job in jobs}


def check_shards(manifest: Manifest, *, workers: int = 1, console: Screen | None = None) -> list[str]:
    """All damage of the shards of a manifest, one line each, in its order."""
    problems = [
        line for found in over_shards(manifest, _check, "checking", workers, console).values() for line in found
    ]
    if not problems:
        for split in manifest.splits.values():
            with ShardReader(manifest.storage, split) as reader:
                counts = np.bincount(reader.labels(), minlength=len(manifest.classes))
                if tuple(counts) != split.class_counts:
                    problems.append(
                        f"split {split.name}: class_counts of the manifest differ from those of the indexes"
                    )
                problems += _renamed(manifest, reader)
    return problems


def key_and_about(stored: Stored) -> tuple[str, dict[str, Any]]:
    """The key and the JSON that an undamaged sample has in its tar."""
    assert stored.stretch is not None
    with tarfile.open(fileobj=io.BytesIO(stored.stretch + bytes(2 * tarfile.BLOCKSIZE))) as tar:
        (member,) = [member for member in tar if member.name.endswith(".json")]
        file = tar.extractfile(member)
        assert file is not None  # a regular file
        return member.name.removesuffix(".json"), json.load(file)


def _renamed(manifest: Manifest, reader: ShardReader) -> list[str]:
    """Where names in the manifest are not those in the tars: classes renamed or swapped, shards of other splits. The
    first sample of each class and of each shard tells."""
    problems = []
    firsts = set(reader.split.starts())
    of_classes = np.unique(reader.labels(), return_index=True)[1].tolist()
    for stored in reader.read_window(sorted(firsts.union(of_classes)), gap=0):
        key, about = key_and_about(stored)
        label = int(stored.row["label"])
        listed = manifest.classes[label]
        if stored.sample_id in firsts and key != stored.key:
            problems.append(f"shard {stored.shard} begins with {key}, by the manifest with {stored.key}")
        if (written := about.get("class", listed)) != listed:
            problems.append(f"shard {stored.shard}: class {label} is {written!r}, by the manifest {listed!r}")
    return problems


def _check(settings: _Settings, job: ShardOf, report: Report) -> tuple[ShardOf, list[str]]:
    storage, splits = settings
    split, number = job
    problems = check_shard(storage, splits[split], number) + _energon_problems(storage, splits[split], number)
    shard = splits[split].shards[number]
    report(shard.samples, shard.bytes, len(problems))
    return job, problems


def _energon_problems(storage: Storage, split: Split, number: int) -> list[str]:
    """Problems of `.tar.idx`, which only other readers use: it may be missing, as in older builds, but not wrong."""
    shard = split.shards[number]
    try:
        stored = storage.read(shard.energon_file)
        index = load_index(storage, shard)
    except MissingFile:
        return []
    except DataError:
        return []  # the index is listed already
    end = index["offset"][-1:] + index["size"][-1:]
    if stored != np.concatenate((index["offset"], end)).astype("<u8").tobytes():
        return [f"{shard.energon_file} does not fit {shard.file}: remove it, only other readers use it"]
    return []
