"""What names mean: when two are the same, which files and folders are hidden, which folders are called like splits."""

from __future__ import annotations

import difflib
import posixpath
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence

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
_PARTS_OF_NAMES = _SPLITS | {
    "trn": "train",
    "tr": "train",
    "dev": "val",
    "tst": "test",
    "te": "test",
    "holdout": "test",
}
_PARTS_OF_NAMES |= dict.fromkeys(("fold", "folds", "split", "part"), "fold")
_MISSING_VALUES = frozenset(("nan", "none", "null", "n/a", "na", "<na>", "nil"))
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


def split_in(name: str) -> str | None:
    """The split, or `fold`, that a part of a name says: `cars_train`, `trainingData`, `tst`, `fold0`; None if none or
    several do. A class may be called so too: no more than a hint."""
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)
    splits = {_PARTS_OF_NAMES[word] for word in map(str.casefold, words) if word in _PARTS_OF_NAMES}
    return splits.pop() if len(splits) == 1 else None


def notes_on(classes: Iterable[str]) -> list[str]:
    """Lines on class names that may be mistakes: alike (`Cat` and `cat`, `03` and `3`), or missing values."""
    missing = [repr(name) for name in classes if name.casefold() in _MISSING_VALUES]
    return [
        *look_alike("classes", classes),
        *([f"classes called like a missing value: {', '.join(missing[:5])}"] if missing else []),
    ]


def most_alike(name: str, names: Sequence[str]) -> str | None:
    """The one of the names that looks the same (`Cat` and `cat`), or is a letter or two away; None if none is."""
    same = (each for each in names if _look(each) == _look(name))
    return next(same, None) or next(iter(difflib.get_close_matches(name[:100], names, 1, 0.8)), None)


def look_alike(what: str, names: Iterable[str]) -> list[str]:
    """A line on names that look alike, if any do; `what` says what they are the names of."""
    first: dict[str, str] = {}
    more: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        look = _look(name)
        if first.setdefault(look, name) != name:
            more[look].append(name)
    pairs = [" and ".join(map(repr, (first[look], *others))) for look, others in more.items()]
    return [f"{what} that look alike, and count as different: {_first(pairs)}"] if pairs else []


def _look(name: str) -> str:
    """A name without its case, spaces and what is not seen; a number by its value."""
    seen = name.casefold()
    if not (seen.isascii() and seen.isprintable()):
        seen = "".join(letter for letter in seen if unicodedata.category(letter) not in ("Cf", "Cc"))
    if re.fullmatch(r"[0-9]+(\.0*)?", seen.strip()):
        return seen.strip().partition(".")[0].lstrip("0") or "0"
    return re.sub(r"[\s_-]+", " ", seen).strip()


def _first(what: list[str]) -> str:
    return "; ".join(what[:3]) + (f" and {len(what) - 3} more" if len(what) > 3 else "")
