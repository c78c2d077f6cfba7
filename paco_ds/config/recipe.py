"""The recipe: every setting of a run, typed and frozen. Files and overrides are read by `recipe_file`.

A setting is either *meaning* (it decides what is learnt: a resumed run must agree on it) or *running* (where and
how it is computed: free to change on resume). Sections and fields marked `RUNNING` are the latter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, Field, model_validator

from paco_ds.config.loss import LossSettings
from paco_ds.config.methods import Method
from paco_ds.config.optimizer import OptimizerSettings, ScheduleSettings
from paco_ds.config.section import RUNNING, Count, Fraction, Natural, NotNegative, Number, Positive, Section, running
from paco_ds.config.views import TrainView, ViewSettings
from paco_ds.errors import redacted


class StorageSettings(Section):
    """Patience with remote storage. Keys and endpoints of a service come from its own environment, never from here."""

    tries: Count = Field(8, description="of each request, with waits that double from half a second to 30 s")
    timeout: Positive = Field(30.0, description="seconds of a try; a second more for each MiB that it moves")
    redirects: bool = Field(False, description="follow a web server's redirects to other hosts, by https")


class CacheSettings(Section):
    """Whole shards of remote storage, kept on a disk of this host and shared by its processes."""

    directory: str = Field(description="folder on a disk of this host")
    bytes: Count = Field(description="the cache never grows beyond this")


Sampler = Literal["instance_balanced", "class_balanced", "square_root", "progressively_balanced"]


class DataSettings(Section):
    """Which shards, and how their samples are laid out and read."""

    shards: str = running(..., description="directory or URL that holds manifest.json")
    classes: Count | None = Field(None, description="number of classes the shards must have")
    train_split: str = Field("train", description="the split that is trained on")
    window: Count = Field(64, description="samples of a slot that are permuted, and read, together")
    workers: Natural = running(0, description="loader processes of each rank; 0 loads in the rank itself")
    sampler: Sampler = Field("instance_balanced", description="how often each image occurs in an epoch (Kang 2020)")
    max_bad_share: Fraction = running(0.001, description="share of an epoch's samples that may be unreadable")
    storage: StorageSettings = running(StorageSettings())
    cache: CacheSettings | None = running(None, description="of whole remote shards; null: only ranges are read")
    allow_pipe_urls: bool = running(False, description="let data.shards be a `pipe:` command, which is then run")
    max_pixels: Annotated[int, Number, Field(ge=1, le=178_956_970)] = Field(
        89_478_485, description="an image of more is a bad sample, by its header; PIL warns here, and fails at twice"
    )


class RoutersSettings(Section):
    """Of model.trained routers: RIDE's second stage, which decides image by image how many experts are asked."""

    top_logits: Count = Field(
        50, description="largest mean logits that a router is shown, or all where there are fewer; CIFAR-100 30"
    )
    hidden: Count = Field(16, description="numbers that a router makes of an expert's feature")
    threshold: Fraction = running(
        0.5, description="probability above which the next expert is asked; higher saves more, lower asks more"
    )


class LoraSettings(Section):
    """Of model.trained lora: low-rank updates of queries, keys, values and output of each attention (Hu et al. 2022).

    W x becomes W x + alpha / rank B A x; W is frozen.
    """

    rank: Count = Field(8, description="rows of A")
    alpha: Positive = Field(8.0, description="alpha / rank scales the update")


class AdaptFormerSettings(Section):
    """Of model.trained adaptformer: a bottleneck beside the MLP of each block (Chen et al. 2022).

    x + MLP(x) becomes x + MLP(x) + scale W_up relu(W_down LN(x)); MLP is frozen.
    """

    width: Count = Field(64, description="of the bottleneck; LIFT: the power of 2 below classes / (2 x blocks)")
    scale: Positive = Field(0.1, description="LIFT: 1, learned")
    learned_scale: bool = Field(False, description="scale is where a number for each block begins")


class ModelSettings(Section):
    """Backbone and projection head; the centers have the backbone's feature dimension (F(x), Eq. 4)."""

    backbone: str = Field(description="cifar_resnetN, a classifier of torchvision by its name, or timm:NAME")
    kwargs: dict[str, Any] = Field(
        {}, description="arguments of a timm network, as drop_path_rate; img_size is that of views.query by default"
    )
    experts: Count | None = Field(
        None, le=8, description="branches of RIDE, from the last but one stage on; of a ViT from its last quarter on"
    )
    expert_width: Literal["full", "reduced"] = Field(
        "full", description="channels of the experts' stages; reduced: three quarters, as RIDE is published"
    )
    centers: Literal["linear", "cosine"] = Field("linear", description="classifier; cosine: LDAM's and RIDE's")
    centers_scale: Positive = Field(30.0, description="of cosine centers")
    centers_from: str | None = running(
        None,
        description="where cosine centers start: class_means, of the features of the training images before training; "
        "or a .safetensors file of embeddings, such as CLIP's of the class names; null: drawn from the seed",
    )
    width: Count = Field(16, description="channels of a CIFAR ResNet's first stage; others have their own")
    start_from: str | None = running(
        None,
        description="run directory of a first stage, file or HuggingFace folder of weights, torchvision:NAME or "
        "timm:TAG; null: random weights",
    )
    start_from_min_share: Fraction = running(
        0.9,
        description="share of the backbone's weights that a file must have, and of the file's that the backbone must "
        "take; less is refused",
    )
    trained: Literal[
        "all", "last_block", "norms", "biases", "lora", "adaptformer", "centers", "center_scales", "routers"
    ] = Field(
        "all",
        description="last_block: of a ResNet, with all BatchNorm; norms, biases (BitFit): those of the backbone; lora, "
        "adaptformer: what model.lora or model.adaptformer adds to a ViT; centers: a new classifier on a frozen "
        "backbone (cRT, linear evaluation), and the projection of contrasts; center_scales: a factor for each center "
        "of a frozen classifier (LWS); routers: which images the next frozen expert sees (RIDE)",
    )
    lora: LoraSettings = LoraSettings()
    adaptformer: AdaptFormerSettings = AdaptFormerSettings()
    frozen_batch_norm: Literal["evaluation", "training"] = Field(
        "evaluation",
        description="of a backbone frozen by trained centers, center_scales or routers; training: it uses the batch's "
        "statistics and goes on averaging, as the published code of cRT and LWS does",
    )
    routers: RoutersSettings = RoutersSettings()
    projection_hidden: Count | None = Field(None, description="hidden width; the feature dimension by default")
    projection: Literal["two_layer", "three_layer"] = Field(
        "two_layer",
        description="Linear-BatchNorm-ReLU-Linear (PaCo), or Linear-ReLU-Linear-ReLU-Linear (GPaCo)",
    )
    projection_dim: Count = Field(128, description="dimension of queries and keys")
    initialisation: Literal["own", "published"] = Field(
        "own",
        description="published: CIFAR ResNets and their projection's last layer by He with fan-in, cosine centers of "
        "length 1; own: the convolutions by He with fan-out, the rest torch's",
    )

    @model_validator(mode="after")
    def _what_is_frozen_comes_from_somewhere(self) -> Self:
        if self.trained != "all" and self.start_from is None:
            raise ValueError(f"trained {self.trained} leaves random weights as they are: set start_from")
        if self.trained == "center_scales" and self.centers == "cosine":
            raise ValueError("trained center_scales scales linear centers: set centers to linear")
        return self

    @model_validator(mode="after")
    def _centers_that_start_somewhere_are_cosine(self) -> Self:
        if self.centers_from is None:
            return self
        if self.trained in ("center_scales", "routers"):
            raise ValueError(f"trained {self.trained} takes the centers of a first stage: leave centers_from out")
        if self.centers != "cosine":
            raise ValueError(
                "centers_from gives directions, and linear centers have a length and a bias too: set centers to cosine"
            )
        return self

    @property
    def adapters(self) -> LoraSettings | AdaptFormerSettings | None:
        """What is added to each block of a ViT, or None."""
        if self.trained == "lora":
            return self.lora
        return self.adaptformer if self.trained == "adaptformer" else None

    @property
    def key_dim(self) -> int:
        """Dimension of one key: of all experts, concatenated."""
        return self.projection_dim * (self.experts or 1)


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


def _true_as_default(value: Any) -> Any:
    """`engine.compile: true` of earlier versions is torch's default mode."""
    return "default" if value is True else value


class EngineSettings(Section):
    """How the step is computed. `auto` is decided by the hardware at the start of a run, which says what it chose."""

    deepspeed: str = Field(
        "auto",
        description="DeepSpeed JSON with a ZeRO stage (zero0 to zero3 ship) and no batch sizes; auto: on CUDA stage 0 "
        "where that fits into the memory of a GPU, else 1; on CPU stage 1",
    )
    precision: Literal["auto", "float32", "bfloat16", "published"] = Field(
        "auto",
        description="bfloat16 is autocast, weights and losses stay float32; auto: bfloat16 on CUDA of compute "
        "capability 8 and above, else float32, and a resumed run keeps its own; published: published_precision",
    )
    published_precision: Literal["float32", "float16"] | None = Field(
        None, description="of the published run; float16 is computed as bfloat16 autocast"
    )
    tf32: Literal["auto"] | bool = Field(
        "auto",
        description="convolutions that stay in float32 in TF32 (10 bits of mantissa) on CUDA; matrix products, the "
        "loss among them, never; auto: not where precision is float32",
    )
    gradients: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="what ranks send of their gradients; bfloat16 is half as much, and rounds each to a part in 256",
    )
    threads: Count | None = Field(None, description="CPU threads of a rank; cores / ranks on the host by default")
    max_skipped: Count = Field(50, description="steps in a row that may change nothing, something not being finite")
    max_grad_norm_ratio: Positive | None = Field(
        None, gt=1, description="skip a step whose gradient norm is more than so many times the usual one; null: none"
    )
    digest_every: Natural = Field(100, description="steps between proofs that ranks hold equal queues; 0: never")
    hang_seconds: Positive | None = Field(
        300, description="seconds without progress after which ranks print their stacks and end; null: never"
    )
    channels_last: Literal["auto"] | bool = Field(
        "auto",
        description="keep images and activations as N, H, W, C in memory; auto: on CUDA of compute capability 7 and "
        "above (tensor cores)",
    )
    activation_checkpointing: bool = Field(
        False, description="keep only the inputs of residual blocks for backward and run the blocks again there"
    )
    compile: Annotated[Literal[False, "default", "reduce-overhead"], BeforeValidator(_true_as_default)] = Field(
        False,
        description="compile the encoders (torch.compile) in one of its modes; ZeRO stages 0 to 2. reduce-overhead "
        "records CUDA graphs; on CPU it is default",
    )

    @model_validator(mode="after")
    def _one_decides_what_is_recomputed(self) -> Self:
        if self.compile and self.activation_checkpointing:
            raise ValueError(
                "compile and activation_checkpointing both decide what backward computes again; set one to false"
            )
        return self


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

    name: str = Field(description="of the run, in metrics and on its page")
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
        """Views that are made of a training image: the query's and, where there are keys, the key's."""
        return (self.views.query, self.views.key) if self.keys_from else (self.views.query,)

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
