"""Stateless randomness: every draw is a function of its purpose and a key of numbers."""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import torch


class DrawPurpose(IntEnum):
    """Purpose of a draw. It is the first number of the seed, so that no two purposes share a seed."""

    SHARDS = 1
    ROTATION = 2
    WINDOW = 3
    QUERY_VIEW = 4
    KEY_VIEW = 5
    SUBSTITUTE = 6
    KEY_GROUPS = 7
    SAMPLER = 8
    MIXUP = 11
    QUERY_DROPOUT = 12
    KEY_DROPOUT = 13


def generator(stream: DrawPurpose, *key: int) -> np.random.Generator:
    """A generator that depends only on the purpose and the key (non-negative numbers)."""
    return np.random.Generator(np.random.PCG64(_words(stream, *key)))


def permutation(length: int, stream: DrawPurpose, *key: int) -> np.ndarray:
    """A random permutation of 0 to length - 1, int64.

    Raw bits are sorted, since numpy guarantees those, but not its shuffle, to be the same in later versions.
    """
    return np.argsort(np.random.PCG64(_words(stream, *key)).random_raw(length), kind="stable")


def seed_torch(stream: DrawPurpose, *key: int) -> None:
    """Let what draws from torch's own generator, such as dropout, depend only on the purpose and the key."""
    torch.manual_seed(int(np.random.PCG64(_words(stream, *key)).random_raw() >> 1))


def _words(*key: int) -> np.ndarray | list[int]:
    """The seed as an array of 32-bit words, which takes numpy two thirds of the time of a list; the same seed if each
    number is one word."""
    return np.array(key, np.uint32) if max(key) < 2**32 else list(key)
