"""The class names of a card or of a text file: in the order of labels, and none that the source gives another label."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import overload

from paco_ds.data.names import same_name
from paco_ds.data.pack.root import Root
from paco_ds.data.pack.source import DIGITS, some
from paco_ds.errors import DataError

_NUMBER = rf"(?P<number>0|[1-9][0-9]{{0,{DIGITS}}})"  # 007 belongs to a name
_BEFORE = re.compile(rf"{_NUMBER}(?:[.):]?\s|[,;])\s*(?P<name>\S.*)")  # 0 cat; 1. cat; 2,cat
_BEHIND = re.compile(rf"(?P<name>.*\S)\s*[\s,;]{_NUMBER}")  # /a/airfield 0
_SPARSE = 2  # numbers behind names of more than twice as many as there are belong to the names: Airbus 320


@overload
def class_names(given: tuple[str, ...] | str, root: Root, notes: list[str]) -> tuple[str, ...]: ...
@overload
def class_names(given: tuple[str, ...] | str | None, root: Root, notes: list[str]) -> tuple[str, ...] | None: ...
def class_names(given: tuple[str, ...] | str | None, root: Root, notes: list[str]) -> tuple[str, ...] | None:
    """The class names of a card: listed there, or in a text file with one name per line.

    Args:
        notes: takes a line if the lines of the file are numbered.

    Raises:
        DataError: the file is missing or not UTF-8; a name is empty or repeated; numbers of lines are out of order.
    """
    if not isinstance(given, str):
        return None if given is None else tuple(map(same_name, given))
    with root.open(given, "the file of class names") as file:
        try:
            names = tuple(line.strip() for line in file.read().decode("utf-8-sig").splitlines())
        except UnicodeDecodeError as error:
            raise DataError(f"{root}/{given} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    names = _without_numbers(tuple(map(same_name, names)), f"{root}/{given}", notes)
    if not names or "" in names:
        raise DataError(f"{root}/{given} must have a class name on each line and no empty line")
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise DataError(f"{root}/{given} names {some(repeated)} more than once")
    return names


def _without_numbers(lines: tuple[str, ...], place: str, notes: list[str]) -> tuple[str, ...]:
    """The names of numbered lines, as `0 cat` or `/a/airfield 0`; DataError if a number is not that of its line.

    Lines are numbered if every one has a number, and none of both is repeated: `1 euro` and `2 euro` are names.
    """
    for pattern in (_BEFORE, _BEHIND):
        found = [match for line in lines if (match := pattern.fullmatch(line))]
        names = tuple(match["name"] for match in found)
        numbers = [int(match["number"]) for match in found]
        if len(found) < max(2, len(lines)) or len(set(names)) < len(names) or len(set(numbers)) < len(numbers):
            continue
        for first in (0, 1):
            if numbers == list(range(first, first + len(numbers))):
                notes.append(f"the numbers of the lines of {place}, from {first}, are left out of the class names")
                return names
        if pattern is _BEFORE or max(numbers) <= _SPARSE * len(numbers):
            raise DataError(
                f"{place} has a number on every line, and {numbers[0]} on the first: sort the lines by it, from 0, and "
                "remove the numbers; if they belong to the names, list these as `classes` in a card"
            )
    return lines


def without_number(line: str) -> str:
    """The name of a numbered line; the line itself if it has no number."""
    return next((match["name"] for pattern in (_BEFORE, _BEHIND) if (match := pattern.fullmatch(line))), line)


def refuse_swapped(
    listed: Mapping[int, str], own: Mapping[int, str], list_place: str, own_place: str, what: str = "label"
) -> None:
    """Raise DataError if a list gives a label the name of another one: a list in another order swaps classes.

    Names that the source has not are taken, as those for the numbers of iNaturalist 2018.

    Args:
        listed, own: names by label, of the list and of the source itself.
        what: `label` or `category`, in messages.
    """
    labels_of: defaultdict[str, set[int]] = defaultdict(set)
    for label, name in own.items():
        labels_of[same_name(name)].add(label)
    for label, name in listed.items():
        labels = labels_of.get(same_name(name), {label})
        if label not in labels:
            raise DataError(
                f"{list_place} calls {what} {label} {name!r:.60}, which is {what} {min(labels)} in {own_place}: "
                "give the names in the order there, or none"
            )
