"""Temperature scaling (Guo et al. 2017): softmax(logits / T), T minimising the NLL of the validation split.

Shapes: N images of a rank, C classes. T changes no predicted class, only the probabilities.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, PositiveFloat, ValidationError
from torch import Tensor

from paco_ds.checkpoint import Checkpoint
from paco_ds.config.parse import read_json
from paco_ds.config.recipe import EvaluationSettings
from paco_ds.data.stream.load import Replaced
from paco_ds.distributed.ranks import Ranks
from paco_ds.errors import CheckpointError, DataError, RecipeError
from paco_ds.evaluation.runner import Ensemble
from paco_ds.evaluation.split import EvaluationSplit
from paco_ds.files import replace_text

FILE = "temperature.json"
LEAST, MOST = 1e-2, 1e2  # of T: beyond, the split does not determine it
_CHUNK = 4096  # images in float64 at a time
_HALVINGS = 60


class Temperature(BaseModel):
    """What RUN/temperature.json holds.

    Attributes:
        temperature: T.
        checkpoint: digest of the weights that it was fitted to.
        split, images: that it was fitted on.
        nll_before, nll_after: mean negative log-likelihood there, with T = 1 and with T.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    temperature: PositiveFloat
    checkpoint: str
    split: str
    images: int
    nll_before: float
    nll_after: float


def checkpoint_digest(checkpoint: Checkpoint, weights: str = "query") -> str:
    """SHA-256 of the weights, and which of them are used; a version-1 checkpoint has it too."""
    digest = str(checkpoint.state["sha256"]["model.safetensors"])
    return digest if weights == "query" else f"{digest}-{weights}"


def validation_split(settings: EvaluationSettings) -> str:
    """The split to fit on.

    Raises:
        RecipeError: there is none beside test.
    """
    if settings.split is None or settings.split == settings.test_split:
        what = "null" if settings.split is None else f"{settings.split}, the test split"
        raise RecipeError(
            f"--fit-temperature fits on evaluation.split, which is {what}: give shards with a validation split "
            f"(paco-build-shards build ... --validation-share .05), and --set evaluation.split=val"
        )
    return settings.split


@torch.no_grad()
def fit_on_split(model: Ensemble, split: EvaluationSplit, ranks: Ranks, checkpoint: str) -> Temperature:
    """The temperature of a model on a split. A collective; each rank keeps the logits of its images in float32.

    Raises:
        DataError: the split determines no T, as when all its images are right.
    """
    model.eval()
    logits, labels = [], []
    bad: list[Replaced] = []
    for batch in split.batches(ranks):
        bad += batch.replaced
        logits.append(model(batch.query.to(ranks.device)).mean_logits()[batch.valid].float().cpu())
        labels.append(batch.labels[batch.valid])
    split.left_out(bad, ranks)
    fitted, images, before, after = fit(torch.cat(logits), torch.cat(labels), ranks)
    if not LEAST < fitted < MOST:
        raise DataError(
            f"the {images} images of {split.name} determine no temperature from {LEAST:g} to {MOST:g}: it needs more "
            f"images, some of them right and some wrong"
        )
    return Temperature(
        temperature=fitted, checkpoint=checkpoint, split=split.name, images=images, nll_before=before, nll_after=after
    )


def fit(logits_NC: Tensor, labels_N: Tensor, ranks: Ranks) -> tuple[float, int, float, float]:
    """(T, images of all ranks, NLL with T = 1, NLL with T); T is LEAST or MOST where there is no minimum between.

    The NLL is convex in b = 1 / T: its derivative, the mean of sum_c p_c(b) z_c - z_y, rises with b. The root is found
    by bisection of log b, in float64 over the images of all ranks.
    """

    def mean(b: float) -> tuple[int, float, float]:
        """(images, NLL, its derivative by b) over all ranks."""
        sums = torch.zeros(3, dtype=torch.float64)
        for first in range(0, len(labels_N), _CHUNK):
            z_BC, y_B = logits_NC[first : first + _CHUNK].double(), labels_N[first : first + _CHUNK, None]
            log_p_BC = (b * z_BC).log_softmax(1)
            slope_B = (log_p_BC.exp() * z_BC).sum(1) - z_BC.gather(1, y_B)[:, 0]
            sums += torch.stack([torch.tensor(float(len(y_B))).double(), -log_p_BC.gather(1, y_B).sum(), slope_B.sum()])
        images, nll, slope = ranks.sum(sums.to(ranks.device)).tolist()
        if not images:
            raise DataError("the validation split has no image that can be read")
        return int(images), nll / images, slope / images

    low, high = -math.log(MOST), -math.log(LEAST)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if mean(math.exp(middle))[2] > 0 else (middle, high)
    fitted = math.exp(-(low + high) / 2)
    images, before, _ = mean(1.0)
    at_edge = fitted >= MOST * (1 - 1e-6) or fitted <= LEAST * (1 + 1e-6)
    return (MOST if fitted > 1 else LEAST) if at_edge else fitted, images, before, mean(1 / fitted)[1]


def save_temperature(run: Path, fitted: Temperature) -> Path:
    """Write RUN/temperature.json; its path."""
    return replace_text(run / FILE, json.dumps(fitted.model_dump(), indent=1) + "\n")


def load_temperature(run: Path, checkpoint: str) -> Temperature:
    """The stored temperature of these weights.

    Raises:
        CheckpointError: there is none, it is damaged, or it belongs to other weights.
    """
    path, fit_it = run / FILE, f"fit it with paco-evaluate --run {run} --fit-temperature"
    if not path.exists():
        raise CheckpointError(f"{path} is not there: {fit_it}, or give --temperature a number")
    try:
        stored = Temperature.model_validate(read_json(path, CheckpointError))
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}; {fit_it}") from None
    if stored.checkpoint != checkpoint:
        raise CheckpointError(f"{path} was fitted to other weights ({stored.checkpoint[:12]}): {fit_it} again")
    return stored
