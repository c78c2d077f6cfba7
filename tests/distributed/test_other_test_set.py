"""A run is measured on images of other shards: classes are compared by name, shots are those of the run."""

import json

import pytest

from paco_ds.data.manifest import load_manifest, open_data
from paco_ds.data.pack.command import main as build
from paco_ds.errors import DataError
from paco_ds.evaluation.split import class_index
from tests.commands import run_command
from tests.recipes import tiny_recipe, write_tiny_recipe


@pytest.fixture(scope="module")
def other_shards(striped_shards, tmp_path_factory):
    """`other_shards(*classes)`: the test images of these classes in new shards, with the classes in this order."""

    def pack(*classes):
        folder, images = tmp_path_factory.mktemp("other"), striped_shards.parent / "images"
        (folder / "classes.txt").write_text("".join(f"{name}\n" for name in classes))
        found = [(path, name) for name in classes for path in sorted((images / "test" / name).iterdir())]
        listed = [f"{path.relative_to(images)},{name}" for path, name in found]
        (folder / "test.csv").write_text("\n".join(["path,label", *listed]))
        csv = ("--source", "csv", "--root", str(images), "--test", str(folder / "test.csv"))
        output = folder / "shards"
        assert build(["build", *csv, "--classes", str(folder / "classes.txt"), "--output", str(output)]) == 0
        return output

    return pack


def test_some_of_the_classes_in_another_order_have_the_figures_of_the_run(pool, striped_shards, other_shards, tmp_path):
    """By the command; the digest of the other shards stands beside that of the run's."""
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 0}}))
    settings = (f"data.shards={striped_shards}", "engine.deepspeed=zero.json", "schedule.epochs=3")
    write_tiny_recipe(tmp_path / "tiny.yaml", *settings)
    run = tmp_path / "run"
    pool(2).run("tests.distributed.training:train", recipe=tmp_path / "tiny.yaml", run=run)
    trained = json.loads((run / "metrics.json").read_text())
    assert len(set(trained["per_class"])) > 1

    other = other_shards("class3", "class0")
    done = run_command("paco_ds.evaluate", "--run", run, "--data", other, "--output", tmp_path / "other.json")
    assert "2 of the 4 classes" in done.stdout
    figures = json.loads((tmp_path / "other.json").read_text())
    own = trained["per_class"]
    assert figures["per_class"] == [own[0], None, None, own[3]]
    assert figures["shots_of_classes"] == trained["shots_of_classes"]
    assert figures["manifest_sha256"] == trained["manifest_sha256"]
    assert figures["data"]["manifest_sha256"] == load_manifest(other).sha256


def test_a_class_that_was_not_trained_is_named(striped_shards, other_shards):
    trained = open_data(tiny_recipe(f"data.shards={striped_shards}").data, [])
    other = load_manifest(other_shards("class0"))
    with pytest.raises(DataError, match=r"has the class 'class1' and 2 more, which the run was not trained on"):
        class_index(trained, other)
