"""p_c and p+ of a step, by shot: one number on every rank, the one of the definition."""

from functools import cached_property

import pytest

from tests.distributed.watching import FIGURES, plain_means
from tests.recipes import tiny_recipe

STEPS = 3
TOLD = (property, cached_property)


def figures_of(result) -> dict[str, float | None]:
    return {f"{figure} {shot}": v for figure in FIGURES for shot, v in getattr(result, figure).items()}


def told(result) -> dict[str, object]:
    """Everything that a step tells."""
    return {
        name: getattr(result, name)
        for name, kind in vars(type(result)).items()
        if isinstance(kind, TOLD) and name[0] != "_"
    }


def assert_close(ours: dict[str, float | None], expected: dict[str, float | None], rel: float) -> None:
    assert {name for name, v in ours.items() if v is None} == {name for name, v in expected.items() if v is None}
    assert {n: v for n, v in ours.items() if v is not None} == pytest.approx(
        {n: v for n, v in expected.items() if v is not None}, rel=rel
    )


@pytest.mark.parametrize("keys", [True, False], ids=["keys", "anchors_without_positives"])
def test_probabilities_by_shot_are_those_of_the_definition_on_any_ranks(pool, keys):
    """1 and 2 ranks agree, all ranks are told the same, and float64 over all micro-batches agrees; an anchor
    without a positive counts for its center alone."""
    seen = {W: pool(W).run("tests.distributed.watching:watched_steps", steps=STEPS, keys=keys) for W in (1, 2)}
    left_out = 0
    for number in range(STEPS):
        (one,), two = ([rank[number] for rank in seen[W]] for W in (1, 2))
        assert told(two[0].result) == told(two[1].result)
        assert_close(figures_of(two[0].result), figures_of(one.result), rel=1e-4)
        for ranks in ([one], two):
            inputs = [batch for rank in ranks for batch in rank.inputs]
            plain = plain_means(tiny_recipe(), inputs)
            expected = {f"{figure} {shot}": v for figure in FIGURES for shot, v in plain[figure].items()}
            assert_close(figures_of(ranks[0].result), expected, rel=1e-5)
        left_out += sum(
            int((batch.other_labels == label).sum()) == 1 for batch in one.inputs for label in batch.labels.tolist()
        )
    assert (left_out > 0) != keys


def test_watching_costs_no_collective_of_its_own(pool):
    """A step sums twice over ranks, with centers and positives to watch and without: totals and statistics."""
    for overrides in ((), ("loss.method=cross_entropy",)):
        for rank in pool(2).run("tests.distributed.watching:watched_steps", steps=2, overrides=overrides):
            assert [step.sums for step in rank] == [2, 2]


def test_without_contrast_there_are_no_positives_to_tell_of(pool):
    """None for every shot, not 0."""
    ((step,),) = pool(1).run(
        "tests.distributed.watching:watched_steps", steps=1, overrides=("loss.method=cross_entropy",)
    )
    assert set(step.result.positive_probability.values()) == {None}
    assert set(step.result.positive_probability_optimum.values()) == {None}
    assert 0 < step.result.center_probability["many"] < 1
