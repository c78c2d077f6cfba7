"""What names mean: when two are the same, which files and folders are hidden, which folders are called like splits."""

from __future__ import annotations

import posixpath
import re
import unicodedata

_MADE_BY_SYSTEMS = frozenset(
    ("__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found")
)
_SPLITS = {
    "train": "train",
    "training": "train",
    "trainset": "train",
    "trainval": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "valset": "val",
    "eval": "val",
    "evaluation": "val",
    "test": "test",
    "testing": "test",
    "testset": "test",
}
_BESIDE_A_SPLIT = frozenset(("set", "data", "dataset", "images", "image", "imgs", "img", "seg", "split", ""))


def same_name(name: str) -> str:
    """The form in which names are compared and kept, NFC: macOS writes `é` as two characters, others as one."""
    return unicodedata.normalize("NFC", name)


def same_path(path: str) -> str:
    """A path without `./`, `//` and the like: two paths to one file are then equal."""
    return posixpath.normpath(path)


def is_hidden(path: str) -> bool:
    """Whether a file or a folder on the way to it is hidden, or a system's own: copies and thumbnails lie there."""
    parts = path.split("/")
    return any(
        (part.startswith(".") and part not in (".", "..")) or part.casefold() in _MADE_BY_SYSTEMS for part in parts
    )


def split_called(folder: str) -> str | None:
    """The split that a folder is called like in one of the usual ways, in any case: `Training`, `valid`, `test_set`."""
    words = re.split(r"[^a-z]+", folder.casefold())
    splits = {_SPLITS[word] for word in words if word in _SPLITS}
    others = {word for word in words if word not in _SPLITS}
    return splits.pop() if len(splits) == 1 and others <= _BESIDE_A_SPLIT else None
