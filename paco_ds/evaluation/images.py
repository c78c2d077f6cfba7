"""Lists the images that a command is given: files, folders, patterns, lists, shards and tars of webdataset."""

from __future__ import annotations

import glob
import os
import stat
import sys
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from paco_ds.config.parse import one_line
from paco_ds.data.manifest import MANIFEST_FILE, load_manifest
from paco_ds.data.names import is_hidden
from paco_ds.data.pack.root import Walk, unreadable
from paco_ds.data.pack.source import ENDINGS, ending
from paco_ds.data.pack.tar_scan import refuse_special, require_whole
from paco_ds.data.shard import ShardReader
from paco_ds.data.storage import as_storage
from paco_ds.errors import UserError

WHAT = "images, folders, patterns, shards, tars, or - for a list of paths on standard input"


@dataclass(frozen=True)
class ListedImage:
    """An image file.

    Attributes:
        name: by which the output calls it: the path of a file; PLACE/FILE.tar/KEY in shards and tars.
        label: name of its class where shards say so.
    """

    name: str
    label: str | None = None

    def read(self) -> bytes:
        """The encoded image.

        Raises:
            OSError, ValueError, BadSample: it cannot be read.
        """
        if not stat.S_ISREG(os.stat(self.name).st_mode):
            raise ValueError("no_file")  # a pipe would wait for a writer
        return Path(self.name).read_bytes()


@dataclass(frozen=True)
class TarImage(ListedImage):
    """A member of a tar: `size` bytes from `offset`."""

    tar: str = ""
    offset: int = 0
    size: int = 0

    def read(self) -> bytes:
        with open(self.tar, "rb") as file:
            file.seek(self.offset)
            image = file.read(self.size)
        if len(image) != self.size:
            raise ValueError("short_read")
        return image


@dataclass(frozen=True)
class ShardImage(ListedImage):
    """A sample of our shards; its bytes are verified by CRC-32."""

    reader: ShardReader | None = None
    sample: int = 0

    def read(self) -> bytes:
        assert self.reader is not None
        return self.reader.read(self.sample).image


def list_images(places: Iterable[str], split: str | None = None) -> Iterator[ListedImage]:
    """The images of all places, in their order; those of a folder by name.

    Args:
        split: of shards; all of them by default.

    Raises:
        UserError: there is no such place, it is no tar, or shards are damaged.
    """
    for place in places:
        if place == "-":
            yield from map(ListedImage, _lines())
        elif os.path.lexists(place):
            yield from _of_place(place, split)
        elif found := sorted(glob.glob(place, recursive=True)):
            for each in found:
                yield from _of_place(each, split)
        else:
            raise UserError(f"{place} is not there: give {WHAT}")


def _of_place(place: str, split: str | None) -> Iterator[ListedImage]:
    if os.path.isdir(place):
        shards = os.path.isfile(os.path.join(place, MANIFEST_FILE))
        yield from _of_shards(place, split) if shards else _of_folder(place)
    elif os.path.basename(place) == MANIFEST_FILE:
        yield from _of_shards(os.path.dirname(place) or ".", split)
    elif place.endswith(".tar"):
        yield from _of_tar(place)
    else:
        yield ListedImage(place)


def _lines() -> Iterator[str]:
    """The paths on standard input, one a line; names of files need not be UTF-8."""
    if sys.stdin is None:
        raise UserError("- reads paths from standard input, which is closed: pipe them in, or give them as arguments")
    for line in sys.stdin.buffer:
        if path := os.fsdecode(line.rstrip(b"\r\n")):
            yield path


def _of_folder(place: str) -> Iterator[ListedImage]:
    walk = Walk(Path(place))
    for folder, folders, files in os.walk(place, followlinks=True, onerror=unreadable):
        folders[:] = [name for name in sorted(folders) if walk.enters(os.path.join(folder, name))]
        images = sorted(name for name in files if ending(name) in ENDINGS and not is_hidden(name))
        yield from (ListedImage(os.path.join(folder, name)) for name in images)


def _of_shards(place: str, wanted: str | None) -> Iterator[ListedImage]:
    manifest = load_manifest(place)
    for split in [manifest.split(wanted)] if wanted else manifest.splits.values():
        manifest.check_files(split.name)
        reader = ShardReader(manifest.storage, split)
        labels = reader.labels()
        for number, shard in enumerate(split.shards):
            for sample in reader.ids_of_shard(number):
                name = os.path.join(place, shard.file, reader.key_of(sample))
                yield ShardImage(name, manifest.classes[labels[sample]], reader, sample)


def _of_tar(place: str) -> Iterator[ListedImage]:
    end = 0
    try:
        with tarfile.open(place, "r:") as tar:
            for member in tar:
                end = member.offset_data + member.size
                if ending(member.name) in ENDINGS and not is_hidden(member.name):
                    refuse_special(member, place)
                    name = os.path.join(place, member.name)
                    yield TarImage(name, None, place, member.offset_data, member.size)
    except tarfile.TarError as error:
        raise UserError(f"{place} is not a whole tar ({one_line(error)}): copy it again, or unpack it") from None
    folder, name = os.path.split(place)
    require_whole(as_storage(folder or "."), name, end)
