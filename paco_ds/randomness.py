"""Randomness as a function: every draw names its stream and what it depends on, and leaves no state behind."""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class DrawPurpose(IntEnum):
    """What a draw is for; it comes first in the seed, so that no two purposes share one."""

    SHARDS = 1
    ROTATION = 2
    WINDOW = 3
    QUERY_VIEW = 4
    KEY_VIEW = 5
    SUBSTITUTE = 6
    KEY_GROUPS = 7
    SAMPLER = 8
    MIXUP = 11


def generator(stream: DrawPurpose, *key: int) -> np.random.Generator:
    """A generator that depends on nothing but the stream and the key (non-negative numbers)."""
    return np.random.Generator(np.random.PCG64(_words(stream, *key)))


def permutation(length: int, stream: DrawPurpose, *key: int) -> np.ndarray:
    """0 to length - 1 in drawn order, int64.

    Raw bits are sorted, since numpy promises those, but not its shuffle, to be the same in later versions.
    """
    return np.argsort(np.random.PCG64(_words(stream, *key)).random_raw(length), kind="stable")


def _words(*key: int) -> np.ndarray | list[int]:
    """A seed as the 32-bit words that numpy makes of a list of numbers: an array of them spares it a third of the time,
    and is the same seed where each number is one word."""
    return np.array(key, np.uint32) if max(key) < 2**32 else list(key)
