"""Where cosine centers start: class means of features, or a file of embeddings; what does not fit is refused."""

import json

import pytest
import torch
from safetensors.torch import save_file

from paco_ds.errors import RecipeError
from paco_ds.training.initial_centers import read_embeddings
from tests.recipes import tiny_recipe

CLASSES = ("owl", "café", "eel")
ROWS = torch.arange(12.0).view(3, 4)


def written(path, rows=ROWS, names=CLASSES, tensor="embeddings"):
    metadata = {} if names is None else {"class_names": json.dumps(names)}
    save_file({tensor: rows}, path, metadata=metadata)
    return path


def test_embeddings_are_read_with_the_names_of_their_classes(tmp_path):
    """Names are compared in one form, as macOS may write them."""
    path = written(tmp_path / "text.safetensors", names=["owl", "cafe\u0301", "eel"])
    assert torch.equal(read_embeddings(path, CLASSES, 4), ROWS)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"names": ["owl", "eel", "café"]},
            "class 1 is 'eel' there and 'café' here; the names are the same, in another",
        ),
        ({"names": ["owl", "cat", "eel"]}, "class 1 is 'cat' there and 'café' here$"),
        ({"names": ["owl"]}, "1 names there, 3 here"),
        ({"names": None}, "has no list 'class_names' in its metadata: write it by safetensors.torch.save_file"),
        ({"tensor": "text"}, "has no tensor 'embeddings'"),
        (
            {"rows": ROWS[:, :2].contiguous()},
            r"embeddings is \[3, 2\], and 3 classes by the backbone's 4 features are needed",
        ),
        ({"rows": ROWS / 0}, "not finite"),
        ({"rows": ROWS.long()}, "not finite floats"),
    ],
)
def test_embeddings_that_do_not_fit_are_refused(tmp_path, given, message):
    """Each by what is wrong."""
    with pytest.raises(RecipeError, match=message):
        read_embeddings(written(tmp_path / "text.safetensors", **given), CLASSES, 4)


def test_a_file_that_is_none_is_refused(tmp_path):
    """Missing, or of another kind."""
    with pytest.raises(RecipeError, match="there is no such file; give class_means"):
        read_embeddings(tmp_path / "text.safetensors", CLASSES, 4)
    (tmp_path / "text.npz").write_bytes(b"PK")
    with pytest.raises(RecipeError, match=r"text.npz is no .safetensors file"):
        read_embeddings(tmp_path / "text.npz", CLASSES, 4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model.centers_from=class_means",), "set centers to cosine"),
        (("model.centers_from=x", "model.trained=routers", "model.start_from=x"), "leave centers_from out"),
    ],
)
def test_recipes_whose_centers_cannot_start_there_are_refused(overrides, message):
    """Linear centers, and those of a first stage."""
    with pytest.raises(RecipeError, match=message):
        tiny_recipe(*overrides)
