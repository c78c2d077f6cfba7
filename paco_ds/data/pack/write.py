"""Assign samples to shards, and write one shard from its rows of the table."""

from __future__ import annotations

import hashlib
import io
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from paco_ds.data.manifest import Name, Shard, StrictModel, sample_key
from paco_ds.data.pack.card import Resize
from paco_ds.data.pack.image_bytes import (
    BadImage,
    Color,
    Encoded,
    ending_of,
    on_background,
    pillow_warnings,
    resized,
    verify,
)
from paco_ds.data.pack.samples import Samples
from paco_ds.data.pack.source import Images
from paco_ds.data.pack.tar import BLOCK, SampleTar
from paco_ds.data.storage import Storage
from paco_ds.errors import StorageError

_JSON = json.JSONEncoder(ensure_ascii=False)
_REPORT_EVERY = 32  # images

Report = Callable[[int, int, int], None]  # images, their source bytes and bad images since the last report


@dataclass(frozen=True)
class WriteSettings:
    """Settings shared by all shards of a build; sent to each process once."""

    output: Storage
    images: Images
    classes: tuple[str, ...]
    resize: Resize | None
    background: Color | None
    verify: bool


@dataclass(frozen=True)
class ShardJob:
    """One shard to write: these rows, with keys numbered from first_key."""

    name: str
    split: str
    first_key: int
    samples: Samples


class Written(StrictModel):
    """Result of a job: the shard, None without a usable image; images per class; reason, place and detail of each bad
    image; images of which Pillow warned, and of the first its place and the text."""

    name: Name
    shard: Shard | None
    counts: dict[int, int]
    bad: tuple[tuple[str, str, str], ...]
    warned: int = 0
    first_warning: tuple[str, str] | None = None


def plan_shards(samples: Samples, split: str, seed: int, shard_bytes: int) -> list[npt.NDArray[np.int64]]:
    """Shuffle the samples of a split by (seed, split) and divide them into shards of about equal bytes: rows of each.

    Only source sizes are used, so the plan is complete before any image is read; a shard exceeds ``shard_bytes``
    by less than one sample. Raw generator bits are sorted because numpy guarantees them, but not its shuffle, to be
    the same in later versions.
    """
    bits = np.random.PCG64([seed, zlib.crc32(split.encode())]).random_raw(len(samples))
    order = np.argsort(bits, kind="stable")
    # two headers, the image padded to whole blocks, and a block for the JSON
    ends = np.cumsum(3 * BLOCK + -(-samples.sizes[order] // BLOCK) * BLOCK)
    shards = -(-int(ends[-1]) // shard_bytes)
    begins = np.concatenate((np.zeros(1, np.int64), ends[:-1]))
    shard_of = begins * shards // int(ends[-1])
    cuts = np.flatnonzero(np.diff(shard_of)) + 1
    return np.split(order, cuts)


def write_shard(settings: WriteSettings, job: ShardJob, report: Report) -> Written:
    """Write one tar, its index and its `.tar.idx`. Each is renamed to its name when complete, the tar last.

    Raises:
        StorageError: the disk is full and the like.
        DataError: the source changed since it was listed.
    """
    samples = job.samples
    counts: dict[int, int] = {}
    bad: list[tuple[str, str, str]] = []
    warned: list[tuple[str, str]] = []
    progress = _Progress(report)
    sizes, labels = samples.sizes.tolist(), samples.labels.tolist()
    read = 0
    with _finished_shards_are_kept():
        try:
            with settings.output.write(f"{job.name}.tar") as file:
                tar = SampleTar(file)
                for row, (size, label, source) in enumerate(zip(sizes, labels, samples.names.texts(), strict=True)):
                    try:
                        with pillow_warnings() as heard:
                            image, ending = _image(settings, samples, row, tar.room(size + 1))
                    except BadImage as error:
                        bad.append((error.reason, source, error.detail))
                    else:
                        about = _about(label, settings.classes[label], source)
                        key = sample_key(job.split, job.first_key + row - len(bad))
                        tar.add(key, ending, image, about, label)
                        counts[label] = counts.get(label, 0) + 1
                        warned += [(source, text) for text in heard[:1]]
                    read += size
                    if row % _REPORT_EVERY == 0:
                        progress(row + 1, read, len(bad))
                tar.close()
                progress(len(samples), read, len(bad))
                if not counts:
                    raise _NothingLeft
                index = io.BytesIO()
                np.save(index, tar.index(), allow_pickle=False)
                beside = {f"{job.name}.index.npy": index.getvalue(), f"{job.name}.tar.idx": tar.energon_index()}
                for name, content in beside.items():
                    with settings.output.write(name) as other:
                        other.write(content)
        except _NothingLeft:
            return Written(name=job.name, shard=None, counts={}, bad=tuple(bad))
    shard = Shard(
        name=job.name,
        samples=len(samples) - len(bad),
        bytes=tar.bytes,
        sha256=tar.sha256,
        index_bytes=len(index.getvalue()),
        index_sha256=hashlib.sha256(index.getvalue()).hexdigest(),
        first_key=job.first_key,
    )
    return Written(
        name=job.name,
        shard=shard,
        counts=counts,
        bad=tuple(bad),
        warned=len(warned),
        first_warning=warned[0] if warned else None,
    )


class _NothingLeft(Exception):  # noqa: N818 (leaves the shard unwritten)
    """No image of a shard could be used."""


class _Progress:
    """Reports the increase of totals since the last report."""

    def __init__(self, report: Report) -> None:
        self._report, self._last = report, (0, 0, 0)

    def __call__(self, images: int, size: int, bad: int) -> None:
        a, b, c = self._last
        self._report(images - a, size - b, bad - c)
        self._last = (images, size, bad)


def _about(label: int, name: str, source: str) -> bytes:
    """The JSON of a sample; encoding the strings alone takes a quarter of the time of a dictionary."""
    return f'{{"label": {label}, "class": {_JSON.encode(name)}, "source": {_JSON.encode(source)}}}'.encode()


def _image(settings: WriteSettings, samples: Samples, row: int, room: memoryview) -> tuple[Encoded, str]:
    """The bytes to store and the ending of their member."""
    data = settings.images.read(samples, row, room)
    ending = ending_of(data)
    if settings.verify:
        verify(data, ending)
    if settings.background is not None:
        data, ending = on_background(data, ending, settings.background)
    if settings.resize is not None:
        return resized(data, ending, settings.resize.short, settings.resize.quality)
    return data, ending


@contextmanager
def _finished_shards_are_kept() -> Iterator[None]:
    """Say after an error of storage that the build resumes."""
    try:
        yield
    except StorageError as error:
        raise StorageError(f"{error}. Then give the same command again: finished shards are kept") from error
