"""Pictures that are in shards more than once: the same bytes, or nearly the same picture by its perceptual hash."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt

from paco_ds.command import Screen
from paco_ds.data.exif import upright
from paco_ds.data.manifest import Manifest, Split
from paco_ds.data.pack.check import ShardOf, key_and_about, over_shards
from paco_ds.data.pack.image_bytes import BadImage, eight_bits, ending_of, opened
from paco_ds.data.pack.source import some
from paco_ds.data.pack.workers import Report
from paco_ds.data.shard import BadSample, ShardReader
from paco_ds.data.storage import Storage
from paco_ds.errors import DataError, UserError

NEAR = 4  # of the 64 bits of the hash may differ
# NEAR + 1 parts of the hash: where NEAR bits differ, one part at least is equal
_PARTS = tuple(
    np.uint64(((1 << width) - 1) << start) for start, width in ((0, 13), (13, 13), (26, 13), (39, 13), (52, 12))
)
_PLAIN = 8  # a hash with fewer bits set, or not set, is of a picture of one colour or nearly so, and says nothing
_MOST_COMPARED = 1 << 22  # hashes compared at a time

Hash = npt.NDArray[np.uint64]  # [N]
Hashes = npt.NDArray[np.uint64]  # [N, 2]: of the bytes, of the picture


@dataclass(frozen=True)
class Pairs:
    """Pictures of one split that are in another, or again in the same.

    Attributes:
        first, second: names of the splits.
        same: ids (in first, in second) of pictures with the same bytes, int64 [P, 2].
        near: ids of other pictures that look nearly the same, int64 [Q, 2].
    """

    first: str
    second: str
    same: npt.NDArray[np.int64]
    near: npt.NDArray[np.int64]


def find_duplicates(manifest: Manifest, *, workers: int = 1, console: Screen | None = None) -> list[Pairs]:
    """Each picture of a split that is in an earlier split, or earlier in its own, with the first that it is equal to.

    Raises:
        UserError: ImageHash is not installed.
        DataError: a shard is damaged.
    """
    try:
        import imagehash  # noqa: F401
    except ImportError:
        raise UserError("--duplicates needs the package ImageHash: pip install 'paco_ds[duplicates]'") from None
    found = over_shards(manifest, _hash_shard, "comparing", workers, console)
    hashes = {
        name: np.concatenate([each for (split, _), each in found.items() if split == name]) for name in manifest.splits
    }
    pairs = [Pairs(name, name, *_within(each)) for name, each in hashes.items()]
    return pairs + [Pairs(a, b, *_between(hashes[a], hashes[b])) for a, b in combinations(hashes, 2)]


def describe(manifest: Manifest, pairs: Pairs) -> list[str]:
    """Lines on pairs, with the names that the pictures had where they came from; none where there are no pairs."""
    lines = []
    readers = [ShardReader(manifest.storage, manifest.split(name)) for name in (pairs.first, pairs.second)]
    labels = [reader.labels() for reader in readers]
    for ids, how in ((pairs.same, "the same"), (pairs.near, "nearly the same")):
        if not len(ids):
            continue
        names = some(
            " = ".join(_source(reader, row) for reader, row in zip(readers, pair, strict=True)) for pair in ids
        )
        where = f"again in {pairs.first}" if pairs.first == pairs.second else f"also in {pairs.first}"
        other = int((labels[0][ids[:, 0]] != labels[1][ids[:, 1]]).sum())
        classes = f", {other:,} of them in another class" if other else ""
        of = f"{len(ids):,} of {len(readers[1]):,} pictures of {pairs.second}"
        lines.append(f"{of} are {where}, {how}{classes}: {names}")
    return lines


def _source(reader: ShardReader, sample: int) -> str:
    """The name of a picture where it came from, or its key in shards of others."""
    (stored,) = reader.read_window([int(sample)])
    return str(key_and_about(stored)[1].get("source", stored.key))


def _hash_shard(settings: tuple[Storage, dict[str, Split]], job: ShardOf, report: Report) -> tuple[ShardOf, Hashes]:
    storage, splits = settings
    split, number = job
    reader = ShardReader(storage, splits[split])
    ids = reader.ids_of_shard(number)
    hashes = np.zeros((len(ids), 2), np.uint64)
    for row, sample in enumerate(ids):
        try:
            image = reader.read(sample).image
        except BadSample as error:
            raise DataError(
                f"{error}: repair the shards first (check without --duplicates names all damage)"
            ) from error
        hashes[row] = int.from_bytes(hashlib.blake2b(image, digest_size=8).digest()), picture_hash(image)
        report(1, len(image), 0)
    return job, hashes


def picture_hash(image: bytes) -> int:
    """64 bits of the lowest frequencies of a picture, upright and in grey (`imagehash.phash`); 0 where it cannot be
    decoded or has one colour only, so that it is near to nothing."""
    import imagehash

    try:
        picture = opened(image, ending_of(image))
        with warnings.catch_warnings(action="ignore"):
            picture.draft("L", (64, 64))  # a JPEG is decoded at an eighth of its size
            bits = imagehash.phash(eight_bits(upright(picture)).convert("L")).hash.ravel()
    except (BadImage, OSError, ValueError, SyntaxError):
        return 0
    plain = min(bits.sum(), (~bits).sum()) < _PLAIN
    return 0 if plain else int.from_bytes(np.packbits(bits).tobytes())


def _between(a: Hashes, b: Hashes) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(same, near) pairs: each row of b with the first row of a."""
    same = _equal(a[:, 0], b[:, 0])
    near = _near(a[:, 1], b[:, 1], strictly_before=False)
    return same, near[~np.isin(near[:, 1], same[:, 1])]


def _within(a: Hashes) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(same, near) pairs of a row and the first earlier one."""
    _, first, inverse = np.unique(a[:, 0], return_index=True, return_inverse=True)
    rows = np.flatnonzero(first[inverse] != np.arange(len(a)))
    same = np.stack((first[inverse][rows], rows), 1).astype(np.int64)
    near = _near(a[:, 1], a[:, 1], strictly_before=True)
    return same, near[~np.isin(near[:, 1], same[:, 1])]


def _equal(a: Hash, b: Hash) -> npt.NDArray[np.int64]:
    values, first = np.unique(a, return_index=True)
    place = np.searchsorted(values, b).clip(max=max(len(values) - 1, 0))
    rows = np.flatnonzero(values[place] == b) if len(values) else np.zeros(0, np.int64)
    return np.stack((first[place[rows]] if len(values) else rows, rows), 1).astype(np.int64)


def _near(a: Hash, b: Hash, *, strictly_before: bool) -> npt.NDArray[np.int64]:
    """Rows of b within NEAR bits of a row of a, each with the first such row of a; hashes of 0 are near to nothing."""
    best = np.full(len(b), len(a), np.int64)
    known, asked = np.flatnonzero(a), np.flatnonzero(b)
    for part in _PARTS:
        for rows_a, rows_b in _alike(known, a[known] & part, asked, b[asked] & part):
            at_a_time = max(1, _MOST_COMPARED // len(rows_a))
            for some_b in np.split(rows_b, range(at_a_time, len(rows_b), at_a_time)):
                close = np.bitwise_count(a[rows_a, None] ^ b[some_b]) <= NEAR
                if strictly_before:
                    close &= rows_a[:, None] < some_b
                first = np.where(close.any(0), rows_a[close.argmax(0)], len(a))  # rows of a ascend
                best[some_b] = np.minimum(best[some_b], first)
    rows = np.flatnonzero(best < len(a))
    return np.stack((best[rows], rows), 1)


def _alike(
    rows_a: npt.NDArray[np.int64], a: Hash, rows_b: npt.NDArray[np.int64], b: Hash
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """The rows that have a value in a, ascending, and those that have it in b, for each value that both have."""
    order_a, order_b = np.argsort(a, kind="stable"), np.argsort(b, kind="stable")
    both = np.intersect1d(a, b)
    bounds = [
        (np.searchsorted(each, both, "left").tolist(), np.searchsorted(each, both, "right").tolist())
        for each in (a[order_a], b[order_b])
    ]
    for from_a, to_a, from_b, to_b in zip(*bounds[0], *bounds[1], strict=True):
        yield rows_a[order_a[from_a:to_a]], rows_b[order_b[from_b:to_b]]
