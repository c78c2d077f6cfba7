"""Streams the lists of a JSON file entry by entry, in bounded memory."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable
from itertools import chain
from typing import Any

import ijson
import numpy as np

from paco_ds.data.pack.file_kinds import is_utf16, packed_as
from paco_ds.data.pack.root import Root
from paco_ds.errors import DataError

_DEEPEST, _LONGEST_TEXT = 100, 2**20
_TEXT = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
_STEPS = bytes.maketrans(b"[{]}", b"\1\1\xff\xff")  # as int8: 1 into a list or object, -1 out of it
_NO_BRACKETS = bytes(set(range(256)) - set(b"[{]}"))
_CHUNK = 1 << 20


def read_lists(root: Root, file: str, takers: dict[str, Callable[[Any], None]]) -> None:
    """Call the taker of each list with its entries, in one pass over the file; "" stands for a file that is a list."""
    with root.open(file, "the JSON file") as stream:
        queues = {part: ijson.sendable_list() for part in takers}
        parsers = [
            ijson.items_coro(queues[part], f"{part}.item" if part else "item", use_float=True) for part in takers
        ]
        nesting = _Nesting()
        try:
            chunks = iter(lambda: stream.read(_CHUNK), b"")
            start = next(chunks, b"").removeprefix(codecs.BOM_UTF8)
            _refuse_other_kinds(start, f"{root}/{file}")
            for chunk in chain((start,), chunks):
                if nesting.too_deep(chunk):
                    raise DataError(f"{root}/{file} is not JSON of images: nested deep, or a text without end")
                for parser in parsers:
                    parser.send(chunk)
                _drain(queues, takers)
            for parser in parsers:
                parser.close()
            _drain(queues, takers)
        except ijson.JSONError as error:
            reason = " ".join(str(error).split())[:120]
            if "integer overflow" in reason:
                raise DataError(f"{root}/{file} has a whole number above 2^63 - 1: number it anew") from error
            if "UTF8" in reason:
                raise DataError(
                    f"{root}/{file} is not UTF-8 text: convert it, as with iconv -f LATIN1 -t UTF-8"
                ) from error
            raise DataError(
                f"{root}/{file} is not JSON ({reason}): copy it again; if NaN or Infinity stands there, write null"
            ) from error


def _refuse_other_kinds(begin: bytes, place: str) -> None:
    """Raise DataError, with the remedy, for what is compressed or UTF-16 by its first bytes."""
    if packed := packed_as(begin):
        raise DataError(f"{place} is {packed[0]}: {packed[1]}")
    if is_utf16(begin):
        raise DataError(f"{place} is UTF-16 text: convert it with iconv -f UTF-16 -t UTF-8")


class _Nesting:
    """Bounds nesting and texts before ijson sees them: its memory grows with the square of the depth."""

    def __init__(self) -> None:
        self._depth, self._rest = 0, b""

    def too_deep(self, chunk: bytes) -> bool:
        """Whether the JSON is nested more than 100 deep up to here, or has a text of more than 1 MiB."""
        text = _TEXT.sub(b"", self._rest + chunk)
        text, quote, begun = text.partition(b'"')  # a text that the next chunk ends
        self._rest = quote + begun
        steps = np.frombuffer(text.translate(_STEPS, _NO_BRACKETS), np.int8).cumsum(dtype=np.int64)
        deepest = self._depth + int(steps.max(initial=0))
        self._depth += int(steps[-1]) if len(steps) else 0
        return deepest > _DEEPEST or len(self._rest) > _LONGEST_TEXT


def _drain(queues: dict[str, Any], takers: dict[str, Callable[[Any], None]]) -> None:
    for part, queue in queues.items():
        for entry in queue:
            takers[part](entry)
        queue.clear()
