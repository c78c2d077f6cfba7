"""Progress: the right view for rank and stream, and what it says."""

from __future__ import annotations

import io
import subprocess
import sys
from dataclasses import replace

from paco_ds.evaluation.accuracy import ShotAccuracy
from paco_ds.metrics.progress import BarProgress, LineProgress, NullProgress, ProgressView, progress_view
from paco_ds.metrics.steps import StepRecord

RECORD = StepRecord(1, 0, 1.25, 0.05, 1.0, 640.0, 0.0, 0.1)


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _view(stream: io.StringIO, rank: int = 0, first_step: int = 0) -> ProgressView:
    return progress_view(rank, total_steps=20, first_step=first_step, epochs=2, every=5, stream=stream)


def test_view_fits_rank_and_stream() -> None:
    """A bar on a terminal, lines in a file, nothing on other ranks."""
    views = (_view(_Terminal()), _view(io.StringIO()), _view(_Terminal(), rank=1))
    for view, kind in zip(views, (BarProgress, LineProgress, NullProgress), strict=True):
        view.close()
        assert isinstance(view, kind)


def test_lines_come_at_the_first_every_nth_and_last_step() -> None:
    """20 steps at every 5: steps 1, 5, 10, 15, 20, each with all figures."""
    out = io.StringIO()
    view = _view(out)
    for step in range(1, 21):
        view.update(replace(RECORD, step=step, epoch=(step - 1) // 10))
    lines = out.getvalue().splitlines()
    assert [line.split("step ")[1].split("/")[0] for line in lines] == ["1", "5", "10", "15", "20"]
    assert lines[2].startswith("epoch 1/2  step 10/20  640 images/s  loss 1.2500  lr 0.05  0:00:0")
    assert lines[2].endswith("left")


def test_resumed_run_and_refused_update_are_said_at_once() -> None:
    """The first step after a resume has its line, and so has a step that was skipped."""
    out = io.StringIO()
    view = _view(out, first_step=11)
    view.update(replace(RECORD, step=12))
    view.update(replace(RECORD, step=13))
    view.update(replace(RECORD, step=14, loss=float("nan"), skipped=True))
    assert [line.split("  ")[1] for line in out.getvalue().splitlines()] == ["step 12/20", "step 14/20"]
    assert "skipped" in out.getvalue()


def test_messages_are_printed_as_they_are() -> None:
    """Text is not taken for markup nor wrapped; a table is drawn."""
    out = io.StringIO()
    view = _view(out)
    view.message("checkpoint [bold]40[/bold] " + "x" * 200)
    view.message(ShotAccuracy(0.5, 0.25, None, 0.4, dict.fromkeys(("many", "medium", "few", "all")), []).table())
    assert out.getvalue().splitlines()[0] == "checkpoint [bold]40[/bold] " + "x" * 200
    assert "50.0" in out.getvalue()


def test_lines_tell_the_share_of_time_that_was_spent_waiting_for_images() -> None:
    """Where it is a percent or more: loader processes are too few, or storage too slow."""
    out = io.StringIO()
    view = progress_view(0, total_steps=20, first_step=0, epochs=2, every=5, stream=out)
    view.update(replace(RECORD, step=1, step_seconds=0.5, data_wait_seconds=0.1))
    assert "images/s  data wait 20 %  loss" in out.getvalue()


def test_bar_shows_epoch_step_and_figures() -> None:
    """The last drawing of the bar holds epoch, step, images/s, loss, lr and time left."""
    out = _Terminal()
    view = _view(out)
    view.update(replace(RECORD, step=20, epoch=1))
    view.message("note")
    view.close()
    for word in ("epoch 2/2", "20/20", "640 images/s", "loss 1.2500", "lr 0.05", "left", "note"):
        assert word in out.getvalue()


def test_a_run_outlives_whoever_watched_it():
    """A pipe that nobody reads any more (ssh has ended) ends the lines, not the process."""
    program = (
        "from paco_ds.metrics.progress import progress_view\n"
        "view = progress_view(0, total_steps=9, first_step=0, epochs=1)\n"
        "for _ in range(3):\n    view.message('x' * 100000)\n"
        "raise SystemExit(7)"
    )
    process = subprocess.Popen([sys.executable, "-u", "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read().decode() == ""
    assert process.wait() == 7
