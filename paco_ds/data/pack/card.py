"""Dataset cards: the name, license and images of a data set, read from YAML or made from command line options.

Each kind of source has its own subclass of `Card`, in a module of `pack.sources` or outside the package.
"""

from __future__ import annotations

import importlib
import itertools
import pkgutil
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self, get_args

from pydantic import Field, PositiveInt, ValidationError, field_validator, model_validator

from paco_ds.config.parse import brief, read_yaml
from paco_ds.config.plugins import is_plugin, load_plugin
from paco_ds.config.shipped import find_card
from paco_ds.data.manifest import Deviation, Mean, Name, Shots, StrictModel, validation_message
from paco_ds.data.pack import sources
from paco_ds.data.pack.root import Root
from paco_ds.data.pack.source import Source
from paco_ds.errors import DataError

# ImageNet's, as in every published recipe without figures of its own.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SPLIT_NAMES = ("train", "val", "test")


Share = Annotated[float, Field(gt=0, lt=1)]  # of the images of each class


class Option(NamedTuple):
    """A card's key as a command line option: `--key METAVAR`, with its help."""

    metavar: str
    help: str


CLASSES_FILE = Option("FILE", "class names in the order of labels, one on each line")


class Imbalance(StrictModel):
    """Makes train long-tailed: its largest class over its smallest is `factor`."""

    factor: Annotated[float, Field(ge=1)]
    profile: Literal["exp", "pareto"] = "exp"
    selection: Literal["seeded", "published"] = "seeded"  # published: the very images of CIFAR-LT, whatever the seed


class Resize(StrictModel):
    """Images whose shorter side is above `short` pixels are shrunk to it and stored as JPEG."""

    short: PositiveInt
    quality: Annotated[int, Field(ge=1, le=100)] = 90


class Card(StrictModel):
    """A dataset card. A subclass is a kind of source: it adds its keys and lists its images.

    A subclass declares `source: Literal["its name"]`, by which cards and `--source` choose it, and `splits`.

    Attributes:
        page: what `--train`, `--val` and `--test` take for this source, in words.
        options: keys of the card that are command line options as well.
    """

    page: ClassVar[str]
    options: ClassVar[dict[str, Option]] = {}

    source: str
    name: str
    license: str
    homepage: str = ""
    root: str = "."  # relative to the card's folder
    mean: Mean = IMAGENET_MEAN
    std: Deviation = IMAGENET_STD
    shots: Shots = Shots()
    imbalance: Imbalance | None = None
    test_share: Share | None = None
    validation_share: Share | None = None
    resize: Resize | None = None
    background: Annotated[str, Field(pattern=r"^(white|black|mean|#[0-9a-fA-F]{6})$")] | None = None
    splits: Mapping[Name, Any]

    @abstractmethod
    def list_images(self, root: Root) -> Source:
        """List the images of all splits without opening them; sizes are MISSING where the source does not give them.

        Raises:
            DataError: a file is missing or malformed, or the splits do not agree on the classes.
        """

    @classmethod
    @abstractmethod
    def split_of(cls, page: str) -> dict[str, Any]:
        """A split's entry in the card for `--train PAGE`."""

    @classmethod
    def keys_of_root(cls, root: str) -> dict[str, Any]:
        """Keys that follow from the root alone, such as `splits`; DataError if it is not a root of this source."""
        return {}

    @field_validator("name", "license", "homepage")
    @classmethod
    def _utf8(cls, text: str) -> str:
        try:
            text.encode()
        except UnicodeEncodeError:  # of a folder's name, or an argument, in another encoding
            raise ValueError(
                "is not UTF-8 text, as the manifest is: give another, as an option or in the card"
            ) from None
        return text

    @model_validator(mode="after")
    def _no_repeats(self) -> Self:
        for (first, a), (second, b) in itertools.combinations(self.splits.items(), 2):
            if a == b:
                raise ValueError(f"splits {first} and {second} are the same images")
        classes = getattr(self, "classes", None)
        repeated = [name for name, n in Counter(classes).items() if n > 1] if isinstance(classes, tuple) else []
        if repeated:
            raise ValueError(f"classes names {', '.join(repeated)} more than once")
        for option in ("imbalance", "test_share", "validation_share"):
            if getattr(self, option) is not None and "train" not in self.splits:
                raise ValueError(f"{option} needs a split train; the card has only: {', '.join(self.splits)}")
        for option, split in (("validation_share", "val"), ("test_share", "test")):
            if getattr(self, option) is not None and split in self.splits:
                raise ValueError(f"{option} makes a split {split} out of train, but the card has a {split} already")
        return self

    @property
    def background_color(self) -> tuple[int, int, int] | None:
        """What transparent parts are filled with, of 255; None leaves them as they are."""
        if self.background is None:
            return None
        if self.background == "mean":
            red, green, blue = (round(255 * value) for value in self.mean)
            return red, green, blue
        named = {"white": "#ffffff", "black": "#000000"}
        value = bytes.fromhex(named.get(self.background, self.background)[1:])
        return value[0], value[1], value[2]

    @property
    def background_hex(self) -> str | None:
        """`background_color` as the manifest has it, `#rrggbb`."""
        return None if self.background_color is None else f"#{bytes(self.background_color).hex()}"


@cache
def card_types() -> dict[str, type[Card]]:
    """The card of each source in the package, by the name of the source."""
    found = {}
    for module in pkgutil.iter_modules(sources.__path__, f"{sources.__name__}."):
        for kind in vars(importlib.import_module(module.name)).values():
            if isinstance(kind, type) and issubclass(kind, Card) and kind.__module__ == module.name:
                (found_name,) = get_args(kind.model_fields["source"].annotation)
                found[found_name] = kind
    return dict(sorted(found.items()))


def card_type(source: Any, origin: str) -> type[Card]:
    """The card of a source: a name in the package, or `module:Class` outside of it where code is allowed.

    Raises:
        DataError: no such source, or the class is not a Card; begins with ``origin``.
        RecipeError: `module:Class` without permission, or it cannot be imported.
    """
    if isinstance(source, str) and is_plugin(source):
        kind = load_plugin(source, "source")
        if not (isinstance(kind, type) and issubclass(kind, Card)):
            raise DataError(f"{origin}: source {source} is not a subclass of paco_ds.data.pack.card.Card")
        return kind
    if not isinstance(source, str) or source not in card_types():
        raise DataError(
            f"{origin}: source is {brief(source)}, must be one of {', '.join(card_types())}, or module:Class"
        )
    return card_types()[source]


def load_card(path: str | Path) -> Card:
    """Read the card at ``path``, or the shipped one of that name.

    Raises:
        DataError: no such card, not YAML, an unknown source, an unknown, missing or ill-typed key.
    """
    path = find_card(path)
    return make_card(read_yaml(path, DataError, "card"), f"card {path}")


def make_card(data: Any, origin: str) -> Card:
    """The card with these keys and values; DataError, beginning with ``origin``, if they are not valid."""
    kind = card_type(data.get("source") if isinstance(data, dict) else None, origin)
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise DataError(f"{origin}: {validation_message(error)}") from error


def changed(card: Card, **changes: Any) -> Card:
    """The card with these keys set, validated again."""
    return make_card(card.model_dump(exclude_none=True) | changes, f"the card of {card.name} with the options given")


def card_of_options(options: Mapping[str, str | None]) -> Card:
    """The card for `source`, `root`, a page per split, `name`, `license`, and the options of the source.

    Raises:
        DataError: an option is missing, or the source does not take it.
    """
    source, root = str(options["source"]), str(options["root"])
    kind = card_type(source, "--source")
    shared = {"source", "root", "name", "license", *SPLIT_NAMES}
    given = {key: value for key, value in options.items() if value is not None}
    for key in given:
        if key in ("root", *SPLIT_NAMES) and not given[key]:
            raise DataError(f"--{key} is empty, such as an unset variable: give it a value, or leave it out")
        if key not in shared | set(kind.options):
            raise DataError(f"--source {source} does not take --{key.replace('_', '-')}")
    try:
        keys = kind.keys_of_root(root)
    except DataError:
        if not any(split in given for split in SPLIT_NAMES):
            raise
        keys = {}  # what the root leaves open is given
    if pages := {split: given[split] for split in SPLIT_NAMES if split in given}:
        keys["splits"] = {split: kind.split_of(page) for split, page in pages.items()}
    if "splits" not in keys:
        raise DataError(f"--source {source} needs --train: {kind.page}, under --root")
    about = {
        "source": source,
        "name": given.get("name") or name_of(root),
        "license": given.get("license", "not stated"),
    }
    return make_card(about | keys | {key: given[key] for key in kind.options if key in given}, f"--source {source}")


def folder_card(root: str | Path) -> Card:
    """A card for class folders without one: root/train, root/val, root/test where they exist, else root as train."""
    return card_of_options({"source": "folder", "root": str(root)})


def name_of(root: str | Path) -> str:
    """The default name of a data set: its folder's."""
    if "://" in str(root):  # without its query, which may be a signature
        return str(root).partition("?")[0].rstrip("/").rpartition("/")[2]
    return Path(root).resolve().name
