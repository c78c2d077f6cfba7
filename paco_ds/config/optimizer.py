"""The settings of the optimizer, and of its learning rate over a run."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from paco_ds.config.section import Count, Natural, NotNegative, Number, Positive, Section

_BelowOne = Annotated[float, Number, Field(ge=0, lt=1)]


class OptimizerSettings(Section):
    """SGD with momentum, as published, or AdamW."""

    name: Literal["sgd", "adamw"] = Field("sgd", description="adamw: Adam with decoupled weight decay, as ViTs have it")
    lr: Positive = Field(description="peak, for the recipe's own step.micro_batches; see lr_per_256")
    lr_per_256: bool = Field(
        False, description="lr is for 256 images a step and is multiplied by those of a step / 256, by no other factor"
    )
    momentum: NotNegative = Field(0.9, lt=1, description="of sgd")
    nesterov: bool = Field(False, description="of sgd: Nesterov's momentum, as RIDE, SADE and BalPoE are published")
    betas: tuple[_BelowOne, _BelowOne] = Field(
        (0.9, 0.999), description="of adamw: shares that the means of gradients and of their squares keep in a step"
    )
    eps: Positive = Field(1e-8, description="of adamw: added to the root of the mean square")
    weight_decay: NotNegative = Field(5e-4, description="of every parameter, but see decay_norms_and_biases")
    decay_norms_and_biases: bool = Field(
        True,
        description="false: no weight decay of parameters of one dimension (norms, biases) and of those that the "
        "network's authors train without it (position embeddings, tokens)",
    )
    layer_decay: Positive = Field(
        1.0,
        le=1,
        description="factor of the learning rate from one depth of the network to the one below it; heads have the "
        "whole rate; networks of timm",
    )
    clip_norm: Positive | None = Field(None, description="largest global norm of the gradient")

    @model_validator(mode="after")
    def _settings_are_of_the_optimizer(self) -> Self:
        others = {"sgd": ("betas", "eps"), "adamw": ("momentum", "nesterov")}[self.name]
        for setting in others:
            value, usual = getattr(self, setting), type(self).model_fields[setting].default
            if value != usual:
                raise ValueError(
                    f"{setting} {value} is not of {self.name}, which has no use for it: leave {setting} out, or set "
                    f"name to {'adamw' if self.name == 'sgd' else 'sgd'}"
                )
        return self

    @property
    def states(self) -> int:
        """Numbers that the optimizer keeps of a weight."""
        return 2 if self.name == "adamw" else int(self.momentum > 0)

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> Self:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov looks ahead along the momentum, which is 0: set momentum or leave nesterov out")
        return self


class ScheduleSettings(Section):
    """Linear warm-up, then half a cosine or milestones; changed every epoch (published) or every step."""

    epochs: Count = Field(description="of the whole training")
    warmup_epochs: Natural = Field(0, description="over which the rate rises linearly to its peak")
    warmup_overshoot: bool = Field(
        False, description="the epoch after warm-up still rises, above the peak (the published CIFAR code)"
    )
    per: Literal["epoch", "step"] = Field("epoch", description="how often the rate changes")
    milestones: tuple[Count, ...] = Field(
        (), description="epochs after which the rate is a tenth, in place of the cosine (CIFAR, published)"
    )
    minimum_lr: NotNegative = Field(0.0, description="learning rate at which the cosine ends, below the peak")

    @model_validator(mode="after")
    def _milestones_are_reached(self) -> Self:
        if list(self.milestones) != sorted(set(self.milestones)) or max(self.milestones, default=0) >= self.epochs:
            raise ValueError(f"milestones {list(self.milestones)} must rise and lie inside {self.epochs} epochs")
        return self

    @model_validator(mode="after")
    def _minimum_is_of_the_cosine(self) -> Self:
        if self.minimum_lr and self.milestones:
            raise ValueError(
                f"minimum_lr {self.minimum_lr:g} ends the cosine, in whose place milestones are: remove one"
            )
        return self

    @model_validator(mode="after")
    def _warmup_is_shorter(self) -> Self:
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs} leaves nothing of {self.epochs} epochs; lower it")
        return self
