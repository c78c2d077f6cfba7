"""Where cosine centers start: means of the classes in the features before training, or embeddings from a file.

Shapes: C classes, F feature dimension, E experts, B images.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from paco_ds.config.parse import brief, one_line
from paco_ds.data.names import same_name
from paco_ds.data.stream.load import Replaced
from paco_ds.distributed.ranks import Ranks
from paco_ds.errors import DataError, RecipeError
from paco_ds.evaluation.split import EvaluationSplit
from paco_ds.files import utf8_path
from paco_ds.models.heads import CosineCenters
from paco_ds.models.recogniser import Recogniser

CLASS_MEANS = "class_means"
_TENSOR, _NAMES = "embeddings", "class_names"  # of a file


def load_initial_centers(
    model: Recogniser, source: str, images: EvaluationSplit, ranks: Ranks, progress: Callable[[], object] = lambda: None
) -> None:
    """Put unit rows into the cosine centers of a fresh model, in place. A collective; the model is moved to the device.

    Args:
        source: `model.centers_from`: class_means, or a file.
        images: of training.
        progress: called after each batch.

    Raises:
        RecipeError: a file that cannot be read, or is of other classes, another order or dimension.
        DataError: a class without an image.
    """
    if source == CLASS_MEANS:
        rows_ECF = class_means(model.to(ranks.device), images, ranks, progress)
    else:
        rows_ECF = read_embeddings(Path(source), images.manifest.classes, model.query_encoder.backbone.feature_dim)[
            None
        ]
    centers = [m for m in model.centers.modules() if isinstance(m, CosineCenters)]
    with torch.no_grad():
        for center, rows_CF in zip(centers, rows_ECF.expand(len(centers), -1, -1), strict=True):
            center.weight.copy_(F.normalize(rows_CF, dim=1))


@torch.no_grad()
def class_means(
    model: Recogniser, images: EvaluationSplit, ranks: Ranks, progress: Callable[[], object] = lambda: None
) -> Tensor:
    """Mean feature of each class over a split, float64 [E, C, F] (E 1 without experts), the same on any number of ranks
    to rounding: every image once, sums in float64.

    Raises:
        DataError: a class without an image that can be read.
    """
    classes = images.manifest.classes
    C = len(classes)
    sums_ECF, counts_C = None, torch.zeros(C, dtype=torch.float64, device=ranks.device)
    was_training = model.training
    bad: list[Replaced] = []
    model.eval()
    for batch in images.batches(ranks):
        valid = batch.valid.to(ranks.device)
        labels = batch.labels.to(ranks.device)[valid]
        feature = model.feature(batch.query.to(ranks.device))
        feature_EBF = (feature if feature.ndim == 3 else feature[None])[:, valid].double()
        if sums_ECF is None:
            sums_ECF = feature_EBF.new_zeros(len(feature_EBF), C, feature_EBF.shape[2])
        sums_ECF.index_add_(1, labels, feature_EBF)
        counts_C += torch.bincount(labels, minlength=C)
        bad += batch.replaced
        progress()
    model.train(was_training)
    images.left_out(bad, ranks)
    assert sums_ECF is not None
    sums_ECF, counts_C = ranks.sum(sums_ECF), ranks.sum(counts_C)
    if empty := [name for name, count in zip(classes, counts_C.tolist(), strict=True) if not count]:
        raise DataError(
            f"model.centers_from class_means: {images.name} has no image of {brief(empty[0])}"
            + (f" and {len(empty) - 1} more classes" if empty[1:] else "")
            + ", which has no mean: leave model.centers_from out, or name a file of embeddings"
        )
    return sums_ECF / counts_C[:, None]


def read_embeddings(path: Path, classes: Sequence[str], feature_dim: int) -> Tensor:
    """Rows of a `.safetensors` file, float32 [C, F]: its tensor `embeddings`.

    The names of the classes, in the order of the rows, are a JSON list under `class_names` of its metadata.

    Raises:
        RecipeError: it is none, or of other classes, another order or dimension.
    """
    where = f"model.centers_from {path}"
    if not path.is_file():
        raise RecipeError(f"{where}: there is no such file; give {CLASS_MEANS}, or a .safetensors file of embeddings")
    try:
        with utf8_path(path) as place, safe_open(place, framework="pt") as file:
            rows = file.get_tensor(_TENSOR) if _TENSOR in list(file.keys()) else None
            names = json.loads((file.metadata() or {}).get(_NAMES, "null"))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise RecipeError(f"{where} is no .safetensors file: {one_line(error)}") from None
    if rows is None or not isinstance(names, list):
        missing = f"tensor {_TENSOR!r}" if rows is None else f"list {_NAMES!r} in its metadata"
        raise RecipeError(
            f"{where} has no {missing}: write it by safetensors.torch.save_file({{{_TENSOR!r}: rows}}, FILE, "
            f"metadata={{{_NAMES!r}: json.dumps(names)}})"
        )
    ours, theirs = [same_name(name) for name in classes], [same_name(str(name)) for name in names]
    if ours != theirs:
        raise RecipeError(f"{where} is of other classes than the shards: {_difference(ours, theirs)}")
    if tuple(rows.shape) != (len(classes), feature_dim):
        raise RecipeError(
            f"{where}: {_TENSOR} is {list(rows.shape)}, and {len(classes)} classes by the backbone's {feature_dim} "
            f"features are needed; CLIP's text is projected back by the image tower's projection"
        )
    if not rows.is_floating_point() or not bool(rows.isfinite().all()):
        raise RecipeError(f"{where}: {_TENSOR} holds numbers that are not finite floats")
    return rows.float()


def _difference(ours: list[str], theirs: list[str]) -> str:
    if len(ours) != len(theirs):
        return f"{len(theirs)} names there, {len(ours)} here"
    c = next(c for c, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
    order = "; the names are the same, in another order: sort its rows as the shards' classes are"
    return f"class {c} is {brief(theirs[c])} there and {brief(ours[c])} here" + (
        order if sorted(ours) == sorted(theirs) else ""
    )
