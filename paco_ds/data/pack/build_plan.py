"""Options of a build, and the plan of its shards, made before the first image is read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from paco_ds.data.pack.build_ranks import BuildRank
from paco_ds.data.pack.card import Card
from paco_ds.data.pack.overlap import overlaps
from paco_ds.data.pack.read import read_source
from paco_ds.data.pack.root import MapOver, Root
from paco_ds.data.pack.selection import make_long_tailed, split_off
from paco_ds.data.pack.source import Source
from paco_ds.data.pack.write import ShardJob, WriteSettings, plan_shards
from paco_ds.data.storage import Storage
from paco_ds.errors import DataError

SHARD_BYTES = 256 * 2**20


@dataclass(frozen=True)
class BuildOptions:
    """Options of a build; see `paco-build-shards build --help`.

    Attributes:
        seed: of the shuffle, the long-tailed subset and the validation split.
        shard_bytes: largest shard.
        verify: decode every image.
        max_bad: bad images that may be left out; more end the build with a list of them.
    """

    seed: int = 0
    shard_bytes: int = SHARD_BYTES
    workers: int = 1
    overwrite: bool = False
    verify: bool = False
    max_bad: int = 0


@dataclass(frozen=True)
class BuildPlan:
    """Everything decided before the first image is read.

    Attributes:
        source: the selected images.
        settings: shared by all worker processes.
        shards: (split, name, number of the first key, rows of the split's table) in the order of the manifest.
        digest: of the images, their sizes and stamps, and all options that the bytes depend on.
        listing: digest of names, labels and sizes alone; equal if the same images were listed before. It stands in the
            manifest, so it must not change from version to version: pixels of arrays are left out.
    """

    source: Source
    settings: WriteSettings
    shards: list[tuple[str, str, int, npt.NDArray[np.int64]]]
    digest: str
    listing: str

    def jobs(self, rank: BuildRank) -> Iterator[ShardJob]:
        """The shards of a rank, each taken from the table on demand."""
        for number, (split, name, first_key, rows) in enumerate(self.shards):
            if rank.takes(number):
                yield ShardJob(name, split, first_key, self.source.splits[split].take(rows))

    def size(self, rank: BuildRank) -> tuple[int, int]:
        """Images and source bytes of a rank's shards."""
        own = [shard for number, shard in enumerate(self.shards) if rank.takes(number)]
        size = sum(int(self.source.splits[split].sizes[rows].sum()) for split, _, _, rows in own)
        return sum(len(rows) for *_, rows in own), size


def plan_build(
    card: Card, root: str | Path, output: Storage, options: BuildOptions, look_up: MapOver = map
) -> BuildPlan:
    """List the source, select from it, and divide it into shards; DataError as `build_shards`."""
    source = select(card, read_source(card, Root(root, without=output), look_up), options.seed)
    return plan_of(card, source, output, options, {}, {})


def select(card: Card, source: Source, seed: int) -> Source:
    """Apply the card's selection: a long-tailed subset of train, then test and validation splits taken from it. Links
    to one image may come apart then, so splits are compared once more."""
    splits, classes, notes = dict(source.splits), len(source.classes), list(source.notes)
    if card.imbalance is not None:
        splits["train"] = make_long_tailed(splits["train"], classes, card.imbalance, seed)
    for name, option in (("test", "test_share"), ("val", "validation_share")):
        if (share := getattr(card, option)) is None:
            continue
        splits["train"], splits[name] = split_off(name, splits["train"], classes, share, seed)
        if not len(splits[name]):
            raise DataError(f"{option} {share} selects no image of these classes: raise it, or add images")
    selected = replace(source, splits=splits, notes=notes)
    if splits.keys() != source.splits.keys():
        notes += [line for line in overlaps(selected) if line not in notes]
    return selected


def plan_of(
    card: Card,
    source: Source,
    output: Storage,
    options: BuildOptions,
    first_shards: Mapping[str, int],
    first_keys: Mapping[str, int],
) -> BuildPlan:
    """Divide a source into shards; `first_shards` and `first_keys` give the first numbers per split.

    Raises:
        DataError: a tar of the source lies in ``output``.
    """
    _refuse_tars_in(output, source.tars)
    settings = WriteSettings(output, source.images, source.classes, card.resize, card.background_color, options.verify)
    shards = []
    for split, samples in source.splits.items():
        if not len(samples):
            continue
        key = first_keys.get(split, 0)
        seed = options.seed + first_shards.get(split, 0)  # images added later get another shuffle
        for number, rows in enumerate(plan_shards(samples, split, seed, options.shard_bytes)):
            shards.append((split, f"{split}-{first_shards.get(split, 0) + number:05d}", key, rows))
            key += len(rows)
    about = {
        "classes": source.classes,
        "resize": card.resize.model_dump() if card.resize else None,
        "background": card.background_color,
        "verify": options.verify,
        "shards": [(split, name, key) for split, name, key, _ in shards],
    }
    listing = _listing(source)
    digest = hashlib.sha256(json.dumps([about, listing]).encode())
    for samples in source.splits.values():
        for column in (samples.stamps, samples.places):
            digest.update(np.ascontiguousarray(column).data)
    for *_, rows in shards:
        digest.update(np.ascontiguousarray(rows).data)
    return BuildPlan(source, settings, shards, digest.hexdigest(), listing)


def _refuse_tars_in(output: Storage, tars: list[str]) -> None:
    """Raise DataError if one of the tars lies in `output`: it would be replaced, or removed as a stale shard, while
    images are still read from it."""
    if output.is_local:  # a tar and the folders on the way to it may be links
        own, of = os.path.realpath(output.local_directory), os.path.dirname
        held = [tar for tar in tars if own in (of(os.path.realpath(tar)), os.path.realpath(of(tar)))]
    else:
        held = [tar for tar in tars if tar == output.place(tar.partition("?")[0].rpartition("/")[2])]
    if held:
        raise DataError(
            f"{held[0]} is a tar of the source in the folder that shards are written to: give another --output, or "
            "move the tars out of it"
        )


def _listing(source: Source) -> str:
    digest = hashlib.sha256()
    for split, samples in source.splits.items():
        digest.update(split.encode())
        for column in (samples.labels, samples.sizes, samples.names.offsets):
            digest.update(np.ascontiguousarray(column).data)
        digest.update(samples.names.blob)
    return digest.hexdigest()
