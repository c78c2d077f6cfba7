"""The source `inaturalist`: the competitions' COCO-style JSON, and the folders of torchvision's INaturalist.

The JSON of 2021 has 2.7 million images, so files are parsed as streams and kept as columns.
"""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Iterator
from types import UnionType
from typing import Any, ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from paco_ds.data.manifest import Name, StrictModel
from paco_ds.data.names import same_name, same_path
from paco_ds.data.pack.card import Card
from paco_ds.data.pack.class_folders import list_folders
from paco_ds.data.pack.class_list import refuse_swapped
from paco_ds.data.pack.json_lists import read_lists
from paco_ds.data.pack.root import Root, require_inside
from paco_ds.data.pack.samples import Names, Samples, SamplesBuilder
from paco_ds.data.pack.source import Files, Source, some
from paco_ds.errors import DataError


class INaturalistSplit(StrictModel):
    """A COCO-style JSON file of images, annotations and categories; or a folder in torchvision's layout."""

    annotations: str | None = None
    folder: str | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.annotations is None) == (self.folder is None):
            raise ValueError("give either annotations, a JSON file, or folder, a tree of images by category")
        return self


class INaturalistCard(Card):
    """Images listed by COCO-style JSON; ``categories`` names a JSON file that holds the classes' names."""

    page: ClassVar[str] = "a JSON file, or a folder in torchvision's layout"

    source: Literal["inaturalist"]
    categories: str | None = None
    splits: dict[Name, INaturalistSplit] = Field(min_length=1)

    @model_validator(mode="after")
    def _one_layout(self) -> Self:
        if len({split.folder is None for split in self.splits.values()}) > 1:
            raise ValueError("some splits have annotations and some a folder; their labels would not be the same")
        return self

    @classmethod
    def split_of(cls, page: str) -> dict[str, Any]:
        return {"annotations": page} if re.search(r"\.json(\.[a-z0-9]+)?$", page, re.IGNORECASE) else {"folder": page}

    def list_images(self, root: Root) -> Source:
        """List the images; labels follow the category ids."""
        if next(iter(self.splits.values())).folder is not None:
            return _read_folders(self, root)
        pages = {name: _Page(root, str(split.annotations)) for name, split in self.splits.items()}
        first = next(iter(pages.values()))
        ids = sorted(first.categories)
        for page in pages.values():
            if not page.categories:
                raise DataError(f"{page.where} has no categories: it must be a list of entries with id and name")
            if sorted(page.categories) != ids:
                differing = [str(i) for i in sorted(set(page.categories) ^ set(ids))]
                raise DataError(f"{page.where} does not have the categories of {first.where}: {some(differing)}")
            for i in ids:
                _refuse_renamed(i, first.categories[i], first.where, page.categories[i], page.where)
        names = _categories(root, self.categories) if self.categories else first.categories
        listed = {i: names[i] for i in ids if i in names}
        refuse_swapped(listed, first.categories, f"{root}/{self.categories}", first.where, "category")
        nameless = [str(i) for i in ids if i not in names]
        if nameless:
            raise DataError(f"{root}/{self.categories} has no name for category {some(nameless)}")
        labels = {category: label for label, category in enumerate(ids)}
        splits = {name: page.samples(labels) for name, page in pages.items()}
        return Source(tuple(names[i] for i in ids), splits, Files(root))


class _Page:
    """One JSON file: images, annotations and categories as columns."""

    def __init__(self, root: Root, file: str) -> None:
        self.where = f"{root}/{file}"
        self._image_ids, self._names = array("q"), SamplesBuilder()
        self._annotated, self._category = array("q"), array("q")
        self.categories: dict[int, str] = {}
        read_lists(root, file, {"images": self._image, "annotations": self._annotation, "categories": self._a_category})

    def _image(self, entry: dict[str, Any]) -> None:
        name = _field(self.where, entry, "images", "file_name", str)
        require_inside(self.where, name)
        self._image_ids.append(_field(self.where, entry, "images", "id", int))
        self._names.add(same_path(name), 0)

    def _annotation(self, entry: dict[str, Any]) -> None:
        self._annotated.append(_field(self.where, entry, "annotations", "image_id", int))
        self._category.append(_field(self.where, entry, "annotations", "category_id", int))

    def _a_category(self, entry: dict[str, Any]) -> None:
        _take_category(self.categories, entry, self.where)

    def samples(self, labels: dict[int, int]) -> Samples:
        """The images with their labels by category; DataError for one without annotation or with two categories."""
        for part, found in (("images", self._image_ids), ("annotations", self._annotated)):
            if not found:
                raise DataError(f"{self.where} has no {part}: it must be a list of entries")
        names = self._names.build().names
        image_ids = np.array(self._image_ids, np.int64)
        self._refuse_shared_ids(image_ids, names)
        annotated, category = self._by_image()
        known = np.array(sorted(labels), np.int64)
        label_of = np.array([labels[c] for c in known.tolist()], np.int32)
        place = np.searchsorted(known, category).clip(max=len(known) - 1)
        unknown = np.flatnonzero(known[place] != category)
        if len(unknown):
            raise DataError(
                f"{self.where}: the annotation of image {annotated[unknown[0]]} has unknown category "
                f"{category[unknown[0]]}"
            )
        at = np.searchsorted(annotated, image_ids).clip(max=len(annotated) - 1)
        lost = np.flatnonzero(annotated[at] != image_ids)
        if len(lost):
            raise DataError(f"{self.where}: image {image_ids[lost[0]]} ({names[int(lost[0])]}) has no annotation")
        return _table(names, label_of[place][at])

    def _refuse_shared_ids(self, image_ids: npt.NDArray[np.int64], names: Names) -> None:
        """Raise DataError if two files have one image id: both would get the label of one."""
        order = np.argsort(image_ids, kind="stable")
        again = np.flatnonzero(image_ids[order][1:] == image_ids[order][:-1])
        for row, other in zip(order[again].tolist(), order[again + 1].tolist(), strict=True):
            if names[row] != names[other]:
                raise DataError(
                    f"{self.where}: images {names[row]} and {names[other]} have the same id {image_ids[row]}: give "
                    "each an id of its own"
                )

    def _by_image(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Annotated images, ascending and each once, and their categories."""
        annotated, category = np.array(self._annotated, np.int64), np.array(self._category, np.int64)
        order = np.argsort(annotated, kind="stable")
        annotated, category = annotated[order], category[order]
        torn = np.flatnonzero((annotated[1:] == annotated[:-1]) & (category[1:] != category[:-1]))
        if len(torn):
            raise DataError(f"{self.where}: image {annotated[torn[0]]} is annotated with two categories")
        first = np.concatenate((np.ones(1, bool), annotated[1:] != annotated[:-1]))
        return annotated[first], category[first]


def _table(names: Names, labels: npt.NDArray[np.int32]) -> Samples:
    nothing = np.empty(0, np.int64)
    unknown = np.full(len(labels), -1, np.int64)
    return Samples(names, labels, unknown, np.zeros(len(labels), np.int64), nothing, nothing.astype(np.int32))


def _categories(root: Root, file: str) -> dict[int, str]:
    """Names by category id. The official categories.json is a bare list; other files have a key `categories`."""
    names: dict[int, str] = {}

    def take(entry: Any) -> None:
        _take_category(names, entry, f"{root}/{file}")

    read_lists(root, file, {"": take, "categories": take})
    return names


def _take_category(names: dict[int, str], entry: Any, where: str) -> None:
    """Add the name of a category by its id; DataError if the id has another name."""
    category = _field(where, entry, "categories", "id", int)
    name = str(_field(where, entry, "categories", "name", str | int)).strip()
    if names.setdefault(category, name) != name:
        raise DataError(
            f"{where}: category {category} is {names[category]!r:.60} and {name!r:.60}: give each an id of its own"
        )


def _field(where: str, entry: Any, part: str, key: str, kind: type | UnionType) -> Any:
    value = entry.get(key) if isinstance(entry, dict) else None
    if kind is int and isinstance(value, str) and value.strip():
        raise DataError(
            f"{where}: {part} has the {key} {value!r:.40}, a text: write it as a whole number without quotes"
        )
    if not isinstance(value, kind) or isinstance(value, bool) or not str(value).strip():
        raise DataError(f"{where}: {part} has an entry without {key}: {entry!r:.80}")
    return value


def _refuse_renamed(category: int, name: str, where: str, other: str, elsewhere: str) -> None:
    """Raise DataError if a category has another name elsewhere: its label would mean two classes."""
    if same_name(name) != same_name(other):
        raise DataError(
            f"category {category} is {name!r:.60} in {where} and {other!r:.60} in {elsewhere}: number the categories "
            "of all splits alike"
        )


def _read_folders(card: INaturalistCard, root: Root) -> Source:
    """torchvision's INaturalist: 2021 has a folder `00000_Animalia_...` per category, the years before have
    `Aves/3111` by super-category and category id."""
    found = {name: _folders_by_category(root, str(split.folder)) for name, split in card.splits.items()}
    first: dict[int, tuple[str, str]] = {}
    for name, folders in found.items():
        for category, (_, called) in folders.items():
            before, split = first.setdefault(category, (called, name))
            _refuse_renamed(category, before, f"split {split}", called, f"split {name}")
    ids = sorted(first)
    known = _categories(root, card.categories) if card.categories else {}
    refuse_swapped(
        {i: known[i] for i in ids if i in known},
        {i: first[i][0] for i in ids},
        f"{root}/{card.categories}",
        "the folders",
        "category",
    )
    names = {i: known.get(i) or first[i][0] for i in ids}
    ignored: Counter[str] = Counter()
    splits, notes = {}, list[str]()
    for name, folders in found.items():
        places = [(label, folders[category][0]) for label, category in enumerate(ids) if category in folders]
        splits[name] = list_folders(root, str(card.splits[name].folder), places, ignored, notes)
    return Source(tuple(names[i] for i in ids), splits, Files(root), ignored, notes=notes)


def _folders_by_category(root: Root, folder: str) -> dict[int, tuple[str, str]]:
    """Folder and name of each category; DataError if two folders have one number."""
    found: dict[int, tuple[str, str]] = {}
    for number, (place, name) in _category_folders(root, folder):
        if number in found:
            raise DataError(
                f"{root}/{place} and {found[number][0]} have the same number {number}: rename one of the two"
            )
        found[number] = place, name
    return found


def _category_folders(root: Root, folder: str) -> Iterator[tuple[int, tuple[str, str]]]:
    """Category id, its folder under the root, and its name."""
    for outer in root.folders(folder):
        number, _, name = outer.partition("_")
        if number.isdecimal() and name:
            yield int(number), (f"{folder}/{outer}", name)
            continue
        for inner in root.folders(f"{folder}/{outer}"):
            if not inner.isdecimal():
                raise DataError(
                    f"{root}/{folder}/{outer}/{inner} is no category: a folder must be called "
                    "NUMBER_NAME (2021), or NAME with folders called by number in it (2017 to 2019)"
                )
            yield int(inner), (f"{folder}/{outer}/{inner}", f"{outer}/{inner}")
