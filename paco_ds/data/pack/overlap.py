"""Images that are in two splits: what a model is measured on must not be among what it learns from."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import combinations

import numpy as np
import numpy.typing as npt

from paco_ds.data.pack.root import Root
from paco_ds.data.pack.samples import MISSING, Names, Samples
from paco_ds.data.pack.source import Files, Source, some


def overlaps(source: Source) -> list[str]:
    """A line for each two splits with the same files, by path and, on a local disk, by device and inode (links); and
    for each two with images of the same groups."""
    lines = []
    for (first, a), (second, b) in combinations(source.splits.items(), 2):
        rows = _same_names(a.names, b.names)
        if isinstance(source.images, Files) and source.images.root.storage.is_local:
            rows = np.union1d(rows, _same_files(source.images.root, a, b))
        if len(rows):
            names = some(b.names.text(row) for row in rows.tolist())
            lines.append(f"WARNING: {len(rows):,} of {len(b):,} images of {second} are also in {first}: {names}")
        rows = np.flatnonzero(np.isin(b.groups, a.groups))
        if len(rows):
            names = some(b.names.text(row) for row in rows.tolist())
            lines.append(f"WARNING: {len(rows):,} of {len(b):,} images of {second} are of groups of {first}: {names}")
    return lines


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


def _identities(root: Root, samples: Samples, rows: npt.NDArray[np.int64]) -> Iterator[tuple[int, tuple[int, int]]]:
    for row in rows.tolist():
        if samples.sizes[row] != MISSING:
            file = os.stat(root.path / samples.names[row])
            yield row, (file.st_dev, file.st_ino)
