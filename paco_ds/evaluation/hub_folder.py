"""A folder as on the HuggingFace hub: weights as timm names them, `id2label`, preprocessing and a model card."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from paco_ds.config.parse import read_json
from paco_ds.errors import DataError
from paco_ds.evaluation.predictor import Predictor
from paco_ds.evaluation.results import CORRECTIONS

PIL_FILTERS = {"bilinear": 2, "bicubic": 3}  # as transformers write them


def write_hub_folder(
    model: Predictor, tensors: dict[str, Tensor], architecture: str, folder: Path, run: Path | None
) -> None:
    """Fill an empty folder.

    Args:
        tensors: the weights by timm's names.
        architecture: timm's name of the network.
        run: whose `metrics.json` the model card is made from.

    Raises:
        DataError: that file is damaged.
    """
    (folder / "model.safetensors").write_bytes(save(tensors))
    size, mean, std = model.view.size, channels(model, "mean"), channels(model, "std")
    pretrained = {
        "input_size": [3, size, size],
        "mean": mean,
        "std": std,
        "interpolation": model.view.interpolation,
        # timm's shorter side is floor(size / crop_pct): rounded down, so that it is ours
        "crop_pct": math.floor(1e6 * size / max(model.view.resize, size)) / 1e6,
        "crop_mode": "center",
        "num_classes": len(model.class_names),
    }
    names = dict(enumerate(model.class_names))
    arguments = model.recogniser.query_encoder.backbone.arguments
    config = {
        "architecture": architecture,
        **({"model_args": arguments} if arguments else {}),
        "num_classes": len(names),
        "num_features": model.recogniser.query_encoder.backbone.feature_dim,
        "label_names": list(model.class_names),
        "id2label": names,
        "label2id": {name: number for number, name in names.items()},
        "pretrained_cfg": pretrained,
    }
    preprocessing = {
        "do_resize": True,
        "size": {"shortest_edge": model.view.resize},
        "resample": PIL_FILTERS[model.view.interpolation],
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
    }
    for name, content in (("config.json", config), ("preprocessor_config.json", preprocessing)):
        (folder / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_card(model, run), encoding="utf-8")


def _card(model: Predictor, run: Path | None) -> str:
    """A model card from what the run measured."""
    metrics = _metrics(model, run)
    data = model.checkpoint.state.get("data", {}) if model.checkpoint else {}
    shots = [(name, metrics[name]) for name in ("many", "medium", "few", "all") if metrics.get(name) is not None]
    rows = "".join(f"| {name.capitalize()} | {100 * value:.1f} |\n" for name, value in shots)
    figures = f"| classes | accuracy, % |\n|---|---|\n{rows}" if rows else "The run has none of these weights yet.\n"
    return f"""---
license: other
license_name: {json.dumps(data.get("license", "not stated"))}
library_name: timm
pipeline_tag: image-classification
tags: [long-tailed, paco]
---

# {model.backbone} for {len(model.class_names):,} classes, trained with paco_ds

## Figures

{figures}
Shots are by the training images of a class. The split is `{metrics.get("split", "not evaluated")}`.

## Limits

The model names one of its {len(model.class_names):,} classes for any image, also for one that shows none of them.
Accuracy is lower for classes with few training images. Its probabilities are not calibrated.

## Use

    model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()

Images: RGB, shorter side {model.view.resize} ({model.view.interpolation}), center {model.view.size} x
{model.view.size}; mean and deviation stand in `preprocessor_config.json`.
"""


def _metrics(model: Predictor, run: Path | None) -> dict[str, Any]:
    """The run's metrics.json if it is of these weights as they are; else {}."""
    if run is None or model.checkpoint is None or not (file := run / "metrics.json").is_file():
        return {}
    remedy = f": write it again with paco-evaluate --run {run}"
    metrics = read_json(file, DataError, remedy)
    if not isinstance(metrics, dict):
        raise DataError(f"{file} holds no figures{remedy}")
    judged = metrics.get("step"), metrics.get("weights", "query")  # older runs do not say which weights
    of_these = judged == (model.checkpoint.step, model.weights) and not metrics.keys() & set(CORRECTIONS)
    return metrics if of_these else {}


def channels(model: Predictor, name: str) -> list[float]:
    values = getattr(model.recogniser.normalize, name).flatten() / 255
    return [round(value, 6) for value in values.tolist()]
