"""A line of several steps: their means and extremes, and nothing lost from sight, however often the run was resumed."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from paco_ds.errors import CheckpointError
from paco_ds.metrics.log import MetricsLog, read
from paco_ds.metrics.steps import StepRecord, StepWindow, steps_of
from paco_ds.report.history import History

EPOCH = 11


def record(step: int) -> StepRecord:
    """Figures that look like a run's, a function of the step; step 17 is skipped, step 8 slow."""
    draw = random.Random(step)
    loss, seconds = draw.uniform(1, 9), 7.5 if step == 8 else draw.uniform(0.1, 0.3)
    return StepRecord(
        step=step,
        epoch=(step - 1) // EPOCH,
        loss=float("nan") if step == 17 else loss,
        lr=0.1 / step,
        grad_norm=float("inf") if step == 17 else draw.uniform(0.5, 2),
        images_per_second=128 / seconds,
        data_wait_seconds=seconds / 10,
        step_seconds=seconds,
        queue_fill=step / 100,
        center_probability={"many": draw.random(), "few": draw.random() if step % 4 == 0 else None},
        parts={"base": draw.random()},
        skipped=step == 17,
        bad_samples=2 if step == 5 else 0,
        grad_norm_ratio=None if step < 4 else draw.uniform(0.8, 1.2),
    )


def write(
    path: Path, first: int, last: int, every: int, window: object = None, checkpoints: dict | None = None
) -> None:
    """Log steps first + 1 to last as a process does that resumes after `first`; ended without a word."""
    log = MetricsLog(path, every=every, steps_per_epoch=EPOCH)
    log.cut_after(first or -1, window)
    for step in range(first + 1, last + 1):
        log.step(record(step), "loss not finite" if step == 17 else None)
        if checkpoints is not None:
            log.checkpoint(step, 0.5)
            checkpoints[step] = json.dumps(log.window())
    log.close()


def steps_logged(path: Path) -> list[dict]:
    return [line for line in read(path) if line["kind"] == "step"]


def test_a_window_of_one_step_is_the_steps_record(tmp_path: Path) -> None:
    """All fields, with the same bits; a skipped step also says why."""
    path = tmp_path / "metrics.jsonl"
    write(path, 0, 20, every=1)
    lines = steps_logged(path)
    assert [line["step"] for line in lines] == list(range(1, 21))
    for line in lines:
        expected = record(line["step"])
        assert (line["lr"], line["step_seconds"]) == (expected.lr, expected.step_seconds)
        assert line.keys() - {"skips"} == {"kind", *StepRecord.__dataclass_fields__}
    assert [(line["step"], line["skips"]) for line in lines if line["skipped"]] == [(17, [[17, "loss not finite"]])]


def test_a_line_has_means_and_extremes_and_ends_with_the_epoch(tmp_path: Path) -> None:
    """Against numpy over the same records; aligned to the run's step numbers."""
    path = tmp_path / "metrics.jsonl"
    write(path, 0, 33, every=5)
    lines = steps_logged(path)
    assert [(line["step"], steps_of(line)) for line in lines] == [
        *((5, 5), (10, 5), (11, 1), (15, 4), (20, 5), (22, 2), (25, 3), (30, 5), (33, 3))
    ]
    for line in (line for line in lines if "steps" in line):
        records = [record(step) for step in range(line["step"] - line["steps"] + 1, line["step"] + 1)]
        assert (line["epoch"], line["lr"]) == (records[-1].epoch, pytest.approx(records[-1].lr, rel=1e-4))
        assert line["queue_fill"] == records[-1].queue_fill
        for name in ("loss", "grad_norm", "data_wait_seconds", "step_seconds", "grad_norm_ratio"):
            values = np.array([getattr(r, name) for r in records], dtype=float)
            values = values[np.isfinite(values)]
            if not len(values):
                assert (line[name], name in line["range"]) == (None, False)
                continue
            assert line[name] == pytest.approx(values.mean(), rel=1e-4)
            assert line["range"][name] == pytest.approx([values.min(), values.max()], rel=1e-4)
        seconds = sum(r.step_seconds for r in records)
        assert line["images_per_second"] == pytest.approx(128 * len(records) / seconds, rel=1e-4)
        few = [r.center_probability["few"] for r in records if r.center_probability["few"] is not None]
        assert line["center_probability"].get("few") == (pytest.approx(np.mean(few), rel=1e-4) if few else None)
        assert line["parts"]["base"] == pytest.approx(np.mean([r.parts["base"] for r in records]), rel=1e-4)
    assert lines[0]["bad_samples"] == 2
    assert lines[1]["range"]["step_seconds"][1] == 7.5
    assert [(line["skipped"], line["skips"]) for line in lines if line.get("skipped")] == [
        (1, [[17, "loss not finite"]])
    ]
    assert "skipped" not in lines[0]
    assert "bad_samples" not in lines[1]


@pytest.mark.parametrize("seed", range(10))
def test_a_run_that_is_killed_and_resumed_anywhere_writes_the_lines_of_one_that_is_not(
    tmp_path: Path, seed: int
) -> None:
    """Whatever the schedule of checkpoints; killed, or stopped in mid-window, several times."""
    draw = random.Random(seed)
    straight, resumed, every = tmp_path / "straight", tmp_path / "resumed", draw.choice((2, 4, 7, 10, 50))
    write(straight, 0, 33, every)
    done, checkpoints = 0, {0: "null"}
    while done < 33:
        last = min(done + draw.randint(1, 12), 33)
        write(resumed, done, last, every, json.loads(checkpoints[done]), checkpoints)
        if draw.random() < 0.5:  # stopped: what it knows of the window is written
            log = MetricsLog(resumed, every=every)
            log.cut_after(last, json.loads(checkpoints[last]))
            log.end_window()
            log.close()
            assert sum(map(steps_of, read(resumed))) == last
        done = 33 if last == 33 else draw.choice([step for step in checkpoints if last - 6 <= step <= last])
    assert steps_logged(resumed) == steps_logged(straight)
    assert [line["step"] for line in read(resumed) if line["kind"] == "checkpoint"] == list(range(1, 34))


def test_an_older_log_of_single_steps_goes_on_in_windows(tmp_path: Path) -> None:
    """Its checkpoint has no window: the first line has what is left of one. The other way round, it is ended."""
    path = tmp_path / "metrics.jsonl"
    write(path, 0, 3, every=1)
    write(path, 3, 10, every=5)
    assert [(line["step"], steps_of(line)) for line in steps_logged(path)] == [(1, 1), (2, 1), (3, 1), (5, 2), (10, 5)]
    checkpoints: dict = {}
    write(path, 0, 7, every=5, checkpoints=checkpoints)
    write(path, 7, 10, every=1, window=json.loads(checkpoints[7]))
    assert [(line["step"], steps_of(line)) for line in steps_logged(path)] == [(5, 5), (8, 3), (9, 1), (10, 1)]


def test_the_report_sees_the_same_run_in_windows(tmp_path: Path) -> None:
    """Numbers, sums and extremes of the curves are those of a log of single steps."""
    histories = []
    for every in (1, 4):
        write(tmp_path / "metrics.jsonl", 0, 33, every)
        histories.append(History(tmp_path / "metrics.jsonl").read_on())
    single, windows = histories
    for name in ("steps", "last", "epochs", "skipped", "bad_samples", "skips"):
        assert getattr(windows, name) == getattr(single, name), name
    assert windows.skips == [17]
    assert windows.seconds == pytest.approx(single.seconds, rel=1e-4)
    for name in ("loss", "grad_norm", "images_per_second"):
        low, high = ([f(p[i] for p in h.curves[name].points()) for h in histories] for f, i in ((min, 2), (max, 3)))
        assert low[0] == pytest.approx(low[1], rel=1e-4)
        assert high[0] == pytest.approx(high[1], rel=1e-4)
    assert windows.x_scale == (11.0, "epoch")


def test_many_skipped_steps_are_counted_and_the_first_named() -> None:
    """A window of any number of steps has a line and a state of bounded size."""
    window = StepWindow()
    for step in range(1, 1001):
        window.add(replace(record(17), step=step), "loss not finite")
    line = window.line()
    assert (line["steps"], line["skipped"], len(line["skips"]), line["loss"]) == (1000, 1000, 100, None)
    assert len(json.dumps(window.state())) < 10_000


@pytest.mark.parametrize(
    "state", [3, [], {"steps": "x"}, {"figures": {"": {"loss": [1]}}}, {"skips": [[1]]}, {"last": {"step": None}}]
)
def test_a_damaged_window_of_a_checkpoint_is_named(tmp_path: Path, state: object) -> None:
    with pytest.raises(CheckpointError, match=r"state.json: log_window.* is not as a run writes it; restore"):
        MetricsLog(tmp_path / "metrics.jsonl").cut_after(3, state)
