"""The model: query encoder, centers and, where the recipe has one, the key encoder.

Both encoders are in one module, so that DeepSpeed partitions and gathers both; an argument of the forward chooses one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paco_ds.config.model import ModelSettings
from paco_ds.config.recipe import Recipe
from paco_ds.models.backbones import Backbone, make_backbone, require_enough_pixels
from paco_ds.models.experts import Experts
from paco_ds.models.families import ImageSizes
from paco_ds.models.heads import CosineCenters, LinearCenters, Normalize, PerExpert, Projection, ScaledCenters
from paco_ds.models.initialisation import initialise_as_published
from paco_ds.models.output import ModelOutput
from paco_ds.models.routing import Routers, ask_in_turn
from paco_ds.models.weight_names import Weights


class Encoder(nn.Module):
    """Backbone and, where contrasts are made, projection: [B, 3, H, W] -> feature [B, F] and unit rows [B, D].

    Of experts both are [E, B, .].
    """

    def __init__(self, backbone: Backbone, projection: nn.Module | None) -> None:
        super().__init__()
        self.backbone, self.projection = backbone, projection

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        feature = self.backbone(images)
        if self.projection is None:
            return feature, None
        return feature, F.normalize(self.projection(feature).float(), dim=-1)


class Average(nn.Module):
    """A moving average of what evaluations run; its parts have the names of those that they follow."""

    def __init__(self, query_encoder: Encoder, centers: nn.Module) -> None:
        super().__init__()
        self.query_encoder, self.centers = query_encoder, centers


class Recogniser(nn.Module):
    """Query encoder with centers (a linear classifier on F(x)) and, for PaCo, the key encoder.

    `forward(images)` gives a `ModelOutput`;
    `forward(images, second_view)` gives the same for both views, [2 B, ...], run one after the other as GPaCo does
    in one micro-batch: BatchNorm normalises each view separately;
    `forward(images, keys=True)` gives keys [B, D], float32 unit rows without gradient.

    In evaluation images may be crops below one another, [B, 3, n S, S]: features and logits are then the means of the
    n crops' (LIFT's test ensemble).

    Of E experts, logits are [E, B, C] and queries [E, B, D], as the losses take them; keys are [B, E D], the experts
    concatenated, as the queue keeps them.

    Attributes:
        average: backbone and centers whose weights are a moving average of those that are trained, for evaluations;
            None without, see `begin_average`.
    """

    def __init__(
        self,
        encoder: Encoder,
        centers: nn.Module,
        normalize: Normalize,
        with_key_encoder: bool,
        prototypes: nn.Module | None = None,
        routers: Routers | None = None,
    ) -> None:
        super().__init__()
        self.normalize = normalize
        self.query_encoder = encoder
        self.centers = centers
        self.prototypes = prototypes
        self.routers = routers
        self.key_encoder = _as_key_encoder(encoder) if with_key_encoder else None
        self.average: Average | None = None
        self.backbone_is_fixed = False

    @property
    def has_projection(self) -> bool:
        """Whether the model has queries."""
        return self.query_encoder.projection is not None

    def freeze_backbone(self, batch_norm: Literal["evaluation", "training"] = "evaluation") -> None:
        """Train heads alone: the backbone keeps its weights.

        Args:
            batch_norm: `evaluation` keeps its BatchNorm statistics and uses them; `training` uses those of the batch
                and goes on averaging, as the published code of cRT and LWS does.
        """
        self.query_encoder.backbone.requires_grad_(False)
        self.backbone_is_fixed = batch_norm == "evaluation"
        self.train(self.training)

    def restart_key_encoder(self) -> None:
        """Reset the key encoder, if there is one, to the query encoder's weights."""
        if self.key_encoder is not None:
            self.key_encoder = _as_key_encoder(self.query_encoder)

    def begin_average(self) -> None:
        """Keep a copy of the present backbone and centers beside, for a moving average of their weights."""
        followed = Average(Encoder(self.query_encoder.backbone, None), self.centers)
        self.average = copy.deepcopy(followed).requires_grad_(False).eval()

    @contextmanager
    def evaluating(self, weights: Weights) -> Iterator[None]:
        """Within it evaluations `use` other weights."""
        before = self.query_encoder, self.centers
        self.use(weights)
        try:
            yield
        finally:
            self.query_encoder, self.centers = before
            if self.key_encoder is not None:
                _set_statistics(self.key_encoder, None)

    def use(self, weights: Weights) -> None:
        """Run the key encoder or the average in place of the query encoder, for evaluations.

        The key encoder has no centers and no running statistics: those are the query encoder's. The average has both
        of its own.
        """
        if weights == "key":
            assert self.key_encoder is not None
            _set_statistics(self.key_encoder, self.query_encoder)
            self.query_encoder = self.key_encoder
        elif weights == "ema":
            assert self.average is not None
            self.query_encoder, self.centers = self.average.query_encoder, self.average.centers

    def fixed_centers(self) -> nn.Module:
        """The frozen classifiers of :class:`ScaledCenters`: one, or one for each expert."""
        if isinstance(self.centers, PerExpert):
            return nn.ModuleList(head.linear for head in self.centers)  # type: ignore[misc]
        return self.centers.linear  # type: ignore[return-value]

    def train(self, mode: bool = True) -> Recogniser:
        super().train(mode)
        if self.backbone_is_fixed:
            self.query_encoder.backbone.eval()
        if self.average is not None:
            self.average.eval()
        return self

    def forward(self, images: Tensor, second_view: Tensor | None = None, *, keys: bool = False) -> ModelOutput | Tensor:
        if keys:
            assert self.key_encoder is not None
            with torch.no_grad():
                return concat_experts(self.key_encoder(self.normalize(images))[1])
        if (crops := _crops_of(images)) is not None:
            features = [self.query_encoder.backbone(self.normalize(crop)) for crop in crops]
            return ModelOutput(_mean(features), _mean(self.centers(feature).float() for feature in features))
        if self.routers is not None and not self.training:
            mean_logits, used = self._ask_in_turn(self.normalize(images))
            return ModelOutput(None, mean_logits, experts_used=used)
        feature, query = self.query_encoder(self.normalize(images))
        if second_view is not None:
            second_feature, second_query = self.query_encoder(self.normalize(second_view))
            feature = torch.cat([feature, second_feature], -2)
            query = None if query is None else torch.cat([query, second_query], -2)
        if self.routers is not None:
            logits = self.centers(feature).float()
            return ModelOutput(feature, logits, query, routers=self.routers(feature, logits))
        if self.prototypes is None or not self.training:
            return ModelOutput(feature, self.centers(feature).float(), query)
        logits, rows = self.centers(feature, rows=True)
        prototypes = F.normalize(self.prototypes(rows).float(), dim=-1)
        return ModelOutput(feature, logits.float(), query, prototypes)

    def feature(self, images: Tensor) -> Tensor:
        """The pooled feature [B, F], of experts [E, B, F]; of crops below one another their mean."""
        crops = _crops_of(images)
        return _mean(self.query_encoder.backbone(self.normalize(each)) for each in crops or (images,))

    def _ask_in_turn(self, images: Tensor) -> tuple[Tensor, Tensor]:
        experts, centers = self.query_encoder.backbone.network, self.centers
        assert isinstance(experts, Experts)
        assert isinstance(centers, PerExpert)
        assert self.routers is not None
        return ask_in_turn(experts, centers, self.routers, images)


def _crops_of(images: Tensor) -> tuple[Tensor, ...] | None:
    """The crops of images where they are below one another; None of single, square views."""
    height, side = images.shape[2:]
    return images.split(side, dim=2) if height > side else None


def _mean(of_crops: Iterable[Tensor]) -> Tensor:
    rows = list(of_crops)
    return torch.stack(rows).mean(0) if rows[1:] else rows[0]


def concat_experts(rows: Tensor) -> Tensor:
    """[E, B, D] of experts concatenated to [B, E D]; [B, D] unchanged."""
    return rows if rows.ndim == 2 else rows.transpose(0, 1).flatten(1)


def split_experts(rows: Tensor, experts: int | None) -> Tensor:
    """[B, E D] split into [E, B, D]; unchanged without experts (None)."""
    return rows if experts is None else rows.unflatten(1, (experts, -1)).transpose(0, 1)


def _as_key_encoder(encoder: Encoder) -> Encoder:
    key_encoder = copy.deepcopy(encoder).requires_grad_(False)
    # keys are normalised with the statistics of their group; running statistics would never be used
    _set_statistics(key_encoder, None)
    return key_encoder


def _set_statistics(key_encoder: Encoder, source: Encoder | None) -> None:
    """Give the BatchNorm layers of a key encoder the running statistics of another encoder, or none."""
    for name, norm in key_encoder.named_modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            its = source and source.get_submodule(name)
            norm.track_running_stats = its is not None
            for each in ("running_mean", "running_var", "num_batches_tracked"):
                setattr(norm, each, its and getattr(its, each))


def make_recogniser(recipe: Recipe, classes: int, mean: Sequence[float], std: Sequence[float]) -> Recogniser:
    """The model of a recipe for shards with this many classes: the heads that its method trains, with weights drawn
    from its seed; nothing is frozen.

    Args:
        mean, std: of the channels, in the 0-1 range.

    Raises:
        RecipeError: an unknown backbone, or one that does not fit the other settings.
    """
    settings, method = recipe.model, recipe.method
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        backbone = make_backbone(settings, sizes := ImageSizes.of(recipe.views))
        dim = backbone.feature_dim

        def project() -> nn.Module:
            hidden, out = settings.projection_hidden or dim, settings.projection_dim
            kind, activation = settings.projection, settings.projection_activation
            return _of_each_expert(settings, lambda: Projection(dim, hidden, out, kind, activation))

        projection = project() if method.contrastive else None
        centers = _of_each_expert(settings, lambda: _centers(settings, dim, classes))
        if not method.trains_centers:
            centers.requires_grad_(False)
        prototypes = project() if method.uses_prototypes else None
        routers = None
        if settings.trained == "routers":
            assert settings.experts is not None
            routers = Routers(settings.experts, dim, classes, settings.routers)
        encoder = Encoder(backbone, projection)
        if settings.initialisation == "published":
            initialise_as_published(encoder, centers)
        with_key_encoder = recipe.keys_from == "key_encoder"
        require_enough_pixels(backbone, settings.backbone, sizes)  # after all weights are drawn
        return Recogniser(encoder, centers, Normalize(mean, std), with_key_encoder, prototypes, routers)


def _of_each_expert(settings: ModelSettings, make_head: Callable[[], nn.Module]) -> nn.Module:
    return make_head() if settings.experts is None else PerExpert(settings.experts, make_head)


def _centers(settings: ModelSettings, feature_dim: int, classes: int) -> nn.Module:
    if settings.trained == "center_scales":
        return ScaledCenters(feature_dim, classes)
    if settings.centers == "cosine":
        return CosineCenters(feature_dim, classes, settings.centers_scale)
    return LinearCenters(feature_dim, classes)
