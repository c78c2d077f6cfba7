"""Owns the source `idx`: IDX files of unsigned bytes, as MNIST and its descendants come; and images held as arrays."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from paco_ds.data.card import IdxCard
from paco_ds.data.pack.samples import Samples, SamplesBuilder
from paco_ds.data.pack.sources.source import Root, Source
from paco_ds.errors import DataError

_UINT8 = 0x08
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Arrays:
    """Images that have no encoded bytes, in files of many: stored as PNG.

    Attributes:
        load: a function at the top of a module, from the root and the name of a file to uint8 [N, H, W] or
            [N, H, W, 3] (RGB).
    """

    root: Root
    load: Callable[[Root, str], Pixels]

    def read(self, samples: Samples, row: int, room: memoryview) -> bytes:
        """One image as PNG; the file it is in is loaded once in each process."""
        file = samples.names[row].rpartition("#")[0]
        pixels = _loaded(self.load, self.root, file)[samples.places[row]]
        if pixels.ndim == 3:
            pixels = pixels[..., ::-1]  # OpenCV writes blue, green, red
        return bytes(cv2.imencode(".png", np.ascontiguousarray(pixels))[1])


@lru_cache(maxsize=8)
def _loaded(load: Callable[[Root, str], Pixels], root: Root, file: str) -> Pixels:
    return load(root, file)


def add_array(rows: SamplesBuilder, file: str, labels: npt.NDArray[np.integer], image_bytes: int) -> None:
    """A row for each image of a file of many."""
    for place, label in enumerate(labels.tolist()):
        rows.add(f"{file}#{place}", label, place=place, size=image_bytes)


def read(card: IdxCard, root: Root) -> Source:
    """List the images of IDX files; DataError if they are malformed or labels lie outside the card's classes."""
    splits = {}
    for name, files in card.splits.items():
        images, labels = load_idx(root, files.images), load_idx(root, files.labels)
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
            raise DataError(
                f"split {name}: {files.images} has shape {images.shape} and {files.labels} {labels.shape}; "
                "they must be [N, H, W] and [N]"
            )
        if len(labels) and labels.max() >= len(card.classes):
            raise DataError(
                f"split {name}: {files.labels} has label {labels.max()}, but the card names {len(card.classes)} classes"
            )
        rows = SamplesBuilder()
        add_array(rows, files.images, labels, images[0].nbytes if len(images) else 0)
        splits[name] = rows.build()
    return Source(card.classes, splits, Arrays(root, load_idx))


def read_idx(path: Path) -> Pixels:
    """As `load_idx`, of a local file."""
    return load_idx(Root(path.parent), path.name)


def load_idx(root: Root, file: str) -> Pixels:
    """The array of an IDX file of unsigned bytes, gzipped or not (format: http://yann.lecun.com/exdb/mnist).

    Raises:
        DataError: missing, damaged gzip, wrong magic number, or a length other than its header says.
    """
    path = root.storage.place(file)
    with root.open(file, "IDX file") as stream:
        raw = stream.read()
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)
        except (EOFError, OSError, zlib.error) as error:
            raise DataError(f"{path} is damaged gzip ({error}): copy it again") from error
    if len(raw) < 4 or raw[:3] != bytes((0, 0, _UINT8)):
        raise DataError(f"{path} is no IDX file of unsigned bytes: it starts with {raw[:4].hex(' ')!r}")
    dimensions = raw[3]
    start = 4 + 4 * dimensions
    shape = tuple(int(n) for n in np.frombuffer(raw[4:start].ljust(4 * dimensions, b"\0"), ">u4"))
    if len(raw) != start + int(np.prod(shape, dtype=np.int64)):
        raise DataError(f"{path} has {len(raw)} bytes, which do not hold the shape {shape} of its header")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)
