"""Owns the reading of source images, as a card describes them: IDX files, folders, iNaturalist's JSON."""

import gzip
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import cv2
import numpy as np
import numpy.typing as npt

from paco_ds.data.card import Card, FolderCard, IdxCard, INaturalistCard
from paco_ds.errors import DataError

# How a file may end, and how it is called in a shard.
ENDINGS = {"jpg": "jpg", "jpeg": "jpg", "png": "png", "webp": "webp"}
_IDX_UINT8 = 0x08
_SHOWN = 5


class SourceSample(Protocol):
    """One image of a source: ``size`` in bytes as stored there, ``where`` names it relative to the root."""

    label: int
    size: int
    where: str

    @property
    def ending(self) -> str:
        """How its member of the shard ends: jpg, png or webp."""

    def read(self) -> bytes:
        """The encoded image."""


@dataclass(slots=True)
class FileSample:
    """An image file; its bytes are kept as they are."""

    label: int
    size: int
    where: str
    root: str

    @property
    def ending(self) -> str:
        """The file's ending, .jpeg called jpg."""
        return ENDINGS[_ending(self.where)]

    def read(self) -> bytes:
        """The bytes of the file; DataError if it cannot be read or was changed since it was listed."""
        path = Path(self.root, self.where)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(f"image {path} cannot be read: {error.strerror}") from error
        if len(data) != self.size:
            raise DataError(f"image {path} changed while the shards were built: start again")
        return data


@dataclass(slots=True)
class PixelSample:
    """An image without encoded bytes: uint8 [H, W] grey pixels, stored as PNG."""

    label: int
    where: str
    pixels: npt.NDArray[np.uint8]

    @property
    def size(self) -> int:
        """Bytes of the raw pixels."""
        return self.pixels.nbytes

    @property
    def ending(self) -> str:
        """PNG."""
        return "png"

    def read(self) -> bytes:
        """The pixels as PNG."""
        return cv2.imencode(".png", self.pixels)[1].tobytes()


@dataclass
class Source:
    """What a card's source holds: class names, samples per split, files left out by ending."""

    classes: tuple[str, ...]
    splits: dict[str, list[Any]]
    ignored: Counter[str] = field(default_factory=Counter)


def read_source(card: Card, root: Path) -> Source:
    """List every image of the card's splits under ``root``, in an order that depends on nothing else.

    Raises:
        DataError: a file or image is missing, malformed or empty, or the splits do not agree on the classes.
    """
    if not root.is_dir():
        raise DataError(f"there is no folder {root} with the images of {card.name}; give it as --root")
    if isinstance(card, IdxCard):
        source = _read_idx_source(card, root)
    elif isinstance(card, FolderCard):
        source = _read_folders(card, root)
    else:
        source = _read_inaturalist(card, root)
    for name, samples in source.splits.items():
        if not samples:
            raise DataError(f"split {name} of {card.name} has no image under {root}")
    if "train" in source.splits:
        counts = Counter(sample.label for sample in source.splits["train"])
        empty = [name for label, name in enumerate(source.classes) if not counts[label]]
        if empty:
            raise DataError(f"no training image of {_some(empty)}: add some, or take the class out")
    return source


def class_counts(card: Card, root: Path, split: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Class names, and how many images each class has in a split of the card.

    An iNaturalist card needs its annotations only, not the images.

    Raises:
        DataError: as :func:`read_source`.
    """
    if isinstance(card, INaturalistCard):
        page = root / card.splits[split].annotations
        read = _read_json(page)
        names = {c["id"]: str(c["name"]) for c in _entries(page, read, "categories", "id", "name")}
        labels = {category: label for label, category in enumerate(sorted(names))}
        classes = tuple(names[category] for category in labels)
        counts = Counter(label for _, label in _labelled_images(page, read, labels))
    else:
        source = read_source(card.model_copy(update={"splits": {split: card.splits[split]}}), root)
        classes, counts = source.classes, Counter(sample.label for sample in source.splits[split])
    return classes, tuple(counts[label] for label in range(len(classes)))


def read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """The array of an IDX file of unsigned bytes, gzipped or not (format: http://yann.lecun.com/exdb/mnist).

    Raises:
        DataError: missing, damaged gzip, wrong magic number, or a length other than its header says.
    """
    if not path.is_file():
        raise DataError(f"IDX file {path} is missing")
    raw = path.read_bytes()
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)
        except (EOFError, OSError, zlib.error) as error:
            raise DataError(f"{path} is damaged gzip ({error}): copy it again") from error
    if len(raw) < 4 or raw[:3] != bytes((0, 0, _IDX_UINT8)):
        raise DataError(f"{path} is no IDX file of unsigned bytes: it starts with {raw[:4].hex(' ')!r}")
    dimensions = raw[3]
    start = 4 + 4 * dimensions
    shape = tuple(int(n) for n in np.frombuffer(raw[4:start].ljust(4 * dimensions, b"\0"), ">u4"))
    if len(raw) != start + int(np.prod(shape, dtype=np.int64)):
        raise DataError(f"{path} has {len(raw)} bytes, which do not hold the shape {shape} of its header")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def _read_idx_source(card: IdxCard, root: Path) -> Source:
    splits: dict[str, list[Any]] = {}
    for name, files in card.splits.items():
        images, labels = read_idx(root / files.images), read_idx(root / files.labels)
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
            raise DataError(
                f"split {name}: {files.images} has shape {images.shape} and {files.labels} {labels.shape}; "
                "they must be [N, H, W] and [N]"
            )
        if len(labels) and labels.max() >= len(card.classes):
            raise DataError(
                f"split {name}: {files.labels} has label {labels.max()}, but the card names {len(card.classes)} classes"
            )
        splits[name] = [
            PixelSample(int(label), f"{files.images}#{position}", pixels)
            for position, (pixels, label) in enumerate(zip(images, labels, strict=True))
        ]
    return Source(card.classes, splits)


def _read_folders(card: FolderCard, root: Path) -> Source:
    found = {name: _class_folders(root / split.folder) for name, split in card.splits.items()}
    first = next(iter(found))
    classes = card.classes or tuple(found[first])
    origin = "the card" if card.classes else f"split {first}"
    for name, folders in found.items():
        missing, extra = set(classes) - set(folders), set(folders) - set(classes)
        if missing or extra:
            raise DataError(
                f"split {name} ({root / card.splits[name].folder}) does not have the classes of {origin}: "
                f"missing {_some(sorted(missing))}; not known {_some(sorted(extra))}"
            )
    source = Source(classes, {})
    for name, split in card.splits.items():
        source.splits[name] = [
            sample
            for label, folder in enumerate(classes)
            for sample in _images_in(root, PurePosixPath(split.folder, folder), label, source.ignored)
        ]
    return source


def _class_folders(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}")
    names = sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith("."))
    if not names:
        raise DataError(f"{folder} has no folder: images must lie in one folder per class")
    return names


def _images_in(root: Path, folder: PurePosixPath, label: int, ignored: Counter[str]) -> list[FileSample]:
    samples = []
    for parent, _, files in os.walk(root / folder):
        inside = PurePosixPath(Path(parent).relative_to(root))
        for file in files:
            ending = _ending(file)
            if ending in ENDINGS:
                samples.append(_file_sample(root, str(inside / file), label))
            else:
                ignored[f".{ending}" if ending else "(no ending)"] += 1
    return sorted(samples, key=lambda sample: sample.where)


def _file_sample(root: Path, where: str, label: int) -> FileSample:
    size = os.stat(root / where).st_size
    if not size:
        raise DataError(f"image {root / where} is empty: replace or remove it")
    return FileSample(label, size, where, str(root))


def _read_inaturalist(card: INaturalistCard, root: Path) -> Source:
    pages = {name: root / split.annotations for name, split in card.splits.items()}
    read = {name: _read_json(path) for name, path in pages.items()}
    first = next(iter(pages))
    ids: list[int] = []
    for name, path in pages.items():
        found = sorted(c["id"] for c in _entries(path, read[name], "categories", "id", "name"))
        ids = ids or found
        if found != ids:
            differing = [str(i) for i in sorted(set(found) ^ set(ids))]
            raise DataError(f"{path} does not have the categories of {pages[first]}: {_some(differing)}")
    names_from = root / card.categories if card.categories else pages[first]
    listed = _read_json(names_from) if card.categories else read[first]
    names = {c["id"]: str(c["name"]) for c in _entries(names_from, listed, "categories", "id", "name")}
    nameless = [str(i) for i in ids if i not in names]
    if nameless:
        raise DataError(f"{names_from} has no name for category {_some(nameless)}")
    labels = {category: label for label, category in enumerate(ids)}
    splits: dict[str, list[Any]] = {name: _annotated_images(root, pages[name], read[name], labels) for name in pages}
    return Source(tuple(names[i] for i in ids), splits)


def _annotated_images(root: Path, path: Path, page: Any, labels: dict[int, int]) -> list[FileSample]:
    samples, missing = [], []
    for where, label in _labelled_images(path, page, labels):
        if (root / where).is_file():
            samples.append(_file_sample(root, where, label))
        else:
            missing.append(where)
    if missing:
        raise DataError(f"{path} lists {len(missing)} images that are not under {root}: {_some(missing)}")
    return samples


def _labelled_images(path: Path, page: Any, labels: dict[int, int]) -> Iterator[tuple[str, int]]:
    """File and label of every image that a page lists, whether or not the image is there."""
    label_of: dict[int, int] = {}
    for annotation in _entries(path, page, "annotations", "image_id", "category_id"):
        image, category = annotation["image_id"], annotation["category_id"]
        if category not in labels:
            raise DataError(f"{path}: the annotation of image {image} has unknown category {category}")
        if label_of.setdefault(image, labels[category]) != labels[category]:
            raise DataError(f"{path}: image {image} is annotated with two categories")
    seen = set()
    for entry in _entries(path, page, "images", "id", "file_name"):
        image, where = entry["id"], entry["file_name"]
        if image not in label_of:
            raise DataError(f"{path}: image {image} ({where}) has no annotation")
        if where in seen:
            raise DataError(f"{path}: image {where} is listed twice")
        if PurePosixPath(where).is_absolute() or ".." in PurePosixPath(where).parts:
            raise DataError(f"{path}: image {where} does not lie under the root")
        if _ending(where) not in ENDINGS:
            raise DataError(f"{path}: image {where} must end in one of {', '.join(ENDINGS)}")
        seen.add(where)
        yield where, label_of[image]


def _read_json(path: Path) -> Any:
    if not path.is_file():
        raise DataError(f"{path} is missing")
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}): copy it again") from error


def _entries(path: Path, page: Any, key: str, *fields: str) -> list[dict[str, Any]]:
    entries = page.get(key) if isinstance(page, dict) else page  # categories.json is a bare list
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{path} has no {key}: it must be a list of entries with {' and '.join(fields)}")
    for entry in entries:
        if not isinstance(entry, dict) or not set(fields) <= set(entry):
            raise DataError(f"{path}: {key} has an entry without {' and '.join(fields)}: {entry!r:.80}")
    return entries


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower().removeprefix(".")


def _some(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return (", ".join(names[:_SHOWN]) or "none") + (f" and {more} more" if more > 0 else "")
