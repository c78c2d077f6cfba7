"""Lists the images that a command is given: files, folders, patterns, lists, shards and tars of webdataset."""

from __future__ import annotations

import codecs
import errno
import glob
import json
import os
import re
import stat
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from paco_ds.config.parse import one_line
from paco_ds.data.manifest import MANIFEST_FILE, Manifest, load_manifest
from paco_ds.data.names import is_hidden
from paco_ds.data.pack.root import Walk, unreadable
from paco_ds.data.pack.source import ENDINGS, ending
from paco_ds.data.pack.tar_scan import refuse_special, require_whole
from paco_ds.data.shard import ShardReader
from paco_ds.data.storage import as_storage
from paco_ds.errors import UserError

WHAT = "images, folders, patterns, shards, tars, or - for a list of paths on standard input"
_MANIFEST = re.compile(r"manifest(-[0-9]+)?\.json")  # that of shards, or one that `add` kept
_PACKED_TAR = re.compile(r"\.(tar\.(gz|bz2|xz|zst)|tgz|tbz2?|txz)$", re.IGNORECASE)


@dataclass(frozen=True)
class ListedImage:
    """An image file.

    Attributes:
        name: by which the output calls it: the path of a file; PLACE/FILE.tar/KEY in shards and tars.
        label: name of its class where shards say so.
        offset: of its bytes in a tar.
    """

    name: str
    label: str | None = None
    offset: int = 0

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


def list_images(
    places: Sequence[str], split: str | None = None, left_out: Counter[str] | None = None
) -> Iterator[ListedImage]:
    """The images of all places, in their order; those of a folder by name. Of several places, or of a pattern, each
    image once; lines of standard input are taken as they are.

    Args:
        split: of shards; all of them by default.
        left_out: counts the files of folders that are no images, by ending.

    Raises:
        UserError: there is no such place, it is no tar, or shards are damaged.
    """
    left_out = Counter() if left_out is None else left_out
    listed, real_folder = set[tuple[str, str, int]](), lru_cache(os.path.realpath)
    for place in places:
        if place == "-":
            yield from map(ListedImage, _lines())
            continue
        found = [place] if os.path.lexists(place) else _matches(place)
        if not found:
            raise UserError(f"{place} is not there: give {WHAT}")
        for each in found:
            if each != place and _is_foreign_manifest(each):
                left_out[".json"] += 1
                continue
            for image in _of_place(each, split, left_out):
                if len(places) > 1 or each != place:
                    folder, name = os.path.split(image.name)
                    key = real_folder(folder), name, image.offset
                    if key in listed:
                        continue
                    listed.add(key)
                yield image


def _of_place(place: str, split: str | None, left_out: Counter[str]) -> Iterator[ListedImage]:
    name = os.path.basename(place)
    if os.path.isdir(place):
        yield from _of_shards(place, split) if _has_shards(place) else _of_folder(place, left_out)
    elif _MANIFEST.fullmatch(name):
        yield from _of_shards(os.path.dirname(place) or "." if name == MANIFEST_FILE else place, split)
    elif ending(name) == "tar":
        yield from _of_tar(place)
    else:
        if _PACKED_TAR.search(name):
            raise UserError(f"{place} is a compressed tar, and images are read by their place in a tar: unpack it")
        yield ListedImage(place)


def _matches(pattern: str) -> list[str]:
    """What a pattern names, sorted: no folder whose content it names too, and nothing in a folder of shards."""
    found = sorted(glob.glob(pattern, recursive=True))
    named_inside, kept, shards = {os.path.dirname(each.rstrip("/")) for each in found}, list[str](), list[str]()
    for each in found:
        if each.startswith(tuple(shards)) or _goes_in_circles(each):
            continue
        if os.path.isdir(each) and _has_shards(each):
            shards.append(os.path.join(each, ""))
        elif os.path.isdir(each) and each.rstrip("/") in named_inside:
            continue
        kept.append(each)
    return kept


def _goes_in_circles(path: str) -> bool:
    """Whether it leads through more links than the system follows, as a link to a folder above makes them."""
    try:
        os.stat(path)
    except OSError as error:
        return error.errno == errno.ELOOP
    return False


def _has_shards(folder: str) -> bool:
    manifest = os.path.join(folder, MANIFEST_FILE)
    return os.path.isfile(manifest) and not _is_foreign_manifest(manifest)


def _is_foreign_manifest(place: str) -> bool:
    """Whether a manifest.json is whole and of another program, as a web page's; a damaged one counts as ours."""
    if not _MANIFEST.fullmatch(os.path.basename(place)):
        return False
    try:
        content = json.loads(Path(place).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return not isinstance(content, dict) or content.get("format") != Manifest.model_fields["format"].default


def _lines() -> Iterator[str]:
    """The paths on standard input, one a line; names of files need not be UTF-8, and a byte order mark is no part of
    the first."""
    if sys.stdin is None:
        raise UserError("- reads paths from standard input, which is closed: pipe them in, or give them as arguments")
    for number, line in enumerate(sys.stdin.buffer):
        if path := os.fsdecode((line if number else line.removeprefix(codecs.BOM_UTF8)).rstrip(b"\r\n")):
            yield path


def _of_folder(place: str, left_out: Counter[str]) -> Iterator[ListedImage]:
    walk = Walk(Path(place))
    for folder, folders, files in os.walk(place, followlinks=True, onerror=unreadable):
        folders[:] = [name for name in sorted(folders) if walk.enters(os.path.join(folder, name))]
        for name in sorted(filter(walk.takes, files)):
            if ending(name) in ENDINGS:
                yield ListedImage(os.path.join(folder, name))
            elif os.path.exists(os.path.join(folder, name)):
                left_out[f".{ending(name)}" if ending(name) else "(no ending)"] += 1
            else:
                left_out["(link to nothing)"] += 1


def _of_shards(place: str, wanted: str | None) -> Iterator[ListedImage]:
    manifest, folder = load_manifest(place), os.path.dirname(place) if place.endswith(".json") else place
    for split in [manifest.split(wanted)] if wanted else manifest.splits.values():
        manifest.check_files(split.name)
        reader = ShardReader(manifest.storage, split)
        labels = reader.labels()
        for number, shard in enumerate(split.shards):
            for sample in reader.ids_of_shard(number):
                name = os.path.join(folder, shard.file, reader.key_of(sample))
                yield ShardImage(name, manifest.classes[labels[sample]], reader=reader, sample=sample)


def _of_tar(place: str) -> Iterator[ListedImage]:
    end = 0
    try:
        with tarfile.open(place, "r:") as tar:
            for member in tar:
                end = member.offset_data + member.size
                if ending(member.name) in ENDINGS and not is_hidden(member.name):
                    refuse_special(member, place)
                    name = os.path.join(place, member.name)
                    yield TarImage(name, None, member.offset_data, place, member.size)
    except tarfile.TarError as error:
        raise UserError(f"{place} is not a whole tar ({one_line(error)}): copy it again, or unpack it") from None
    folder, name = os.path.split(place)
    require_whole(as_storage(folder or "."), name, end)
