"""Owns the dataset card: a YAML page that says what a data set is called, licensed and made of, and the cards that
the command line makes of its options."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import Field, PositiveFloat, PositiveInt, StrictStr, TypeAdapter, ValidationError, model_validator

from paco_ds.data.manifest import Name, Shots, StrictModel, Triple, validation_message
from paco_ds.errors import DataError

# ImageNet's, as in every published recipe without figures of its own.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SPLIT_NAMES = ("train", "val", "test")


class IdxSplit(StrictModel):
    """A pair of IDX files, gzipped or not: images uint8 [N, H, W], labels uint8 [N]."""

    images: str
    labels: str


class CifarSplit(StrictModel):
    """Python pickles of CIFAR-10 or CIFAR-100, laid end to end."""

    files: tuple[str, ...] = Field(min_length=1)


class FolderSplit(StrictModel):
    """A folder with one folder of images per class."""

    folder: str


class INaturalistSplit(StrictModel):
    """A COCO-style JSON file of images, annotations and categories; or a folder as torchvision's INaturalist has it."""

    annotations: str | None = None
    folder: str | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.annotations is None) == (self.folder is None):
            raise ValueError("give either annotations, a JSON file, or folder, a tree of images by category")
        return self


class ListSplit(StrictModel):
    """A text file with a path and an integer label on each line, as the long-tailed benchmarks publish them."""

    list: str


class CsvSplit(StrictModel):
    """A CSV file with a header."""

    file: str


class WebdatasetSplit(StrictModel):
    """Tars of another build: a pattern such as `train-*.tar` or `train-{000..107}.tar`."""

    tars: str


class Imbalance(StrictModel):
    """Makes train long-tailed: its largest class over its smallest is `factor`."""

    factor: Annotated[float, Field(ge=1)]
    profile: Literal["exp", "pareto"] = "exp"


class Resize(StrictModel):
    """Images whose shorter side is above `short` pixels are made that small and stored as JPEG."""

    short: PositiveInt
    quality: Annotated[int, Field(ge=1, le=100)] = 90


class _Card(StrictModel):
    name: str
    license: str
    homepage: str = ""
    root: str = "."  # relative to the card's folder
    mean: Triple = IMAGENET_MEAN
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = IMAGENET_STD
    shots: Shots = Shots()
    imbalance: Imbalance | None = None
    validation_share: Annotated[float, Field(gt=0, lt=1)] | None = None
    resize: Resize | None = None

    @model_validator(mode="after")
    def _no_repeats(self) -> Self:
        splits = getattr(self, "splits", {})
        for (first, a), (second, b) in itertools.combinations(splits.items(), 2):
            if a == b:
                raise ValueError(f"splits {first} and {second} are the same images")
        classes = getattr(self, "classes", None)
        repeated = [name for name, n in Counter(classes).items() if n > 1] if isinstance(classes, tuple) else []
        if repeated:
            raise ValueError(f"classes names {', '.join(repeated)} more than once")
        for option in ("imbalance", "validation_share"):
            if getattr(self, option) is not None and "train" not in splits:
                raise ValueError(f"{option} is about the split train, and there is none; splits: {', '.join(splits)}")
        if self.validation_share is not None and "val" in splits:
            raise ValueError("validation_share takes a split val out of train, but the splits have a val already")
        return self


class IdxCard(_Card):
    """Images in IDX files; they have no encoded bytes, so they are stored as ``encoding``."""

    source: Literal["idx"]
    classes: tuple[str, ...]
    encoding: Literal["png"] = "png"
    splits: dict[Name, IdxSplit] = Field(min_length=1)


class CifarCard(_Card):
    """CIFAR's python pickles; class names are those of ``meta`` unless the card gives them."""

    source: Literal["cifar"]
    classes: tuple[str, ...] | None = None
    meta: str | None = None
    encoding: Literal["png"] = "png"
    splits: dict[Name, CifarSplit] = Field(min_length=1)

    @model_validator(mode="after")
    def _names_from_somewhere(self) -> Self:
        if (self.classes is None) == (self.meta is None):
            raise ValueError("give either meta, the pickle with the classes' names, or classes")
        return self


class FolderCard(_Card):
    """Images in a folder per class; ``classes`` fixes the order of labels, else it is that of the names."""

    source: Literal["folder"]
    classes: tuple[str, ...] | None = None
    splits: dict[Name, FolderSplit] = Field(min_length=1)


class INaturalistCard(_Card):
    """Images listed by COCO-style JSON; ``categories`` names a JSON file that holds the classes' names."""

    source: Literal["inaturalist"]
    categories: str | None = None
    splits: dict[Name, INaturalistSplit] = Field(min_length=1)

    @model_validator(mode="after")
    def _one_layout(self) -> Self:
        if len({split.folder is None for split in self.splits.values()}) > 1:
            raise ValueError("some splits have annotations and some a folder; their labels would not be the same")
        return self


class ListCard(_Card):
    """Images named by list files; ``classes`` names the classes or a text file with a name on each line."""

    source: Literal["list"]
    classes: tuple[StrictStr, ...] | StrictStr | None = None
    splits: dict[Name, ListSplit] = Field(min_length=1)


class CsvCard(_Card):
    """Images named by the rows of CSV files; rows of one ``group_column`` value stay on one side of a split."""

    source: Literal["csv"]
    path_column: str = "path"
    label_column: str = "label"
    group_column: str | None = None
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] = ","
    classes: tuple[StrictStr, ...] | StrictStr | None = None
    splits: dict[Name, CsvSplit] = Field(min_length=1)


class WebdatasetCard(_Card):
    """Samples of other webdataset shards: an image and `.json` with ``label_key`` and ``class_key``, or `.cls`."""

    source: Literal["webdataset"]
    label_key: str = "label"
    class_key: str = "class"
    classes: tuple[StrictStr, ...] | StrictStr | None = None
    splits: dict[Name, WebdatasetSplit] = Field(min_length=1)


Card = IdxCard | CifarCard | FolderCard | INaturalistCard | ListCard | CsvCard | WebdatasetCard
_CARDS: dict[str, Any] = {get_args(kind.model_fields["source"].annotation)[0]: kind for kind in get_args(Card)}
SOURCES = tuple(_CARDS)


def load_card(path: str | Path) -> Card:
    """Read the card at ``path``.

    Raises:
        DataError: no such file, not YAML, an unknown kind of source, an unknown, missing or ill-typed key.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"there is no dataset card {path}; shards/README.md says what one is")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"card {path} is not YAML: {' '.join(str(error).split())}") from error
    return make_card(data, f"card {path}")


def make_card(data: Any, origin: str) -> Card:
    """The card that these keys and values are; DataError, beginning with ``origin``, if they are none."""
    kind = data.get("source") if isinstance(data, dict) else None
    if not isinstance(kind, str) or kind not in _CARDS:
        raise DataError(f"{origin}: source is {kind!r}, must be one of {', '.join(_CARDS)}")
    try:
        return TypeAdapter[Card](_CARDS[kind]).validate_python(data)
    except ValidationError as error:
        raise DataError(f"{origin}: {validation_message(error)}") from error


def changed(card: Card, **changes: Any) -> Card:
    """The card with these keys set; what does not fit together is refused as in a file."""
    return make_card(card.model_dump(exclude_none=True) | changes, f"the card of {card.name} with the options given")


def folder_card(root: str | Path) -> Card:
    """A card for images without one: root/train, root/val, root/test where they are, else root as train."""
    return make_card(
        {"name": name_of(root), "license": "not stated", "source": "folder", "splits": folder_splits(root)}, "--source"
    )


def folder_splits(root: str | Path) -> dict[str, dict[str, str]]:
    """The splits that a folder has: its train, val and test, or itself as train."""
    found = [name for name in SPLIT_NAMES if Path(root, name).is_dir()]
    return {name: {"folder": name} for name in found} if "train" in found else {"train": {"folder": "."}}


def name_of(root: str | Path) -> str:
    """What a data set without a name is called: its folder."""
    return str(root).rstrip("/").rpartition("/")[2] if "://" in str(root) else Path(root).resolve().name
