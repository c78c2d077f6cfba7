"""Tables of embedded images: kept as they are in both formats; exact neighbours; what is no table is named."""

import dataclasses

import numpy as np
import pytest

from paco_ds.errors import UserError
from paco_ds.evaluation import embeddings
from paco_ds.evaluation.embeddings import Embeddings, load_embeddings, nearest
from paco_ds.evaluation.neighbours import main


@pytest.fixture
def table():
    features = np.array([[1, 0], [2, 0], [0, 1], [1, 1]], np.float32)
    names, labels = ["a.jpg", "<b>.jpg", "c.jpg", "d.jpg"], ["cat", "", None, "dog"]
    return Embeddings(names, labels, ["cat"] * 4, [0.5] * 4, ["s", "s", "t", "u"], features, "w", ["photos"], None)


@pytest.mark.parametrize("ending", [".npz", ".parquet"])
def test_a_table_is_read_as_it_was_written(table, tmp_path, ending):
    table.save(tmp_path / f"t{ending}")
    loaded = load_embeddings(tmp_path / f"t{ending}")
    np.testing.assert_array_equal(loaded.features, table.features)
    others = [dataclasses.asdict(each) | {"features": None} for each in (loaded, table)]
    assert others[0] == others[1]


def test_neighbours_equal_a_sort_of_all_with_ties_by_index_in_any_chunk(monkeypatch):
    rows = np.random.default_rng(0).integers(-2, 3, (60, 3)).astype(np.float32)
    plain = embeddings.unit(rows) @ embeddings.unit(rows).T
    for chunk in (1, 2**25):
        monkeypatch.setattr(embeddings, "_CHUNK", chunk)
        for (found, similarities), row in zip(nearest(rows, rows, 7), plain, strict=True):
            np.testing.assert_allclose(similarities, np.sort(row)[::-1][:7], atol=1e-6)
            for one, two in zip(range(6), range(1, 7), strict=True):
                assert similarities[one] > similarities[two] or found[one] < found[two]
    assert [len(found) for found, _ in nearest(rows[:2], rows[:3], 9)] == [3, 3]


def test_an_image_is_not_its_own_neighbour_and_copies_are_marked(table, tmp_path, capsys):
    table.save(tmp_path / "t.npz")
    assert main([str(tmp_path / "t.npz"), "--query", "a.jpg", "-k", "2"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        "<b>.jpg,1.000000,,cat,copy",
        "d.jpg,0.707107,dog,cat,",
    ]


@pytest.mark.parametrize("ending", [".npz", ".parquet"])
def test_what_is_no_table_is_named(tmp_path, ending):
    path = tmp_path / f"t{ending}"
    with pytest.raises(UserError, match="is not there"):
        load_embeddings(path)
    path.write_bytes(b"PK no table")
    with pytest.raises(UserError, match="is no file of embeddings, or damaged"):
        load_embeddings(path)
