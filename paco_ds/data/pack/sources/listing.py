"""Owns the sources `list` and `csv`: text files that name an image and its class on each line, read line by line."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from paco_ds.data.card import CsvCard, ListCard
from paco_ds.data.pack.samples import Samples, SamplesBuilder
from paco_ds.data.pack.sources.source import Files, Root, Source, class_names, require_inside, some
from paco_ds.errors import DataError

_LARGEST_LABEL = 10_000_000  # a label beyond it is a mistake, not a class


def read_lists(card: ListCard, root: Root) -> Source:
    """List files as ImageNet-LT, Places-LT and iNaturalist18 publish them: `path label`, the label counted from 0."""
    classes = class_names(card.classes, root)
    limit = len(classes) if classes is not None else _LARGEST_LABEL
    splits = {name: _read_list(root, split.list, limit) for name, split in card.splits.items()}
    if classes is None:
        largest = max((int(samples.labels.max()) for samples in splits.values() if len(samples)), default=-1)
        classes = tuple(str(label) for label in range(largest + 1))
    return Source(classes, splits, Files(root))


def _read_list(root: Root, file: str, limit: int) -> Samples:
    rows = SamplesBuilder()
    with root.open(file, "the list file") as stream:
        for number, line in enumerate(_lines(stream, f"{root}/{file}"), 1):
            where = f"{root}/{file}, line {number}"
            if not line.strip():
                continue
            path, _, label = line.strip().rpartition(" ") if " " in line.strip() else line.strip().rpartition("\t")
            if not path or not label.isdecimal():
                raise DataError(f"{where}: {line.strip()!r:.80} is not a path and a label from 0")
            if int(label) >= limit:
                raise DataError(f"{where}: label {label} is out of range, the labels are 0 to {limit - 1}")
            require_inside(where, path.strip())
            rows.add(path.strip(), int(label))
    if not len(rows):
        raise DataError(f"{root}/{file} names no image")
    return rows.build()


def read_csv(card: CsvCard, root: Root) -> Source:
    """CSV files with a header. A label is a class name; with ``classes`` given it may be a position in them."""
    classes = class_names(card.classes, root)
    labels = _Labels(classes)
    groups: dict[str, int] = {}
    splits = {
        name: _read_rows(card, root, split.file, labels, groups, may_add=name == "train" or "train" not in card.splits)
        for name, split in sorted(card.splits.items(), key=lambda item: item[0] != "train")
    }
    names, order = labels.sorted()
    relabelled = {
        name: Samples(s.names, order[s.labels], s.sizes, s.stamps, s.places, s.groups) for name, s in splits.items()
    }
    return Source(names, {name: relabelled[name] for name in card.splits}, Files(root))


class _Labels:
    """Class names met so far; closed when the card gives them."""

    def __init__(self, given: tuple[str, ...] | None) -> None:
        self._given = given
        self._number = {name: label for label, name in enumerate(given or ())}

    def find(self, text: str, where: str, may_add: bool) -> int:
        number = self._number.get(text)
        if number is not None:
            return number
        if self._given is None and may_add:
            return self._number.setdefault(text, len(self._number))
        if self._given is not None and text.isdecimal():
            if int(text) < len(self._given):
                return int(text)
            raise DataError(f"{where}: label {text} is out of range, the labels are 0 to {len(self._given) - 1}")
        known = "the classes given" if self._given is not None else "the classes of train"
        raise DataError(f"{where}: {text!r:.60} is none of {known}")

    def sorted(self) -> tuple[tuple[str, ...], np.ndarray]:
        """Class names in their final order, numbers by value and else by name, and the new label of each old one."""
        if self._given is not None:
            return self._given, np.arange(len(self._given), dtype=np.int32)
        numeric = all(name.isdecimal() for name in self._number)
        names = sorted(self._number, key=lambda name: (int(name), name) if numeric else (0, name))
        order = np.empty(len(names), np.int32)
        order[[self._number[name] for name in names]] = np.arange(len(names), dtype=np.int32)
        return tuple(names), order


def _read_rows(
    card: CsvCard, root: Root, file: str, labels: _Labels, groups: dict[str, int], *, may_add: bool
) -> Samples:
    rows = SamplesBuilder()
    place = f"{root}/{file}"
    with root.open(file, "the CSV file") as stream:
        reader = csv.reader(_lines(stream, place), delimiter=card.delimiter, strict=True)
        try:
            header = [name.strip() for name in next(reader, [])]
            path_at = _column(header, card.path_column, "path_column", place)
            label_at = _column(header, card.label_column, "label_column", place)
            group_at = _column(header, card.group_column, "group_column", place) if card.group_column else None
            for row in reader:
                if not row:
                    continue
                where = f"{place}, line {reader.line_num}"
                if len(row) != len(header):
                    raise DataError(f"{where} has {len(row)} fields, the header has {len(header)}")
                path, label = row[path_at].strip(), row[label_at].strip()
                if not path or not label:
                    raise DataError(f"{where}: {card.label_column if path else card.path_column} is empty")
                group = None if group_at is None else groups.setdefault(row[group_at], len(groups))
                rows.add(path, labels.find(label, where, may_add), group=group)
        except csv.Error as error:
            raise DataError(f"{place}, line {reader.line_num}: no CSV, {error}") from error
    if not len(rows):
        raise DataError(f"{place} names no image")
    return rows.build()


def _column(header: list[str], name: str, setting: str, place: str) -> int:
    if header.count(name) != 1:
        found = "twice" if name in header else "not"
        raise DataError(f"{place} has {found} the column {name!r}; set {setting} to one of: {some(header)}")
    return header.index(name)


def _lines(stream: BinaryIO, place: str) -> Iterator[str]:
    """Lines of UTF-8 text, with or without a byte order mark."""
    try:
        yield from io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    except UnicodeDecodeError as error:
        raise DataError(f"{place} is not UTF-8 text ({error.reason} at byte {error.start}): convert it") from error
