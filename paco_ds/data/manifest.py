"""manifest.json: the content of a directory of shards, and a check of its files against it."""

import difflib
import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    PrivateAttr,
    StringConstraints,
    ValidationError,
    model_validator,
)

from paco_ds.config.data import DataSettings
from paco_ds.config.parse import brief, parse_json
from paco_ds.config.section import Section
from paco_ds.data.storage import MissingFile, Storage, as_storage, open_storage
from paco_ds.errors import DataError

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
_WITHOUT = {  # what a data set without this split needs
    "val": "; build with --validation-share .05, or set evaluation.split to null",
    "test": "; build with --test-share .1, or set evaluation.test_split to a split that there is",
}

# Names become file names and prefixes of keys. No dot: webdataset ends a key at its first dot.
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]+$")]
HexColor = Annotated[str, StringConstraints(pattern=r"^#[0-9a-f]{6}$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


def _of_unit_range(value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"{value:g} is not within 0 to 1, the range of pixels: divide figures of 0 to 255 by 255")
    return value


Level = Annotated[float, AfterValidator(_of_unit_range)]
Mean = tuple[Level, Level, Level]  # of red, green, blue
Deviation = tuple[PositiveFloat, PositiveFloat, PositiveFloat]
Size = Annotated[int, Field(gt=0, lt=2**48)]  # bytes or samples; sums stay within an int64
Amount = Annotated[int, Field(ge=0, lt=2**48)]


class StrictModel(Section):
    """A section of a card or manifest: an unknown key is refused with the nearest valid one."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, data: Any) -> Any:
        for key in data if isinstance(data, dict) else ():
            if key not in cls.model_fields:
                near = difflib.get_close_matches(str(key)[:100], cls.model_fields, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"valid: {', '.join(cls.model_fields)}"
                raise ValueError(f"unknown key {brief(key)}; {hint}")
        return data


def validation_message(error: ValidationError) -> str:
    """The first problem of a validation as one line, ``place.in.the.file: what is wrong``; an unknown key before a
    missing one, which is most often the same, mistyped."""
    problems = error.errors(include_url=False)
    problem = next((each for each in problems if each["type"] == "extra_forbidden"), problems[0])
    place = ".".join(str(part) for part in problem["loc"])
    reason = problem["msg"].removeprefix("Value error, ")
    return f"{place}: {reason}" if place else reason


def sample_key(split_name: str, number: int) -> str:
    """The key of a sample, computed from its number, so that a damaged sample can be named."""
    return f"{split_name}-{number:08d}"


SHOTS = ("many", "medium", "few")


class Shots(StrictModel):
    """Many: more than ``many`` training images of the class; Few: fewer than ``few``; Medium: the rest."""

    many: NonNegativeInt = 100
    few: NonNegativeInt = 20

    @model_validator(mode="after")
    def _ordered(self) -> "Shots":
        if self.few > self.many + 1:
            raise ValueError(f"few ({self.few}) overlaps many ({self.many}): few may be at most many + 1")
        return self

    def of(self, training_images: int) -> Literal["many", "medium", "few"]:
        """The shot of a class with that many training images."""
        if training_images > self.many:
            return "many"
        return "few" if training_images < self.few else "medium"


class Shard(StrictModel):
    """One tar and its index: sizes in bytes, digests of the whole files."""

    name: Name
    samples: Size
    bytes: Size
    sha256: Sha256
    index_bytes: Size
    index_sha256: Sha256
    first_key: Amount | None = None  # number in the first sample's key, if it differs from its id

    @property
    def file(self) -> str:
        """Name of the tar in the directory."""
        return f"{self.name}.tar"

    @property
    def index_file(self) -> str:
        """Name of the index beside the tar."""
        return f"{self.name}.index.npy"

    @property
    def energon_file(self) -> str:
        """Name of the file of offsets beside the tar, in Megatron-Energon's format."""
        return f"{self.name}.tar.idx"


class Split(StrictModel):
    """The samples of one split; ids 0 .. samples-1 follow the order of its shards."""

    name: Name
    samples: Size
    class_counts: tuple[Amount, ...]
    bytes: Size
    shards: tuple[Shard, ...]

    def starts(self) -> tuple[int, ...]:
        """Id of the first sample of each shard."""
        return tuple(itertools.accumulate((shard.samples for shard in self.shards[:-1]), initial=0))

    @model_validator(mode="after")
    def _sums_agree(self) -> "Split":
        sums = {
            "samples, summed over the shards,": (sum(s.samples for s in self.shards), self.samples),
            "bytes, summed over the shards,": (sum(s.bytes for s in self.shards), self.bytes),
            "class_counts, summed,": (sum(self.class_counts), self.samples),
        }
        for what, (found, stated) in sums.items():
            if found != stated:
                raise ValueError(f"{what} give {found}, but the split has {stated}")
        return self


@dataclass(frozen=True)
class TrainedData:
    """What a model has to know of the shards that it was trained on, to predict without them.

    Attributes:
        classes: their names, in the order of the logits.
        class_counts: training images of each.
        mean, std: of the channels of its pixels, in the 0-1 range.
        background: `#rrggbb` that the build put under transparent parts; None if it left them, or
            if an older paco_ds built the shards.
        license: of the images; None of a checkpoint that an older paco_ds wrote.
    """

    classes: Sequence[str]
    class_counts: Sequence[int]
    mean: Sequence[float]
    std: Sequence[float]
    background: str | None = None
    license: str | None = None

    def state(self) -> dict[str, Any]:
        """Its entries in a checkpoint: no entry for what there is not."""
        return {name: value for name, value in asdict(self).items() if value is not None}


class Manifest(StrictModel):
    """The content of manifest.json; it is written last, so a directory that has one is complete.

    ``mean`` and ``std`` are per channel (RGB) of pixels scaled to 0..1; a label is a position in ``classes``.
    """

    format: Literal["paco_ds shards"] = "paco_ds shards"
    version: Literal[1] = 1
    revision: PositiveInt = 1  # increased by each `add`
    listings: tuple[Sha256, ...] = ()  # digests of the images listed for the build and each `add`
    name: str
    license: str
    source: str
    seed: int
    classes: tuple[str, ...] = Field(min_length=1)
    mean: Mean
    std: Deviation
    background: HexColor | None = None  # under transparent parts; not written where the build had none
    shots: Shots
    splits: dict[Name, Split] = Field(min_length=1)

    _storage: Storage = PrivateAttr()
    _sha256: str = PrivateAttr()

    @model_validator(mode="after")
    def _splits_fit_classes(self) -> "Manifest":
        for name, split in self.splits.items():
            if split.name != name:
                raise ValueError(f"splits.{name} calls itself {split.name!r}")
            if len(split.class_counts) != len(self.classes):
                raise ValueError(
                    f"splits.{name}.class_counts has {len(split.class_counts)} entries for {len(self.classes)} classes"
                )
        return self

    @model_validator(mode="after")
    def _names_are_of_one_thing(self) -> "Manifest":
        shards = Counter(shard.name for split in self.splits.values() for shard in split.shards)
        for what, names in (("class", Counter(self.classes)), ("shard", shards)):
            if "" in names:
                raise ValueError(f"a {what} has an empty name")
            if repeated := [name for name, count in names.items() if count > 1]:
                raise ValueError(f"the {what} {repeated[0]!r} is listed twice")
        return self

    @property
    def storage(self) -> Storage:
        """The storage of the manifest and its shards."""
        return self._storage

    @property
    def directory(self) -> Path:
        """The local directory of the manifest; DataError if it is remote."""
        return self._storage.local_directory

    @property
    def sha256(self) -> str:
        """SHA-256 of the manifest's bytes; identifies the data of a run."""
        return self._sha256

    def split(self, name: str) -> Split:
        """The split of that name; DataError with the valid names."""
        if name not in self.splits:
            known, remedy = ", ".join(self.splits), _WITHOUT.get(name, "")
            raise DataError(f"{self.storage.url} has no split {name!r}; its splits are: {known}{remedy}")
        return self.splits[name]

    def shots_of_classes(self, train_split: str = "train") -> tuple[str, ...]:
        """Per class "many", "medium" or "few", by its number of images in ``train_split``."""
        return tuple(self.shots.of(count) for count in self.split(train_split).class_counts)

    def trained_data(self, train_split: str = "train") -> TrainedData:
        """What a checkpoint keeps of these shards."""
        counts = self.split(train_split).class_counts
        return TrainedData(self.classes, counts, self.mean, self.std, self.background, self.license)

    def check_files(self, split_name: str) -> None:
        """Raise DataError unless every shard and index of the split exists in full size, by one listing.

        Files of a `pipe:` command have no known size; each is checked when it is read.
        """
        if self.storage.is_pipe:
            return
        stated: dict[str, int] = {}
        for shard in self.split(split_name).shards:
            stated |= {shard.file: shard.bytes, shard.index_file: shard.index_bytes}
        sizes = self.storage.sizes()
        if sizes is None:
            with ThreadPoolExecutor(16) as pool:
                found = pool.map(lambda name: self.storage.size(name) if self.storage.exists(name) else None, stated)
                sizes = {name: size for name, size in zip(stated, found, strict=True) if size is not None}
        for name, size in stated.items():
            require_size(self.storage, name, size, sizes.get(name))


def require_size(storage: Storage, name: str, stated: int, found: int | None) -> None:
    """Raise DataError, with the remedy, unless a listed file has the stated bytes; `found` is None if it is missing."""
    remedy = f"copy it again or rebuild it; `paco-build-shards check {storage.url}` lists all damage of the directory"
    if found is None:
        raise DataError(f"{storage.place(name)} is missing, but {MANIFEST_FILE} lists it: {remedy}")
    if found != stated:
        raise DataError(f"{storage.place(name)} has {found} bytes, {MANIFEST_FILE} says {stated}: {remedy}")


def load_manifest(directory: str | Path | Storage) -> Manifest:
    """Read and verify ``directory``/manifest.json, a path, URL or storage; no shard is opened.

    The place may also be a manifest file itself, such as the `manifest-1.json` that `add` keeps.

    Raises:
        DataError: no directory, no manifest, not JSON, another format or version, or inconsistent sums.
    """
    storage, file = as_storage(directory), MANIFEST_FILE
    if storage.url.endswith(".json"):
        storage, file = storage.parent()
    path = storage.place(file)
    build = f"`paco-build-shards build CARD --output {storage.url}`"
    if storage.is_local and not storage.local_directory.is_dir():
        raise DataError(f"there is no shard directory {storage.url}; make it with {build}")
    try:
        raw = storage.read(file)
    except MissingFile as error:
        raise DataError(f"{storage.url} has no {file}: its build is not finished; make it with {build}") from error
    data = parse_json(raw, path, DataError, f"; rebuild it with {build} --overwrite")
    if not isinstance(data, dict) or data.get("format") != "paco_ds shards":
        raise DataError(f"{path} is not a manifest of paco_ds shards; make shards with {build}")
    if data.get("version") != FORMAT_VERSION:
        raise DataError(
            f"{path} has format version {brief(data.get('version'))}, this paco_ds reads version {FORMAT_VERSION}; "
            f"rebuild it with {build} --overwrite"
        )
    try:
        manifest = Manifest.model_validate(data)
    except ValidationError as error:
        raise DataError(
            f"{path} is inconsistent, was it edited by hand? {validation_message(error)}; "
            f"restore it or rebuild it with {build} --overwrite"
        ) from error
    manifest._storage, manifest._sha256 = storage, hashlib.sha256(raw).hexdigest()
    return manifest


def open_data(settings: DataSettings, splits: Iterable[str]) -> Manifest:
    """The manifest of the shards that `data.shards` names, with these splits checked to be there in full size.

    Raises:
        DataError: shards are missing, cut, or do not have the recipe's number of classes.
    """
    manifest = load_manifest(open_storage(settings))
    if settings.classes is not None and settings.classes != len(manifest.classes):
        raise DataError(
            f"data.classes is {settings.classes}, but {manifest.storage.url} has {len(manifest.classes)} classes: "
            f"point data.shards at other shards or set data.classes={len(manifest.classes)}"
        )
    for split in splits:
        manifest.check_files(split)
    return manifest
