"""Draws that depend on nothing but their stream and key."""

import numpy as np
import pytest

from paco_ds.randomness import DrawPurpose, generator, permutation


@pytest.mark.parametrize("key", [(1, 2, 3), (0,), (2**32 - 1, 0), (2**32, 7), (5, 2**40)])
def test_a_seed_is_what_numpy_makes_of_the_list(key):
    """Numbers of one 32-bit word and longer ones alike."""
    seed = [DrawPurpose.WINDOW, *key]
    assert generator(DrawPurpose.WINDOW, *key).random() == np.random.Generator(np.random.PCG64(seed)).random()
    bits = np.random.PCG64(seed).random_raw(9)
    assert permutation(9, DrawPurpose.WINDOW, *key).tolist() == np.argsort(bits, kind="stable").tolist()
