"""A log of any length is read in bounded memory, once."""

import json

import pytest

from paco_ds.report.history import POINTS, Curve, History


def test_a_curve_is_thinned_and_keeps_its_range():
    """A hundred thousand values become a few hundred points; the one spike stays, what is not finite takes no part."""
    curve = Curve()
    for x in range(100_000):
        curve.add(x, 99.0 if x == 50_000 else float("nan") if x == 3 else 1.0)
    points = list(curve.points())
    assert POINTS <= len(points) <= 2 * POINTS
    assert (min(p[2] for p in points), max(p[3] for p in points)) == (1.0, 99.0)
    assert [p[0] for p in points] == sorted(p[0] for p in points)
    assert sum(mean == 1.0 for _, mean, _, _ in points) == len(points) - 1


def line(step):
    return json.dumps({"kind": "step", "step": step, "epoch": step // 1000, "loss": 1.0, "step_seconds": 2.0}) + "\n"


def test_a_long_log_is_bounded(tmp_path):
    """Of 40,000 steps and 3,000 restarts, a bounded number is kept, whatever names the parts of a loss have."""
    log = tmp_path / "metrics.jsonl"
    with log.open("w") as file:
        for step in range(40_000):
            file.write(line(step))
        for n in range(3000):
            file.write(json.dumps({"kind": "restart", "step": 1, "number": n}) + "\n")
            file.write(json.dumps({"kind": "step", "step": 40_000 + n, "parts": {f"p{n}": 1.0}}) + "\n")
    history = History(log).read_on()
    assert (history.steps, history.last) == (43_000, 42_999)
    assert sum(len(curve) for curve in history.curves.values()) < 3 * 2 * POINTS
    assert (len(history.restarts), history.restarts[-1]["number"]) == (2000, 2999)
    assert history.seconds["step"] == 80_000


def test_only_what_was_logged_since_is_read(tmp_path):
    """A torn line is read once it is whole; steps are counted once."""
    log = tmp_path / "metrics.jsonl"
    log.write_text(line(1) + line(2)[:-9])
    history = History(log).read_on()
    assert history.steps == 1
    with log.open("a") as file:
        file.write(line(2)[-9:] + "damaged\n" + line(3))
    assert history.read_on().steps == 3
    assert history.damaged == 1
    assert history.read_on().rows("loss") == [[1.0, 1.0, 1.0, 1.0], [2.0, 1.0, 1.0, 1.0], [3.0, 1.0, 1.0, 1.0]]


@pytest.mark.parametrize("value", ["text", [1], None, True])
def test_what_is_no_figure_is_left_out(tmp_path, value):
    log = tmp_path / "metrics.jsonl"
    log.write_text(json.dumps({"kind": "step", "step": 1, "loss": value, "epoch": value, "bad_samples": value}) + "\n")
    assert len(History(log).read_on().curves.get("loss", ())) == (value is True)
