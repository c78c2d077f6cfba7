"""Owns the bytes of a shard: the index of a tar, reading one sample by its id, and finding damage.

A shard is a plain tar of ``KEY.jpg`` (or .png, .webp) and ``KEY.json`` members, two per sample, side by side.
Its index gives the stretch of bytes of each sample, so that any sample is one read, and a CRC-32 of that
stretch: webdataset by itself ends silently at a damaged header and does not see damaged data.
"""

import hashlib
import io
import json
import os
import tarfile
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np
import numpy.typing as npt

from paco_ds.data.manifest import Shard, Split, require_file
from paco_ds.errors import DataError
from paco_ds.files import sha256_file

IMAGE_ENDINGS = ("jpg", "png", "webp")

# One row per sample. offset: first byte of the sample's first tar header; size: its whole stretch, headers
# and padding included; image_offset: from the start of the stretch; crc32: of the whole stretch, so that a
# flipped header byte is seen as well.
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

# Each reading process keeps its own; the usual limit of a process is 1024 open files.
_MAX_OPEN_SHARDS = 128


class BadSample(Exception):  # noqa: N818 (an event of the stream, which replaces the sample; not an end)
    """One sample cannot be read: ``reason`` is a short slug, ``key`` and ``shard`` say where."""

    def __init__(self, reason: str, key: str, shard: str) -> None:
        super().__init__(reason, key, shard)
        self.reason, self.key, self.shard = reason, key, shard

    def __str__(self) -> str:
        return f"sample {self.key} of shard {self.shard}: {self.reason}"


@dataclass(frozen=True)
class RawSample:
    """One sample as stored: ``image`` holds encoded bytes."""

    key: str
    label: int
    shard: str
    image: bytes


def sample_key(split_name: str, sample_id: int) -> str:
    """The key of a sample follows from its id, so that a damaged one can be named."""
    return f"{split_name}-{sample_id:08d}"


def index_shard(path: str | Path) -> np.ndarray:
    """The index of the finished tar at ``path``: INDEX_DTYPE [samples], in the order of the file.

    It is read back from disk, so it describes what is there, not what was meant to be written.

    Raises:
        DataError: a member is not half of an image and JSON pair with one key.
    """
    with tarfile.open(path, "r:") as tar:
        members = tar.getmembers()
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
            label = json.loads(stretch[label_at : label_at + by_ending["json"].size])["label"]
            image_at = images[0].offset_data - start
            index[number] = (start, size, image_at, images[0].size, label, zlib.crc32(stretch))
    return index


def load_index(directory: Path, shard: Shard) -> np.ndarray:
    """INDEX_DTYPE [samples] of a shard; DataError if the file is not the one that the manifest lists."""
    path = directory / shard.index_file
    require_file(path, shard.index_bytes)
    raw = path.read_bytes()
    if hashlib.sha256(raw).hexdigest() != shard.index_sha256:
        raise DataError(f"{path} is damaged, its SHA-256 is not the manifest's: copy it again or rebuild it")
    index = np.load(io.BytesIO(raw), allow_pickle=False)
    if index.dtype != INDEX_DTYPE or index.shape != (shard.samples,):
        raise DataError(f"{path} is no index of {shard.samples} samples: rebuild the shards")
    return index


class ShardReader:
    """Reads samples of one split by id, 0 .. samples-1 in the order of its shards.

    Files are opened when first needed and stay open; pickling carries none of them, so a reader can be sent
    to worker processes. Not for use by several threads at once.
    """

    def __init__(self, directory: str | Path, split: Split) -> None:
        self.directory = Path(directory)
        self.split = split
        self.counts: tuple[int, ...] = tuple(shard.samples for shard in split.shards)
        self._starts = np.cumsum((0, *self.counts))
        self._indexes: dict[int, np.ndarray] = {}
        self._files: OrderedDict[int, BinaryIO] = OrderedDict()
        self._labels: npt.NDArray[np.int64] | None = None

    def __reduce__(self) -> tuple[type["ShardReader"], tuple[Path, Split]]:
        return ShardReader, (self.directory, self.split)

    def __len__(self) -> int:
        return self.split.samples

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close the open shards; the next read opens them again."""
        while self._files:
            self._files.popitem()[1].close()

    def read(self, sample_id: int) -> RawSample:
        """The sample of that id, its bytes proven by CRC-32.

        Raises:
            BadSample: ``crc_mismatch``, ``short_read`` or ``read_error``.
            DataError: the shard or its index is missing, cut or not the manifest's.
            IndexError: no such id.
        """
        if not 0 <= sample_id < self.split.samples:
            raise IndexError(f"split {self.split.name} has ids 0 to {self.split.samples - 1}, not {sample_id}")
        number = int(np.searchsorted(self._starts, sample_id, side="right")) - 1
        row = self._index(number)[sample_id - self._starts[number]]
        key, shard = sample_key(self.split.name, sample_id), self.split.shards[number].file
        size = int(row["size"])
        try:
            stretch = os.pread(self._file(number).fileno(), size, int(row["offset"]))
        except OSError as error:
            raise BadSample("read_error", key, shard) from error
        if len(stretch) != size:
            raise BadSample("short_read", key, shard)
        if zlib.crc32(stretch) != row["crc32"]:
            raise BadSample("crc_mismatch", key, shard)
        start = int(row["image_offset"])
        return RawSample(key, int(row["label"]), shard, stretch[start : start + int(row["image_size"])])

    def labels(self) -> npt.NDArray[np.int64]:
        """Labels by id, int64 [samples]; reads every index once."""
        if self._labels is None:
            parts = [self._index(number)["label"] for number in range(len(self.counts))]
            self._labels = np.concatenate(parts).astype(np.int64)
            self._labels.flags.writeable = False
        return self._labels

    def ids_of_class(self, label: int) -> npt.NDArray[np.int64]:
        """Ids of the samples of one class, ascending, int64."""
        return np.flatnonzero(self.labels() == label)

    def ids_of_shard(self, number: int) -> range:
        """Ids of the samples of one shard."""
        return range(int(self._starts[number]), int(self._starts[number + 1]))

    def _index(self, number: int) -> np.ndarray:
        if number not in self._indexes:
            self._indexes[number] = load_index(self.directory, self.split.shards[number])
        return self._indexes[number]

    def _file(self, number: int) -> BinaryIO:
        if number not in self._files:
            shard = self.split.shards[number]
            require_file(self.directory / shard.file, shard.bytes)
            if len(self._files) >= _MAX_OPEN_SHARDS:
                self._files.popitem(last=False)[1].close()
            self._files[number] = open(self.directory / shard.file, "rb", buffering=0)  # noqa: SIM115
        self._files.move_to_end(number)
        return self._files[number]


def check_shard(directory: Path, split: Split, number: int) -> list[str]:
    """All that is wrong with one shard, a line each: size, digests, counts, CRC-32 of every sample."""
    shard = split.shards[number]
    problems = []
    with ShardReader(directory, split) as reader:
        try:
            require_file(directory / shard.file, shard.bytes)
            if sha256_file(directory / shard.file) != shard.sha256:
                problems.append(f"shard {shard.file}: SHA-256 differs from the manifest's")
            for sample_id in reader.ids_of_shard(number):
                try:
                    reader.read(sample_id)
                except BadSample as bad:
                    problems.append(str(bad))
        except DataError as error:
            problems.append(f"shard {shard.file}: {error}")
    return problems
