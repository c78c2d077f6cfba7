"""Folders that are taken for classes and may be splits, or one folder around the classes, by what they hold."""

from __future__ import annotations

import re
import shlex
from collections import Counter

from paco_ds.data.names import same_path, split_called, split_in
from paco_ds.data.pack.card import SPLIT_NAMES
from paco_ds.data.pack.root import Root
from paco_ds.data.pack.source import ENDINGS, ending, some
from paco_ds.errors import DataError

_NEARLY_ALL = 0.9
_FEWEST, _AS_MANY = 8, 4  # shared names that are classes whatever the folders around them are called: 8, 4 a folder


def refuse_nested(root: Root, split: str, classes: list[str]) -> list[str]:
    """Raise DataError if the folders in the folder of a split are no classes; otherwise lines on what is in doubt.

    They are none where no image lies directly in them and (nearly) all that they hold are folders of the same names, if
    they are also called like splits in part (`cars_train`), or hold many that are not numbered: a class of each of the
    years 2019 and 2020 stays one. Nor is a single one whose images lie in several folders.
    """
    inside: dict[str, list[str]] = {}
    for name in classes:
        if not (inner := root.folders_in(f"{split}/{name}")):
            return _called_like_splits(classes)  # the usual case, at the first class
        inside[name] = inner
    if all(any(map(split_called, inner)) for inner in inside.values()):
        first = root.storage.place(same_path(f"{split}/{classes[0]}"))
        if len(classes) == 1:
            raise DataError(f"{first} holds splits, and would be the only class: give it as --root")
        raise DataError(
            f"{first} holds splits, as all class folders do: arrange them as train/CLASS and val/CLASS, or name the "
            "classes in a card if they are none"
        )
    if any(_holds_images(root, f"{split}/{name}") for name in classes):
        return _called_like_splits(classes)
    return _only_class(root, split, classes[0]) if len(classes) == 1 else _shared(root, split, inside)


def _shared(root: Root, split: str, inside: dict[str, list[str]]) -> list[str]:
    """`refuse_nested` of several folders that hold folders and no images."""
    folders_of = Counter(each for inner in inside.values() for each in inner)
    *smaller, _ = sorted(inside.values(), key=len)  # a split may lack classes of the largest
    if any(sum(folders_of[each] > 1 for each in inner) < _NEARLY_ALL * len(inner) for inner in smaller):
        return _called_like_splits(list(inside))
    again = sorted(each for each, folders in folders_of.items() if folders > 1)
    many = len(again) >= max(_FEWEST, _AS_MANY * len(inside)) and not _numbered(again)
    if not (many or _split_names(list(inside))):
        what = f"the class folders {some(inside)} hold folders of the same names ({some(again)}) and no image directly"
        remedy = "if the inner ones are the classes, give the outer ones as --train, --val and --test"
        return [f"WARNING: {what}: {remedy}"] if len(again) > 1 else []
    folders = [same_path(f"{split}/{name}") for name in inside]
    named: dict[str | None, str] = {split_in(name): folder for name, folder in zip(inside, folders, strict=True)}
    if "train" not in named or len(named) == 1:
        named = dict(zip(SPLIT_NAMES, folders, strict=False))
    words = " ".join(f"--{each} {shlex.quote(named[each])}" for each in SPLIT_NAMES if each in named)
    raise DataError(
        f"{some(root.storage.place(folder) for folder in folders)} hold folders of the same names ({some(again)}): "
        f"give them as splits, such as {words}; if they are classes, name them in a card's `classes`"
    )


def _only_class(root: Root, split: str, name: str) -> list[str]:
    """`refuse_nested` of a single folder without images directly in it."""
    folder = f"{split}/{name}"
    while not _holds_images(root, folder):
        inner = [each for each in root.folders_in(folder) if _has_images(root, f"{folder}/{each}")]
        if len(inner) > 1:
            break
        if not inner:
            return []
        folder = f"{folder}/{inner[0]}"
    else:
        return []
    place, option = root.storage.place(same_path(folder)), "--root" if same_path(split) == "." else "--train"
    about = f"{root.storage.place(same_path(f'{split}/{name}'))} is the only class, and its images lie in {some(inner)}"
    remedy = f"give {place if option == '--root' else same_path(folder)} as {option}"
    if _numbered(inner):
        return [f"WARNING: {about}: if those are the classes, {remedy}"]
    raise DataError(f"{about}: if those are the classes, {remedy}; if it is one, name it in a card's `classes`")


def _called_like_splits(classes: list[str]) -> list[str]:
    """A line on classes whose names say splits, such as `cars_train` and `cars_test`."""
    if not _split_names(classes):
        return []
    return [f"WARNING: the classes are called like splits, {some(classes)}: are their images sorted by class?"]


def _split_names(names: list[str]) -> bool:
    """Whether the names say two splits or more, or folds, in part of each."""
    said = {split_in(name) for name in names}
    return None not in said and len(names) > 1 and (len(said) > 1 or said == {"fold"})


def _numbered(names: list[str]) -> bool:
    """Whether names differ in numbers only, by half of them or more: years, days, persons."""
    return 2 * len({re.sub(r"[0-9]+", "", name) for name in names}) <= len(names)


def _holds_images(root: Root, folder: str) -> bool:
    return any(ending(name) in ENDINGS for name in root.files_in(folder))


def _has_images(root: Root, folder: str) -> bool:
    return any(ending(name) in ENDINGS for name in root.files(folder))
