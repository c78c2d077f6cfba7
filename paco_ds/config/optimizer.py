"""The settings of the optimizer, and of its learning rate over a run."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from paco_ds.config.section import Count, Natural, NotNegative, Number, Positive, Section

_BelowOne = Annotated[float, Number, Field(ge=0, lt=1)]

_OF = {  # settings that not every optimizer has
    "momentum": ("sgd", "lars", "muon"),
    "nesterov": ("sgd", "lars", "muon"),
    "betas": ("adamw", "muon"),
    "eps": ("adamw", "muon"),
    "trust_coefficient": ("lars",),
}


class OptimizerSettings(Section):
    """SGD with momentum, as published, AdamW, LARS or Muon."""

    name: Literal["sgd", "adamw", "lars", "muon"] = Field(
        "sgd",
        description="adamw: Adam with decoupled weight decay, as ViTs have it; lars: SGD for large batches, each "
        "weight with a rate of its own; muon: matrices by Muon at AdamW's learning rate, all else by AdamW. lars and "
        "muon at ZeRO stage 0",
    )
    lr: Positive = Field(description="peak, for the recipe's own step.micro_batches; see lr_per_256")
    lr_per_256: bool = Field(
        False, description="lr is for 256 images a step and is multiplied by those of a step / 256, by no other factor"
    )
    momentum: NotNegative = Field(0.9, lt=1, description="of sgd, lars and muon (whose authors have 0.95)")
    nesterov: bool = Field(
        False,
        description="Nesterov's momentum: of sgd, as RIDE, SADE and BalPoE are published, of lars, and of muon, whose "
        "authors have it",
    )
    betas: tuple[_BelowOne, _BelowOne] = Field(
        (0.9, 0.999),
        description="of adamw and muon's AdamW: shares that the means of gradients and of their squares keep in a step",
    )
    eps: Positive = Field(1e-8, description="of adamw and of muon's AdamW: added to the root of the mean square")
    trust_coefficient: Positive = Field(
        0.001, description="of lars: length of a weight's step over that of the weight, at a learning rate of 1"
    )
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
        for setting, optimizers in _OF.items():
            value, usual = getattr(self, setting), type(self).model_fields[setting].default
            if value != usual and self.name not in optimizers:
                raise ValueError(
                    f"{setting} {value} is not of {self.name}, which has no use for it: leave {setting} out, or set "
                    f"name to {' or '.join(optimizers)}"
                )
        return self

    @property
    def takes_parts(self) -> bool:
        """Whether it steps any part of a weight by itself, so that ranks may partition weights (ZeRO stages 1 to 3)."""
        return self.name in ("sgd", "adamw")

    def states_of(self, *, matrix: bool = False) -> int:
        """Numbers that the optimizer keeps of each of a weight's.

        Args:
            matrix: the weight is one of Muon's, see `hidden_matrices`.
        """
        by_adamw = self.name == "adamw" or (self.name == "muon" and not matrix)
        return 2 if by_adamw else int(self.momentum > 0 or self.name == "muon")

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
