"""Where results are written: no result of other images is replaced."""

import json
import shutil

import pytest

from paco_ds import evaluate
from paco_ds.data.manifest import load_manifest
from paco_ds.data.storage import Storage
from paco_ds.errors import CheckpointError, DataError
from paco_ds.evaluation.results import _folder_of, results_file
from paco_ds.evaluation.split import class_index


@pytest.fixture
def manifests(striped_shards, tmp_path):
    """`manifests(folder, name)`: that of a data set of another name in a folder, without its shards."""

    def manifest(folder, name="tiny"):
        (tmp_path / folder).mkdir(parents=True)
        about = json.loads((striped_shards / "manifest.json").read_text()) | {"name": name}
        (tmp_path / folder / "manifest.json").write_text(json.dumps(about))
        return load_manifest(tmp_path / folder)

    return manifest


def write(file, split, trained, other=None):
    """Results as `paco-evaluate` writes them, as far as their place depends on them."""
    data = {"data": {"manifest_sha256": other.sha256}} if other else {}
    file.write_text(json.dumps({"split": split, "manifest_sha256": trained.sha256, **data}))


def test_results_of_other_shards_are_named_by_folder_and_split(manifests, tmp_path):
    trained, night = manifests("own"), manifests("night")
    assert results_file(tmp_path, "test", "test", trained).name == "metrics.json"
    assert results_file(tmp_path, "val", "test", trained).name == "metrics-val.json"
    assert results_file(tmp_path, "test", "test", trained, night).name == "metrics-night-test.json"
    assert results_file(tmp_path, "val", "test", trained, night).name == "metrics-night-val.json"


def test_results_of_a_set_whose_folder_has_the_same_name_are_not_replaced(manifests, tmp_path):
    trained, first, second = manifests("own"), manifests("a/night", "first"), manifests("b/night", "second")
    file = results_file(tmp_path, "test", "test", trained, first)
    write(file, "test", trained, first)
    assert results_file(tmp_path, "test", "test", trained, first) == file
    assert results_file(tmp_path, "test", "test", trained, second).name == (
        f"metrics-night-test-{second.sha256[:8]}.json"
    )


def test_a_split_called_like_another_set_and_split_does_not_replace_its_results(manifests, tmp_path):
    trained, night = manifests("own", "own"), manifests("night")
    write(results_file(tmp_path, "test", "test", trained, night), "test", trained, night)
    name = results_file(tmp_path, "night-test", "test", trained).name
    assert name == f"metrics-night-test-{trained.sha256[:8]}.json"


def test_a_file_that_holds_no_results_is_not_replaced(manifests, tmp_path):
    trained = manifests("own")
    for text in ("", "[]", '{"data": 3}', "[" * 100_000):
        (tmp_path / "metrics-val.json").write_text(text)
        assert results_file(tmp_path, "val", "test", trained).name == f"metrics-val-{trained.sha256[:8]}.json"


@pytest.mark.parametrize(
    ("address", "name"),
    [(".", "here"), ("./", "here"), ("s3://bucket", "bucket"), ("https://host/night/?key=x", "night")],
)
def test_shards_have_the_name_of_their_folder_however_they_are_given(address, name, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert _folder_of(Storage(address)) == name


def test_a_class_in_another_spelling_is_named_with_the_runs_own(striped_shards, tmp_path):
    """The source `folder` takes no list of classes: a folder is renamed."""
    shutil.copy(striped_shards / "manifest.json", tmp_path / "manifest.json")
    trained, path = load_manifest(striped_shards), tmp_path / "manifest.json"
    for spelling, remedy in (
        ("Class1", "rename it to 'class1', which the run has"),
        ("ox", r"one of the run's \(class0,"),
    ):
        path.write_text((striped_shards / "manifest.json").read_text().replace('"class1"', f'"{spelling}"'))
        with pytest.raises(DataError, match=f"has the class '{spelling}', .*{remedy}.*or leave its images out"):
            class_index(load_manifest(tmp_path), trained)


def test_a_folder_without_a_run_is_called_so(tmp_path, capsys):
    """And not a recipe whose name is unknown."""
    with pytest.raises(SystemExit) as end:
        evaluate.main(["--run", str(tmp_path)])
    assert end.value.code == CheckpointError.status
    assert f"{tmp_path} is not the run directory of a training: " in capsys.readouterr().err
