"""Images that are in two splits, or in shards already: what a model is measured on must not be among what it learns
from, and what it learns from should count once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import combinations

import numpy as np
import numpy.typing as npt

from paco_ds.data.manifest import Manifest
from paco_ds.data.pack.image_bytes import BadImage, Encoded
from paco_ds.data.pack.root import Root
from paco_ds.data.pack.samples import MISSING, Names, Samples
from paco_ds.data.pack.source import Files, Images, Source, some
from paco_ds.data.shard import BadSample, ShardReader, load_index

_READ_TOGETHER = 256  # samples

Digests = npt.NDArray[np.uint64]  # of the bytes of images


def overlaps(source: Source) -> list[str]:
    """A line for each two splits with the same files, by path and, on a local disk, by device and inode (links), be
    they images or files of many images; and for each two with images of the same groups."""
    lines = []
    for (first, a), (second, b) in combinations(source.splits.items(), 2):
        rows, root = _same_names(a.names, b.names), source.images.root
        if root.storage.is_local:
            of_one = (
                _same_files(root, a, b) if isinstance(source.images, Files) else _in_same_files(source.images, a, b)
            )
            rows = np.union1d(rows, of_one)
        if len(rows):
            names = some(b.names.text(row) for row in rows.tolist())
            lines.append(f"WARNING: {len(rows):,} of {len(b):,} images of {second} are also in {first}: {names}")
        rows = np.flatnonzero(np.isin(b.groups, a.groups))
        if len(rows):
            names = some(b.names.text(row) for row in rows.tolist())
            lines.append(f"WARNING: {len(rows):,} of {len(b):,} images of {second} are of groups of {first}: {names}")
    return lines


def overlaps_with_shards(source: Source, manifest: Manifest) -> list[str]:
    """A line for each split of a source and each split of shards that hold the same images, byte for byte.

    By the indexes, only what has the same label and size is read. So images that the shards hold in another class, or
    otherwise than the source does (resized, or as the PNG of an array), are not found.
    """
    lines = []
    for second, samples in source.splits.items():
        for first, split in manifest.splits.items():
            rows = _rows_in_shards(source.images, samples, ShardReader(manifest.storage, split))
            if len(rows):
                names = some(samples.names.text(row) for row in rows.tolist())
                lines.append(
                    f"WARNING: {len(rows):,} of {len(samples):,} images of {second} are in {first} of "
                    f"{manifest.storage.url} already: {names}"
                )
    return lines


def _rows_in_shards(images: Images, samples: Samples, reader: ShardReader) -> npt.NDArray[np.int64]:
    """Rows whose bytes are those of a sample of the shards with the same label."""
    asked = samples.labels.astype(np.int64) << 32 | samples.sizes

    def alike(number: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """(ids of a shard's samples with a label and size that is asked for, these two as one number)."""
        index = load_index(reader.storage, reader.split.shards[number])
        stored = index["label"].astype(np.int64) << 32 | index["image_size"]
        found = np.isin(stored, asked)
        return reader.ids_of_shard(number).start + np.flatnonzero(found), stored[found]

    with ThreadPoolExecutor(1 if reader.storage.is_local else 16) as pool:
        ids, stored = map(np.concatenate, zip(*pool.map(alike, range(len(reader.counts))), strict=True))
    rows = np.flatnonzero(np.isin(asked, stored))
    if not len(rows):
        return rows
    with reader:
        known = np.fromiter(_digests_of_shards(reader, ids), np.uint64)
    return rows[np.isin(np.fromiter(_digests(images, samples.take(rows)), np.uint64, len(rows)), known)]


def _digests_of_shards(reader: ShardReader, ids: npt.NDArray[np.int64]) -> Iterator[int]:
    for first in range(0, len(ids), _READ_TOGETHER):
        for stored in reader.read_window(ids[first : first + _READ_TOGETHER].tolist()):
            with suppress(BadSample):  # `check` names damage
                yield _digest(stored.sample().image)


def _digests(images: Images, samples: Samples) -> Iterator[int]:
    for row, size in enumerate(samples.sizes.tolist()):
        try:
            yield _digest(images.read(samples, row, memoryview(bytearray(size + 1))))
        except BadImage:  # the build names it
            yield 0


def _digest(image: Encoded) -> int:
    return int.from_bytes(hashlib.blake2b(image, digest_size=8).digest())


def _same_names(a: Names, b: Names) -> npt.NDArray[np.int64]:
    """Rows of b whose name is one of a."""
    hashes = np.fromiter(map(hash, a.raws()), np.int64, len(a)), np.fromiter(map(hash, b.raws()), np.int64, len(b))
    suspects = np.flatnonzero(np.isin(hashes[1], hashes[0]))  # two names may share a hash
    if not len(suspects):
        return suspects
    known = {a.raw(row) for row in np.flatnonzero(np.isin(hashes[0], hashes[1])).tolist()}
    return np.array([row for row in suspects.tolist() if b.raw(row) in known], np.int64)


def _same_files(root: Root, a: Samples, b: Samples) -> npt.NDArray[np.int64]:
    """Rows of b that are a file of a by another name. Only files of the same size and time are looked at again."""
    about = [np.stack((s.sizes, s.stamps), 1).view("i8,i8").ravel() for s in (a, b)]
    rows = [np.flatnonzero(np.isin(mine, other)) for mine, other in zip(about, reversed(about), strict=True)]
    known = {identity for _, identity in _identities(root, a, rows[0])}
    return np.array([row for row, identity in _identities(root, b, rows[1]) if identity in known], np.int64)


def _in_same_files(images: Images, a: Samples, b: Samples) -> npt.NDArray[np.int64]:
    """Rows of b in a file of many images, a tar or an array, that is one of a's by another name."""

    def identities(samples: Samples) -> dict[str, tuple[int, int]]:
        return {f: _identity(os.stat(images.root.path / f)) for f in set(map(images.file_of, samples.names))}

    elsewhere = {identity: file for file, identity in identities(a).items()}
    linked = {file for file, identity in identities(b).items() if elsewhere.get(identity, file) != file}
    rows = (row for row, name in enumerate(b.names) if images.file_of(name) in linked) if linked else ()
    return np.fromiter(rows, np.int64)


def _identity(file: os.stat_result) -> tuple[int, int]:
    return file.st_dev, file.st_ino


def _identities(root: Root, samples: Samples, rows: npt.NDArray[np.int64]) -> Iterator[tuple[int, tuple[int, int]]]:
    for row in rows.tolist():
        if samples.sizes[row] != MISSING:
            yield row, _identity(os.stat(root.path / samples.names[row]))
