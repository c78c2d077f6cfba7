"""A trained model away from its shards: the answers of the run's own evaluation, from files, bytes and arrays."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image

import paco_ds
from paco_ds.checkpoint import Checkpoint, chosen_checkpoint
from paco_ds.config.data import DataSettings
from paco_ds.config.load import load_recipe
from paco_ds.config.recipe import EvaluationSettings
from paco_ds.data.manifest import load_manifest, open_data
from paco_ds.distributed.ranks import Ranks
from paco_ds.errors import CheckpointError, DataError, RecipeError
from paco_ds.evaluation import embed, neighbours, temperature, trained_runs
from paco_ds.evaluation.embeddings import load_embeddings
from paco_ds.evaluation.predict import main
from paco_ds.evaluation.predictor import _trained_data
from paco_ds.evaluation.runner import Ensemble, load_recogniser
from tests.commands import run_command
from tests.damaged import copy_with_damage
from tests.recipes import evaluation_batches, write_tiny_recipe


@pytest.fixture(scope="module")
def trained(pool, striped_shards, tmp_path_factory):
    """A run of 2 ranks on shards that are gone since, its test images, and its probabilities for them."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(striped_shards, folder / "shards")
    (folder / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    settings = ("engine.deepspeed=zero.json", "schedule.epochs=3", "evaluation.checkpoint=best_balanced")
    write_tiny_recipe(folder / "tiny.yaml", f"data.shards={folder / 'shards'}", *settings)
    pool(2).run("tests.distributed.training:train", recipe=folder / "tiny.yaml", run=folder / "run")
    recipe = load_recipe(folder / "run" / "recipe.yaml")
    manifest = open_data(recipe.data, ["test"])
    checkpoint = chosen_checkpoint(folder / "run", recipe.evaluation.checkpoint)
    model = load_recogniser(checkpoint, recipe, manifest).eval()
    with torch.no_grad():
        batches = list(evaluation_batches(recipe, manifest, "test"))
        answers = torch.cat([model(batch.query).mean_logits().softmax(1)[batch.valid] for batch in batches])
        labels = torch.cat([batch.labels[batch.valid] for batch in batches])
    shutil.rmtree(folder / "shards")
    images = sorted((striped_shards.parent / "images" / "test").glob("*/*.png"))
    return folder / "run", images, answers, labels


@pytest.fixture(scope="module")
def model(trained):
    return paco_ds.load(trained[0])


def test_probabilities_are_those_of_the_runs_evaluation(model, trained):
    """Of each image, whatever its place; without shards."""
    _, images, answers, labels = trained
    assert model.class_names == ("class0", "class1", "class2", "class3")
    ours = dict(zip(images, model.probabilities(images), strict=True))
    for label, name in enumerate(model.class_names):
        of_class = torch.stack([row for path, row in ours.items() if path.parent.name == name])
        theirs = answers[labels == label]
        order = [rows[:, 0].argsort() for rows in (of_class, theirs)]
        torch.testing.assert_close(of_class[order[0]], theirs[order[1]], rtol=1e-5, atol=1e-6)


def test_an_image_may_be_a_path_its_bytes_an_array_or_pils(model, trained):
    path = trained[1][0]
    picture = Image.open(path).convert("RGB")
    rows = model.probabilities([path, str(path), path.read_bytes(), np.asarray(picture), picture])
    assert all(torch.equal(row, rows[0]) for row in rows)


def test_predictions_are_named_and_the_most_probable_first(model, trained):
    (two,) = model.predict(trained[1][:1], top=2)
    row = model.probabilities(trained[1][:1])[0]
    assert two[0].name == model.class_names[int(row.argmax())]
    assert two[0].probability == pytest.approx(float(row.max()))
    assert two[0].probability >= two[1].probability
    assert len(model.predict(trained[1][:1], top=9)[0]) == 4
    assert model.predict([]) == []


def test_features_are_what_the_centers_take(model, trained):
    features = model.embed(trained[1][:3])
    weights = chosen_checkpoint(trained[0], "best_balanced").model()
    assert features.shape == (3, 16)
    logits = features @ weights["centers.weight"].T + weights["centers.bias"]
    torch.testing.assert_close(logits.softmax(1), model.probabilities(trained[1][:3]))


def test_an_image_that_cannot_be_read_is_named(model, trained, tmp_path):
    """By predict as an error, by stream in its place."""
    bad = tmp_path / "bad.png"
    bad.write_bytes(trained[1][0].read_bytes()[:50])
    with pytest.raises(DataError, match=r"bad\.png cannot be read \(truncated\)"):
        model.predict([bad])
    answers = list(model.stream([bad, trained[1][0], tmp_path / "none.png", b"text", "a\0b"]))
    assert [type(answer).__name__ for answer in answers] == ["Unreadable", "tuple", *["Unreadable"] * 3]
    assert answers[2].reason == "No such file or directory"
    assert answers[3] == type(answers[3])("image 3", "unknown_format")


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=f"{tmp_path} is not the run directory of a training"):
        paco_ds.load(tmp_path)


def test_a_network_that_was_not_trained_is_refused_in_one_line(trained, tmp_path):
    """A recipe.yaml that was edited, or other settings of paco-evaluate."""
    shutil.copytree(trained[0], tmp_path / "run")
    recipe = tmp_path / "run" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("projection_dim: ", "projection_dim: 1"))
    with pytest.raises(CheckpointError, match=r"is of another network, \d+ tensors differ: .* there and .* here"):
        paco_ds.load(tmp_path / "run")


def test_names_that_are_not_utf_8_are_written_as_they_are(trained, tmp_path):
    name = os.fsdecode(b"\xff.png")
    shutil.copy(trained[1][0], tmp_path / name)
    assert main([str(trained[0]), str(tmp_path), "--device", "cpu", "--output", str(tmp_path / "o.csv")]) == 0
    assert b"/\xff.png,class" in (tmp_path / "o.csv").read_bytes()


@pytest.mark.parametrize(
    ("place", "message"),
    [("nowhere", "nowhere is not there"), ("-", "no image was given: there is none in standard input")],
)
def test_a_mistake_leaves_standard_output_empty(trained, monkeypatch, capsys, place, message):
    """A table that goes on to another program is one, or nothing."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    with pytest.raises(SystemExit):
        main([str(trained[0]), place, "--device", "cpu"])
    said = capsys.readouterr()
    assert message in said.err
    assert said.out == ""


@pytest.mark.parametrize("ending", [".csv", ".jsonl"])
def test_the_command_writes_a_row_for_each_image_of_folders_and_lists(
    trained, model, tmp_path, monkeypatch, capsys, ending
):
    """One that cannot be read is an empty row and a line."""
    run, images, *_ = trained
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "notes.txt").write_text("no image")
    (tmp_path / "some" / "bad.JPG").write_text("no image either")
    shutil.copy(images[0], tmp_path / "some" / "a, b.png")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(f"{images[7]}\n\n".encode())))
    output = tmp_path / f"out{ending}"
    assert main([str(run), str(tmp_path / "some"), "-", "--top", "2", "--output", str(output), "--device", "cpu"]) == 0
    said = capsys.readouterr().err
    assert "bad.JPG cannot be read (unknown_format)" in said
    assert "2 images" in said
    assert "1 unreadable" in said
    lines = output.read_text().splitlines()
    (first, second) = model.predict([images[7]], top=2)[0]
    if ending == ".csv":
        assert lines[0] == "path,class_1,probability_1,class_2,probability_2"
        assert lines[1].startswith(f'"{tmp_path}/some/a, b.png",class')
        assert lines[2] == f"{tmp_path}/some/bad.JPG"
        assert lines[3] == f"{images[7]},{first.name},{first.probability:.6f},{second.name},{second.probability:.6f}"
    else:
        rows = [json.loads(line) for line in lines]
        assert rows[1] == {"path": f"{tmp_path}/some/bad.JPG", "predictions": None}
        assert [each["class"] for each in rows[2]["predictions"]] == [first.name, second.name]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"out{ending}", "some"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere is not there"),
        (["EMPTY"], "no image was given"),
        (["EMPTY", "--output", "a.xlsx"], "neither .csv nor .jsonl"),
        (["EMPTY", "--top", "-1"], "--top -1 names no class"),
        (["EMPTY", "--device", "gpu"], "--device gpu cannot be used"),
        (["EMPTY", "--device", "meta"], "--device meta cannot be used: it holds no values"),
    ],
)
def test_a_mistake_is_one_line(trained, tmp_path, capsys, arguments, message):
    words = [str(tmp_path) if word == "EMPTY" else word for word in arguments]
    with pytest.raises(SystemExit) as ended:
        main([str(trained[0]), "--device", "cpu", *words])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def places(trained, striped_shards, tmp_path_factory):
    """Shards, a tar and a pattern of the same images, with one in the tar that cannot be read."""
    tar = tmp_path_factory.mktemp("places") / "x.tar"
    with tarfile.open(tar, "w") as file:
        file.add(trained[1][0], "a.png")
        file.addfile(tarfile.TarInfo("b.jpg"))
    return [str(striped_shards), str(tar), str(trained[1][0].parent / "*.png")]


def test_parquet_has_the_rows_of_csv(trained, places, tmp_path):
    words = [str(trained[0]), *places, "--split", "test", "--device", "cpu", "--top", "2", "--output"]
    assert main([*words, str(tmp_path / "t.csv")]) == main([*words, str(tmp_path / "t.parquet")]) == 0
    rows = pyarrow.parquet.read_table(tmp_path / "t.parquet").to_pylist()
    with open(tmp_path / "t.csv", newline="") as file:
        lines = list(csv.reader(file))
    assert list(rows[0]) == lines[0]
    for row, line in zip(rows, lines[1:], strict=True):
        cells = [f"{cell:.6f}" if isinstance(cell, float) else cell for cell in row.values() if cell is not None]
        assert cells == line


def test_shards_tars_and_patterns_are_predicted_the_same_on_two_ranks(trained, places, tmp_path, capsys):
    """In input order; an image of a tar that cannot be read is named and ends nothing."""
    files = [tmp_path / f"{ranks}.csv" for ranks in (1, 2)]
    words = [str(trained[0]), *places, "--split", "test", "--device", "cpu", "--top", "2", "--output"]
    assert main([*words, str(files[0])]) == 0
    assert "x.tar/b.jpg cannot be read" in capsys.readouterr().err
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, *launch, "-m", "paco_ds.evaluation.predict"]
    done = subprocess.run([*command, *words, str(files[1])], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert files[0].read_bytes() == files[1].read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in files)


def test_temperature_minimises_nll_and_belongs_to_its_weights(trained, model):
    z = 3 * torch.randn(400, 4, generator=torch.Generator().manual_seed(0))
    y = torch.multinomial((z / 2.5).softmax(1), 1, generator=torch.Generator().manual_seed(1))[:, 0]
    fitted, images, before, after = temperature.fit(z, y, Ranks(0, 1, 0, torch.device("cpu")))
    nll = {
        t: float(torch.nn.functional.cross_entropy(z.double() / t, y)) for t in (fitted * 0.99, fitted, fitted * 1.01)
    }
    assert images == 400
    assert after == pytest.approx(nll[fitted])
    assert min(nll, key=lambda t: nll[t]) == fitted
    assert after < before
    with pytest.raises(CheckpointError, match=r"temperature\.json is not there: fit it with paco-evaluate"):
        temperature.load_temperature(trained[0], model.digest)
    stored = temperature.Temperature(
        temperature=2, checkpoint="other", split="val", images=9, nll_before=1, nll_after=1
    )
    path = temperature.save_temperature(trained[0], stored)
    with pytest.raises(CheckpointError, match="was fitted to other weights"):
        temperature.load_temperature(trained[0], model.digest)
    path.unlink()


def test_a_temperature_belongs_to_the_weights_that_were_loaded(trained, striped_shards, tmp_path, monkeypatch):
    """Also where a training has written newer ones meanwhile."""
    fitted = {"temperature": 2, "split": "val", "images": 9, "nll_before": 1, "nll_after": 1}
    monkeypatch.setattr(
        trained_runs, "fit_on_split", lambda *given: temperature.Temperature(**fitted, checkpoint=given[-1])
    )
    recipe = load_recipe(trained[0] / "recipe.yaml")
    images = trained_runs.RunImages(recipe, load_manifest(striped_shards), "test", None)
    loaded = Checkpoint(tmp_path, 1, {"sha256": {"model.safetensors": "of those that were loaded"}})
    trained_runs.fit_temperature(tmp_path, loaded, Ensemble([]), images, Ranks(0, 1, 0, torch.device("cpu")))
    assert temperature.load_temperature(tmp_path, "of those that were loaded").temperature == 2


@pytest.mark.parametrize("split", [None, "test"])
def test_temperature_is_never_fitted_on_test(split):
    with pytest.raises(RecipeError, match="with a validation split"):
        temperature.validation_split(EvaluationSettings(split=split))


def test_embeddings_of_shards_have_labels_and_a_new_image_its_neighbours(trained, model, places, tmp_path, capsys):
    run, images, *_ = trained
    table = tmp_path / "t.npz"
    assert embed.main([str(run), places[0], "--split", "test", "--device", "cpu", "-o", str(table)]) == 0
    loaded = load_embeddings(table)
    assert set(loaded.labels) == set(model.class_names)
    capsys.readouterr()
    assert neighbours.main([str(table), "--query", str(images[0]), "--run", str(run), "-k", "1"]) == 0
    (row,) = capsys.readouterr().out.splitlines()[1:]
    assert row.split(",")[1:3] == ["1.000000", images[0].parent.name]


def test_a_damaged_sample_of_shards_is_listed_and_ends_nothing(trained, striped_shards, tmp_path, capsys):
    """Its row is empty; the others are predicted."""
    tar = next(path.name for path in sorted(striped_shards.glob("*.tar")) if "test" in path.name)
    shards = copy_with_damage(striped_shards, tmp_path / "shards", tar)
    output = tmp_path / "o.csv"
    words = [str(trained[0]), str(shards), "--split", "test", "--device", "cpu", "--output", str(output)]
    assert main(words) == 0
    rows = list(csv.reader(output.open(newline="")))[1:]
    assert [len(row) for row in rows].count(1) == 1
    assert len(rows) == 20
    assert "1 unreadable" in capsys.readouterr().err


def test_a_temperature_is_fitted_by_the_command_and_used(trained, striped_shards, tmp_path):
    """On validation, stored in the run; it changes the probabilities and no class."""
    run = tmp_path / "run"
    shutil.copytree(trained[0], run)
    words = ("--run", run, "--set", f"data.shards={striped_shards}", "--output", tmp_path / "metrics.json")
    said = run_command("paco_ds.evaluate", *words, "--fit-temperature").stdout
    assert "temperature.json: temperature " in said
    stored = json.loads((run / "temperature.json").read_text())
    assert (stored["split"], stored["images"]) == ("val", 24)
    assert stored["nll_after"] <= stored["nll_before"]
    rows = []
    for name, options in (("plain", []), ("scaled", ["--temperature", "auto"])):
        output = tmp_path / f"{name}.csv"
        assert main([str(run), str(trained[1][0]), "--device", "cpu", "--output", str(output), *options]) == 0
        rows.append(output.read_text().split(","))
    assert rows[0][-2] == rows[1][-2]
    assert rows[0][-1] != rows[1][-1]


def test_a_reader_that_leaves_ends_the_command_quietly(trained, monkeypatch, capsys):
    """As `| head` does: status of SIGPIPE, no line."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as closed, monkeypatch.context() as patched:
        patched.setattr("sys.stdout", closed)
        with pytest.raises(SystemExit) as ended:
            main([str(trained[0]), str(trained[1][0]), "--device", "cpu"])
    assert ended.value.code == 141
    assert capsys.readouterr().err == ""


def test_transparent_parts_are_filled_as_in_the_shards_of_the_training(model, tmp_path, monkeypatch):
    """Of files, bytes, arrays and PIL's; one without transparent parts is as before, a damaged one is named."""
    pixels = np.random.default_rng(0).integers(0, 255, (12, 12, 4), dtype=np.uint8)
    pixels[..., 3] = 255
    pixels[:6, :, 3] = 0
    picture, path = Image.fromarray(pixels), tmp_path / "a.png"
    picture.save(path)
    white = pixels[..., :3].copy()
    white[:6] = 255
    with_white, unfilled = model.probabilities([white, pixels[..., :3]])
    assert not torch.allclose(with_white, unfilled, atol=1e-3)
    torch.testing.assert_close(model.probabilities([path])[0], unfilled)
    monkeypatch.setattr(model, "background", "#ffffff")
    rows = model.probabilities([path, path.read_bytes(), pixels, picture])
    torch.testing.assert_close(rows, with_white.expand(4, -1))
    torch.testing.assert_close(model.probabilities([pixels[..., :3]])[0], unfilled)
    with pytest.raises(DataError, match=r"image 0 cannot be read \(truncated\)"):
        model.predict([path.read_bytes()[:60]])


@pytest.mark.parametrize("background", [None, "#102030"])
def test_the_background_comes_from_the_checkpoint(striped_shards, background):
    """Checkpoints without one, as all were before, are read as before."""
    manifest = load_manifest(striped_shards).model_copy(update={"background": background})
    state = {"data": json.loads(json.dumps(manifest.trained_data().state()))}
    assert ("background" in state["data"]) == (background is not None)
    data = _trained_data(Checkpoint(striped_shards, 0, state), DataSettings(shards="gone"))
    assert data.background == background


def test_a_run_is_read_from_a_folder_whose_name_is_not_utf_8(trained, tmp_path):
    """safetensors opens paths of UTF-8 alone."""
    run = tmp_path / os.fsdecode(b"caf\xe9")
    shutil.copytree(trained[0], run)
    images = trained[1][:2]
    assert torch.equal(paco_ds.load(run).probabilities(images), paco_ds.load(trained[0]).probabilities(images))
