"""The `loss` section of a recipe: the method, what methods share, and a section for each method that has settings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, create_model, field_validator, model_validator

from paco_ds.config.methods import METHODS, Method, find_method
from paco_ds.config.section import NotNegative, Positive, Section, running


class DistillSettings(Section):
    """Distillation from a trained run, beside the loss of the method."""

    teacher: str = running(..., description="run directory of the teacher, trained on the same shards")
    weight: Positive = Field(1.0, description="of the divergence from the teacher; 1 as published for RIDE")
    temperature: Positive = Field(1.5, description="divides the logits of both; 1.5 as published for RIDE")


class SharedLossSettings(Section):
    """The method, and the settings that methods share (the general form of the loss, see `losses.paco`)."""

    method: str = Field("paco", description="one of the methods of docs/methods.md, or module:name with --allow-code")
    alpha: Positive = Field(0.05, description="weight of the contrast positives, Eq. (13)")
    beta: Positive = Field(1.0, description="weight of the own center")
    gamma: NotNegative = Field(1.0, description="scale of the contrast terms in the denominator")
    temperature: Positive = Field(0.2, description="tau, divides the scores of the contrast")
    supt: Positive = Field(1.0, description="divides center logits and class prior")
    smoothing: NotNegative = Field(0.0, lt=1, description="label smoothing over the centers")
    class_prior: bool = Field(True, description="PaCo adds log q(y) to center logits in training")
    normalization: Literal["published", "summed"] = Field(
        "published", description="published: divided by the weight sum of an anchor; summed: Eq. (4) as printed"
    )
    contrast_scope: Literal["micro_batch", "global_batch"] = Field(
        "micro_batch", description="whose keys of this step an anchor meets: published: its own micro-batch's"
    )
    options: dict[str, Any] = Field({}, description="settings of a method that is module:name")
    distill: DistillSettings | None = Field(None, description="a trained run that teaches, with any method of centers")

    @property
    def active(self) -> Method:
        """The settings of the method that is trained: its section, or `options` of one from outside the package."""
        method = find_method(self.method)
        if self.method not in METHODS:
            return method(**self.options)
        section: Method | None = getattr(self, self.method, None)
        return method() if section is None else section

    @field_validator("method")
    @classmethod
    def _method_is_known(cls, method: str) -> str:
        find_method(method)
        return method

    @model_validator(mode="after")
    def _method_takes_settings(self) -> Self:
        if self.options and self.method in METHODS:
            raise ValueError(
                f"options are for a method from outside the package; those of {self.method} are set under {self.method}"
            )
        if self.distill is not None and not self.active.trains_centers:
            raise ValueError(
                f"distill teaches center logits, which method {self.method} does not train: set distill to null"
            )
        return self


if TYPE_CHECKING:

    class LossSettings(SharedLossSettings):
        """`SharedLossSettings` with a field for each method of the package that has settings, by the method's name."""

else:
    LossSettings = create_model(
        "LossSettings",
        __base__=SharedLossSettings,
        __module__=__name__,
        __doc__=SharedLossSettings.__doc__,
        **{name: (method, method()) for name, method in METHODS.items() if method.model_fields},
    )
