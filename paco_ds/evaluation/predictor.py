"""A trained run as an object that takes images: without shards, DeepSpeed or ranks.

    import paco_ds

    model = paco_ds.load("runs/demo")
    model.predict(["a.jpg", "b.png"], top=5)

Shapes: N images, C classes, F the width of the features, E experts.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from paco_ds.checkpoint import Checkpoint, chosen_checkpoint
from paco_ds.config.data import DataSettings
from paco_ds.config.load import load_recipe_of_run
from paco_ds.config.views import EvalView
from paco_ds.data.manifest import Manifest, TrainedData, open_data
from paco_ds.data.pack.image_bytes import BadImage, Color, ending_of, filled, on_background
from paco_ds.data.shard import BadSample, RawSample
from paco_ds.data.stream.views import MakeViews, make_view
from paco_ds.errors import DataError
from paco_ds.evaluation.images import ListedImage
from paco_ds.evaluation.runner import Ensemble, load_recogniser
from paco_ds.evaluation.temperature import checkpoint_digest
from paco_ds.models.recogniser import Recogniser, concat_experts
from paco_ds.models.weight_names import Weights

T = TypeVar("T")
Picture = str | os.PathLike[str] | bytes | npt.NDArray[np.uint8] | Image.Image | ListedImage
"""An image: the path of a file, the bytes of one, uint8 [H, W, 3] of RGB, PIL's, or one of `list_images`."""
View = npt.NDArray[np.uint8]  # [size, size, 3], of five crops [5 size, size, 3]


@dataclass(frozen=True)
class Prediction:
    """A class by name, and its probability."""

    name: str
    probability: float


@dataclass(frozen=True)
class Embedded:
    """Features before the classifier, float32 [F] (of experts one after the other), and the most probable class.

    `sha256` is of the encoded image, so that copies are known.
    """

    feature: npt.NDArray[np.float32]
    predicted: Prediction
    sha256: str


@dataclass(frozen=True)
class Unreadable:
    """An image that cannot be read, and why, as in `truncated` or `unknown_format`."""

    name: str
    reason: str


class Predictor:
    """A trained model, the view that it was evaluated with, and the names of its classes.

    Images are resized and cropped as in the run's evaluations, transparent parts are filled as in its shards, and the
    weights are those that gave its results.

    Args:
        view: of evaluations.
        max_pixels: of an image; more are refused.
        batch: images that are run at a time.
        autocast: whether the model runs under bfloat16 autocast, as it was trained.
        background: `#rrggbb` that the shards of the training had put under transparent parts.
        checkpoint: which the weights are from; None for others.
        weights: which of its weights.

    Attributes:
        temperature: that logits are divided by; 1 unless set.
        digest: SHA-256 of the weights; empty without a checkpoint.
        class_names: the C classes, in the order of `probabilities`.
        backbone: name of the network, as in a recipe.
        recogniser: the model itself.
    """

    def __init__(
        self,
        model: Recogniser,
        backbone: str,
        class_names: Sequence[str],
        view: EvalView,
        max_pixels: int,
        batch: int,
        autocast: bool,
        background: str | None = None,
        checkpoint: Checkpoint | None = None,
        weights: Weights = "query",
    ) -> None:
        self.backbone, self.class_names, self.view, self.batch = backbone, tuple(class_names), view, batch
        self.temperature, self.max_pixels, self.background = 1.0, max_pixels, background
        self.checkpoint, self.weights = checkpoint, weights
        self.digest = checkpoint_digest(checkpoint, weights) if checkpoint else ""
        self.recogniser, self._autocast = model.eval(), autocast
        self._answer = Ensemble([(model, autocast)])
        self._make_views = MakeViews((make_view(view),), max_pixels)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.recogniser.parameters()).device

    def to(self, device: str | torch.device) -> Predictor:
        """Itself, with the weights on a device."""
        self._answer.to(device)
        return self

    def predict(self, images: Iterable[Picture], top: int = 1) -> list[tuple[Prediction, ...]]:
        """The `top` most probable classes of each image, the most probable first.

        Raises:
            DataError: an image cannot be read; it is named by its path or its number.
        """
        return [_or_raise(answer) for answer in self.stream(images, top)]

    def stream(self, images: Iterable[Picture], top: int = 1) -> Iterator[tuple[Prediction, ...] | Unreadable]:
        """As `predict`, a batch at a time as images come, and without an end at one that cannot be read."""
        for views in self._views(images):
            readable = [view for view, _ in views if not isinstance(view, Unreadable)]
            answers = iter(self._named(self._probabilities(readable), top) if readable else ())
            yield from (view if isinstance(view, Unreadable) else next(answers) for view, _ in views)

    def embed_stream(self, images: Iterable[Picture]) -> Iterator[Embedded | Unreadable]:
        """As `stream`, with features."""
        for views in self._views(images):
            readable = [(view, sha256) for view, sha256 in views if not isinstance(view, Unreadable)]
            answers = iter(self._embedded(readable) if readable else ())
            yield from (view if isinstance(view, Unreadable) else next(answers) for view, _ in views)

    def probabilities(self, images: Iterable[Picture]) -> Tensor:
        """float32 [N, C] on the CPU; raises as `predict`."""
        return self._of_all(images, self._probabilities, len(self.class_names))

    def embed(self, images: Iterable[Picture]) -> Tensor:
        """Features before the classifier, float32 [N, F] on the CPU, of experts one after the other [N, E F]; raises as
        `predict`."""
        return self._of_all(images, self._features, 0)

    def _of_all(self, images: Iterable[Picture], run: Callable[[Sequence[View]], Tensor], width: int) -> Tensor:
        rows = [run([_or_raise(view) for view, _ in views]) for views in self._views(images)]
        return torch.cat(rows) if rows else torch.zeros(0, width)

    @torch.no_grad()
    def _probabilities(self, views: Sequence[View]) -> Tensor:
        logits_NC = self._answer(_stacked(views).to(self.device)).mean_logits()
        return (logits_NC / self.temperature).softmax(1).cpu()

    def _embedded(self, views: Sequence[tuple[View, str]]) -> list[Embedded]:
        pixels = [view for view, _ in views]
        rows = zip(self._features(pixels), self._named(self._probabilities(pixels), 1), views, strict=True)
        return [Embedded(feature.numpy(), best, sha256) for feature, (best,), (_, sha256) in rows]

    @torch.no_grad()
    def _features(self, views: Sequence[View]) -> Tensor:
        images = _stacked(views).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast):
            feature = self.recogniser.feature(images)
        return concat_experts(feature.float()).cpu()

    def _named(self, probabilities_NC: Tensor, top: int) -> list[tuple[Prediction, ...]]:
        best = probabilities_NC.topk(min(top, len(self.class_names)))
        return [
            tuple(Prediction(self.class_names[c], p) for c, p in zip(classes, probabilities, strict=True))
            for classes, probabilities in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    def _views(self, images: Iterable[Picture]) -> Iterator[list[tuple[View | Unreadable, str]]]:
        """Batches of (view, SHA-256 of the file), decoded by threads: decoders release Python's lock. The next batch is
        decoded while the model runs on this one."""
        numbered = enumerate(images)
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:

            def begun() -> list[Future[tuple[View | Unreadable, str]]]:
                return [threads.submit(self._view, *each) for each in islice(numbered, self.batch)]

            batch = begun()
            while batch:
                following = begun()
                yield [view.result() for view in batch]
                batch = following

    def _view(self, number: int, image: Picture) -> tuple[View | Unreadable, str]:
        name = _name(image, number)
        try:
            color = _color(self.background)
            encoded = _encoded(image, color)
            (view,) = self._make_views(RawSample(name, 0, "", _filled(encoded, color)), np.random.default_rng(0))
        except BadSample as bad:
            return Unreadable(name, bad.reason), ""
        except OSError as error:
            return Unreadable(name, error.strerror or str(error)), ""
        except DataError:  # of shards: a file that is gone or cut, not an image
            raise
        except ValueError as error:  # a path that no file can have
            return Unreadable(name, str(error)), ""
        return view, hashlib.sha256(encoded).hexdigest()


def load(run: str | os.PathLike[str], device: str | torch.device = "cpu", weights: Weights | None = None) -> Predictor:
    """The model of a run's results: its best weights if `evaluation.checkpoint` keeps them, else the newest.

    Class names, the mean and deviation of pixels and the background of transparent parts come from the checkpoint; of
    runs before 0.11, which do not have them there, from the shards.

    Args:
        weights: `query`, `key` or `ema`; those of the run's `evaluation.weights` by default.

    Raises:
        CheckpointError, RecipeError: there is no such run, its checkpoints are damaged, or have no such weights.
        DataError: a run of before 0.11 whose shards are not there.
    """
    run = Path(run)
    recipe = load_recipe_of_run(run, [f"evaluation.weights={weights}"] if weights else [])
    checkpoint = chosen_checkpoint(run, recipe.evaluation.checkpoint)
    data = _trained_data(checkpoint, recipe.data)
    model = load_recogniser(checkpoint, recipe, data)
    return Predictor(
        model,
        recipe.model.backbone,
        data.classes,
        recipe.views.evaluation,
        recipe.data.max_pixels,
        recipe.evaluation.batch,
        checkpoint.state["autocast"],
        data.background,
        checkpoint,
        recipe.evaluation.weights,
    ).to(device)


def _trained_data(checkpoint: Checkpoint, settings: DataSettings) -> Manifest | TrainedData:
    if "data" in checkpoint.state:
        return TrainedData(**checkpoint.state["data"])
    manifest = open_data(settings, [])
    checkpoint.check_data(manifest.sha256)
    return manifest


def _stacked(views: Sequence[View]) -> Tensor:
    """uint8 [N, 3, size, size], of five crops [N, 3, 5 size, size]."""
    return torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2).contiguous()


def _name(image: Picture, number: int) -> str:
    if isinstance(image, ListedImage):
        return image.name
    return os.fspath(image) if isinstance(image, str | os.PathLike) else f"image {number}"


def _color(background: str | None) -> Color | None:
    if background is None:
        return None
    red, green, blue = bytes.fromhex(background[1:])
    return red, green, blue


def _filled(encoded: bytes, color: Color | None) -> bytes:
    """An image with the color under transparent parts, as the build of shards fills them; one that is damaged as it is,
    since the decoder names the damage."""
    if color is None:
        return encoded
    try:
        return bytes(on_background(encoded, ending_of(encoded), color)[0])
    except BadImage:
        return encoded


def _encoded(image: Picture, color: Color | None) -> bytes:
    """The bytes of an image file; of pixels in memory, with the color under transparent parts."""
    if isinstance(image, ListedImage):
        return image.read()
    if isinstance(image, bytes):
        return image
    if isinstance(image, str | os.PathLike):
        return Path(image).read_bytes()
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    if color is not None:
        picture = filled(picture, color) or picture
    output = io.BytesIO()
    picture.convert("RGB").save(output, "PNG", compress_level=0)
    return output.getvalue()


def _or_raise(answer: T | Unreadable) -> T:
    if isinstance(answer, Unreadable):
        raise DataError(f"{answer.name} cannot be read ({answer.reason}): leave it out, or use stream()")
    return answer
