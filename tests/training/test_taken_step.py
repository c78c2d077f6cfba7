"""The record of a taken step, and why a step was skipped, of figures that are made up here."""

import math

import pytest
import torch

from paco_ds.metrics.steps import StepRecord
from paco_ds.training.step_result import StepResult, pack, skip_reason
from paco_ds.training.taken_step import TakenStep, step_record

SHOTS = {"many": None, "medium": None, "few": None}


def made(statistics=0, replaced=0, keys_finite=1, applied=1, grad_norm=3.0, ratio=1.5, loss=8.0):
    """Of two micro-batches, with 20 of 80 keys in the queue and no anchors."""
    totals = torch.tensor([statistics, replaced, 0, loss, *[0] * 18], dtype=torch.float64)
    figures = (torch.tensor(float(value)) for value in (keys_finite, applied, grad_norm, ratio, 20))
    named = zip(("keys_finite", "applied", "grad_norm", "ratio", "pushed"), figures, strict=True)
    return StepResult(pack(**dict(named), totals=totals), (), 2, 80)


def test_a_record_has_the_figures_of_its_step():
    """Steps are counted from 1 in it, and the rate is of the seconds with the wait."""
    taken = TakenStep(4, 0.1, 2.0, 0.5, (), made(replaced=3))
    assert step_record(taken, epoch=1, global_batch=32) == StepRecord(
        step=5,
        epoch=1,
        loss=4.0,
        lr=0.1,
        grad_norm=3.0,
        images_per_second=16.0,
        data_wait_seconds=0.5,
        step_seconds=2.0,
        queue_fill=0.25,
        center_probability=SHOTS,
        center_probability_optimum=SHOTS,
        positive_probability=SHOTS,
        positive_probability_optimum=SHOTS,
        bad_samples=3,
        grad_norm_ratio=1.5,
    )


@pytest.mark.parametrize(
    ("figures", "reason"),
    [
        ({}, None),
        ({"keys_finite": 0, "applied": 0}, "keys not finite"),
        ({"loss": math.nan, "applied": 0}, "loss not finite"),
        ({"statistics": 1, "applied": 0}, "statistics not finite"),
        ({"grad_norm": math.inf, "applied": 0}, "gradient not finite"),
        ({"grad_norm": 30, "ratio": 15, "applied": 0}, "its gradient norm 30 is 15 times the usual one"),
    ],
)
def test_a_skipped_step_says_why(figures, reason):
    """In words; its record is marked."""
    result = made(**figures)
    assert skip_reason(result) == reason
    assert step_record(TakenStep(0, 0.1, 1.0, 0.0, (), result), 0, 32).skipped == (reason is not None)
