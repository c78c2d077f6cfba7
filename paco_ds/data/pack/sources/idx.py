"""The source `idx`: IDX files of unsigned bytes, the format of MNIST and its descendants."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, StrictStr

from paco_ds.data.manifest import Name, StrictModel
from paco_ds.data.pack.card import CLASSES_FILE, Card, Option
from paco_ds.data.pack.class_list import class_names
from paco_ds.data.pack.root import Root
from paco_ds.data.pack.samples import SamplesBuilder
from paco_ds.data.pack.source import Arrays, Pixels, Source, add_array
from paco_ds.errors import DataError

_UINT8 = 0x08


class IdxSplit(StrictModel):
    """A pair of IDX files, gzipped or not: images uint8 [N, H, W], labels uint8 [N]."""

    images: str
    labels: str


class IdxCard(Card):
    """Images in IDX files; they have no encoded bytes, so they are stored as ``encoding``."""

    page: ClassVar[str] = "IMAGES,LABELS"
    options: ClassVar[dict[str, Option]] = {"classes": CLASSES_FILE}

    source: Literal["idx"]
    classes: tuple[StrictStr, ...] | StrictStr
    encoding: Literal["png"] = "png"
    splits: dict[Name, IdxSplit] = Field(min_length=1)

    @classmethod
    def split_of(cls, page: str) -> dict[str, Any]:
        images, comma, labels = page.partition(",")
        if not comma:
            raise DataError(f"{page!r}: give an IDX split as IMAGES,LABELS")
        return {"images": images, "labels": labels}

    def list_images(self, root: Root) -> Source:
        """List the images of IDX files; DataError if they are malformed or a label has no class."""
        notes: list[str] = []
        classes = class_names(self.classes, root, notes)
        splits = {}
        for name, files in self.splits.items():
            images, labels = load_idx(root, files.images), load_idx(root, files.labels)
            if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
                raise DataError(
                    f"split {name}: {files.images} has shape {images.shape} and {files.labels} {labels.shape}; "
                    "they must be [N, H, W] and [N]"
                )
            if len(labels) and labels.max() >= len(classes):
                raise DataError(
                    f"split {name}: {files.labels} has label {labels.max()}, but the card names {len(classes)} classes"
                )
            rows = SamplesBuilder()
            add_array(rows, files.images, labels, images)
            splits[name] = rows.build()
        return Source(classes, splits, Arrays(root, load_idx), notes=notes)


def read_idx(path: Path) -> Pixels:
    """`load_idx` of a local file."""
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
