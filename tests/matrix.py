"""Matrices of settings: a few cases in which every value occurs run with each change, the whole in `make soak`."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any

import pytest


def matrix(*factors: Iterable[Any], each_change: Iterable[tuple[Any, ...]]) -> list[Any]:
    """All combinations of the factors, for `pytest.mark.parametrize`; those not in `each_change` are soak tests.

    Raises:
        ValueError: a case that is no combination, or a value that no case has.
    """
    kept, every = set(each_change), list(product(*factors))
    if missing := [case for case in kept if case not in every]:
        raise ValueError(f"{missing} are no combinations of the factors")
    for place, factor in enumerate(factors):
        if left_out := set(factor) - {case[place] for case in kept}:
            raise ValueError(f"no case of each change has {left_out}")
    return [case if case in kept else pytest.param(*case, marks=pytest.mark.soak) for case in every]
