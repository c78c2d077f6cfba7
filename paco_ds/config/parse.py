"""Parse YAML and JSON from outside: within bounds of size, depth and values, any mistake one line that names the file.

YAML is data alone: no tag makes an object, and an alias counts as often as it is used. Nine lists, each of nine aliases
to the one before, are 300 bytes and 400 million values.
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from paco_ds.errors import UserError
from paco_ds.files import read_at_most

MOST_YAML = 2 * 2**20  # bytes; a card that lists 100,000 classes has 2 MB
MOST_JSON = 2**30  # bytes; a manifest of a million shards has 300 MB
_DEEPEST = 40
_MOST_VALUES = 200_000
_LONGEST_NUMBER = 100  # characters: YAML's numbers to the base 60 take quadratic time
_OTHER_BASE = re.compile(r"[-+]?0[0-9_]+$|.*:")  # 010 is eight in YAML 1.1, and 1:30 is ninety
_SHOWN = 200  # characters of a parser's message


def parse_yaml(text: str | bytes, place: str, error: type[UserError]) -> Any:
    """The plain values of a YAML document: numbers, strings, booleans, None, lists and dicts.

    Args:
        place: names the document in messages.
        error: type of the errors raised.

    Raises:
        UserError: of that type; not YAML or not UTF-8, a tag, a key given twice, or more than the bounds allow.
    """
    if len(text) > MOST_YAML:
        raise error(f"{place} has more than {MOST_YAML} bytes; settings have a few thousand: is it another file?")
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        return yaml.load(text, _BoundedLoader)
    except RecursionError:
        raise error(f"{place} is not valid YAML: it is nested more than {_DEEPEST} deep") from None
    except (yaml.YAMLError, ValueError, OverflowError) as mistake:  # ValueError: a date or number out of range
        raise error(f"{place} is not valid YAML: {one_line(mistake)}") from None


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r:.60} stands in it twice")
        found[key] = value
    return found


def parse_json(raw: str | bytes, place: str, error: type[UserError], remedy: str = "", once: bool = False) -> Any:
    """The values of a JSON document; UserError of the type `error` if it is not JSON, not UTF-8, nested too deep, or,
    with `once`, if an object has a key twice: readers take one or the other."""
    try:
        return json.loads(raw, object_pairs_hook=_each_once if once else None)
    except RecursionError:
        raise error(f"{place} is not JSON (it is nested too deep){remedy}") from None
    except ValueError as mistake:
        raise error(f"{place} is not JSON ({one_line(mistake)}){remedy}") from None


def read_yaml(path: Path, error: type[UserError], what: str = "") -> Any:
    """`parse_yaml` of a file; it is also an error if the file cannot be read.

    Args:
        what: what kind of file it is, before its path in messages.
    """
    return parse_yaml(_read(path, MOST_YAML, error), f"{what} {path}".lstrip(), error)


def read_json(path: Path, error: type[UserError], remedy: str = "") -> Any:
    """`parse_json` of a file; it is also an error if the file cannot be read."""
    return parse_json(_read(path, MOST_JSON, error), str(path), error, remedy)


def brief(value: Any) -> str:
    """A value for a message, as Python writes it, cut after 200 characters."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more than 4,300 digits
        return "a very long number"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def one_line(mistake: Exception) -> str:
    """What a parser says, on one line, cut after 200 characters."""
    text = " ".join(str(mistake).split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _read(path: Path, most: int, error: type[UserError]) -> bytes:
    """At most one byte more than allowed: the file may be endless, as a device is."""
    try:
        with path.open("rb") as file:
            raw = read_at_most(file, most)
    except (OSError, ValueError) as mistake:  # ValueError: a zero byte in the name
        raise error(f"{path} cannot be read: {getattr(mistake, 'strerror', None) or mistake}") from None
    if len(raw) > most:
        raise error(f"{path} has more than {most} bytes: is it another file?")
    return raw


class _BoundedLoader(yaml.SafeLoader):
    """SafeLoader that counts values, aliases included, before it makes any, and refuses a key given twice."""

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _check_bounds(node)
        return node

    def fetch_flow_collection_start(self, token: type[yaml.Token]) -> None:  # where "[[[[..." takes seconds otherwise
        if self.flow_level >= _DEEPEST:
            raise yaml.YAMLError(f"it is nested more than {_DEEPEST} deep")
        super().fetch_flow_collection_start(token)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue  # `<<: *other` gives keys that the mapping itself may set otherwise
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                continue  # refused below
            if key in seen:
                place = key_node.start_mark
                raise yaml.constructor.ConstructorError(None, None, f"key {brief(key)} is given twice; keep one", place)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _check_bounds(root: yaml.Node) -> None:
    left, waiting = _MOST_VALUES, [(root, 1)]
    while waiting:
        node, depth = waiting.pop()
        left -= 1
        if left < 0:
            raise yaml.YAMLError(f"it has more than {_MOST_VALUES} values, aliases counted as often as they are used")
        if depth > _DEEPEST:
            raise yaml.YAMLError(f"it is nested more than {_DEEPEST} deep")
        if isinstance(node, yaml.MappingNode):
            waiting += [(child, depth + 1) for pair in node.value for child in pair]
        elif isinstance(node, yaml.SequenceNode):
            waiting += [(child, depth + 1) for child in node.value]
        elif node.tag.endswith((":int", ":float")) and len(node.value) > _LONGEST_NUMBER:
            raise yaml.YAMLError(f"a number has more than {_LONGEST_NUMBER} characters")
        elif node.tag.endswith((":int", ":float")) and _OTHER_BASE.match(node.value):
            raise yaml.YAMLError(
                f"{node.value} would be read as a number to another base: write it without leading zeros and colons, "
                f"or in quotes if it is a name"
            )
