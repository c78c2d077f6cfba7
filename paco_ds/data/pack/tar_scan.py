"""Scanning the tars of others for where each image and label lies. What is not whole or not one thing is refused."""

from __future__ import annotations

import tarfile
from dataclasses import dataclass, field

from paco_ds.config.parse import parse_json
from paco_ds.data.names import is_hidden, same_name, same_path
from paco_ds.data.pack.file_kinds import LONGEST_MAGIC, is_archive, packed_as
from paco_ds.data.pack.image_bytes import BadImage
from paco_ds.data.pack.root import Root
from paco_ds.data.pack.samples import SamplesBuilder
from paco_ds.data.pack.source import ENDINGS, LARGEST_LABEL, ending, label_in, some
from paco_ds.data.storage import Storage
from paco_ds.errors import DataError

_MOST_ABOUT = 1 << 20  # bytes of a JSON member
_TAIL = 1 << 20  # bytes read at a time of what follows the last member
_SORT = "pack it sorted by name, so that the members of a sample lie beside each other (tar --sort=name)"
_DOTS = "; a key ends at the first dot of a name: where names have dots before their ending, pack them without"


@dataclass
class _Sample:
    """The members of one key that matter: images and what says their label, by ending."""

    images: dict[str, tuple[str, int, int]] = field(default_factory=dict)
    about: bytes | None = None
    cls: bytes | None = None


@dataclass
class TarScan:
    """Reads tars one after another into a table.

    Attributes:
        label_key, class_key: of the label and its class name in a sample's `.json`.
        image_ending: of the image to take, from the first dot on; None where samples have one.
        rows: a row for each sample.
        names: class names by label, as far as the tars give them.
        bad: samples without an image.
        hidden, first_hidden: number of hidden members, which are left out, and the name of the first.
        archives: members that are archives themselves, which are not read.
    """

    root: Root
    label_key: str
    class_key: str
    image_ending: str | None
    names: dict[int, str]
    bad: list[BadImage]
    rows: SamplesBuilder = field(default_factory=SamplesBuilder)
    hidden: int = 0
    first_hidden: str = ""
    archives: list[str] = field(default_factory=list)

    def tar(self, tar: str) -> None:
        """Add the samples of a tar; DataError if it is damaged, since a reader would end at the place silently."""
        tar = same_path(tar)  # `./a.tar` in train and `a.tar` in val are the same images
        place, local = self.root.storage.place(tar), self.root.storage.is_local
        key, sample, end = "", _Sample(), 0
        keys: set[str] = set()
        self._refuse_packed(tar)
        stamp = self.root.storage.stamp(tar)
        try:
            # what lies behind a URL comes as a stream from end to end, since a request a member would take longer
            with (
                self.root.open(tar, "tar") as file,
                tarfile.open(fileobj=file, mode="r:" if local else "r|") as archive,
            ):
                while (member := archive.next()) is not None:
                    archive.members = []  # type: ignore[attr-defined]  # it would keep every member
                    end = member.offset_data + member.size
                    if not member.isreg() and not _matters(member.name):
                        continue
                    if is_hidden(member.name):
                        self.hidden += 1
                        self.first_hidden = self.first_hidden or member.name
                        continue
                    if is_archive(member.name):
                        self.archives.append(f"{tar}#{member.name}")
                    refuse_special(member, place)
                    folder, _, base = same_path(member.name).rpartition("/")
                    stem, _, suffix = base.partition(".")
                    if f"{folder}/{stem}" != key:
                        self._take(tar, stamp, key, sample)
                        key, sample = f"{folder}/{stem}", _Sample()
                        if key in keys:
                            raise DataError(f"{place} has members of {key.lstrip('/')} in two places: {_SORT}")
                        keys.add(key)
                    self._member(archive, member, suffix.lower(), sample, place)
        except (tarfile.TarError, OSError, EOFError) as error:
            raise DataError(f"{place} is damaged or no tar ({error}): copy it again") from error
        self._take(tar, stamp, key, sample)
        require_whole(self.root.storage, tar, end)

    def _refuse_packed(self, tar: str) -> None:
        """Raise DataError for a compressed tar or another archive, by its first bytes."""
        storage = self.root.storage
        if packed := packed_as(storage.read_range(tar, 0, min(LONGEST_MAGIC, storage.size(tar)))):
            kind, remedy = packed
            remedy += " and pack its files as a tar" if "archive" in kind else ""
            raise DataError(f"{storage.place(tar)} is {kind}, and images are read by their place in a tar: {remedy}")

    def _member(
        self, archive: tarfile.TarFile, member: tarfile.TarInfo, suffix: str, sample: _Sample, place: str
    ) -> None:
        """Note an image or what says a label; DataError if it is there already."""
        twice = False
        if ending(member.name) in ENDINGS:
            twice = suffix in sample.images
            sample.images[suffix] = (member.name, member.offset_data, member.size)
        elif suffix in ("json", "cls"):
            twice = (sample.about if suffix == "json" else sample.cls) is not None
            self._label_of(archive, member, suffix, sample)
        if twice:
            raise DataError(f"{place} has {member.name} twice, and one of them would be lost: remove one")

    def _label_of(self, archive: tarfile.TarFile, member: tarfile.TarInfo, suffix: str, sample: _Sample) -> None:
        if member.size > _MOST_ABOUT:
            raise DataError(f"{archive.name!s}: {member.name} has {member.size} bytes, too many to say a label")
        file = archive.extractfile(member)
        assert file is not None  # a regular file
        if suffix == "json":
            sample.about = file.read()
        else:
            sample.cls = file.read()

    def _take(self, tar: str, stamp: int, key: str, sample: _Sample) -> None:
        """One sample into the table, or among the bad ones."""
        if sample == _Sample():
            return
        where = f"{tar}#{key.lstrip('/')}"
        if (image := self._image(sample, f"{self.root}/{where}")) is None:
            self.bad.append(BadImage("no_image", where))
            return
        member, offset, size = image
        label, name = self._label(sample, f"{self.root}/{where}")
        if name is not None and self.names.setdefault(label, name) != name:
            raise DataError(
                f"{self.root}/{where}: label {label} is called {name!r}, and {self.names[label]!r} before it"
            )
        self.rows.add(f"{tar}#{member}", label, place=offset, size=size, stamp=stamp)

    def _image(self, sample: _Sample, where: str) -> tuple[str, int, int] | None:
        if self.image_ending is not None:
            return sample.images.get(self.image_ending.lower().lstrip("."))
        if len(sample.images) > 1:
            raise DataError(
                f"{where} has several images, {some(f'.{each}' for each in sample.images)}: choose one with "
                f"--image-ending (image_ending in a card){_hint(sample)}"
            )
        return next(iter(sample.images.values()), None)

    def _label(self, sample: _Sample, where: str) -> tuple[int, str | None]:
        """(label, class name if there is one) by the JSON or, where that has none, by `.cls`."""
        about = None if sample.about is None else parse_json(sample.about, where, DataError, once=True)
        if about is not None and not isinstance(about, dict):
            raise DataError(f"{where}: its .json is no object with keys, but {about!r:.60}")
        label, name = (about or {}).get(self.label_key), (about or {}).get(self.class_key)
        written = None if sample.cls is None else sample.cls.decode("utf-8-sig", "replace").strip()
        number = None if written is None else label_in(written, LARGEST_LABEL, f"{where}: .cls")
        if label is None:
            label = number
        if label is None:
            lacks = f"its .json has no {self.label_key!r} (label_key)" if about is not None else "no .json"
            raise DataError(
                f"{where} has no label: {lacks}, no .cls; if it lies elsewhere in the tar, {_SORT}{_hint(sample)}"
            )
        if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < LARGEST_LABEL:
            raise DataError(f"{where}: label {label!r:.60} is no number from 0 to {LARGEST_LABEL - 1}")
        if number not in (None, label):
            raise DataError(f"{where}: label {label} by its .json, and {written} by its .cls: remove one of the two")
        return label, None if name is None else same_name(str(name))


def _hint(sample: _Sample) -> str:
    """What else may be the cause where an image's ending has a dot in it, as `v1.0000.jpg` of `img.v1.0000.jpg`."""
    return _DOTS if any("." in each for each in sample.images) else ""


def _matters(name: str) -> bool:
    """Whether a member of this name would be an image, or say a label."""
    return ending(name) in ENDINGS or ending(name) in ("json", "cls")


def refuse_special(member: tarfile.TarInfo, place: str) -> None:
    """Raise DataError for a member whose bytes do not lie in the tar as they are: readers of webdataset skip it."""
    if member.issparse():
        raise DataError(f"{place}: {member.name} is stored as a sparse file: pack it as a plain one")
    if member.islnk() or member.issym():
        raise DataError(
            f"{place}: {member.name} is a link to {member.linkname}, without bytes of its own: pack it with "
            "tar --dereference --hard-dereference"
        )
    if not member.isreg():
        raise DataError(f"{place}: {member.name} is a folder, a device or the like, no file: take it out")


def require_whole(storage: Storage, tar: str, end: int) -> None:
    """tarfile, like webdataset, ends silently at a damaged header or another archive: after the last member there must
    be zeros, two blocks at least, and nothing else."""
    start, size = -(-end // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE, storage.size(tar)
    if size < start + 2 * tarfile.BLOCKSIZE:
        raise DataError(f"{storage.place(tar)} is damaged after byte {end}: no end of a tar there; copy it again")
    for at in range(start, size, _TAIL):
        tail = storage.read_range(tar, at, min(_TAIL, size - at))
        if not any(tail):
            continue
        place = storage.place(tar)
        if any(tail[: 2 * tarfile.BLOCKSIZE]) and at == start:
            raise DataError(f"{place} is damaged after byte {end}: no end of a tar there; copy it again")
        first = at + next(number for number, byte in enumerate(tail) if byte)
        raise DataError(
            f"{place} goes on after its end, at byte {first}: tars joined by `cat`? All that follows would be lost: "
            "give them as files of their own, or join them with `tar --concatenate`"
        )
