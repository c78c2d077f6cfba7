"""The table of a split's source images, in columns, so that 3 million rows fit in memory.

A row takes its name and 28 bytes. Workers receive only their rows (`Samples.take`).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

MISSING = -1  # size of an image that is listed but does not exist
_BLOCK = 2048  # rows converted to Python objects at a time


class Names(Sequence[str]):
    """Strings as one blob of UTF-8 and int64 offsets [N + 1]; other encodings survive as surrogate escapes."""

    def __init__(self, blob: bytes | bytearray, offsets: npt.NDArray[np.int64]) -> None:
        self.blob, self.offsets = blob, offsets

    @classmethod
    def of(cls, names: Iterable[str]) -> Names:
        """From strings, one at a time: an iterator of millions never becomes a list."""
        blob, ends = bytearray(), array("q", [0])
        for name in names:
            blob += name.encode("utf-8", "surrogateescape")
            ends.append(len(blob))
        return cls(blob, np.array(ends, np.int64))

    def raw(self, row: int) -> bytes:
        """The bytes of one name."""
        return bytes(self.blob[self.offsets[row] : self.offsets[row + 1]])

    def text(self, row: int) -> str:
        """One name for display and storage: bytes that are not UTF-8 become escapes."""
        return self.raw(row).decode("utf-8", "backslashreplace")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> str:  # type: ignore[override]  # `take` replaces slices
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)} names")
        return self.raw(row).decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        return (raw.decode("utf-8", "surrogateescape") for raw in self.raws())

    def raws(self) -> Iterator[bytes]:
        """The bytes of every name, in half the time of `raw` for each row."""
        for block in self.blocks():
            blob = bytes(block.blob)
            yield from (blob[a:b] for a, b in pairwise(block.offsets.tolist()))

    def texts(self) -> Iterator[str]:
        """Every name, as `text`."""
        return (raw.decode("utf-8", "backslashreplace") for raw in self.raws())

    def blocks(self, size: int = _BLOCK) -> Iterator[Names]:
        """The names in order, in blocks of `size`."""
        for at in range(0, len(self), size):
            offsets = self.offsets[at : at + size + 1]
            yield Names(bytes(self.blob[offsets[0] : offsets[-1]]), offsets - offsets[0])

    def take(self, rows: npt.NDArray[np.int64]) -> Names:
        """The names of these rows, in their order."""
        begins, ends = self.offsets[rows], self.offsets[rows + 1]
        blob = b"".join(self.blob[a:b] for a, b in zip(begins.tolist(), ends.tolist(), strict=True))
        return Names(blob, np.concatenate((np.zeros(1, np.int64), np.cumsum(ends - begins, dtype=np.int64))))

    def repeated(self) -> npt.NDArray[np.int64]:
        """Rows whose name occurs in an earlier row, ascending."""
        hashes = np.fromiter(map(hash, self.raws()), np.int64, len(self))
        order = np.argsort(hashes, kind="stable")
        alike = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
        suspects = np.unique(np.concatenate((order[alike], order[alike + 1])))  # two names may share a hash
        seen: set[bytes] = set()
        again = []
        for row in suspects.tolist():
            name = self.raw(row)
            again.append(row) if name in seen else seen.add(name)
        return np.array(again, np.int64)


@dataclass(frozen=True)
class Samples:
    """The images of a split at their source, row by row.

    Attributes:
        names: relative to the root: a path, or `file#position` in a file of many images.
        labels: int32 [N].
        sizes: int64 [N], bytes at the source; MISSING where the image does not exist.
        stamps: int64 [N], `Storage.stamp` of the file, or a digest of its pixels if they are read for the list.
        places: int64 [N], position in a file of many images; empty for single files.
        groups: int32 [N], images of a group stay in the same split; empty without groups.
    """

    names: Names
    labels: npt.NDArray[np.int32]
    sizes: npt.NDArray[np.int64]
    stamps: npt.NDArray[np.int64]
    places: npt.NDArray[np.int64]
    groups: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: npt.NDArray[np.int64]) -> Samples:
        """These rows, in their order."""
        return Samples(
            self.names.take(rows),
            self.labels[rows],
            self.sizes[rows],
            self.stamps[rows],
            self.places[rows] if len(self.places) else self.places,
            self.groups[rows] if len(self.groups) else self.groups,
        )

    def sized(self, sizes: npt.NDArray[np.int64], stamps: npt.NDArray[np.int64]) -> Samples:
        """The same rows with these sizes and stamps."""
        return replace(self, sizes=sizes, stamps=stamps)

    def counts(self, classes: int) -> npt.NDArray[np.int64]:
        """Images of each class, int64 [classes]."""
        return np.bincount(self.labels, minlength=classes)


class SamplesBuilder:
    """Collects rows one at a time."""

    def __init__(self) -> None:
        self._blob, self._ends = bytearray(), array("q", [0])
        self._labels, self._groups = array("i"), array("i")
        self._places, self._sizes, self._stamps = array("q"), array("q"), array("q")

    def __len__(self) -> int:
        return len(self._labels)

    def add(
        self,
        name: str,
        label: int,
        *,
        group: int | None = None,
        place: int | None = None,
        size: int | None = None,
        stamp: int | None = None,
    ) -> None:
        """Add a row; give group, place, size and stamp for every row or for none."""
        self._blob += name.encode("utf-8", "surrogateescape")
        self._ends.append(len(self._blob))
        self._labels.append(label)
        if group is not None:
            self._groups.append(group)
        if place is not None:
            self._places.append(place)
        if size is not None:
            self._sizes.append(size)
        if stamp is not None:
            self._stamps.append(stamp)

    def build(self) -> Samples:
        """The table; sizes are MISSING and stamps 0 unless given, until `Samples.sized`."""
        count = len(self)
        return Samples(
            Names(self._blob, np.array(self._ends, np.int64)),
            np.array(self._labels, np.int32),
            np.array(self._sizes, np.int64) if self._sizes else np.full(count, MISSING, np.int64),
            np.array(self._stamps, np.int64) if self._stamps else np.zeros(count, np.int64),
            np.array(self._places, np.int64),
            np.array(self._groups, np.int32),
        )
