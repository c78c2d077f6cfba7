"""Small parts that are added to each block of a ViT and trained in place of it: LoRA, and AdaptFormer's bottleneck.

They are added in place, and tensors of the network keep their names. Shapes: B images, T tokens, F width of a block.
"""

from __future__ import annotations

import copy
import math
import types
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paco_ds.config.model import AdaptFormerSettings, LoraSettings
from paco_ds.errors import RecipeError

ModuleT = TypeVar("ModuleT", bound=nn.Module)
_ADDED = ("lora_down", "lora_up", "adapter")  # parts of the names of what is added


class LowRankLinear(nn.Linear):
    """W x + b + alpha / rank B A x (LoRA, Hu et al. 2022). A is drawn by He's uniform with a = sqrt 5, B is zero.

    Args:
        linear: whose weight and bias are taken over, by their names.
    """

    def __init__(self, linear: nn.Linear, settings: LoraSettings) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.scale = settings.alpha / settings.rank
        self.lora_down = nn.Parameter(torch.empty(settings.rank, linear.in_features))
        self.lora_up = nn.Parameter(torch.zeros(linear.out_features, settings.rank))
        nn.init.kaiming_uniform_(self.lora_down, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + self.scale * F.linear(F.linear(x, self.lora_down), self.lora_up)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """One layer of the same function, with its own weights."""
        placed = {"device": self.weight.device, "dtype": self.weight.dtype}
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, **placed)
        linear.weight.copy_(self.weight + self.scale * self.lora_up @ self.lora_down)
        if self.bias is not None:
            linear.bias.copy_(self.bias)
        return linear.requires_grad_(False).train(self.training)


class Bottleneck(nn.Module):
    """scale W_up relu(W_down LN(x)), [B, T, F] -> [B, T, F] (AdaptFormer, Chen et al. 2022).

    LN is its own, as LIFT has it. W_down is drawn by He's uniform with a = sqrt 5; W_up and both biases are zero.
    """

    def __init__(self, width: int, settings: AdaptFormerSettings) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.down, self.up = nn.Linear(width, settings.width), nn.Linear(settings.width, width)
        self.scale = nn.Parameter(torch.full((1,), settings.scale), requires_grad=settings.learned_scale)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.scale * self.up(F.relu(self.down(self.norm(x))))
        return added


def add_adapters(blocks: Sequence[Any] | None, settings: LoraSettings | AdaptFormerSettings, backbone: str) -> None:
    """Add LoRA or AdaptFormer's bottlenecks to the blocks of a network, in place. They add zero at first.

    Args:
        blocks: timm's `Block`s, whose forward is known; None of another network.
        backbone: its name, for the message.

    Raises:
        RecipeError: the network has no such blocks, or the rank is none.
    """
    name = "lora" if isinstance(settings, LoraSettings) else "adaptformer"
    if blocks is None:
        raise RecipeError(
            f"model.trained {name} adds to the blocks of timm's VisionTransformer (vit, deit3, dinov2, CLIP's image "
            f"towers), and {backbone} is none: set model.backbone to one of them, such as timm:vit_base_patch16_224, "
            f"or model.trained to norms, biases or centers"
        )
    for block in blocks:
        if isinstance(settings, LoraSettings):
            width = block.attn.qkv.in_features
            if settings.rank >= width:
                raise RecipeError(f"model.lora.rank {settings.rank} is not below {width}, the width of {backbone}")
            block.attn.qkv = LowRankLinear(block.attn.qkv, settings)
            block.attn.proj = LowRankLinear(block.attn.proj, settings)
        else:
            block.adapter = Bottleneck(block.attn.qkv.in_features, settings)
            block.forward = types.MethodType(_with_bottleneck, block)


def _with_bottleneck(block: Any, x: Tensor, **options: Any) -> Tensor:
    """The forward of timm's `Block`, with the bottleneck beside its MLP."""
    x = x + block.drop_path1(block.ls1(block.attn(block.norm1(x), **options)))
    y: Tensor = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x)))) + block.adapter(x)
    return y


def is_added(name: str) -> bool:
    """Whether a parameter of this name was added by `add_adapters`."""
    return any(part in _ADDED for part in name.split("."))


def merged(module: ModuleT) -> ModuleT:
    """The module with LoRA's updates inside the weights of its layers, a copy; itself where it has none."""
    if not any(isinstance(m, LowRankLinear) for m in module.modules()):
        return module
    module = copy.deepcopy(module)
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, LowRankLinear):
                setattr(parent, name, child.merged())
    return module
