"""Shards: the index of a tar, reading a sample by its id, and detecting damage.

A shard is a plain tar of ``KEY.jpg`` (or another of `IMAGE_ENDINGS`) and ``KEY.json`` members, two adjacent ones per
sample. Its index has the byte range of each sample, so that a sample is one read, and a CRC-32 of that range:
webdataset alone stops silently at a damaged header and does not detect damaged data.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np
import numpy.typing as npt

from paco_ds.config.parse import one_line, parse_json
from paco_ds.data.manifest import Shard, Split, require_size, sample_key
from paco_ds.data.storage import MissingFile, Storage, as_storage
from paco_ds.errors import DataError
from paco_ds.files import sha256_file

IMAGE_ENDINGS = ("jpg", "png", "webp", "gif", "bmp")

# One row per sample. offset: first byte of the sample's first tar header; size: of its byte range, headers and padding
# included; image_offset: from the start of the range; crc32: of the whole range, so that damaged headers are detected.
INDEX_DTYPE = np.dtype(
    [
        ("offset", "<u8"),
        ("size", "<u4"),
        ("image_offset", "<u4"),
        ("image_size", "<u4"),
        ("label", "<u4"),
        ("crc32", "<u4"),
    ]
)

# per process; the usual limit of a process is 1024 open files
MAX_OPEN_SHARDS = 128

GAP = 256 * 1024  # bytes between two samples that cost less to read than another request
_CHECKED_TOGETHER = 256  # samples
_PIECE = 16 * 2**20  # bytes
_DAMAGE = {"crc_mismatch", "short_read", "read_error"}  # of a shard; other reasons are of the images in it


class BadSample(Exception):  # noqa: N818 (the stream replaces the sample; it does not end)
    """A sample that cannot be read: ``reason`` is a short slug, ``key`` and ``shard`` identify it."""

    def __init__(self, reason: str, key: str, shard: str) -> None:
        super().__init__(reason, key, shard)
        self.reason, self.key, self.shard = reason, key, shard

    def __str__(self) -> str:
        return f"sample {self.key} of shard {self.shard}: {self.reason}"


def remedy_of(reasons: Collection[str], shards: str) -> str:
    """What helps against samples that are bad for these reasons, in sentences.

    Args:
        shards: where the shards are.
    """
    reasons, remedies = {*reasons}, []
    if reasons & _DAMAGE:
        remedies.append(f"Copy or build the shards again: paco-build-shards check {shards} names all damage.")
    if "too_many_pixels" in reasons:
        remedies.append("Raise data.max_pixels, or build with --resize-short.")
    if reasons - _DAMAGE - {"too_many_pixels"}:
        remedies.append(
            "The images themselves are damaged: build with --verify, which names all such, and repair them or leave "
            "them out (--max-bad)."
        )
    return " ".join(remedies)


@dataclass(frozen=True)
class RawSample:
    """One sample; ``image`` holds the encoded bytes."""

    key: str
    label: int
    shard: str
    image: bytes


@dataclass(frozen=True)
class Stored:
    """The bytes of a sample as read, not yet verified; `stretch` is None after a read error."""

    sample_id: int
    key: str
    shard: str
    row: np.void
    stretch: bytes | None

    def sample(self) -> RawSample:
        """The sample, its bytes verified by CRC-32; BadSample ``crc_mismatch``, ``short_read`` or ``read_error``."""
        row, key = self.row, self.key
        if self.stretch is None:
            raise BadSample("read_error", key, self.shard)
        if len(self.stretch) != row["size"]:
            raise BadSample("short_read", key, self.shard)
        if zlib.crc32(self.stretch) != row["crc32"]:
            raise BadSample("crc_mismatch", key, self.shard)
        start = int(row["image_offset"])
        image = self.stretch[start : start + int(row["image_size"])]
        return RawSample(key, int(row["label"]), self.shard, image)


def index_shard(path: str | Path) -> np.ndarray:
    """The index of the finished tar at ``path``: INDEX_DTYPE [samples], in the order of the file.

    It is read back from disk, so it describes the file as it is.

    Raises:
        DataError: a member is not half of an image and JSON pair with one key.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            members = tar.getmembers()
    except (tarfile.TarError, ValueError) as error:
        raise DataError(f"{path} is not a whole tar: {one_line(error)}") from error
    if len(members) % 2:
        raise DataError(f"{path} has {len(members)} members; a shard has an image and a JSON for each sample")
    index = np.zeros(len(members) // 2, INDEX_DTYPE)
    with open(path, "rb") as file:
        for number, pair in enumerate(zip(members[::2], members[1::2], strict=True)):
            by_ending = {member.name.rpartition(".")[2]: member for member in pair}
            images = [member for ending, member in by_ending.items() if ending in IMAGE_ENDINGS]
            if len({member.name.partition(".")[0] for member in pair}) != 1 or len(images) != 1:
                raise DataError(f"{path}: {pair[0].name}, {pair[1].name} are not one sample's image and JSON")
            start, last = pair[0].offset, pair[1]
            size = last.offset_data + -(-last.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE - start
            file.seek(start)
            stretch = file.read(size)
            label_at = by_ending["json"].offset_data - start
            about = parse_json(
                stretch[label_at : label_at + by_ending["json"].size], f"{path}: {pair[0].name}", DataError
            )
            if not isinstance(about, dict) or type(about.get("label")) is not int or not 0 <= about["label"] < 2**32:
                raise DataError(f"{path}: the JSON of {pair[0].name} has no label")
            label = about["label"]
            image_at = images[0].offset_data - start
            index[number] = (start, size, image_at, images[0].size, label, zlib.crc32(stretch))
    return index


# numpy parses an array's header as a Python literal, which may fail in Python 3.11 ("AST constructor recursion depth
# mismatch") if several threads do so at the same time, as for the indexes of many shards
_PARSING = threading.Lock()


def load_index(place: Storage | str | Path, shard: Shard) -> np.ndarray:
    """INDEX_DTYPE [samples] of a shard; DataError if the file does not match the manifest."""
    storage = as_storage(place)
    path = storage.place(shard.index_file)
    try:
        raw = storage.read(shard.index_file, shard.index_bytes)
    except MissingFile:
        require_size(storage, shard.index_file, shard.index_bytes, None)
        raise
    require_size(storage, shard.index_file, shard.index_bytes, len(raw))
    if hashlib.sha256(raw).hexdigest() != shard.index_sha256:
        raise DataError(f"{path} is damaged, its SHA-256 differs from the manifest's: copy it again or rebuild it")
    if len(raw) < shard.samples * INDEX_DTYPE.itemsize:
        raise DataError(f"{path} is not an index of {shard.samples} samples: rebuild the shards")
    file = io.BytesIO(raw)
    try:
        with _PARSING:
            version = np.lib.format.read_magic(file)
            about = np.lib.format.read_array_header_1_0(file) if version == (1, 0) else None
            file.seek(0)
            if about != ((shard.samples,), False, INDEX_DTYPE):  # before memory is allocated for what it asks
                raise DataError(f"{path} is not an index of {shard.samples} samples: rebuild the shards")
            index = np.load(file, allow_pickle=False)
    except DataError:
        raise
    except Exception as error:  # numpy evaluates the header, in which a flipped byte raises nearly anything
        raise DataError(f"{path} is not an index ({one_line(error)}): rebuild the shards") from error
    if not _within_shard(index, shard):
        raise DataError(f"{path} has ranges outside {shard.file}: rebuild the shards")
    return index


def _within_shard(index: np.ndarray, shard: Shard) -> bool:
    """Whether the ranges are in order and inside the tar, and images are inside their ranges."""
    start, size = index["offset"].astype(np.int64), index["size"].astype(np.int64)
    image_end = index["image_offset"].astype(np.int64) + index["image_size"]
    return bool((start[1:] >= (start + size)[:-1]).all() and start[-1] + size[-1] <= shard.bytes) and bool(
        (image_end <= size).all()
    )


class ShardReader:
    """Reads samples of one split by id, 0 .. samples-1 in the order of its shards.

    Indexes are loaded and files opened on first use, and a limited number is kept. They are not pickled, so a reader
    can be sent to worker processes. Thread-safe.

    Args:
        place: the directory of the shards: a storage, path or URL.
        keep: number of most recently used indexes kept in memory.
    """

    def __init__(self, place: Storage | str | Path, split: Split, *, keep: int = 256) -> None:
        self.storage, self.split, self.keep = as_storage(place), split, keep
        self.counts: tuple[int, ...] = tuple(shard.samples for shard in split.shards)
        self._starts = np.cumsum((0, *self.counts))
        self._indexes: OrderedDict[int, np.ndarray] = OrderedDict()
        self._files: OrderedDict[int, _File] = OrderedDict()
        self._labels: npt.NDArray[np.int32] | None = None
        self._lock = threading.Lock()  # of the two dictionaries
        self._loading = [threading.Lock() for _ in range(16)]  # so that no two threads load one index

    def __reduce__(self) -> tuple[Callable[..., ShardReader], tuple[Storage, Split, int]]:
        return _restore_reader, (self.storage, self.split, self.keep)

    def __len__(self) -> int:
        return self.split.samples

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the open shards; the next read opens them again."""
        with self._lock:
            self._files.clear()

    def read(self, sample_id: int) -> RawSample:
        """The sample of that id, its bytes verified by CRC-32.

        Raises:
            BadSample: ``crc_mismatch``, ``short_read`` or ``read_error``.
            DataError: the shard or its index is missing, truncated or not the manifest's, or remote storage fails.
            IndexError: no such id.
        """
        return next(self.read_window([sample_id])).sample()

    def read_window(self, sample_ids: Sequence[int], gap: int = GAP) -> Iterator[Stored]:
        """The bytes of ascending ids, in as few range reads as possible: one for consecutive ids.

        Gaps of at most `gap` bytes are read too; no range crosses from a shard to the next.

        Raises:
            DataError, IndexError: as `read`. `Stored.sample` raises for damage of single samples.
        """
        ids = np.asarray(sample_ids, dtype=np.int64)
        for first_or_last in ids[[0, -1]] if len(ids) else ():
            if not 0 <= first_or_last < self.split.samples:
                raise IndexError(f"split {self.split.name} has ids 0 to {self.split.samples - 1}, not {first_or_last}")
        shards = np.searchsorted(self._starts, ids, side="right") - 1
        for number in np.unique(shards):
            of_shard = ids[shards == number]
            rows = self._index(int(number))[of_shard - self._starts[number]]
            ends = (rows["offset"] + rows["size"]).astype(np.int64)
            cuts = np.flatnonzero(rows["offset"][1:].astype(np.int64) - ends[:-1] > gap) + 1
            for part_ids, part in zip(np.split(of_shard, cuts), np.split(rows, cuts), strict=True):
                yield from self._read_stretch(int(number), part_ids, part)

    def labels(self) -> npt.NDArray[np.int32]:
        """Labels by id, int32 [samples]; reads every index once."""
        if self._labels is None:
            with ThreadPoolExecutor(1 if self.storage.is_local else 16) as pool:
                parts = list(pool.map(self._labels_of_shard, range(len(self.counts))))
            self._labels = np.concatenate(parts)
            self._labels.flags.writeable = False
        return self._labels

    def ids_of_class(self, label: int) -> npt.NDArray[np.int64]:
        """Ids of the samples of one class, ascending, int64."""
        return np.flatnonzero(self.labels() == label)

    def ids_of_shard(self, number: int) -> range:
        """Ids of the samples of one shard."""
        return range(int(self._starts[number]), int(self._starts[number + 1]))

    def _labels_of_shard(self, number: int) -> npt.NDArray[np.int32]:
        return self._load(number)["label"].astype(np.int32)

    def _load(self, number: int) -> np.ndarray:
        shard, classes = self.split.shards[number], len(self.split.class_counts)
        index = load_index(self.storage, shard)
        if index["label"].max() >= classes:
            raise DataError(
                f"{self.storage.place(shard.index_file)} has label {index['label'].max()}, but the manifest has only "
                f"{classes} classes: was it edited by hand? Restore it, or rebuild the shards"
            )
        return index

    def _read_stretch(self, number: int, ids: np.ndarray, rows: np.ndarray) -> Iterator[Stored]:
        """One range read; after an error of a local disk sample by sample, so that only affected samples are bad."""
        shard, start = self.split.shards[number].file, int(rows["offset"][0])
        end = int(rows["offset"][-1]) + int(rows["size"][-1])
        try:
            stretch = memoryview(self._read_bytes(number, start, end - start))
        except OSError:
            if len(ids) == 1:
                yield Stored(int(ids[0]), self._key(number, int(ids[0])), shard, rows[0], None)
                return
            for i in range(len(ids)):
                yield from self._read_stretch(number, ids[i : i + 1], rows[i : i + 1])
            return
        for sample_id, row in zip(ids, rows, strict=True):
            first = int(row["offset"]) - start
            # a copy, so that a window's memory is freed sample by sample
            sample = bytes(stretch[first : first + int(row["size"])])
            yield Stored(int(sample_id), self._key(number, int(sample_id)), shard, row, sample)

    def key_of(self, sample_id: int) -> str:
        """The key of a sample, by which messages name it; nothing is read."""
        return self._key(int(np.searchsorted(self._starts, sample_id, side="right")) - 1, sample_id)

    def _key(self, number: int, sample_id: int) -> str:
        """The key of a sample: computed from its id, unless bad images were left out of the build."""
        first = self.split.shards[number].first_key
        return sample_key(
            self.split.name, sample_id if first is None else first + sample_id - int(self._starts[number])
        )

    def _read_bytes(self, number: int, start: int, size: int) -> bytes:
        if self.storage.is_local or self.storage.cache is not None:
            file = self._file(number)  # the reference keeps it open
            data = os.pread(file.fileno, size, start)
            # a short read: the file has shrunk, or the system returns less at a time, as of 2 GiB and more
            while len(data) < size and (more := os.pread(file.fileno, size - len(data), start + len(data))):
                data += more
            return data
        self._file(number)
        return self.storage.read_range(self.split.shards[number].file, start, size)

    def _index(self, number: int) -> np.ndarray:
        with self._loading[number % len(self._loading)]:
            with self._lock:
                if number in self._indexes:
                    self._indexes.move_to_end(number)
                    return self._indexes[number]
            index = self._load(number)
            with self._lock:
                self._indexes[number] = index
                while len(self._indexes) > self.keep:
                    self._indexes.popitem(last=False)
            return index

    def _file(self, number: int) -> _File:
        """The open shard, checked to have the manifest's size."""
        with self._loading[number % len(self._loading)]:
            with self._lock:
                if number in self._files:
                    self._files.move_to_end(number)
                    return self._files[number]
            file = self._open(self.split.shards[number])
            with self._lock:
                self._files[number] = file
                while len(self._files) > MAX_OPEN_SHARDS:
                    self._files.popitem(last=False)  # closed once no thread reads it
            return file

    def _open(self, shard: Shard) -> _File:
        try:
            if self.storage.is_local or self.storage.cache is not None:
                file = _File(self.storage.open_whole(shard.file, shard.bytes))
                require_size(self.storage, shard.file, shard.bytes, os.fstat(file.fileno).st_size)
                return file
            require_size(self.storage, shard.file, shard.bytes, self.storage.size(shard.file))
            return _File(None)
        except MissingFile:
            require_size(self.storage, shard.file, shard.bytes, None)
            raise


class _File:
    """An open file that closes with its last reference; for remote ranges it only records that the size was checked."""

    def __init__(self, file: BinaryIO | None) -> None:
        self._file = file

    def __del__(self) -> None:
        if self._file is not None:
            self._file.close()

    @property
    def fileno(self) -> int:
        assert self._file is not None
        return self._file.fileno()


def _restore_reader(storage: Storage, split: Split, keep: int) -> ShardReader:
    return ShardReader(storage, split, keep=keep)


def check_shard(place: Storage | str | Path, split: Split, number: int) -> list[str]:
    """All damage of one shard, one line each: size, digests, counts, CRC-32 of every sample."""
    shard = split.shards[number]
    problems = []
    with ShardReader(place, split) as reader:
        try:
            ids = reader.ids_of_shard(number)
            bad = []
            for first in range(ids.start, ids.stop, _CHECKED_TOGETHER):
                for stored in reader.read_window(range(first, min(first + _CHECKED_TOGETHER, ids.stop))):
                    try:
                        stored.sample()
                    except BadSample as error:
                        bad.append(str(error))
            if sha256_stored(reader.storage, shard.file, shard.bytes) != shard.sha256:
                problems.append(f"shard {shard.file}: SHA-256 differs from the manifest's")
            problems += bad
        except DataError as error:
            problems.append(f"shard {shard.file}: {error}")
    return problems


def sha256_stored(storage: Storage, name: str, size: int) -> str:
    """SHA-256 of a file of a storage, in hexadecimal."""
    if storage.is_local:
        return sha256_file(storage.local_directory / name)
    digest = hashlib.sha256()
    for start in range(0, size, _PIECE):
        digest.update(storage.read_range(name, start, min(_PIECE, size - start)))
    return digest.hexdigest()
