"""Bootstrap intervals of differences against closed forms, and what paco-compare and a table say of them."""

import json
import math

import numpy as np
import pytest

from paco_ds.errors import DataError, UserError
from paco_ds.evaluation.correctness import packed, unpacked
from paco_ds.paper.compare import main
from paco_ds.paper.comparison import MethodResults, SeedResult, verdicts
from paco_ds.paper.intervals import paired_difference
from tests.recipes import write_tiny_recipe


def draws(share: float, images: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random(images) < share


def half_width(found) -> float:
    return (found.high - found.low) / 2


def test_one_seed_has_the_standard_error_of_paired_images():
    """1.96 sqrt(var(d) / N), as for a mean of independent pairs."""
    ours, theirs = draws(0.8, 4000, 1), draws(0.7, 4000, 2)
    found = paired_difference({1: ours}, {1: theirs})
    d = ours.astype(float) - theirs
    assert found.mean == pytest.approx(d.mean())
    assert half_width(found) == pytest.approx(1.96 * math.sqrt(d.var() / len(d)), rel=0.06)
    assert (found.low + found.high) / 2 == pytest.approx(d.mean(), abs=0.002)
    assert (found.seeds, found.images) == (1, 4000)


def test_seeds_whose_images_are_all_alike_have_the_seeds_error_alone():
    """Seed s is better by c_s on every image or none: 1.96 sqrt(var(c) / S)."""
    gains = np.arange(30) % 3 - 1
    ours = {s: np.full(50, gain > 0) for s, gain in enumerate(gains)}
    theirs = {s: np.full(50, gain < 0) for s, gain in enumerate(gains)}
    found = paired_difference(ours, theirs)
    assert found.mean == pytest.approx(0)
    assert half_width(found) == pytest.approx(1.96 * math.sqrt(gains.var() / 30), rel=0.08)


def test_pairs_of_images_make_it_narrow():
    """Two methods that differ on few images: much narrower than without pairs. Equal ones have no interval at all."""
    ours = draws(0.8, 2000, 1)
    theirs = ours ^ draws(0.02, 2000, 2)
    found = paired_difference({1: ours}, {1: theirs})
    assert half_width(found) < 0.4 * 1.96 * math.sqrt(2 * 0.8 * 0.2 / 2000)
    same = paired_difference({1: ours, 2: ours}, {1: ours, 2: ours})
    assert (same.mean, same.low, same.high) == (0, 0, 0)


def test_common_seeds_are_paired_and_others_left_out():
    """And without any there are no pairs; nor with other images."""
    a, b = draws(0.8, 100, 1), draws(0.7, 100, 2)
    assert paired_difference({1: a, 2: b}, {2: a, 3: b}).mean == pytest.approx(b.mean() - a.mean())
    with pytest.raises(UserError, match="no seed in common"):
        paired_difference({1: a}, {2: b})
    with pytest.raises(UserError, match="other numbers of images"):
        paired_difference({1: a}, {1: b[:90]})


@pytest.mark.parametrize("images", [0, 1, 7, 8, 9, 2000])
def test_what_was_right_survives_packing(images):
    """A bit an image."""
    correct = draws(0.5, images, 3)
    kept = json.loads(json.dumps({"correct": packed(correct)}))
    assert np.array_equal(unpacked(kept, "x"), correct)


@pytest.mark.parametrize("kept", [{}, {"correct": None}, {"correct": {"images": 9, "bits": "AA=="}}, {"correct": "?"}])
def test_a_run_of_an_earlier_version_is_named(kept):
    """With what to do."""
    with pytest.raises(DataError, match=r"run/metrics\.json does not say which images.*evaluate the run again"):
        unpacked(kept, "run/metrics.json")


def _run(folder, name, method, seed, correct):
    run = folder / name
    run.mkdir()
    write_tiny_recipe(run / "recipe.yaml", f"seed={seed}", f"loss.method={method}")
    final = {"split": "test", "manifest_sha256": "ab", "class_names": ["a"], "all": float(correct.mean())}
    final |= dict.fromkeys(("many", "medium", "few"), 0.5) | {"correct": packed(correct)}
    (run / "metrics.json").write_text(json.dumps(final))
    return str(run)


@pytest.mark.parametrize("form", ["markdown", "csv", "latex"])
def test_paco_compare_gives_differences_from_the_first_line(tmp_path, capsys, form):
    """Below the table, in its format."""
    runs = [_run(tmp_path, f"ce{s}", "cross_entropy", s, draws(0.7, 500, s)) for s in (1, 2)]
    runs += [_run(tmp_path, f"paco{s}", "paco", s, draws(0.8, 500, 10 + s)) for s in (1, 2)]
    assert main([*runs, "--differences", "--no-paper", "--format", form]) == 0
    below = capsys.readouterr().out.split("\n\n")[1]
    assert "paco1 and 1 more - ce1 and 1 more" in below
    assert "over 2 seeds and 500 images" in below
    with pytest.raises(SystemExit):
        main([*runs[:2], "--differences", "--no-paper"])
    assert "these are seeds of one" in capsys.readouterr().err


def test_a_tables_verdict_has_the_interval_if_all_runs_say_what_was_right():
    """Otherwise the spread over seeds alone, as before."""

    def method(name, share, known=True):
        runs = [(s, draws(share, 400, 100 * s + len(name))) for s in (1, 2)]
        seeds = [SeedResult(s, 0.5, 0.5, 0.5, float(c.mean()), c if known else None) for s, c in runs]
        return MethodResults(name, seeds)

    known = verdicts([method("ce", 0.6), method("paco", 0.8)])[-1]
    assert "points, 95% bootstrap interval +" in known
    assert "over 2 seeds and 400 images); the gap exceeds the seeds' spread" in known
    assert "interval" not in verdicts([method("ce", 0.6, known=False), method("paco", 0.8)])[-1]
