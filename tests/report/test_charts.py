"""Charts: what is thinned out keeps its extremes."""

from __future__ import annotations

import numpy as np

from paco_ds.report.charts import as_floats, binned, probability_chart


def test_bins_keep_the_range_and_leave_out_nan() -> None:
    """A million steps become 150 points; the one spike stays in the range, NaN takes no part."""
    x = np.arange(1_000_000, dtype=np.float64)
    y = np.ones_like(x)
    y[500_000], y[3] = 99.0, np.nan
    at, mean, low, high = binned(x, y)
    assert len(at) == 150
    assert (low.min(), high.max()) == (1.0, 99.0)
    assert np.isfinite(mean).all()


def test_few_or_no_values_are_drawn_as_they_are() -> None:
    """Three values stay three; none stay none."""
    at, mean, _, _ = binned(np.array([1.0, 2.0, 3.0]), as_floats([5.0, None, 7.0]))
    assert (at.tolist(), mean.tolist()) == ([1.0, 3.0], [5.0, 7.0])
    assert len(binned(np.array([]), np.array([]))[0]) == 0


def test_probabilities_of_every_shot_are_inside_their_panel() -> None:
    """Panels share an axis, which must not end at what the first shot has."""
    x = np.arange(3.0)
    seen = {shot: np.full(3, value) for shot, value in (("many", 0.004), ("medium", 0.01), ("few", 0.047))}
    optimum = {shot: np.full(3, 0.02) for shot in seen}
    for axes in probability_chart(x, seen, optimum, "epoch").axes:
        assert axes.get_ylim()[0] == 0
        assert axes.get_ylim()[1] > 0.047
    assert probability_chart(x, seen, optimum, "epoch", top=1.02).axes[2].get_ylim() == (0, 1.02)
