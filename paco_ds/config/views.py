"""The settings of views: which random operations make one, and how strong each is.

`randcls`, `randclsstack`, `sim`, `sim02`, `mocov2` and `regular` are one chain of operations with other defaults, the
values of the published code (dvlab-research/Parametric-Contrastive-Learning); any of them may be set in a recipe.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self, TypeVar

from pydantic import Field, model_validator

from paco_ds.config.section import Count, Fraction, Natural, NotNegative, Number, Positive, Section, Side

Byte = Annotated[int, Number, Field(ge=0, le=255)]
Hue = Annotated[float, Number, Field(ge=0, le=0.5)]
Range = tuple[Positive, Positive]
ViewDevice = Literal["cpu", "accelerator"]
ViewT = TypeVar("ViewT", bound=Section)


class SmallView(Section):
    """Small images: random zoom and shift, horizontal flip, one erased square (Cutout, DeVries 2017)."""

    name: Literal["small"] = "small"
    size: Side = Field(description="pixels of a side")
    zoom: Range = Field((0.8, 1.2), description="factors of the size, between which one is drawn")
    shift: Natural = Field(3, description="pixels")
    flip: Fraction = Field(0.5, description="probability of a mirrored view")
    cutout: Natural = Field(8, description="pixels of a side of the erased square; 0 erases none")

    @model_validator(mode="after")
    def _ranges_rise(self) -> Self:
        return _rising(self, "zoom")


class RandAugmentSettings(Section):
    """timm's `rand-n{operations}-m{magnitude}-mstd{magnitude_std}`: operations drawn from 15, with replacement."""

    operations: Count = Field(2, description="n: operations drawn for a view")
    magnitude: NotNegative = Field(10, description="m: mean magnitude; what is drawn above 10 counts as 10, as in timm")
    magnitude_std: NotNegative = Field(0.5, description="mstd: deviation of an operation's magnitude")
    probability: Fraction = Field(0.5, description="that an operation drawn is applied")
    translation: Fraction = Field(0.45, description="of a side, at magnitude 10")
    fill: tuple[Byte, Byte, Byte] = Field((124, 116, 104), description="color of pixels from outside: ImageNet's mean")


class ChainView(Section):
    """RandomResizedCrop, flip, jitter, gray, blur, RandAugment, erasing, in this order; a name sets strengths."""

    size: Side = Field(224, description="pixels of a side")
    area: Range = Field((0.08, 1.0), description="of the image, in the crop")
    ratio: Range = Field((3 / 4, 4 / 3), description="width / height of the crop")
    flip: Fraction = Field(0.5, description="probability of a mirrored view")
    jitter: Fraction = Field(
        0.4, description="brightness, contrast and saturation: factors in 1 - jitter to 1 + jitter"
    )
    hue: Hue = Field(0.0, description="shift of at most this share of the color circle")
    jitter_probability: Fraction = Field(1.0, description="that jitter and hue are applied")
    gray: Fraction = Field(0.0, description="probability of a view without color")
    gray_first: bool = Field(False, description="gray before jitter, which then changes brightness and contrast alone")
    blur: Fraction = Field(0.0, description="probability of a Gaussian blur")
    blur_sigma: Range = Field((0.1, 2.0), description="pixels")
    randaugment: RandAugmentSettings | None = Field(None, description="operations after the others; null: none")
    erasing: Fraction = Field(
        0.0, description="probability that a rectangle of 2 to 33 % of the view becomes noise (Zhong et al. 2020)"
    )

    @model_validator(mode="after")
    def _ranges_rise(self) -> Self:
        if self.area[1] > 1:
            raise ValueError(f"area {list(self.area)} asks for crops larger than the image; set its end to at most 1")
        return _rising(self, "area", "ratio", "blur_sigma")


class RegularView(ChainView):
    """Crop, flip, color jitter."""

    name: Literal["regular"] = "regular"


class RandClsView(ChainView):
    """`regular` and RandAugment: the query's view of the published ResNet-50 runs."""

    name: Literal["randcls"] = "randcls"
    randaugment: RandAugmentSettings | None = RandAugmentSettings()


class RandClsStackView(RandClsView):
    """`randcls` with gray and blur before RandAugment."""

    name: Literal["randclsstack"] = "randclsstack"  # type: ignore[assignment]
    gray: Fraction = 0.2
    blur: Fraction = 0.5


class SimView(ChainView):
    """Crop, jitter, gray, blur, flip, after SimCLR (Chen et al. 2020): the key's view of most published runs."""

    name: Literal["sim"] = "sim"
    gray: Fraction = 0.2
    blur: Fraction = 0.5


class Sim02View(SimView):
    """`sim` with crops of at least a fifth of the image."""

    name: Literal["sim02"] = "sim02"  # type: ignore[assignment]
    area: Range = (0.2, 1.0)


class MocoV2View(ChainView):
    """Crop, jitter with hue, gray, blur, flip, of MoCo v2 (Chen et al. 2020)."""

    name: Literal["mocov2"] = "mocov2"
    area: Range = (0.2, 1.0)
    hue: Hue = 0.1
    jitter_probability: Fraction = 0.8
    gray: Fraction = 0.2
    blur: Fraction = 0.5


class CifarKeyView(ChainView):
    """The key's view of the published CIFAR runs: SimCLR's at 32 pixels."""

    name: Literal["cifar_key"] = "cifar_key"
    size: Side = 32
    area: Range = (0.2, 1.0)
    hue: Hue = 0.1
    jitter_probability: Fraction = 0.8
    gray: Fraction = 0.2
    blur: Fraction = 0.5


class CifarView(Section):
    """The query's view of the published CIFAR runs: padded crop, flip, AutoAugment's CIFAR-10 policy, Cutout.

    An image whose shorter side is not `size` is resized to it first.
    """

    name: Literal["cifar"] = "cifar"
    size: Side = Field(32, description="pixels of a side")
    padding: Natural = Field(4, description="black pixels around the image before the crop")
    flip: Fraction = Field(0.5, description="probability of a mirrored view")
    autoaugment: Literal["cifar10"] | None = Field("cifar10", description="the policy of Cubuk et al. 2019; null: none")
    fill: tuple[Byte, Byte, Byte] = Field((128, 128, 128), description="color of pixels that AutoAugment lets in")
    cutout: Natural = Field(16, description="pixels of a side of the erased square; 0 erases none")


class EvalView(Section):
    """Shorter side to `resize`, then the center `size` x `size` pixels, or five crops of that size."""

    name: Literal["eval"] = "eval"
    size: Side = Field(224, description="pixels of a side")
    resize: Side = Field(256, description="pixels of the shorter side before the crop")
    interpolation: Literal["bilinear", "bicubic"] = Field(
        "bilinear", description="of that resize; torchvision's is bilinear, that of most ViTs bicubic"
    )
    crops: Literal["center", "five"] = Field(
        "center", description="five: the four corners and the center, whose logits are averaged (LIFT's test ensemble)"
    )

    @property
    def number_of_crops(self) -> int:
        return 5 if self.crops == "five" else 1

    @model_validator(mode="after")
    def _crop_fits(self) -> Self:
        if self.resize < self.size:
            raise ValueError(f"resize {self.resize} is smaller than the crop size {self.size}; raise resize")
        return self


TrainView = (
    SmallView
    | RegularView
    | RandClsView
    | RandClsStackView
    | SimView
    | Sim02View
    | MocoV2View
    | CifarView
    | CifarKeyView
)
AnyView = TrainView | EvalView


class ViewSettings(Section):
    """Random views of a training image for the query and the key encoder, and the fixed one of evaluation."""

    query: Annotated[TrainView, Field(discriminator="name")]
    key: Annotated[TrainView, Field(discriminator="name")]
    evaluation: EvalView = EvalView()
    device: ViewDevice = Field(
        "cpu",
        description="what makes training views: loader processes, or the rank's device, for which they only decode and "
        "crop; the draws are the same, pixels differ by rounding and by how colors of JPEGs are decoded",
    )

    @model_validator(mode="after")
    def _sizes_agree(self) -> Self:
        if self.query.size != self.key.size:
            raise ValueError(f"query.size {self.query.size} and key.size {self.key.size} differ; set them equal")
        return self

    @model_validator(mode="after")
    def _device_has_all(self) -> Self:
        for name, view in (("query", self.query), ("key", self.key)):
            if self.device == "accelerator" and erases(view):
                raise ValueError(f"device accelerator cannot erase; set {name}.erasing to 0, or device to cpu")
        return self


def erases(view: TrainView) -> bool:
    """Whether the view may draw random erasing, which no device but the CPU carries out."""
    return isinstance(view, ChainView) and view.erasing > 0


def _rising(view: ViewT, *names: str) -> ViewT:
    for name in names:
        low, high = getattr(view, name)
        if low > high:
            raise ValueError(f"{name} [{low:g}, {high:g}] is no range; write the smaller value first")
    return view
