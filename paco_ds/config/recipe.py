"""The recipe: every setting of a run, typed and frozen. Files and overrides are read by `config.load`.

A setting is either *meaning* (it decides what is learnt: a resumed run must agree on it) or *running* (where and
how it is computed: free to change on resume). Sections and fields marked `RUNNING` are the latter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, Field, field_validator, model_validator

from paco_ds.config.data import DataSettings
from paco_ds.config.engine import EngineSettings
from paco_ds.config.loss import LossSettings
from paco_ds.config.methods import Method
from paco_ds.config.model import ModelSettings
from paco_ds.config.optimizer import OptimizerSettings, ScheduleSettings
from paco_ds.config.section import RUNNING, Count, Fraction, Natural, NotNegative, Section, running
from paco_ds.config.views import TrainView, ViewSettings
from paco_ds.errors import redacted


class KeyEncoderSettings(Section):
    """The momentum encoder that makes keys (He et al. 2020). `key_encoder: none` has one encoder for both views."""

    momentum: Fraction = Field(0.999, description="share that a key weight keeps of itself in a step")
    momentum_schedule: Literal["constant", "cosine"] = Field("constant", description="cosine rises to 1 (BYOL)")
    scale_momentum: bool = Field(False, description="momentum^(M / M_ref), as long as the recipe's in images seen")
    batch_norm: Literal["shuffle", "local", "auto"] = Field(
        "shuffle",
        description="groups over which keys are normalised; auto: shuffle where the key encoder has BatchNorm, its "
        "projection's too, else local, which exchanges no images",
    )
    shuffle_block: Count | None = Field(
        None,
        ge=2,
        description="consecutive micro-batches that shuffle images among themselves, as many as a node has ranks; "
        "null: all of a step, as published",
    )

    @model_validator(mode="after")
    def _a_block_is_shuffled(self) -> Self:
        if self.shuffle_block is not None and self.batch_norm == "local":
            raise ValueError("shuffle_block bounds the shuffle, which batch_norm local does without: leave it null")
        return self


class QueueSettings(Section):
    """The ring of the newest keys of all ranks."""

    length: Natural = Field(8192, description="keys that are kept; 0: none")


class StepSettings(Section):
    """One optimizer step is `micro_batches` x `micro_batch` images, on any number of ranks."""

    micro_batch: Count = Field(description="images of one micro-batch: the scope of BatchNorm and contrasts")
    micro_batches: Count = Field(description="micro-batches of one optimizer step; ranks must divide it")
    mixup: NotNegative = Field(
        0.0, description="alpha of Beta(alpha, alpha), the share of each image in a mix of two; 0 mixes none"
    )
    cutmix: NotNegative = Field(
        0.0,
        description="alpha of Beta(alpha, alpha), the share of each image that a rectangle of another leaves; 0: none",
    )
    reference_micro_batches: Count | None = Field(
        None, description="what the learning rate was chosen for: the recipe file's own step.micro_batches"
    )
    lr_scaling: Literal["linear", "square_root", "none"] = Field(
        "linear", description="how the learning rate follows micro_batches / reference_micro_batches"
    )

    @model_validator(mode="after")
    def _images_are_mixed_in_one_way(self) -> Self:
        if self.mixup and self.cutmix:
            raise ValueError(
                f"mixup {self.mixup:g} and cutmix {self.cutmix:g} both mix the images: set one of them to 0"
            )
        return self

    @property
    def global_batch(self) -> int:
        return self.micro_batch * self.micro_batches

    @property
    def scale(self) -> float:
        """M / M_ref (1.0 when the recipe is run as written)."""
        return self.micro_batches / (self.reference_micro_batches or self.micro_batches)

    @property
    def lr_scale(self) -> float:
        """Factor of the learning rate, a function of `scale`."""
        return {"linear": self.scale, "square_root": math.sqrt(self.scale), "none": 1.0}[self.lr_scaling]


class CheckpointSettings(Section):
    """When a checkpoint is written, and how many are kept."""

    every_epochs: Count = Field(1, description="epochs between two checkpoints")
    every_steps: Count | None = Field(None, description="also inside an epoch")
    keep: Count = Field(2, description="newest checkpoints that are kept")
    keep_every_epochs: Count | None = Field(None, description="of every so many epochs, kept for good")


class EvaluationSettings(Section):
    """Held-out accuracy during training and at its end."""

    every_epochs: Natural = Field(1, description="0: only at the end")
    split: str | None = Field("val", description="watched during training, settings are chosen on it; null: none")
    test_split: str = Field("test", description="measured once, at the end")
    batch: Count = Field(256, description="images that a rank evaluates at a time")
    max_bad_share: Fraction = Field(
        0.0, description="share of a split's images that may be unreadable and are left out by name; 0: none may"
    )
    checkpoint: Literal["last", "best_all", "best_balanced"] = Field(
        "last", description="which weights the test split is given: the last, or the best on `split`, never on test"
    )
    weights: Literal["query", "key", "ema"] = Field(
        "query",
        description="which weights are evaluated, predicted with and exported: query: those that are trained; key: the "
        "key encoder, with the query encoder's centers and running statistics; ema: a moving average of those that are "
        "trained, kept beside",
    )
    ema_decay: Fraction = Field(
        0.9999, description="share that the average keeps of itself in a step n, at most (1 + n) / (10 + n)"
    )
    pictures: bool = Field(True, description="misclassified test images are shown on report.html")

    @model_validator(mode="after")
    def _best_is_judged_on_something(self) -> Self:
        if self.checkpoint != "last" and (self.split is None or self.every_epochs == 0):
            raise ValueError(
                f"checkpoint {self.checkpoint} is chosen on a validation split during training: set split and "
                f"every_epochs, or checkpoint last"
            )
        if self.checkpoint != "last" and self.split == self.test_split:
            raise ValueError(
                f"checkpoint {self.checkpoint} would be chosen on {self.split}, the test split: nothing is chosen on "
                f"test. Build the shards with --validation-share and set split to val, or checkpoint to last"
            )
        return self


class MetricsSettings(Section):
    """Logging, and metrics served during a run."""

    serve: bool = Field(True, description="serve /metrics on every rank")
    port: Count = Field(18400, le=65535, description="of local rank 0; the others follow")
    address: str | None = Field(
        None, description="address of this host that serves, and stands in the targets; by default all, IPv4 and IPv6"
    )

    @field_validator("address")
    @classmethod
    def _without_brackets(cls, address: str | None) -> str | None:
        """An IPv6 address may be given as it stands in a URL."""
        return address and address.removeprefix("[").removesuffix("]")

    targets_dir: str | None = Field(None, description="folder of all runs' lists of targets, beside the run's own")
    linger_seconds: float = Field(
        0.0, ge=0, le=60, description="how long a run that finished or failed is still served; two scrapes suffice"
    )
    log_every: Count = Field(
        10, description="steps of a line of metrics.jsonl, and between lines when the output is no terminal"
    )
    sinks: tuple[str, ...] = Field((), description="where figures go beside metrics.jsonl: tensorboard, wandb, mlflow")


def _none_as_null(value: Any) -> Any:
    """`none` is written as a word: in YAML it is not null."""
    return None if value == "none" else value


class Recipe(Section):
    """Every setting of a run."""

    name: str = Field(
        description="of the run in its log, its page, metrics.json and plans; the label `run` of Prometheus is the "
        "name of the run directory"
    )
    seed: Natural = Field(1, description="of initial weights, order, views and all other random numbers")
    data: DataSettings
    views: ViewSettings
    model: ModelSettings
    loss: LossSettings = LossSettings()
    key_encoder: Annotated[KeyEncoderSettings | None, BeforeValidator(_none_as_null)] = KeyEncoderSettings()
    queue: QueueSettings = QueueSettings()
    step: StepSettings
    optimizer: OptimizerSettings
    schedule: ScheduleSettings
    engine: EngineSettings = running(EngineSettings())
    checkpoint: CheckpointSettings = running(CheckpointSettings())
    evaluation: EvaluationSettings = running(EvaluationSettings())
    metrics: MetricsSettings = running(MetricsSettings())

    @model_validator(mode="after")
    def _scope_has_keys(self) -> Self:
        if self.key_encoder is None and self.loss.contrast_scope == "global_batch":
            raise ValueError(
                "loss.contrast_scope global_batch needs keys of the whole step before its first query, which "
                "key_encoder none does not make; set loss.contrast_scope to micro_batch"
            )
        return self

    @model_validator(mode="after")
    def _blocks_fill_the_step(self) -> Self:
        block, M = self.key_encoder.shuffle_block if self.key_encoder else None, self.step.micro_batches
        if block is not None and M % block:
            fitting = ", ".join(str(n) for n in range(2, M + 1) if M % n == 0)
            raise ValueError(
                f"key_encoder.shuffle_block {block} does not divide step.micro_batches {M}: "
                + (f"set it to one of {fitting}, or null" if fitting else "set it to null")
            )
        return self

    @model_validator(mode="after")
    def _routers_see_one_view(self) -> Self:
        if self.model.trained == "routers" and self.views.evaluation.crops != "center":
            raise ValueError(
                f"views.evaluation.crops {self.views.evaluation.crops}: routers would ask other experts for each crop; "
                "set it to center"
            )
        return self

    @model_validator(mode="after")
    def _weights_to_evaluate_are_there(self) -> Self:
        weights = self.evaluation.weights
        if weights == "key" and self.keys_from != "key_encoder":
            raise ValueError("evaluation.weights key: this recipe has no key encoder; set it to ema or query")
        if weights != "query" and self.model.trained == "routers":
            raise ValueError(f"evaluation.weights {weights}: routers are not averaged; set it to query")
        return self

    @model_validator(mode="after")
    def _learning_rate_is_scaled_once(self) -> Self:
        if self.optimizer.lr_per_256 and self.step.lr_scaling != "linear":
            raise ValueError(
                f"optimizer.lr_per_256 and step.lr_scaling {self.step.lr_scaling} both say how the learning rate "
                "follows the images of a step: leave one of them out"
            )
        if self.schedule.minimum_lr >= self.lr:
            raise ValueError(
                f"schedule.minimum_lr {self.schedule.minimum_lr:g} is not below the peak learning rate {self.lr:g}: "
                "lower it"
            )
        return self

    @model_validator(mode="after")
    def _method_suits_run(self) -> Self:
        self.method.check(self)
        return self

    @property
    def method(self) -> Method:
        """The settings of the method that is trained."""
        return self.loss.active

    @property
    def keys_from(self) -> Literal["key_encoder", "query_encoder"] | None:
        """What makes the keys: a momentum encoder, the query encoder on a second view (GPaCo), or nothing where the
        method has no contrast."""
        if not self.method.contrastive:
            return None
        return "query_encoder" if self.key_encoder is None else "key_encoder"

    @property
    def training_views(self) -> tuple[TrainView, ...]:
        """Views that are made of a training image: the query's and, for keys or a loss of both views, the key's."""
        both = self.keys_from or self.method.uses_both_views
        return (self.views.query, self.views.key) if both else (self.views.query,)

    @property
    def runs_both_views(self) -> bool:
        """Whether the query encoder runs both views, whose rows are all in the loss (GPaCo, MDCS)."""
        return self.keys_from == "query_encoder" or self.method.uses_both_views

    @property
    def lr(self) -> float:
        """Peak learning rate of this run: the recipe's, scaled by `step.lr_scaling` or `optimizer.lr_per_256`."""
        scale = self.step.global_batch / 256 if self.optimizer.lr_per_256 else self.step.lr_scale
        return self.optimizer.lr * scale

    def resume_identity(self) -> dict[str, Any]:
        """The settings that decide what is learnt, as {dotted key: value}."""
        return dict(_leaves(self, ""))

    def default(self, key: str) -> Any:
        """What a setting, by its dotted key, is where nobody sets it; None for one that must be set, and for all of a
        section that is left out by default."""
        *path, name = key.split(".")
        section: BaseModel = self
        for part in path:
            if type(section).model_fields[part].default is None:
                return None
            section = getattr(section, part)
            if isinstance(section, dict):
                return None
        field = type(section).model_fields[name]
        value = None if field.is_required() else field.get_default(call_default_factory=True)
        return list(value) if isinstance(value, tuple) else value

    def to_yaml(self) -> str:
        """The recipe as a file, with `***` for the credentials of URLs; who reads it has those of the environment."""
        return yaml.safe_dump(_without_credentials(self.model_dump(mode="json")), sort_keys=False)


def _without_credentials(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_credentials(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_credentials(each) for each in value]
    return redacted(value) if isinstance(value, str) else value


def _leaves(section: BaseModel, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, field in type(section).model_fields.items():
        extra = field.json_schema_extra
        if (isinstance(extra, dict) and RUNNING in extra) or prefix + name == "name":
            continue
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from _leaves(value, f"{prefix}{name}.")
        elif isinstance(value, dict):
            yield from ((f"{prefix}{name}.{key}", each) for key, each in value.items())
        else:
            yield prefix + name, list(value) if isinstance(value, tuple) else value
