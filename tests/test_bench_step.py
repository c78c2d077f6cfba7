"""The bench of the step: both sides take the same step, parts add up, every bar ends as a line. No time is asserted."""

import json
import sys
from pathlib import Path

import pytest

# As `python tools/bench/step.py` has it: benches are scripts that find their shared modules beside them.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools" / "bench"))

import ranks
import step

TINY = step.Size(
    "cifar_resnet20",
    16,
    8,
    classes=4,
    queue=32,
    dim=8,
    view="small",
    rounds=2,
    width=4,
    reported=(step.Contestant("stage 2, 16 MiB buckets", {"stage": 2, "reduce_bucket_size": 2**22}),),
)


@pytest.fixture(scope="module")
def timings(tmp_path_factory):
    return step.Bench(TINY, tmp_path_factory.mktemp("bench")).run(TINY.reported, rounds=2)


def test_ours_and_the_published_loop_take_the_same_steps(timings):
    """Losses of the first two steps agree, the second after an update: the times are of the same work."""
    ours = timings[step.OURS.name].losses
    assert ours[0] != ours[1]
    for name in (step.RIVAL.name, TINY.reported[0].name):
        assert timings[name].losses == pytest.approx(ours, rel=1e-5), name


def test_every_part_of_the_step_is_timed_and_none_twice(timings):
    """On both sides; together with what no part names they are the step."""
    for name in (step.OURS.name, step.RIVAL.name):
        timing = timings[name]
        assert len(timing.seconds) == 2
        for seconds, parts in zip(timing.seconds, timing.parts, strict=True):
            assert set(parts) == set(step.PARTS)
            assert min(parts.values()) > 0
            assert sum(parts.values()) <= seconds
        assert timing.peak > 0
    assert timings[step.ENCODERS].median > 0


def test_bars_and_tables_are_printed(timings, capsys):
    """One line of each bar, with the figures it was computed from."""
    step.print_timings(TINY, timings, rounds=2)
    bars = step.bars_of(TINY, timings)
    step.print_bars(bars, as_json=True)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()[-2:]]
    assert [line["bar"] for line in lines] == ["<= 0.5", ">= 0.98"]
    assert all(line["ours"] > 0 and line["rival"] > 0 for line in lines)


def test_the_benched_sizes_are_those_of_the_bars():
    """ResNet-50 at 224 pixels with m = 8, ResNet-32 at 32 with m = 64, M = 2, on two ranks."""
    assert [(s.backbone, s.pixels, s.micro_batch) for s in step.SIZES] == [
        ("resnet50", 224, 8),
        ("cifar_resnet32", 32, 64),
    ]
    assert step.WORLD_SIZE == 2
    assert {c.zero["stage"] for c in step.REPORTED} == {0, 1, 2, 3}


def test_a_part_inside_another_counts_for_itself_alone(monkeypatch):
    """And what is taken starts again from nothing."""
    clock = iter([0.0, 2.0, 5.0, 6.0])
    monkeypatch.setattr(ranks.time, "perf_counter", lambda: next(clock))
    parts = ranks.Parts()
    with parts.part("outer"), parts.part("inner"):
        pass
    assert parts.take() == {"outer": 3.0, "inner": 3.0}
    assert parts.take() == {}


def test_a_rank_that_raises_is_named_with_its_traceback():
    """And the group is gone, instead of waiting for it."""
    with pytest.raises(RuntimeError, match=r"start: rank 0: [\s\S]*has no attribute 'Nobody'"):
        ranks.RankGroup(1, "step_workers:Nobody")
