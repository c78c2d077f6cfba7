"""`preflight --views` and `--workers`: a sheet of the user's own images, and workers enough for a node's GPUs."""

import itertools
import json

import cv2
import pytest
import torch

from paco_ds.config.load import load_recipe
from paco_ds.config.views import RegularView
from paco_ds.data.manifest import load_manifest
from paco_ds.errors import UserError
from paco_ds.planning import loading_ways
from paco_ds.planning.loading import measure_loading, measure_step, plan_loading
from paco_ds.planning.preflight import main
from tests.recipes import write_tiny_recipe


@pytest.fixture
def recipe_file(tmp_path, striped_shards):
    """The tiny recipe on small shards."""
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 1}}')
    path = tmp_path / "tiny.yaml"
    write_tiny_recipe(path, f"data.shards={striped_shards}", f"engine.deepspeed={tmp_path / 'ds.json'}")
    return path


def test_a_sheet_shows_images_and_views(recipe_file, tmp_path, capsys):
    """A picture is written; its format follows the name's ending."""
    sheet = tmp_path / "sheet.png"
    assert main(["--views", str(sheet), "--recipe", str(recipe_file)]) == 0
    height, width, _ = cv2.imread(str(sheet)).shape
    assert height > 400
    assert width > 400
    assert str(sheet) in capsys.readouterr().out


@pytest.mark.parametrize("name", ["sheet.mp5", "no-such-folder/sheet.png"])
def test_a_sheet_that_cannot_be_written_is_an_error_in_words(recipe_file, tmp_path, capsys, name):
    """Status 2 and the path."""
    with pytest.raises(SystemExit) as stopped:
        main(["--views", str(tmp_path / name), "--recipe", str(recipe_file)])
    assert stopped.value.code == 2
    assert f"{name} cannot be written" in capsys.readouterr().err


def test_workers_follow_from_both_rates():
    """With a quarter more than the mean; a node needs a core for each worker and each rank."""
    plan = plan_loading(400, 1000, gpus=8, configured=4, measured=True)
    assert plan.workers == 4
    assert plan.verdict == ("fed" if plan.cores >= 40 else "too few cores")
    assert plan_loading(10_000, 10, gpus=1, configured=1, measured=False).workers == 1


def test_too_few_cores_or_workers_are_said_with_the_remedy(monkeypatch):
    """How long GPUs would wait, or the setting to give."""
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(16)))
    starved = plan_loading(200, 1000, gpus=4, configured=7, measured=True)
    assert starved.verdict == "too few cores"
    assert "so it waits 40% of the time" in starved.lines()[-1]  # 12 cores x 200 / 4 = 600 of 1000
    fewer = plan_loading(800, 1000, gpus=4, configured=1, measured=True)
    assert fewer.verdict == "too few workers"
    assert "--set data.workers=2" in fewer.lines()[-1]
    assert plan_loading(800, 1000, gpus=4, configured=2, measured=True).verdict == "fed"


def test_both_rates_are_measured_on_real_work(recipe_file, striped_shards):
    """Reading, decoding and views of the shards; keys, queries and backward of the model; threads are put back."""
    recipe, threads = load_recipe(recipe_file), torch.get_num_threads()
    assert (
        measure_loading(recipe.data, recipe.training_views, load_manifest(striped_shards), recipe.seed, seconds=0.02)
        > 10
    )
    assert torch.get_num_threads() == threads
    routers = ["loss.method=routing", "model.trained=routers", "model.start_from=unused", "model.experts=2"]
    methods = [], ["key_encoder=none"], ["loss.method=cross_entropy"], ["loss.method=bcl"], routers
    for override in methods:
        rate = measure_step(load_recipe(recipe_file, override), [9, 5, 2, 1], torch.device("cpu"), seconds=0.02)
        assert rate > 1


def test_the_command_says_how_many_workers(recipe_file, capsys):
    """Status 1 where the recipe has too few; without a GPU the rate must be given."""
    common = ["--workers", "--recipe", str(recipe_file)]
    assert main([*common, "--images-per-second", "20", "--ranks", "2", "--gpus-per-node", "1", "--json"]) == 1
    plan = json.loads(capsys.readouterr().out)
    assert (plan["per_gpu"], plan["workers"], plan["configured"]) == (10.0, 1, 0)
    enough = ["--images-per-second", "20", "--ranks", "2", "--gpus-per-node", "1", "--set", "data.workers=1"]
    assert main([*common, *enough]) == (0 if plan["cores"] > 1 else 1)
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            main(common)
        assert "no GPU to measure: give --images-per-second" in capsys.readouterr().err


def test_a_plan_says_how_many_cores_a_node_needs_by_each_way(recipe_file, capsys, monkeypatch):
    """Views by loader processes or the device, the shards as they are or smaller; without shards, of made-up images."""
    rates = itertools.cycle([100.0, 250.0, 200.0, 1000.0])
    monkeypatch.setattr(loading_ways, "loading_rate", lambda *of: next(rates))
    common = ["--plan", "--recipe", str(recipe_file), "--ranks", "1", "--device", "cpu", "--gpu-rate", "2000"]
    assert main([*common, "--json"]) == 0
    cores = json.loads(capsys.readouterr().out)["cores_per_node"]
    # 8 x (2000 x 1.25 / rate, rounded up, and one for the rank)
    assert list(cores.values()) == [8 * 26, 8 * 11, 8 * 14, 8 * 4]
    assert list(cores) == [
        f"views.device={device}{of}"
        for of in ("", ", shards built with --resize-short 12")
        for device in ("cpu", "accelerator")
    ]
    assert main([*common, "--gpus-per-node", "1"]) == 0
    said = capsys.readouterr().out
    assert "cores of a node of 1 GPUs at 2000 images/s each" in said
    assert "    26 cores  views.device=cpu (100 images/s a core)" in said


def test_ways_are_measured_on_samples_in_memory(recipe_file, striped_shards):
    """Those of the shards, and made-up photographs, which are those of no shards."""
    recipe = load_recipe(recipe_file)
    for manifest in (load_manifest(striped_shards), None):
        ways = loading_ways.plan_ways(
            recipe.data, recipe.training_views, manifest, per_gpu=1, gpus=2, short=8, seconds=0.01
        )
        assert [way.cores for way in ways] == [4] * 4
        assert all(way.per_worker > 1.25 for way in ways)
    erasing = [RegularView(size=8, erasing=1.0)]  # which no device can carry out
    ways = loading_ways.plan_ways(recipe.data, erasing, None, per_gpu=1, gpus=2, short=8, seconds=0.01)
    assert [way.name[:16] for way in ways] == ["views.device=cpu"] * 2
    with pytest.raises(UserError, match="0 images/s for a GPU: it must be above 0"):
        loading_ways.plan_ways(recipe.data, recipe.training_views, None, per_gpu=0, gpus=2, short=8, seconds=0.01)


def test_something_must_be_asked_for(recipe_file, capsys):
    """The things that it does are named."""
    with pytest.raises(SystemExit):
        main(["--recipe", str(recipe_file)])
    assert "--plan, --workers, --launch, --views" in capsys.readouterr().err
