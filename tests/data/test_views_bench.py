"""The bench of views: both sides make two views of 224 pixels from the same photographs. No time is asserted."""

import json
import random
import sys
from pathlib import Path

import numpy as np
import torch

# As the benches have it: scripts that find their shared module beside them.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools" / "bench"))

import views

from paco_ds.config.load import load_recipe
from paco_ds.data.stream.decode import decode
from paco_ds.data.stream.views import MakeViews, make_view


def test_both_sides_make_alike_views_of_the_same_photographs():
    """Sizes as stated; the mean of all pixels agrees within its error."""
    samples = views.photographs(6)
    sides = [decode(sample, 10**9).shape[:2] for sample in samples]
    assert all(500 <= max(side) <= 800 for side in sides)
    assert len(set(sides)) == 6
    recipe = load_recipe(views.RECIPE)
    assert (recipe.views.query.name, recipe.views.key.name) == ("randcls", "sim")
    ours = MakeViews((make_view(recipe.views.query), make_view(recipe.views.key)), 10**9)
    bare, whole = views.published_views(on_device=True), views.published_views(on_device=False)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    found, theirs = [], []
    for number in range(150):
        sample = samples[number % 6]
        found.append([v.mean() for v in ours(sample, *map(np.random.default_rng, ((number, 0), (number, 1))))])
        theirs.append([np.asarray(v).mean() for v in bare(sample.image)])
    difference = np.mean(found, 0) - np.mean(theirs, 0)
    error = np.sqrt((np.var(found, 0) + np.var(theirs, 0)) / len(found))
    assert (np.abs(difference) < 3.5 * error).all(), (difference, error)
    assert all(tensor.shape == (3, 224, 224) and tensor.dtype == torch.float32 for tensor in whole(samples[0].image))


def test_the_bench_ends_with_its_bar(monkeypatch, capsys):
    """One line of JSON with the keys that all benches have."""
    monkeypatch.setattr(sys, "argv", ["views.py", "--images", "2", "--repeats", "1", "--json"])
    threads = torch.get_num_threads()
    try:
        assert views.main() in (0, 1)
    finally:
        torch.set_num_threads(threads)
    bar = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert list(bar) == ["name", "ours", "rival", "floor", "ratio", "bar", "holds"]
    assert bar["holds"] == (bar["ratio"] >= 3)
