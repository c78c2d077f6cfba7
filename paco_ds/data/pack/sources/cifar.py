"""The source `cifar`: the Python pickles of CIFAR-10 and CIFAR-100, loaded without executing their content."""

from __future__ import annotations

import io
import pickle
from typing import Any, ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from paco_ds.data.manifest import Name, StrictModel
from paco_ds.data.pack.card import Card
from paco_ds.data.pack.root import Root
from paco_ds.data.pack.samples import SamplesBuilder
from paco_ds.data.pack.source import Arrays, Source, add_array, some
from paco_ds.data.storage import as_storage
from paco_ds.errors import DataError

_SIDE = 32
_LABELS = (b"fine_labels", b"labels")  # CIFAR-100, CIFAR-10
_NAMES = (b"fine_label_names", b"label_names")


def _bytes_of_text(text: str, encoding: str) -> bytes:
    """`_codecs.encode` for latin1 alone: Python 3 writes bytes so at pickle protocols of Python 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for {encoding!r}, which CIFAR's files have no use for")
    return text.encode("latin1")


# All names that a CIFAR pickle refers to: an array is rebuilt from its type and bytes. Names of numpy 1 and 2.
_ALLOWED = {
    (f"numpy.{core}.multiarray", "_reconstruct"): np._core.multiarray._reconstruct  # type: ignore[attr-defined]
    for core in ("core", "_core")
} | {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype, ("_codecs", "encode"): _bytes_of_text}


class _Restricted(pickle.Unpickler):
    """Numbers, strings, bytes, lists and dicts look up no name; arrays need those of `_ALLOWED`; others are refused."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which CIFAR's files have no use for") from None


class CifarSplit(StrictModel):
    """Python pickles of CIFAR-10 or CIFAR-100, one after another."""

    files: tuple[str, ...] = Field(min_length=1)


class CifarCard(Card):
    """CIFAR's Python pickles; class names are those of ``meta`` unless the card gives them."""

    page: ClassVar[str] = "pickles, separated by commas"

    source: Literal["cifar"]
    classes: tuple[str, ...] | None = None
    meta: str | None = None
    encoding: Literal["png"] = "png"
    splits: dict[Name, CifarSplit] = Field(min_length=1)

    @model_validator(mode="after")
    def _classes_or_meta(self) -> Self:
        if (self.classes is None) == (self.meta is None):
            raise ValueError("give either meta, the pickle with the classes' names, or classes")
        return self

    @classmethod
    def split_of(cls, page: str) -> dict[str, Any]:
        return {"files": page.split(",")}

    @classmethod
    def keys_of_root(cls, root: str) -> dict[str, Any]:
        """Splits and meta of an unpacked CIFAR-10 or CIFAR-100 folder; DataError if the root is neither."""
        place = as_storage(root)
        if place.exists("meta"):
            return {"meta": "meta", "splits": {"train": {"files": ["train"]}, "test": {"files": ["test"]}}}
        if place.exists("batches.meta"):
            batches = [f"data_batch_{number}" for number in range(1, 6)]
            splits = {"train": {"files": batches}, "test": {"files": ["test_batch"]}}
            return {"meta": "batches.meta", "splits": splits}
        raise DataError(f"{root} has neither meta (CIFAR-100) nor batches.meta (CIFAR-10): is it the unpacked folder?")

    def list_images(self, root: Root) -> Source:
        """List the images of CIFAR's pickles; DataError if they are malformed or a label has no class."""
        classes = self.classes or _names(root, str(self.meta))
        splits = {}
        for name, split in self.splits.items():
            rows = SamplesBuilder()
            for file in split.files:
                page, place = _unpickled(root, file), root.storage.place(file)
                labels, images = _labels(page, place), _images(page, place)
                if len(labels) != len(images):
                    raise DataError(f"{root}/{file} has {len(images)} images and {len(labels)} labels")
                outside = np.flatnonzero((labels < 0) | (labels >= len(classes)))
                if len(outside):
                    raise DataError(
                        f"{root}/{file}: label {labels[outside[0]]} of image {outside[0]} is none of the "
                        f"{len(classes)} classes"
                    )
                add_array(rows, file, labels, images)
            splits[name] = rows.build()
        return Source(classes, splits, Arrays(root, load_images))


def load_images(root: Root, file: str) -> npt.NDArray[np.uint8]:
    """The images of a pickle, uint8 [N, 32, 32, 3], RGB."""
    return _images(_unpickled(root, file), root.storage.place(file))


def _unpickled(root: Root, file: str) -> dict[bytes, Any]:
    path = root.storage.place(file)
    with root.open(file, "CIFAR file") as stream:
        raw = stream.read()
    try:
        page = _Restricted(io.BytesIO(raw), encoding="bytes").load()
    except Exception as error:  # a damaged pickle raises nearly anything
        raise DataError(f"{path} is no CIFAR pickle: {error}") from error
    if not isinstance(page, dict):
        raise DataError(f"{path} is no CIFAR pickle: it holds a {type(page).__name__}, not a dict")
    return {key.encode() if isinstance(key, str) else key: value for key, value in page.items()}


def _images(page: dict[bytes, Any], path: str) -> npt.NDArray[np.uint8]:
    data = page.get(b"data")
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3 * _SIDE**2:
        raise DataError(f"{path} has no data of uint8 [N, {3 * _SIDE**2}]")
    return data.reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1)


def _labels(page: dict[bytes, Any], path: str) -> npt.NDArray[np.int64]:
    for key in _LABELS:
        if key in page:
            labels = page[key]
            if not isinstance(labels, list) or not all(isinstance(label, int) for label in labels):
                raise DataError(f"{path}: {key.decode()} is no list of numbers")
            return np.array(labels, np.int64)
    raise DataError(f"{path} has neither {' nor '.join(key.decode() for key in _LABELS)}")


def _names(root: Root, file: str) -> tuple[str, ...]:
    page, path = _unpickled(root, file), root.storage.place(file)
    for key in _NAMES:
        if key in page:
            names = tuple(n.decode() if isinstance(n, bytes) else str(n) for n in page[key])
            repeated = sorted({name for name in names if names.count(name) > 1})
            if repeated:
                raise DataError(f"{path} names {some(repeated)} more than once")
            return names
    raise DataError(f"{path} has neither {' nor '.join(key.decode() for key in _NAMES)}")
