"""Weights of experts, learned on test images without labels: SADE's prediction stability (Zhang et al. 2022, Sec. 4.2).

The weights w (a softmax) maximise the mean cosine similarity of the predictions of two random views of each image::

    cos( softmax(sum_e w_e z_e(x')), softmax(sum_e w_e z_e(x'')) )

SGD with Nesterov's momentum from equal weights, 5 epochs in batches of 128, less where a weight falls below .05, as
published. Other test distributions are simulated: labels decide how much an image counts, where SADE draws subsets.

Shapes: D test distributions, E experts, B images, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paco_ds.config.model import ModelSettings
from paco_ds.config.optimizer import OptimizerSettings
from paco_ds.config.views import TrainView
from paco_ds.distributed.ranks import MicroBatchLayout, Ranks
from paco_ds.errors import RecipeError
from paco_ds.evaluation.accuracy import ClassCounts
from paco_ds.evaluation.predictions import share_by_distribution
from paco_ds.evaluation.split import EvaluationSplit
from paco_ds.models.output import ModelOutput

EPOCHS, BATCH, LEAST_WEIGHT = 5, 128, 0.05  # test_training_*.py of Vanint/SADE-AgnosticLT
AS_IT_IS = "as it is"  # the split with the classes' shares that it has


class Aggregated(nn.Module):
    """A model of experts that answers with a weighted sum of their logits.

    Args:
        autocast: whether it runs under bfloat16 autocast, as it was trained.
        weights_E: of its experts, of sum 1.
    """

    weights_E: Tensor

    def __init__(self, model: nn.Module, autocast: bool, weights_E: Tensor) -> None:
        super().__init__()
        self.model, self.autocast = model, autocast
        self.register_buffer("weights_E", weights_E.float(), persistent=False)

    def of_experts(self, images: Tensor) -> Tensor:
        """The experts' logits [E, B, C], float32."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.autocast):
            output: ModelOutput = self.model(images)
        return output.logits.float()

    def forward(self, images: Tensor) -> ModelOutput:
        return ModelOutput(None, torch.einsum("e,ebc->bc", self.weights_E, self.of_experts(images)))


def equal_weights(settings: ModelSettings) -> Tensor:
    """Equal weights [E] of the experts of a model.

    Raises:
        RecipeError: it has no experts, or routers choose among them.
    """
    if settings.experts is None or settings.trained == "routers":
        has = "routers: give that of its experts" if settings.experts else "none"
        raise RecipeError(
            f"--aggregate-experts needs a run with model.experts, all of which see each image; this one has {has}"
        )
    return torch.full((settings.experts,), 1 / settings.experts)


def learn_weights(
    model: Aggregated,
    split: EvaluationSplit,
    view: TrainView,
    ranks: Ranks,
    optimizer: OptimizerSettings,
    seed: int,
) -> dict[str, Tensor]:
    """{test distribution: weights [E], float64} of a split: as it is, and with the shares of `share_by_distribution`.

    A collective; the same on any number of ranks up to rounding. The last images of an epoch that do not fill a batch
    are left out, others in each epoch.

    Args:
        view: of which two are drawn of each image.
        optimizer: learning rate and weight decay, those of training as published.

    Raises:
        RecipeError: the optimizer is not SGD, or the ranks do not divide the batch.
    """
    if optimizer.name != "sgd":
        raise RecipeError(
            f"--aggregate-experts learns weights by SGD, and optimizer.name is {optimizer.name}: give --set "
            f"optimizer.name=sgd --set optimizer.lr=0.1 (published: .1 for CIFAR, .025 for ImageNet-LT)"
        )
    layout = _layout(sum(split.images_of_classes), ranks)
    counting = images_count(split.images_of_classes, split.class_counts)
    learner = WeightLearner(
        [counts_C.to(ranks.device) for counts_C in counting.values()],
        len(model.weights_E),
        optimizer.lr,
        optimizer.weight_decay,
        ranks.sum,
    )
    model.eval()
    stream, steps = split.random_views((view, view), layout, seed=seed, epochs=EPOCHS)
    for step, batch in enumerate(stream, 1):
        views = (images.to(ranks.device) for images in (batch.query, batch.key) if images is not None)
        with torch.no_grad():
            first_EBC, second_EBC = (model.of_experts(images) for images in views)
        learner.step(first_EBC, second_EBC, batch.labels.to(ranks.device))
        if step % steps == 0 and learner.end_epoch():
            break
    return dict(zip(counting, learner.weights_DE.unbind(), strict=True))


def images_count(test_counts: Sequence[int], class_counts: Sequence[int]) -> dict[str, Tensor]:
    """{test distribution: how much an image of each class counts [C]}: 1 for the split as it is.

    Args:
        test_counts: images of each class in the split.
        class_counts: training images of each class; they order the classes from head to tail.
    """
    images_C = torch.tensor(test_counts, dtype=torch.float64).clamp(min=1)
    shares = share_by_distribution(class_counts)
    return {AS_IT_IS: torch.ones_like(images_C), **{name: share_C / images_C for name, share_C in shares.items()}}


class WeightLearner:
    """The weights of experts under several test distributions, learned side by side.

    Args:
        counting_DC: of each distribution, how much an image of each class counts.
        add_up: sums a tensor over ranks, each of which has a part of every batch.
    """

    def __init__(
        self,
        counting_DC: Sequence[Tensor],
        experts: int,
        lr: float,
        weight_decay: float,
        add_up: Callable[[Tensor], Tensor],
    ) -> None:
        self._counting_DC, self._add_up = torch.stack(list(counting_DC)).double(), add_up
        start_DE = self._counting_DC.new_full((len(counting_DC), experts), 1 / experts)
        self._raw_DE = nn.Parameter(start_DE)
        self._optimizer = torch.optim.SGD([self._raw_DE], lr, 0.9, weight_decay=weight_decay, nesterov=True)
        self._learns_D = torch.ones(len(counting_DC), dtype=torch.bool, device=start_DE.device)
        self.weights_DE = start_DE.softmax(1)

    def step(self, first_EBC: Tensor, second_EBC: Tensor, labels_B: Tensor) -> None:
        """One step on this rank's part of a batch: logits of two views, and labels, which decide what counts."""
        count_DB = self._counting_DC[:, labels_B]
        similar_DB = stability(self._raw_DE.softmax(1), first_EBC, second_EBC).double()
        (slope_DE,) = torch.autograd.grad(-(count_DB * similar_DB).sum(), self._raw_DE)
        total = self._add_up(torch.cat([slope_DE, count_DB.sum(1, keepdim=True)], 1))
        self._raw_DE.grad = total[:, :-1] / total[:, -1:].clamp(min=torch.finfo(total.dtype).tiny)
        self._optimizer.step()
        self.weights_DE = torch.where(self._learns_D[:, None], self._raw_DE.detach().softmax(1), self.weights_DE)

    def end_epoch(self) -> bool:
        """Whether no distribution learns any more: each stops where a weight, of two decimals, is below .05."""
        self._learns_D &= ~(self.weights_DE.round(decimals=2) < LEAST_WEIGHT).any(1)
        return not self._learns_D.any()


def stability(weights_DE: Tensor, first_EBC: Tensor, second_EBC: Tensor) -> Tensor:
    """The cosine similarity of the weighted predictions of two views, of each image [D, B]."""

    def predicted(logits_EBC: Tensor) -> Tensor:
        return torch.einsum("de,ebc->dbc", weights_DE.to(logits_EBC.dtype), logits_EBC).softmax(2)

    return F.cosine_similarity(predicted(first_EBC), predicted(second_EBC), dim=2, eps=1e-6)


@torch.no_grad()
def accuracy_of_weights(
    model: Aggregated, weights: Mapping[str, Tensor], split: EvaluationSplit, ranks: Ranks
) -> dict[str, float]:
    """{test distribution: expected top-1 with its own weights}, of one pass over the split. A collective."""
    shares = share_by_distribution(split.class_counts)
    weights_DE = torch.stack([weights[name] for name in shares]).float()
    counts = [ClassCounts.zeros(len(split.shots), ranks.device) for _ in shares]
    model.eval()
    for batch in split.batches(ranks):
        labels, valid = batch.labels.to(ranks.device), batch.valid.to(ranks.device)
        logits_DBC = torch.einsum("de,ebc->dbc", weights_DE, model.of_experts(batch.query.to(ranks.device)))
        for logits_BC, counted in zip(logits_DBC, counts, strict=True):
            counted.add(logits_BC, labels, valid)
    totals = map(ClassCounts.from_tensor, ranks.sum(torch.stack([c.as_tensor() for c in counts])))
    return {name: _expected(total, shares[name].to(ranks.device)) for name, total in zip(shares, totals, strict=True)}


def _expected(counts: ClassCounts, share_C: Tensor) -> float:
    present_C = counts.total_C > 0
    accuracy_P = counts.correct1_C[present_C].double() / counts.total_C[present_C]
    return float((share_C[present_C] * accuracy_P).sum() / share_C[present_C].sum())


def _layout(images: int, ranks: Ranks) -> MicroBatchLayout:
    batch = min(BATCH, images)
    if batch % ranks.world_size:
        raise RecipeError(
            f"--aggregate-experts learns from batches of {batch} images, which {ranks.world_size} ranks cannot share "
            f"evenly: run it on a number of ranks that divides {batch}, such as 1"
        )
    return MicroBatchLayout(batch // ranks.world_size, ranks.world_size, ranks.rank, ranks.world_size)
