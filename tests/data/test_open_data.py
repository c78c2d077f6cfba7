"""What training checks of its shards before it starts."""

import shutil

import pytest

from paco_ds.data.manifest import load_manifest, open_data
from paco_ds.errors import DataError
from tests.recipes import tiny_recipe


def test_shards_that_fit_are_opened(striped_shards):
    """The manifest of the recipe's shards."""
    assert len(open_data(tiny_recipe(f"data.shards={striped_shards}", "data.classes=4").data, ["train"]).classes) == 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.classes=8142", r"data.classes is 8142, but .* has 4 classes: .*set data.classes=4"),
        ("data.shards=/nowhere/shards", r"/nowhere/shards"),
    ],
)
def test_shards_that_do_not_fit_the_recipe_are_refused(striped_shards, override, message):
    """Setting, what there is, and what to do."""
    shards = () if "shards" in override else (f"data.shards={striped_shards}",)
    with pytest.raises(DataError, match=message):
        open_data(tiny_recipe(*shards, override).data, ["train"])


def test_a_split_that_is_not_there_is_answered_with_those_that_are(striped_shards):
    """The recipe's data.train_split, evaluation.split and test_split are asked for by name."""
    with pytest.raises(DataError, match=r"has no split 'dev'; its splits are: train, val, test"):
        open_data(tiny_recipe(f"data.shards={striped_shards}").data, ["train", "dev"])


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_cut_shard_of_any_used_split_is_found_before_training(striped_shards, tmp_path, split):
    """Not an epoch later."""
    shutil.copytree(striped_shards, tmp_path / "cut")
    shard = load_manifest(tmp_path / "cut").split(split).shards[-1]
    path = tmp_path / "cut" / shard.file
    path.write_bytes(path.read_bytes()[:-1024])
    with pytest.raises(DataError, match=rf"{shard.file} has \d+ bytes, manifest.json says \d+: .*check"):
        open_data(tiny_recipe(f"data.shards={tmp_path / 'cut'}").data, [split])
