"""Candidates of wrong labels: planted ones are found, in the tail too; small classes and copies; the page's texts."""

import csv

import numpy as np
import pytest
from PIL import Image

from paco_ds.evaluation.embeddings import Embeddings
from paco_ds.evaluation.label_noise import wrong_labels
from paco_ds.report.wrong_labels import csv_text, main

EVIL = "</script><b>=x"


def table_of(features, labels, names=None, digests=None, images=()):
    number = len(labels)
    names = names or [f"{i}.png" for i in range(number)]
    digests = digests or [str(i) for i in range(number)]
    features = np.asarray(features, np.float32)
    return Embeddings(names, labels, ["p"] * number, [0.5] * number, digests, features, "w" * 64, list(images), None)


def clusters(sizes, noise=0.3):
    """Features around orthogonal means, and their classes."""
    generator = np.random.default_rng(0)
    classes = np.repeat(np.arange(len(sizes)), sizes)
    means = 2 * np.eye(len(sizes), 16)
    return means[classes] + noise * generator.standard_normal((len(classes), 16)), [f"c{c}" for c in classes]


def test_planted_wrong_labels_are_the_candidates_in_head_and_tail():
    """The tail has 6 images, fewer than k; its own images are not blamed for that."""
    features, labels = clusters([300, 40, 6])
    planted = {0: "c1", 5: "c2", 310: "c0", 345: "c0"}
    for image, label in planted.items():
        labels[image] = label
    answer = wrong_labels(table_of(features, labels), 10)
    assert {each.image for each in answer.found} == planted.keys()
    assert answer.found[0].image == 5  # of the smallest class
    assert [each.suggested for each in answer.found if each.image in (0, 310, 345)].count("c0") == 1
    assert {each.image: each.suggested for each in answer.found} == {0: "c0", 5: "c0", 310: "c1", 345: "c2"}


def test_clean_clusters_of_any_size_have_no_candidate():
    features, labels = clusters([200, 20, 4, 2])
    assert wrong_labels(table_of(features, labels), 10).found == []


def test_the_score_is_that_of_a_plain_loop_in_float64():
    generator = np.random.default_rng(1)
    features, labels = generator.standard_normal((40, 4)), [f"c{c}" for c in generator.integers(0, 3, 40)]
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    expected = {}
    for i, label in enumerate(labels):
        others = sorted((j for j in range(40) if j != i), key=lambda j: -unit[i] @ unit[j])
        near = others[: min(5, labels.count(label) - 1)]
        weights = [max(0.0, unit[i] @ unit[j]) for j in near]
        score = 1 - sum(w for w, j in zip(weights, near, strict=True) if labels[j] == label) / sum(weights)
        if score > 0.5:
            expected[i] = score
    found = {each.image: each.score for each in wrong_labels(table_of(features, labels), 5).found}
    assert found == pytest.approx(expected, abs=1e-5)
    assert 5 < len(found) < 35


def test_copies_support_no_label_and_are_named_where_theirs_differs():
    features, labels = clusters([20, 3])
    features = np.concatenate([features, features[:1], features[:1]])
    digests = [*map(str, range(23)), "0", "0"]
    found = wrong_labels(table_of(features, [*labels, "c0", "c0"], digests=digests), 5).found
    assert found == []
    found = wrong_labels(table_of(features, ["c1", *labels[1:], "c1", "c1"], digests=digests), 5).found
    assert [(each.image, each.suggested, each.copies) for each in found] == [(0, "c0", ("c1", "c1"))]
    found = wrong_labels(table_of(features, [*labels, "c0", "c1"], digests=digests), 5).found
    assert [(each.image, each.suggested, each.copies) for each in found] == [
        (24, "c0", ("c0", "c0")),
        (0, "c1", ("c0", "c1")),
    ]


def test_lonely_and_unlabelled_images_are_not_judged():
    features, labels = clusters([5, 1, 2])
    answer = wrong_labels(table_of(features, [*labels[:6], None, None]), 5)
    assert (answer.found, answer.judged, answer.alone, answer.unlabelled) == ([], 5, 1, 2)


def test_the_page_shows_pictures_and_takes_names_as_text(tmp_path, capsys):
    features, labels = clusters([20, 4])
    labels = [EVIL if label == "c1" else label for label in labels]
    labels[0] = EVIL
    folder = tmp_path / "images"
    folder.mkdir()
    names = [str(folder / f"{i}.png") for i in range(24)]
    for i, name in enumerate(names[:23]):
        Image.new("RGB", (30, 20), (i, 0, 0)).save(name)
    labels[23] = "c0"
    table_of(features, labels, names, images=[str(folder), str(tmp_path / "gone")]).save(tmp_path / "t.npz")
    assert main([str(tmp_path / "t.npz"), "-o", str(tmp_path / "page.html")]) == 0
    assert "2 candidates among 24 images" in capsys.readouterr().err
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 3
    assert "Pictures that could not be read: 1 of 4" in page
    assert "gone is not there" in page
    assert page.count("</script>") == 1
    assert "<b>=x" not in page
    assert "http" not in page.replace("http-equiv", "")
    rows = list(csv.reader((tmp_path / "page.csv").open()))
    assert rows[0][:3] == ["path", "label", "suggested"]
    assert {row[0] for row in rows[1:]} == {names[0], names[23]}


def test_cells_that_a_spreadsheet_would_run_are_guarded():
    features, labels = clusters([9, 4])
    labels[0] = "=c"
    labels = ["=c" if label == "c1" else label for label in labels]
    table = table_of(features, labels, names=["@a", *(f"-{i}" for i in range(12))])
    (row,) = list(csv.reader(csv_text(table, wrong_labels(table, 5).found).splitlines()))[1:]
    assert row[:2] == ["'@a", "'=c"]
    assert row[5].startswith("'-")


def test_what_cannot_be_done_is_told(tmp_path, capsys):
    features, _ = clusters([3])
    table_of(features, [None] * 3).save(tmp_path / "t.npz")
    for arguments, told in [
        (["t.npz", "-o", "p.html"], "has no labels"),
        (["t.npz", "-o", "p.txt"], "does not end in .html"),
        (["t.npz", "-o", "none/p.html"], "is no folder"),
        (["none.npz", "-o", "p.html"], "is not there"),
    ]:
        with pytest.raises(SystemExit) as raised:
            main([str(tmp_path / arguments[0]), "-o", str(tmp_path / arguments[2])])
        assert raised.value.code == 2
        assert told in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["t.npz"]
