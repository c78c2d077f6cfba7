"""Damaged images by the hundred thousand: an image or a reason, in time, and views of whatever is an image."""

import time

import numpy as np
import pytest

from paco_ds.config.views import RandClsStackView, SimView
from paco_ds.data.shard import BadSample, RawSample
from paco_ds.data.stream.views import MakeViews, make_view
from tests.data.mutated_images import KINDS, mutations, whole_image

pytestmark = pytest.mark.soak

MUTATIONS = 20_000


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_images_neither_crash_nor_hang(kind, record, capfd):
    """Both views are made of all that can be decoded; the slowest image takes no second."""
    make_views = MakeViews((make_view(RandClsStackView(size=32)), make_view(SimView(size=32))), 1_000_000)
    rng, bad, slowest = np.random.default_rng(1), 0, 0.0
    for number, data in enumerate(mutations(whole_image(kind, 300, 400), MUTATIONS, rng)):
        start = time.perf_counter()
        try:
            views = make_views(RawSample("k", 0, "s.tar", data), *map(np.random.default_rng, (number, number + 1)))
            assert all(view.shape == (32, 32, 3) for view in views)
        except BadSample:
            bad += 1
        slowest = max(slowest, time.perf_counter() - start)
    assert capfd.readouterr() == ("", "")
    assert slowest < 1
    figure = f"{bad} bad, the others became views; slowest {1000 * slowest:.0f} ms"
    record(f"{MUTATIONS} mutations of a {kind} image", figure, True)
