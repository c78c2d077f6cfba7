"""The benches measure what they say: same work on both sides, every bar with its keys. No time is asserted."""

import dataclasses
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

# As `python tools/bench/loss.py` has it: benches are scripts that find their shared module beside them.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools" / "bench"))

import key_encoder
import key_queue
import loss
import report
import watching

TINY = loss.Size(6, 9, 40)
# Large enough for a peak to show; bars of every kind, the first two out of reach.
SMALL = loss.Size(64, 2000, 4096, times_as_fast=1e9, share_of_floor=1e-9, share_of_memory=2.0)
KEYS = ["name", "ours", "rival", "floor", "ratio", "bar", "holds"]


@pytest.mark.parametrize("clustered", [False, True], ids=["random", "clustered"])
def test_rival_and_ours_compute_the_same_loss_and_gradients(clustered):
    """Otherwise their times would not be comparable."""
    case = loss.make_case(TINY, clustered=clustered)
    ours, rival = case.ours(case.snapshot()), case.published()
    torch.testing.assert_close(ours, rival)
    gradients = [torch.autograd.grad(value, case.inputs) for value in (ours, rival)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    assert loss.gradient_error(TINY, clustered=clustered) < 1e-5


def test_floor_is_the_gradient_of_the_queue_term():
    """The floor's two products are work that the loss has to do, not an easier one."""
    case = loss.make_case(TINY)
    scores = case.query_BD @ case.queue.keys_KD.T / loss.TAU
    (gradient,) = torch.autograd.grad(scores.logsumexp(1).sum(), case.query_BD)
    torch.testing.assert_close(case.floor()[0] / loss.TAU, gradient)


def test_every_bar_ends_the_output_as_a_line_of_seven_keys(capsys):
    """All kinds of bar, read back from the last lines."""
    assert loss.main(["--repeats", "1", "--processes", "1", "--json"], sizes=[SMALL]) == 0
    lines = capsys.readouterr().out.splitlines()
    bars = [json.loads(line) for line in lines[-7:]]
    assert [list(bar) for bar in bars] == [KEYS] * 7
    assert [bar["holds"] for bar in bars[:2]] == [False, False]
    assert len({bar["name"] for bar in bars}) == 7
    assert not lines[-8].startswith("{")


def test_the_benched_sizes_carry_the_bars():
    """8, 4 and 3 times as fast, and the two that only the longest queue has."""
    bars = {str(size): (size.times_as_fast, size.share_of_floor, size.share_of_memory) for size in loss.SIZES}
    assert bars["256/8142/65536"] == (8, 0.75, 0.1)
    assert bars["128/8142/8192"] == (4, None, None)
    assert bars["32/8142/8192"] == (3, None, None)
    assert {size.classes for size in loss.SIZES} == {8142, 20_000, 100_000}


def test_the_published_average_is_the_fused_one():
    """The bench's rival does the same work."""
    fused, rival = ([torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))] for _ in range(2))
    query = [torch.nn.Parameter(torch.tensor([0.5, 4.0, 0.0]))]
    torch._foreach_lerp_([p.data for p in fused], [p.data for p in query], 0.1)
    key_encoder.published_update(rival, query, 0.9)
    torch.testing.assert_close(fused[0], rival[0])


def test_the_queues_length_where_sharding_pays_is_where_both_take_the_same_time():
    """From times at one length: what grows with K is scaled, collectives are not."""
    times = key_queue.Times(
        class_sums=100.0,
        logsumexp=50.0,
        push=1,
        digest=1,
        shard_class_sums=30.0,
        shard_logsumexp=45.0,
        collectives=2.0,
        gather=1,
        gather_bytes=1,
    )
    K = times.keys_where_sharding_pays(accumulation=2, keys=1000)
    replicated = (100 + 2 * 50) * K / 1000
    assert replicated == pytest.approx((30 + 2 * 45) * K / 1000 + 2 * 2)
    slower = dataclasses.replace(times, shard_class_sums=300.0)
    assert slower.keys_where_sharding_pays(accumulation=2, keys=1000) == float("inf")


def test_a_step_on_a_full_queue_leaves_it_full():
    """What the queue's bench measures memory of."""
    assert len(key_queue.full_queue(1000)) == 1000
    assert key_queue.prepare_step(1000)().dtype == torch.int64


def test_saved_bytes_counts_each_storage_once():
    """A tensor saved twice, and a view of it, are one storage."""
    x = torch.ones(10, requires_grad=True)
    y = torch.ones(10, requires_grad=True)
    assert loss.saved_bytes(lambda: x * y + x * y) == 80
    assert loss.saved_bytes(lambda: x[:5] * y[:5]) == 80
    assert loss.saved_bytes(lambda: x + y) == 0


def test_works_are_timed_in_turn_after_one_unmeasured_call():
    """The order rotates, so that no work always follows the same other."""
    calls = []
    seconds = report.median_seconds({name: lambda name=name: calls.append(name) for name in "abc"}, repeats=2)
    assert "".join(calls) == "abc" + "abc" + "bca"
    assert list(seconds) == ["a", "b", "c"]
    with pytest.raises(ValueError, match="--repeats"):
        report.median_seconds({"a": list}, repeats=0)


def allocate(mebibytes: int):
    held = torch.ones(mebibytes * 2**18)
    return lambda: held + 1


def test_peak_extra_memory_is_that_of_the_work_alone():
    """64 MiB of result beside 64 MiB of input, which does not count."""
    extra = report.peak_extra_bytes(allocate, 64)
    assert 60 * report.MIB < extra < 100 * report.MIB


@pytest.mark.parametrize(("ratio", "upper", "lower"), [(2.0, True, True), (1.9, True, False), (2.1, False, True)])
def test_bars_hold_at_their_limit(ratio, upper, lower):
    """Both directions, the limit included."""
    assert report.at_most("a", ratio, 2, ours=ratio).holds is upper
    assert report.at_least("a", ratio, 2, ours=ratio, rival=1.0).holds is lower


class TestWatching:
    def test_what_is_timed_gives_the_values_of_the_loss(self):
        """Otherwise the bench would time something else; an anchor without a positive included."""
        case = loss.make_case(TINY)
        published = case.loss
        inputs = [case.labels_B, case.logits_BC, case.query_BD, case.key_BD, case.snapshot()]
        output = published(*inputs)
        expected = (
            output.center_probability_B,
            output.center_optimum_B,
            output.positive_probability_B,
            output.positive_optimum_B,
        )
        for ours, value in zip(watching.anchor_terms(published, inputs).values(published), expected, strict=True):
            torch.testing.assert_close(ours, value, rtol=1e-4, atol=1e-7)

    def test_added_is_computing_and_what_the_rest_takes_more_than_without(self, capsys, monkeypatch):
        """The bar compares it with the step; lines end the output."""
        figures = watching.Figures(100.0, 0.1, 0.5, 0.2, 0.06, 0.05, 0.04, 0.01)
        assert figures.added_ms == pytest.approx(0.44)
        faster = replace(figures, reducing_ms=0.01)
        assert faster.added_ms == pytest.approx(0.43)  # noise takes nothing off the others
        monkeypatch.setattr(watching, "run_ranks", lambda ranks, repeats, sizes: [figures] * len(sizes))
        assert watching.main(["--json"]) == 0
        bars = [json.loads(line) for line in capsys.readouterr().out.splitlines()[-2:]]
        assert [list(bar) for bar in bars] == [KEYS] * 2
        assert [bar["ratio"] for bar in bars] == pytest.approx([0.0044] * 2)
        assert [(bar["bar"], bar["holds"]) for bar in bars] == [("<= 0.01", True)] * 2
