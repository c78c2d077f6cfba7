"""Owns the settings of losses: which method, and a section of its own for each method that has any."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from paco_ds.config.section import Fraction, Natural, NotNegative, Number, Positive, Section, running


class LogitAdjustmentSettings(Section):
    """Of loss.method logit_adjustment."""

    tau: NotNegative = Field(1.0, description="times log q(y); 1 as published")


class ClassBalancedSettings(Section):
    """Of loss.method class_balanced."""

    beta: Fraction = Field(0.9999, lt=1, description="of the effective number of images (1 - beta^n) / (1 - beta)")


class FocalSettings(Section):
    """Of loss.method focal."""

    gamma: NotNegative = Field(2.0, description="power of 1 - p; 2 as published")
    class_balanced: bool = Field(False, description="weights of effective numbers too (Cui et al. 2019)")
    beta: Fraction = Field(0.9999, lt=1, description="of the effective number of images")


class LdamSettings(Section):
    """Of loss.method ldam, which needs model.centers cosine."""

    max_margin: NotNegative = Field(0.5, description="of the rarest class, in cosine")
    scale: Positive = Field(30.0, description="of the cosine centers; equal to model.centers_scale")
    drw_epoch: Natural | None = Field(None, description="epochs after which re-weighting sets in (DRW); null: never")
    beta: Fraction = Field(0.9999, lt=1, description="of the effective number of images")


class MultiTaskSettings(Section):
    """Of loss.method multi_task: softmax + weight x contrast."""

    softmax: Literal["cross_entropy", "balanced_softmax"] = "cross_entropy"
    contrast: Literal["reweighted", "balanced_softmax", "supcon"] = Field(
        "reweighted",
        description="SupCon: each anchor weighted by effective numbers, log q added to contrast logits, or as it is",
    )
    weight: Positive = Field(0.1, description="of the contrast; .05 to 1 in Tables 13 and 14")
    beta: Fraction = Field(0.999, lt=1, description="of the effective number of images, for reweighted")


class RideSettings(Section):
    """Of loss.method ride, which needs model.experts."""

    base: Literal["ldam", "cross_entropy"] = Field("ldam", description="loss of each expert; ldam: cosine centers")
    max_margin: NotNegative = Field(0.5, description="of the rarest class, in cosine")
    scale: Positive = Field(30.0, description="of the cosine centers; equal to model.centers_scale")
    diversity: NotNegative = Field(0.2, description="weight of the experts' divergence from their mean; CIFAR .45")
    temperature: Positive = Field(1.0, description="of that divergence")
    reweight_epoch: Natural | None = Field(
        None, description="epochs after which weights and class-wise temperatures set in; null: never"
    )
    reweight_factor: Fraction = Field(
        0.02, lt=1, description="how far temperatures follow the class counts; iNaturalist .015"
    )
    beta: Fraction = Field(0.9999, lt=1, description="of the effective number of images")


class RoutingSettings(Section):
    """Of loss.method routing, which needs model.trained routers."""

    positive_weight: Positive = Field(
        100.0, description="of images that a later expert puts right; higher asks more experts; 100 as published"
    )


class DistillSettings(Section):
    """A trained run teaches: beside the method's loss, its probabilities are learnt."""

    teacher: str = running(..., description="run directory of the teacher, trained on the same shards")
    weight: Positive = Field(1.0, description="of the divergence from the teacher; 1 as published for RIDE")
    temperature: Positive = Field(1.5, description="divides the logits of both; 1.5 as published for RIDE")


class BalPoESettings(Section):
    """Of loss.method balpoe, which needs model.experts."""

    lambdas: tuple[Annotated[float, Number], ...] = Field(
        (1.0, 0.0, -1.0), min_length=1, description="bias of each expert; their mean is the bias of the model"
    )


class BclSettings(Section):
    """Of loss.method bcl."""

    softmax_weight: Positive = Field(1.0, description="of the logit-adjusted cross-entropy")
    contrast_weight: Positive = Field(0.35, description="of the contrast; ImageNet-LT's")


class ProCoSettings(Section):
    """Of loss.method proco."""

    weight: Positive = Field(1.0, description="of the contrast")
    max_concentration: Positive = Field(1e5, description="of a class's distribution, reached by a single key")


Method = Literal[
    "paco",
    "cross_entropy",
    "balanced_softmax",
    "logit_adjustment",
    "class_balanced",
    "focal",
    "ldam",
    "supcon",
    "multi_task",
    "ride",
    "routing",
    "balpoe",
    "bcl",
    "proco",
]
_CONTRASTIVE = ("paco", "supcon", "multi_task", "bcl", "proco")


class LossSettings(Section):
    """The method, the settings that methods share (the general form of the loss, see `losses.paco`), and a section for
    each method that has settings of its own."""

    method: Method = "paco"
    alpha: Positive = Field(0.05, description="weight of the contrast positives, Eq. (13)")
    beta: Positive = Field(1.0, description="weight of the own center")
    gamma: NotNegative = Field(1.0, description="scale of the contrast terms in the denominator")
    temperature: Positive = 0.2
    supt: Positive = Field(1.0, description="divides center logits and class prior")
    smoothing: NotNegative = Field(0.0, lt=1, description="label smoothing over the centers")
    class_prior: bool = Field(True, description="PaCo adds log q(y) to center logits in training")
    normalization: Literal["published", "summed"] = "published"
    contrast_scope: Literal["micro_batch", "global_batch"] = Field(
        "micro_batch", description="whose keys of this step an anchor meets: published: its own micro-batch's"
    )
    logit_adjustment: LogitAdjustmentSettings = LogitAdjustmentSettings()
    class_balanced: ClassBalancedSettings = ClassBalancedSettings()
    focal: FocalSettings = FocalSettings()
    ldam: LdamSettings = LdamSettings()
    multi_task: MultiTaskSettings = MultiTaskSettings()
    ride: RideSettings = RideSettings()
    routing: RoutingSettings = RoutingSettings()
    balpoe: BalPoESettings = BalPoESettings()
    bcl: BclSettings = BclSettings()
    proco: ProCoSettings = ProCoSettings()
    distill: DistillSettings | None = Field(None, description="a trained run that teaches, with any method of centers")

    @model_validator(mode="after")
    def _centers_can_be_taught(self) -> Self:
        if self.distill is not None and not self.trains_centers:
            raise ValueError(
                f"distill teaches center logits, which method {self.method} does not train: set distill to null"
            )
        return self

    @property
    def contrast(self) -> bool:
        """True when queries are held against other views, which needs a second view of each image."""
        return self.method in _CONTRASTIVE

    @property
    def trains_centers(self) -> bool:
        """False for the first of two stages, where centers stay as they were drawn, and for routing, where they stay
        as they were trained."""
        return self.method not in ("supcon", "routing")

    @property
    def prototypes(self) -> bool:
        """True when centers take part in the contrast through a projection of their own."""
        return self.method == "bcl"

    @property
    def starts_to_reweight(self) -> tuple[str, int | None]:
        """(setting, epochs after which the loss changes, None for never)."""
        if self.method == "ldam":
            return "loss.ldam.drw_epoch", self.ldam.drw_epoch
        return "loss.ride.reweight_epoch", self.ride.reweight_epoch if self.method == "ride" else None
