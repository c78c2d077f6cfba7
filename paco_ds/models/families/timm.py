"""`timm:NAME`, any network of timm with pooled features, where timm is installed."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from paco_ds.config.model import ModelSettings
from paco_ds.config.parse import brief, one_line
from paco_ds.errors import RecipeError
from paco_ds.models.experts import Experts, FirstStages, Width, whole_name
from paco_ds.models.families.base import Family, ImageSizes, Network

_PREFIX = "timm:"
# Set by us, or none of a recipe's business: weights come by model.start_from alone.
_OURS = ("num_classes", "in_chans", "features_only", "scriptable", "exportable", "no_jit", "device", "dtype")
_OF_WEIGHTS = ("pretrained", "checkpoint_path", "cache_dir", "pruned")
# Networks that can be cut between two stages: class, its row of stages, the layer after them, and all that follows.
_CUT = {
    "VisionTransformer": ("blocks", "norm", ("norm", "fc_norm", "attn_pool", "head_drop", "head")),
    "SwinTransformer": ("layers", "norm", ("norm", "head")),
    "SwinTransformerV2": ("layers", "norm", ("norm", "head")),
    "ConvNeXt": ("stages", "norm_pre", ("norm_pre", "head")),
}


class LastStages(nn.Module):
    """A network of timm from one of its stages on: the output of the stage before to pooled features.

    Args:
        whole: cut in place.
        stages: name of its row of stages.
        first: number of its first stage here.
        norm: name of the layer that follows the stages.
        kept: names of its parts after the stages, `norm` among them.
    """

    def __init__(self, whole: Any, stages: str, first: int, norm: str, kept: Collection[str]) -> None:
        super().__init__()
        self.whole, self._stages, self._norm = whole, stages, norm
        setattr(whole, stages, getattr(whole, stages)[first:])
        for name, _ in list(whole.named_children()):
            if name != stages and name not in kept:
                setattr(whole, name, nn.Identity())
        for name, _ in list(whole.named_parameters(recurse=False)):
            setattr(whole, name, None)

    def forward(self, x: Tensor) -> Tensor:
        if not len(x):  # an expert that no router asked: Swin's windows cannot be cut from no image
            none: Tensor = self(x.new_zeros(1, *x.shape[1:]))[:0]
            return none
        stages = getattr(self.whole, self._stages)
        if getattr(self.whole, "grad_checkpointing", False):  # of blocks in one row; stages of others have their own
            from timm.models import checkpoint_seq

            x = checkpoint_seq(stages, x)
        else:
            x = stages(x)
        pooled: Tensor = self.whole.forward_head(getattr(self.whole, self._norm)(x))
        return pooled


def weight_configs(architecture: str) -> dict[str, Any]:
    """{name with its tag: timm's description} of the weights that timm has of one of its networks."""
    import timm

    return {name: cfg for name, cfg in timm.models.get_arch_pretrained_cfgs(architecture).items() if cfg.has_weights}


def _make(settings: ModelSettings, sizes: ImageSizes) -> Network:
    name = settings.backbone.removeprefix(_PREFIX)
    if importlib.util.find_spec("timm") is None:
        raise RecipeError(f"model.backbone timm:{name} needs timm: pip install timm")
    import timm

    if name not in timm.list_models():
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "python -c 'import timm; print(timm.list_models())'"
        raise RecipeError(f"model.backbone timm:{name} is not one of timm's; {hint}")
    network, arguments = _created(name, settings.kwargs, sizes.training)
    _check_patches(name, network, sizes)
    dims = {_feature_dim(name, network, size, place) for size, place in _sized(sizes)}
    (dim,) = dims
    return Network(network, dim, arguments)


def _sized(sizes: ImageSizes) -> list[tuple[int, str]]:
    places = [(sizes.training, "views.query.size"), (sizes.evaluation, "views.evaluation.size")]
    return places if sizes.training != sizes.evaluation else places[:1]


def _created(name: str, kwargs: Mapping[str, Any], size: int) -> tuple[nn.Module, dict[str, Any]]:
    """(network without classifier, the arguments it was made with); `img_size` is that of the views where a network
    takes it and the user gave none."""
    for key in kwargs:
        if key in _OURS:
            raise RecipeError(f"model.kwargs.{key} is set by paco_ds: leave it out")
        if key in _OF_WEIGHTS or key.startswith("pretrained_"):
            raise RecipeError(f"model.kwargs.{key}: weights to start from are named by model.start_from alone")
    if "img_size" not in kwargs:
        sized = {**kwargs, "img_size": size}
        try:
            return _create(name, sized), sized
        except TypeError as error:
            if _unexpected(error) != "img_size":
                raise _refusal(name, error) from None
    try:
        return _create(name, kwargs), dict(kwargs)
    except TypeError as error:
        raise _refusal(name, error) from None


def _create(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """The network; TypeError of timm's for an argument it does not know, RecipeError for a value it does not take."""
    import timm

    try:
        network: nn.Module = timm.create_model(name, pretrained=False, num_classes=0, **arguments)
    except TypeError as error:
        if _unexpected(error):
            raise
        raise RecipeError(_not_made(name, arguments, error)) from None
    except Exception as error:  # timm asserts, and fails anywhere inside on a value of another type
        raise RecipeError(_not_made(name, arguments, error)) from None
    return network


def _not_made(name: str, arguments: Mapping[str, Any], error: Exception) -> str:
    return f"timm:{name} cannot be made with model.kwargs {brief(dict(arguments))}: {one_line(error) or repr(error)}"


def _unexpected(error: TypeError) -> str | None:
    """The argument that a TypeError calls unexpected."""
    found = re.search(r"unexpected keyword argument\S* \[?'(\w+)'", str(error))
    return found[1] if found else None


def _refusal(name: str, error: TypeError) -> RecipeError:
    """What to say of an argument that a network does not know: those with near names."""
    import timm

    wrong = _unexpected(error)
    with torch.device("meta"):
        kind = type(timm.create_model(name, num_classes=0))
    known = [key for key in inspect.signature(kind.__init__).parameters if key not in (*_OURS, "self", "kwargs")]
    near = difflib.get_close_matches(str(wrong), known, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"it takes {', '.join(known)}"
    return RecipeError(f"model.kwargs.{wrong} is no argument of timm:{name}; {hint}")


def _check_patches(name: str, network: nn.Module, sizes: ImageSizes) -> None:
    """RecipeError for images that patches do not divide: their last pixels would be left out without a word."""
    embed = getattr(network, "patch_embed", None)
    patch = getattr(embed, "patch_size", None)
    if not isinstance(patch, tuple) or getattr(embed, "dynamic_img_pad", False):
        return
    side = int(max(patch))
    for size, place in _sized(sizes):
        if size % side:
            below, above = size // side * side, (size // side + 1) * side
            raise RecipeError(
                f"{place} {size}: the patches of timm:{name} have {side} pixels a side, which do not divide it; set "
                f"{f'{below} or ' if below else ''}{above}, or model.kwargs.patch_size"
            )


def _feature_dim(name: str, network: nn.Module, size: int, place: str) -> int:
    """Dimension of the pooled feature, found by running the network without numbers.

    Raises:
        RecipeError: it does not take images of this size, or does not pool.
    """
    tensors = [*network.named_parameters(), *network.named_buffers()]
    without_numbers = {key: torch.empty_like(tensor, device="meta") for key, tensor in tensors}
    was_training = network.training
    network.eval()
    try:
        with torch.no_grad():
            shape = functional_call(network, without_numbers, (torch.empty(1, 3, size, size, device="meta"),)).shape
    except Exception as error:  # sizes that do not fit fail anywhere inside
        raise RecipeError(
            f"{place} {size}: timm:{name} does not take images of this size ({one_line(error)}); see model.kwargs: "
            "img_size is that of views.query by default, and dynamic_img_size=true lets most ViTs take others"
        ) from None
    network.train(was_training)
    if len(shape) != 2:
        raise RecipeError(
            f"timm:{name} gives features of shape {tuple(shape)} where one vector an image is needed: set "
            "model.kwargs.global_pool (avg, or token where it has a class token)"
        )
    return int(shape[1])


def _checkpoint(backbone: nn.Module) -> bool:
    networks: list[Any] = [m for m in backbone.modules() if hasattr(m, "set_grad_checkpointing")]
    for network in networks:
        try:
            network.set_grad_checkpointing(True)
        except AssertionError as error:  # how those of timm's that cannot say so
            raise RecipeError(f"engine.activation_checkpointing: {one_line(error)}; set it to false") from None
    return bool(networks)


def _branch(network: Any, count: int, width: Width, another: Callable[[], nn.Module]) -> Experts | None:
    """A ViT before the last quarter of its blocks, Swin and ConvNeXt before their last two stages as RIDE's ResNets."""
    kind = type(network).__name__
    if kind not in _CUT or not type(network).__module__.startswith("timm."):
        return None
    if width != "full":
        raise RecipeError(f"model.expert_width {width} is of ResNets; experts of {kind} have its own width: set full")
    stages, norm, after = _CUT[kind]
    number = len(getattr(network, stages))
    own = max(1, number // 4) if kind == "VisionTransformer" else min(2, number - 1)
    wholes = [another() for _ in range(count)]
    experts: list[nn.Module] = [LastStages(whole, stages, number - own, norm, after) for whole in wholes]
    return Experts(FirstStages(network, stages, number - own, after), experts, int(network.head_hidden_size))


def _adapt(tensors: dict[str, Tensor], network: nn.Module) -> Mapping[str, Tensor]:
    """By the function with which timm reads the files of a network's authors, and its own of other image sizes."""
    read = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    return tensors if read is None else read(tensors, network)


def _depths(names: Sequence[str], network: Any) -> dict[str, int] | None:
    from timm.models._manipulate import group_with_matcher

    if not hasattr(network, "group_matcher"):
        return None
    pairs = [(whole_name(name), name) for name in names]
    groups = group_with_matcher(pairs, network.group_matcher(coarse=False), return_values=True)
    return {name: depth for depth, members in groups.items() for name in members}


def _not_decayed(network: Any) -> set[str]:
    return set(network.no_weight_decay()) if hasattr(network, "no_weight_decay") else set()


def _transformer_blocks(network: nn.Module) -> list[nn.Module] | None:
    from timm.layers import Attention
    from timm.models.vision_transformer import Block, VisionTransformer

    if not isinstance(network, VisionTransformer):
        return None
    blocks = list(network.blocks)
    # other kinds of block or attention may compute with the weights of a layer without calling it
    alike = all(type(block) is Block and type(block.attn) is Attention for block in blocks)
    return blocks if alike else None


FAMILY = Family(
    owns=lambda name: name.startswith(_PREFIX),
    names=tuple,
    make=_make,
    arguments=True,
    checkpoint=_checkpoint,
    branch=_branch,
    adapt=_adapt,
    depths=_depths,
    not_decayed=_not_decayed,
    transformer_blocks=_transformer_blocks,
)
