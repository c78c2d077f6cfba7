"""Everything that evaluation writes is the same at any number of ranks."""

import json

import cv2
import numpy as np
import pytest

from paco_ds.data.pack.command import main as build
from tests.recipes import write_tiny_recipe

TRAIN_COUNTS, TEST_COUNTS = (120, 101, 60, 20, 19, 10, 5), (7, 4, 6, 5, 3, 9, 1)  # of all three shots, top-5 of 7
EXPERTS = ("model.experts=3", "model.centers=cosine", "loss.method=ride")
NOT_FIGURES = {"world_size", "started", "finished"}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """7 classes of stripes in noise, 35 test images: no number of ranks and no batch divides them."""
    root, rng = tmp_path_factory.mktemp("seven"), np.random.default_rng(0)
    for split, counts in (("train", TRAIN_COUNTS), ("test", TEST_COUNTS)):
        for label, count in enumerate(counts):
            folder = root / "images" / split / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                image = rng.integers(0, 150, (12, 12, 3), dtype=np.uint8)
                image[label : label + 2] += 90
                cv2.imwrite(str(folder / f"{number}.png"), image)
    arguments = ["build", "--source", "folder", "--root", str(root / "images"), "--output", str(root / "shards")]
    assert build([*arguments, "--shard-bytes", "30000"]) == 0
    return root / "shards"


@pytest.mark.parametrize("overrides", [(), EXPERTS], ids=["one_classifier", "experts"])
def test_all_figures_are_those_of_one_rank(pool, shards, tmp_path, overrides):
    """Top-1 and top-5 of every shot, per class, F1, calibration, confusions and other test distributions, on 1, 2 and
    4 ranks; every image of the split takes part once."""
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"stage": 0}}')
    settings = (f"data.shards={shards}", f"engine.deepspeed={tmp_path / 'zero.json'}", "evaluation.split=null")
    write_tiny_recipe(tmp_path / "tiny.yaml", *settings, "loss.method=cross_entropy", *overrides)
    run = tmp_path / "run"
    pool(1).run("tests.distributed.training:train", recipe=tmp_path / "tiny.yaml", run=run, stop_at_step=8)
    figures = {}
    for world_size in (1, 2, 4):
        output = tmp_path / f"{world_size}.json"
        batch = ("evaluation.batch=3",)
        pool(world_size).run("tests.distributed.evaluating:written", run=run, output=output, overrides=batch)
        written = json.loads(output.read_text())
        assert written["world_size"] == world_size
        figures[world_size] = {name: value for name, value in written.items() if name not in NOT_FIGURES}
    one = figures[1]
    assert 0 < one["all"] < one["top5"]["all"] < 1
    assert None not in (*one["top5"].values(), one["many"], one["medium"], one["few"], one["calibration_error"])
    correct = round(one["all"] * sum(TEST_COUNTS))
    assert correct + sum(c["images"] for c in one["confusions"]) == sum(TEST_COUNTS)
    assert len(one["test_agnostic"]) == 11
    for world_size in (2, 4):
        assert figures[world_size].keys() == one.keys()
        for name, value in one.items():
            assert figures[world_size][name] == near(value), (world_size, name)


def near(value):
    """A figure but for the order of its sums; everything else exactly."""
    return pytest.approx(value, abs=1e-6) if isinstance(value, float) else value
