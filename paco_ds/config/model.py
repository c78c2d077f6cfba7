"""The settings of the model: backbone, centers, projection, and what of them is trained."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from paco_ds.config.section import Count, Fraction, Positive, Section, running


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
    centers_scale: Positive = Field(30.0, description="s, which multiplies the cosines of cosine centers")
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
    projection_activation: Literal["relu", "gelu"] = Field("relu", description="gelu: GPaCo's ViTs")
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
