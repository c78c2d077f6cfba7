"""Owns the writing of shards: which sample goes into which, and files that appear only when whole."""

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from webdataset.writer import TarWriter

from paco_ds.data.manifest import Shard
from paco_ds.data.shard import index_shard, sample_key
from paco_ds.data.sources import SourceSample
from paco_ds.files import sha256_file, whole_file

_OWNER = "paco_ds"  # fixed, so that the same input gives the same bytes for every user
_BLOCK = 512


@dataclass(frozen=True)
class ShardJob:
    """All that one process needs to write one shard."""

    directory: Path
    name: str
    split: str
    first_id: int
    samples: tuple[SourceSample, ...]
    classes: tuple[str, ...]


def plan_shards(samples: Sequence[SourceSample], split: str, seed: int, shard_bytes: int) -> list[list[SourceSample]]:
    """Shuffle the samples of a split by (seed, split) and cut them into shards of about equal bytes.

    Only sizes of the sources are used, so the plan stands before anything is read or encoded; a shard stays
    below ``shard_bytes`` up to the size of one sample. Raw generator bits are sorted because numpy promises
    them, but not its shuffle, to be the same in later versions.
    """
    bits = np.random.PCG64([seed, zlib.crc32(split.encode())]).random_raw(len(samples))
    order = np.argsort(bits, kind="stable")
    # Two headers, the image padded to whole blocks, and a block for the JSON.
    sizes = np.array([3 * _BLOCK + -(-samples[i].size // _BLOCK) * _BLOCK for i in order], np.int64)
    ends = np.cumsum(sizes)
    shards = -(-int(ends[-1]) // shard_bytes)
    shard_of = (ends - sizes) * shards // int(ends[-1])
    cuts = np.flatnonzero(np.diff(shard_of)) + 1
    return [[samples[i] for i in part] for part in np.split(order, cuts)]


def write_shard(job: ShardJob) -> Shard:
    """Write one tar and its index; both get their names only when whole, the index first."""
    shard = job.directory / f"{job.name}.tar"
    index_path = job.directory / f"{job.name}.index.npy"
    with whole_file(shard) as file:
        with TarWriter(file, encoder=False, mtime=0, user=_OWNER, group=_OWNER) as tar:
            for sample_id, sample in enumerate(job.samples, job.first_id):
                about = {"label": sample.label, "class": job.classes[sample.label], "source": sample.where}
                tar.write(
                    {
                        "__key__": sample_key(job.split, sample_id),
                        sample.ending: sample.read(),
                        "json": json.dumps(about, ensure_ascii=False).encode(),
                    }
                )
        file.flush()
        index = index_shard(file.name)
        with whole_file(index_path) as index_file:
            np.save(index_file, index, allow_pickle=False)
    return Shard(
        name=job.name,
        samples=len(job.samples),
        bytes=shard.stat().st_size,
        sha256=sha256_file(shard),
        index_bytes=index_path.stat().st_size,
        index_sha256=sha256_file(index_path),
    )
