"""Finds files whose names a list writes in another Unicode form than the disk: macOS writes `é` as two characters."""

from __future__ import annotations

import os
import posixpath
from collections import defaultdict
from collections.abc import Iterable

from paco_ds.data.names import same_name
from paco_ds.data.pack.root import Root

Entries = dict[str, list[str]]  # by NFC, the names on disk


class Spellings:
    """The names below a root by their NFC form. Each folder is listed once, when it is first asked for."""

    def __init__(self, root: Root) -> None:
        self._root = root
        self._folders: dict[str, Entries] = {}
        self._everything: Entries | None = None

    def of(self, name: str) -> list[str]:
        """The paths on disk that are the same name; several where the disk has it in several forms."""
        if not self._root.storage.is_local:
            if self._everything is None:
                self._everything = _by_form(self._root.storage.find(""))
            return self._everything.get(same_name(name), [])
        found = ["/" if name.startswith("/") else ""]
        for part in name.strip("/").split("/"):
            here = same_name(part)
            found = [posixpath.join(folder, entry) for folder in found for entry in self._inside(folder).get(here, [])]
        return found

    def _inside(self, folder: str) -> Entries:
        if folder not in self._folders:
            try:
                names = sorted(os.listdir(self._root.path / folder))
            except OSError:  # no folder, or one that cannot be read: its images are missing
                names = []
            self._folders[folder] = _by_form(names)
        return self._folders[folder]


def _by_form(names: Iterable[str]) -> Entries:
    entries: Entries = defaultdict(list)
    for name in names:
        entries[same_name(name)].append(name)
    return dict(entries)
