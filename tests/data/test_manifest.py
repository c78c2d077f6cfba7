"""What a directory of shards says it holds, and what is refused."""

import json
import pickle
from pathlib import Path

import pytest

from paco_ds.data.manifest import Manifest, Shots, load_manifest
from paco_ds.errors import DataError


def edit(manifest: Manifest, **changes: object) -> Path:
    """Change top-level entries of manifest.json; returns its directory."""
    path = manifest.directory / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return manifest.directory


def test_describes_the_splits(tiny_shards: Manifest) -> None:
    """Counts, classes and normalisation are those of the card and its images."""
    train = tiny_shards.split("train")
    assert train.samples == 47
    assert train.class_counts == (30, 12, 5)
    assert len(train.shards) > 1
    assert tiny_shards.classes == ("cat", "dog", "eel")
    assert tiny_shards.mean == (0.5, 0.5, 0.5)


def test_shots_follow_the_training_counts(tiny_shards: Manifest) -> None:
    """The thresholds of the card (20 / 10) sort 30, 12 and 5 images."""
    assert tiny_shards.shots_of_classes() == ("many", "medium", "few")


def test_shot_thresholds_are_the_papers() -> None:
    """Many is more than 100, Few is less than 20, both bounds belong to Medium."""
    assert [Shots().of(n) for n in (101, 100, 20, 19)] == ["many", "medium", "medium", "few"]


def test_overlapping_shots_are_refused() -> None:
    """A class cannot be Many and Few."""
    with pytest.raises(ValueError, match=r"few \(30\) overlaps many \(20\)"):
        Shots(many=20, few=30)


def test_pickle_keeps_directory_and_digest(tiny_shards: Manifest) -> None:
    """Worker processes get the manifest as it was loaded."""
    copy = pickle.loads(pickle.dumps(tiny_shards))
    assert (copy.directory, copy.sha256) == (tiny_shards.directory, tiny_shards.sha256)


def test_unknown_split_names_the_known_ones(tiny_shards: Manifest) -> None:
    """A mistyped split is answered with the splits there are."""
    with pytest.raises(DataError, match="no split 'valid'; its splits are: train, test"):
        tiny_shards.split("valid")


@pytest.mark.parametrize(
    ("split", "remedy"), [("val", "set evaluation.split to null"), ("test", "set evaluation.test_split to a split")]
)
def test_a_split_that_was_not_built_comes_with_its_remedy(tiny_shards: Manifest, split: str, remedy: str) -> None:
    """How to build it, or to do without."""
    without = tiny_shards.model_copy(update={"splits": {"train": tiny_shards.split("train")}})
    without._storage = tiny_shards.storage
    with pytest.raises(DataError, match=f"has no split '{split}'; its splits are: train; build with .*{remedy}"):
        without.split(split)


def test_missing_directory_names_the_command(tmp_path: Path) -> None:
    """The remedy is the command that makes shards."""
    with pytest.raises(DataError, match=r"no shard directory .*nowhere; make it with `paco-build-shards"):
        load_manifest(tmp_path / "nowhere")


def test_directory_without_manifest_was_not_built_whole(tmp_path: Path) -> None:
    """A manifest is written last."""
    with pytest.raises(DataError, match=r"has no manifest.json: its build is not finished"):
        load_manifest(tmp_path)


def test_manifest_that_is_not_json(damaged: Manifest) -> None:
    """A cut manifest is named."""
    path = damaged.directory / "manifest.json"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=r"manifest.json is not JSON"):
        load_manifest(damaged.directory)


def test_manifest_of_something_else(damaged: Manifest) -> None:
    """JSON of another format is not taken for ours."""
    with pytest.raises(DataError, match="not a manifest of paco_ds shards"):
        load_manifest(edit(damaged, format="web app"))


def test_manifest_of_another_version_says_both(damaged: Manifest) -> None:
    """The version found, the version read, and the remedy."""
    with pytest.raises(DataError, match=r"has format version 7, this paco_ds reads version 1; rebuild"):
        load_manifest(edit(damaged, version=7))


def test_edited_sums_are_refused(damaged: Manifest) -> None:
    """Counts that no longer add up are named."""
    splits = json.loads((damaged.directory / "manifest.json").read_text())["splits"]
    splits["train"]["samples"] = 48
    with pytest.raises(DataError, match=r"splits\.train: samples, summed over the shards, give 47.* has 48"):
        load_manifest(edit(damaged, splits=splits))


def test_edited_class_counts_are_refused(damaged: Manifest) -> None:
    """Class counts must add up to the samples."""
    splits = json.loads((damaged.directory / "manifest.json").read_text())["splits"]
    splits["train"]["class_counts"][0] += 1
    with pytest.raises(DataError, match="class_counts, summed, give 48"):
        load_manifest(edit(damaged, splits=splits))


def test_edited_classes_are_refused(damaged: Manifest) -> None:
    """A class name too many contradicts the counts."""
    with pytest.raises(DataError, match="class_counts has 3 entries for 4 classes"):
        load_manifest(edit(damaged, classes=["cat", "dog", "eel", "fox"]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": ["cat", "dog", "cat"]}, "the class 'cat' is listed twice"),
        ({"classes": ["cat", "", "eel"]}, "a class has an empty name"),
        ({"std": [0, 0, 0]}, r"std.0: Input should be greater than 0"),
        ({"mean": [123, 116, 103]}, r"mean.0: 123 is not within 0 to 1"),
    ],
)
def test_edited_names_and_figures_are_refused(damaged: Manifest, changes: dict[str, object], message: str) -> None:
    """Names that are of no one class; figures with which no training step is finite."""
    with pytest.raises(DataError, match=message):
        load_manifest(edit(damaged, **changes))


def test_a_shard_of_two_splits_is_refused(damaged: Manifest) -> None:
    """What a model is measured on would be what it learns from."""
    splits = json.loads((damaged.directory / "manifest.json").read_text())["splits"]
    splits["val"] = splits["train"] | {"name": "val"}
    with pytest.raises(DataError, match="the shard 'train-00000' is listed twice"):
        load_manifest(edit(damaged, splits=splits))


def test_mistyped_key_names_the_nearest(damaged: Manifest) -> None:
    """An unknown key is answered with the nearest valid one."""
    with pytest.raises(DataError, match="unknown key 'licence'; did you mean 'license'"):
        load_manifest(edit(damaged, licence="MIT"))


def test_check_files_accepts_whole_shards(tiny_shards: Manifest) -> None:
    """Whole shards pass."""
    tiny_shards.check_files("train")


def test_check_files_names_a_cut_shard(damaged: Manifest) -> None:
    """A shard that lost its end is named, with the remedy."""
    path = damaged.directory / "train-00001.tar"
    path.write_bytes(path.read_bytes()[:-512])
    with pytest.raises(DataError, match=r"train-00001.tar has \d+ bytes, manifest.json says \d+: copy it"):
        damaged.check_files("train")


@pytest.mark.parametrize("file", ["train-00001.tar", "train-00001.index.npy"])
def test_check_files_names_a_missing_file(damaged: Manifest, file: str) -> None:
    """A shard or index that is gone is named; the other split is still well."""
    (damaged.directory / file).unlink()
    with pytest.raises(DataError, match=rf"{file} is missing.*copy it again or rebuild.*check"):
        damaged.check_files("train")
    damaged.check_files("test")
