"""What is due after which step, in plain numbers: epochs of 4 steps, 3 of them, if a test says nothing else."""

import pytest

from paco_ds.config.recipe import CheckpointSettings, EvaluationSettings
from paco_ds.training.timetable import Timetable

STEPS = range(1, 13)


def made(stop_at_step=None, checkpoint=(), evaluation=()):
    """With the settings of two sections, as pairs."""
    sections = CheckpointSettings(**dict(checkpoint)), EvaluationSettings(**dict(evaluation))
    return Timetable(12, 4, stop_at_step, *sections)


def due(when):
    """The steps after which it is."""
    return [done for done in STEPS if when(done)]


@pytest.mark.parametrize(("stop", "last"), [(None, 12), (5, 5), (12, 12), (99, 12)])
def test_a_run_ends_at_its_end_or_where_it_is_to_stop(stop, last):
    """Whichever comes first."""
    assert made(stop).last_step == last


def test_epochs_are_of_equal_length():
    """The start of the run ends none."""
    timetable = made()
    assert due(timetable.ends_epoch) == [4, 8, 12]
    assert not timetable.ends_epoch(0)
    assert [timetable.epoch(done) for done in (0, 3, 4, 12)] == [0, 0, 1, 3]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [4, 8, 12]),
        ({"every_epochs": 2}, [8]),
        ({"every_steps": 3}, [3, 4, 6, 8, 9, 12]),
        ({"every_steps": 5, "every_epochs": 3}, [5, 10, 12]),
    ],
)
def test_checkpoints_are_due_after_epochs_and_after_steps(settings, expected):
    """Both settings count from the first step of the run."""
    assert due(made(checkpoint=settings).checkpoint_due) == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({}, [4, 8, 12]), ({"every_epochs": 2}, [8, 12]), ({"every_epochs": 0}, [12]), ({"split": None}, [])],
)
def test_evaluations_are_due_after_epochs_and_at_the_end(settings, expected):
    """Where there is a validation split. A stop before the end adds none, and at the start none is due."""
    assert due(made(evaluation=settings).evaluation_due) == expected
    assert due(made(stop_at_step=6, evaluation=settings).evaluation_due) == expected
    assert not made(evaluation=settings).evaluation_due(0)


@pytest.mark.parametrize(
    ("stop", "settings", "expected"),
    [
        (None, {}, [1, 2, 3, 5, 6, 7, 9, 10, 11]),
        (6, {}, [1, 2, 3, 5]),
        (None, {"every_steps": 3, "every_epochs": 9}, [1, 2, 5, 7, 10, 11]),
    ],
)
def test_the_next_step_follows_but_after_an_epoch_at_a_checkpoint_and_at_the_end(stop, settings, expected):
    """Images of the next step are asked for ahead only there."""
    assert due(made(stop, checkpoint=settings).next_step_follows) == expected
