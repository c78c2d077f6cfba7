"""Pictures of the optima: drawn for any number of classes and shots."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from paco_ds.data.manifest import Shots
from paco_ds.paper.optima import LongTail, OptimaPage


def page(counts: list[int], alpha: float = 0.05) -> OptimaPage:
    shots = tuple(Shots().of(count) for count in counts)
    return OptimaPage(
        LongTail("made", "train", tuple(map(str, range(len(counts)))), shots, np.array(counts)), alpha, 64, 8
    )


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of what other tests left
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("error::UserWarning", "error::RuntimeWarning")
@pytest.mark.parametrize(
    "counts",
    [[50], [10, 10], [900, 80, 2], list(range(130, 100, -1)), [5000] * 20 + [400] * 300 + [2] * 1000],
    ids=["one_class", "equal_classes", "named", "one_shot", "many_classes"],
)
def test_every_tail_is_drawn_without_a_warning(counts, tmp_path):
    """Warnings are of axes without an extent, of logarithms of 0, of texts that do not fit."""
    (path,) = page(counts).draw(tmp_path / "page.png")
    assert path.stat().st_size > 10_000


def test_curves_are_the_optima_and_those_of_equation_9_are_dashed():
    """SupCon and PaCo on the left, PaCo's centers on the right, classes in their order."""
    made = page([900, 80, 2])
    figure = Figure()
    made.draw_optima(figure)
    left, right = figure.axes
    dashed = [line for line in (*left.lines, *right.lines) if line.get_linestyle() == "--"]
    solid = [line for line in (*left.lines, *right.lines) if line.get_marker() == "o"]
    mean, by_equation_9 = made._mean, made._by_equation_9
    for lines, optima in ((solid, mean), (dashed, by_equation_9)):
        drawn = [line.get_ydata() for line in lines]
        for y, expected in zip(drawn, (optima.supcon_C, optima.positive_AC[0], optima.center_AC[0]), strict=True):
            np.testing.assert_array_equal(y, expected)


def test_no_mathematics_is_left_unread_on_a_logarithmic_axis():
    """The charts' style reads no mathematics, so powers of ten would show as markup."""
    figure = Figure()
    page([900, 80, 2]).draw_alphas(figure)
    figure.canvas.draw()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            assert not any("$" in label.get_text() for label in axis.get_ticklabels())
