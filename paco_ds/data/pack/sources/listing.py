"""The sources `list` and `csv`: text files with an image and its class on each line, read line by line."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterator
from typing import Annotated, Any, BinaryIO, ClassVar, Literal

import numpy as np
from pydantic import BeforeValidator, Field, StrictStr

from paco_ds.data.manifest import Name, StrictModel
from paco_ds.data.names import look_alike, same_name, same_path
from paco_ds.data.pack.card import CLASSES_FILE, Card, Option
from paco_ds.data.pack.class_list import class_names, without_number
from paco_ds.data.pack.root import Root, require_inside
from paco_ds.data.pack.samples import Samples, SamplesBuilder
from paco_ds.data.pack.source import DIGITS, LARGEST_LABEL, Files, Source, label_in, refuse_labels_from_one, some
from paco_ds.errors import DataError


class ListSplit(StrictModel):
    """A text file with a path and an integer label on each line, as the long-tailed benchmarks publish them."""

    list: str


class ListCard(Card):
    """Images named by list files; ``classes`` gives the class names, or a text file with one per line."""

    page: ClassVar[str] = "the list file"
    options: ClassVar[dict[str, Option]] = {"classes": CLASSES_FILE}

    source: Literal["list"]
    classes: tuple[StrictStr, ...] | StrictStr | None = None
    splits: dict[Name, ListSplit] = Field(min_length=1)

    @classmethod
    def split_of(cls, page: str) -> dict[str, Any]:
        return {"list": page}

    def list_images(self, root: Root) -> Source:
        """Lists as ImageNet-LT, Places-LT and iNaturalist18 publish them: `path label`, labels from 0."""
        notes: list[str] = []
        classes = class_names(self.classes, root, notes)
        limit = len(classes) if classes is not None else LARGEST_LABEL
        splits = {name: _read_list(root, split.list, limit) for name, split in self.splits.items()}
        if classes is None:
            refuse_labels_from_one(splits, f"{root}/{next(iter(self.splits.values())).list}")
            largest = max((int(samples.labels.max()) for samples in splits.values() if len(samples)), default=-1)
            classes = tuple(str(label) for label in range(largest + 1))
        return Source(classes, splits, Files(root), notes=notes)


class CsvSplit(StrictModel):
    """A CSV file with a header."""

    file: str


def _tab(text: Any) -> Any:
    """A shell passes a tab on as a backslash and a letter."""
    return "\t" if text == "\\t" else text


class CsvCard(Card):
    """Images named by the rows of CSV files. Rows with the same ``group_column`` value stay in the same split."""

    page: ClassVar[str] = "the CSV file"
    options: ClassVar[dict[str, Option]] = {
        "classes": CLASSES_FILE,
        "path_column": Option("NAME", "column of the path (path)"),
        "label_column": Option("NAME", "column of the class (label)"),
        "group_column": Option("NAME", "rows with the same value stay in the same split"),
        "delimiter": Option("CHARACTER", "between fields (,); \\t is a tab"),
    }

    source: Literal["csv"]
    path_column: str = "path"
    label_column: str = "label"
    group_column: str | None = None
    delimiter: Annotated[str, BeforeValidator(_tab), Field(min_length=1, max_length=1)] = ","
    classes: tuple[StrictStr, ...] | StrictStr | None = None
    splits: dict[Name, CsvSplit] = Field(min_length=1)

    @classmethod
    def split_of(cls, page: str) -> dict[str, Any]:
        return {"file": page}

    def list_images(self, root: Root) -> Source:
        """CSV files with a header. A label is a class name; with ``classes`` given it may be an index into them, unless
        one of their names is a number."""
        notes: list[str] = []
        labels = _Labels(class_names(self.classes, root, notes), numbered=bool(notes))
        groups: dict[str, int] = {}
        splits = {
            name: _read_rows(
                self, root, split.file, labels, groups, may_add=name == "train" or "train" not in self.splits
            )
            for name, split in sorted(self.splits.items(), key=lambda item: item[0] != "train")
        }
        names, order = labels.sorted()
        relabelled = {
            name: Samples(s.names, order[s.labels], s.sizes, s.stamps, s.places, s.groups) for name, s in splits.items()
        }
        notes += look_alike(f"groups of {self.group_column}", groups)
        return Source(names, {name: relabelled[name] for name in self.splits}, Files(root), notes=notes)


def _read_list(root: Root, file: str, limit: int) -> Samples:
    rows = SamplesBuilder()
    with root.open(file, "the list file") as stream:
        for number, line in enumerate(_lines(stream, f"{root}/{file}"), 1):
            where = f"{root}/{file}, line {number}"
            if not (text := line.strip()):
                continue
            path, label = [*text.rsplit(maxsplit=1), ""][:2]  # a path may have spaces
            if not label.isdecimal():
                raise DataError(f"{where}: {text!r:.80} is not a path and a label from 0")
            require_inside(where, path)
            rows.add(same_path(path), label_in(label, limit, where))
    if not len(rows):
        raise DataError(f"{root}/{file} names no image")
    return rows.build()


class _Labels:
    """Class names read so far; fixed if the card gives them."""

    def __init__(self, given: tuple[str, ...] | None, numbered: bool) -> None:
        self._given, self._numbered = given, numbered  # the file of names was numbered: a label may be a line of it
        self._number = {name: label for label, name in enumerate(given or ())}
        # of classes 1, 2, 3 the label 1 could be the first or the second: only their names count then
        self._numeric = any(name.isdecimal() for name in given or ())

    def find(self, text: str, where: str, may_add: bool) -> int:
        number = self._number.get(text)
        if number is None and self._numbered:
            number = self._number.get(without_number(text))
        if number is not None:
            return number
        if self._given is None and may_add:
            return self._number.setdefault(text, len(self._number))
        if self._given is not None and text.isdecimal() and not self._numeric:
            return label_in(text, len(self._given), where)
        known = "the classes given" if self._given is not None else "the classes of train"
        if self._numeric:
            known += "; some of them are numbers, so labels are names and not positions: write names"
        raise DataError(f"{where}: {text!r:.60} is none of {known}")

    def sorted(self) -> tuple[tuple[str, ...], np.ndarray]:
        """Class names in final order (numbers by value, else by name), and the new label of each old label."""
        if self._given is not None:
            return self._given, np.arange(len(self._given), dtype=np.int32)
        numeric = all(name.isdecimal() and len(name) <= DIGITS for name in self._number)
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
            if header and (mark := re.fullmatch(r"sep=(.?)", card.delimiter.join(header).strip())):
                _refuse_other_mark(mark[1], card.delimiter, place)
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
                path, label = (_field(row, at, header, where) for at in (path_at, label_at))
                if not path or not label:
                    raise DataError(f"{where}: {card.label_column if path else card.path_column} is empty")
                group = None
                if group_at is not None:
                    group = _group(_field(row, group_at, header, where), groups, f"{where}: {card.group_column}")
                rows.add(_path(root, path), labels.find(same_name(label), where, may_add), group=group)
        except csv.Error as error:
            raise DataError(f"{place}, line {reader.line_num}: no CSV, {error}") from error
    if not len(rows):
        raise DataError(f"{place} names no image")
    return rows.build()


def _field(row: list[str], at: int, header: list[str], where: str) -> str:
    """A field without spaces around it; DataError if it has a line end, as after a quote that is not closed."""
    text = row[at].strip()
    if "\n" in text or "\r" in text:
        raise DataError(f"{where}: {header[at]} {text!r:.60} has a line end in it: close or remove a quote before it")
    return text


def _path(root: Root, path: str) -> str:
    """`same_path`, but a path that goes back over a link stays as it is: the link leads to another folder."""
    if ".." not in path:  # the usual case
        return same_path(path)
    parts = path.split("/")
    over = ["/".join(parts[:at]) for at, part in enumerate(parts) if part == ".." and at]
    linked = root.storage.is_local and any(os.path.islink(root.path / each) for each in over)
    return path if linked else same_path(path)


def _refuse_other_mark(mark: str, delimiter: str, place: str) -> None:
    """Raise DataError if the first line of a CSV file, as Excel reads it, names another delimiter than the card."""
    if mark not in ("", delimiter):
        raise DataError(f"the fields of {place} are separated by {mark!r}, as its first line says: set delimiter to it")


def _group(text: str, groups: dict[str, int], where: str) -> int:
    """The number of a group, the same for values that differ only in spaces around them or in Unicode's form."""
    if not (value := same_name(text)):
        raise DataError(f"{where} is empty: give a row that is of no group a value of its own, such as its path")
    return groups.setdefault(value, len(groups))


def _column(header: list[str], name: str, setting: str, place: str) -> int:
    others = [mark for mark in ";\t|," if len(header) == 1 and mark in header[0]]
    if others:
        raise DataError(
            f"{place} has one column, {header[0]!r:.60}; its fields are separated by {others[0]!r}: set delimiter"
        )
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
