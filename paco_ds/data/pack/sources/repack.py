"""The source `webdataset`: samples of other tars, repacked with another shard size, order or selection.

Tars are scanned once for where each image and label lies; only JSON and numbers are decoded.
"""

from __future__ import annotations

import fnmatch
import os
import tarfile
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import braceexpand
from pydantic import Field, StrictStr

from paco_ds.config.parse import parse_json
from paco_ds.data.manifest import Name, StrictModel
from paco_ds.data.pack.card import CLASSES_FILE, Card, Option
from paco_ds.data.pack.image_bytes import BadImage, Encoded
from paco_ds.data.pack.root import Root
from paco_ds.data.pack.samples import Samples, SamplesBuilder
from paco_ds.data.pack.source import ENDINGS, Source, class_names, ending
from paco_ds.data.storage import MissingFile, Storage
from paco_ds.errors import DataError

_MAX_OPEN = 64
_MOST_ABOUT = 1 << 20  # bytes of a JSON member


@dataclass
class Members:
    """Images that are members of tars. Tars stay open, since rows come in any order from a few of them."""

    root: Root
    _open: dict[str, int] = field(default_factory=dict, repr=False)

    def __getstate__(self) -> Root:
        return self.root

    def __setstate__(self, root: Root) -> None:
        self.root, self._open = root, {}

    def read(self, samples: Samples, row: int, room: memoryview) -> Encoded:
        name = samples.names[row]
        tar = name.partition("#")[0]
        if not self.root.storage.is_local:
            return self._read_range(tar, int(samples.places[row]), len(room) - 1)
        try:
            if tar not in self._open:
                if len(self._open) >= _MAX_OPEN:
                    os.close(self._open.pop(next(iter(self._open))))
                self._open[tar] = os.open(self.root.path / tar, os.O_RDONLY)
            size = os.preadv(self._open[tar], (room[:-1],), int(samples.places[row]))
        except OSError as error:
            raise BadImage("unreadable", name, error.strerror or str(error)) from error
        if size != len(room) - 1:
            raise self._changed(tar)
        return room[:-1]

    def _read_range(self, tar: str, place: int, size: int) -> bytes:
        try:
            return self.root.storage.read_range(tar, place, size)
        except MissingFile:
            raise self._changed(tar) from None

    def _changed(self, tar: str) -> DataError:
        return DataError(f"{self.root.storage.place(tar)} changed while the shards were built: start again")


class WebdatasetSplit(StrictModel):
    """Tars of another build: a pattern such as `train-*.tar` or `train-{000..107}.tar`."""

    tars: str


class WebdatasetCard(Card):
    """Samples of other webdataset shards: an image and `.json` with ``label_key`` and ``class_key``, or `.cls`."""

    page: ClassVar[str] = "the tars, as a pattern such as 'train-*.tar'"
    options: ClassVar[dict[str, Option]] = {"classes": CLASSES_FILE}

    source: Literal["webdataset"]
    label_key: str = "label"
    class_key: str = "class"
    classes: tuple[StrictStr, ...] | StrictStr | None = None
    splits: dict[Name, WebdatasetSplit] = Field(min_length=1)

    @classmethod
    def split_of(cls, page: str) -> dict[str, Any]:
        return {"tars": page}

    def list_images(self, root: Root) -> Source:
        """List the samples of tars. Labels are the numbers in them, class names those beside them or the card's."""
        names: dict[int, str] = {}
        splits = {}
        bad: list[BadImage] = []
        for split, tars in self.splits.items():
            scan = _Scan(self, root, SamplesBuilder(), names, bad)
            for tar in _expanded(root, tars.tars):
                scan.tar(tar)
            splits[split] = scan.rows.build()
        given = class_names(self.classes, root)
        largest = max((int(s.labels.max()) for s in splits.values() if len(s)), default=-1)
        if given is not None and largest >= len(given):
            raise DataError(f"label {largest} of the tars is out of range, the labels are 0 to {len(given) - 1}")
        classes = given or tuple(names.get(label, str(label)) for label in range(largest + 1))
        return Source(classes, splits, Members(root), bad=bad)


def _expanded(root: Root, pattern: str) -> list[str]:
    """The tars of a pattern with braces and stars, in the order of their names."""
    tars: list[str] = []
    for name in braceexpand.braceexpand(pattern):
        if "*" not in name and "?" not in name:
            tars.append(name)
            continue
        folder, _, last = name.rpartition("/")
        found = sorted(n for n in _names(root, folder) if fnmatch.fnmatchcase(n, last))
        tars += [f"{folder}/{n}" if folder else n for n in found]
    if not tars:
        raise DataError(f"no tar under {root} is called {pattern}")
    missing = [tar for tar in tars if not root.storage.exists(tar)]
    if missing:
        raise DataError(f"tar {root}/{missing[0]} is missing ({len(missing)} of {len(tars)})")
    return tars


def _names(root: Root, folder: str) -> list[str]:
    """Names of the files directly in a folder; none where there is no such folder."""
    if root.storage.is_local:
        place = root.path / folder
        return [entry.name for entry in os.scandir(place) if entry.is_file()] if place.is_dir() else []
    return [name for name in root.storage.find(folder) if "/" not in name]


@dataclass
class _Sample:
    """The members of one key that matter: where the image is, and what says its label."""

    image: tuple[str, int, int] | None = None
    about: bytes | None = None
    cls: bytes | None = None


@dataclass
class _Scan:
    """Reads tars one after another into a table."""

    card: WebdatasetCard
    root: Root
    rows: SamplesBuilder
    names: dict[int, str]
    bad: list[BadImage]

    def tar(self, tar: str) -> None:
        """Add the samples of a tar; DataError if it is damaged, since a reader would end at the place silently."""
        place, local = self.root.storage.place(tar), self.root.storage.is_local
        key, sample, end = "", _Sample(), 0
        try:
            # what lies behind a URL comes as a stream from end to end, since a request a member would take longer
            with (
                self.root.open(tar, "tar") as file,
                tarfile.open(fileobj=file, mode="r:" if local else "r|") as archive,
            ):
                while (member := archive.next()) is not None:
                    archive.members = []  # type: ignore[attr-defined]  # it would keep every member
                    end = member.offset_data + member.size
                    if not member.isreg():
                        continue
                    folder, _, base = member.name.rpartition("/")
                    stem, _, suffix = base.partition(".")
                    if f"{folder}/{stem}" != key:
                        self._take(tar, key, sample)
                        key, sample = f"{folder}/{stem}", _Sample()
                    if ending(base) in ENDINGS:
                        sample.image = (member.name, member.offset_data, member.size)
                    elif suffix.lower() in ("json", "cls"):
                        self._label_of(archive, member, suffix.lower(), sample)
        except (tarfile.TarError, OSError, EOFError) as error:
            raise DataError(f"{place} is damaged or no tar ({error}): copy it again") from error
        self._take(tar, key, sample)
        _require_whole(self.root.storage, tar, end)

    def _label_of(self, archive: tarfile.TarFile, member: tarfile.TarInfo, suffix: str, sample: _Sample) -> None:
        if member.size > _MOST_ABOUT:
            raise DataError(f"{archive.name!s}: {member.name} has {member.size} bytes, too many to say a label")
        file = archive.extractfile(member)
        assert file is not None  # a regular file
        if suffix == "json":
            sample.about = file.read()
        else:
            sample.cls = file.read()

    def _take(self, tar: str, key: str, sample: _Sample) -> None:
        """One sample into the table, or among the bad ones."""
        if sample == _Sample():
            return
        where = f"{tar}#{key.lstrip('/')}"
        if sample.image is None:
            self.bad.append(BadImage("no_image", where))
            return
        member, offset, size = sample.image
        label, name = self._label(sample, f"{self.root}/{where}")
        if name is not None and self.names.setdefault(label, name) != name:
            raise DataError(
                f"{self.root}/{where}: label {label} is called {name!r}, and {self.names[label]!r} before it"
            )
        self.rows.add(f"{tar}#{member}", label, place=offset, size=size)

    def _label(self, sample: _Sample, where: str) -> tuple[int, str | None]:
        name = None
        try:
            if sample.about is not None:
                about = parse_json(sample.about, where, DataError)
                label, name = about[self.card.label_key], about.get(self.card.class_key)
            else:
                label = int(sample.cls or b"")
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise DataError(
                f"{where} has no label: neither .json with {self.card.label_key!r} (label_key) nor .cls ({error!r})"
            ) from error
        if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < 2**31:
            raise DataError(f"{where}: label {label!r} is no number from 0")
        return label, None if name is None else str(name)


def _require_whole(storage: Storage, tar: str, end: int) -> None:
    """tarfile, like webdataset, ends silently at a damaged header: what follows the last member must be zeros."""
    start = -(-end // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    tail = storage.read_range(tar, start, max(0, min(2 * tarfile.BLOCKSIZE, storage.size(tar) - start)))
    if len(tail) < 2 * tarfile.BLOCKSIZE or any(tail):
        raise DataError(f"{storage.place(tar)} is damaged after byte {end}: no end of a tar there; copy it again")
