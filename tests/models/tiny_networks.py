"""One tiny network of each family of timm, for images of 32 pixels, without drop path, which Swin has by default."""

from __future__ import annotations

import json
from typing import Any

TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", {"depth": 4, "embed_dim": 16, "num_heads": 2, "patch_size": 8}),
    "deit3": ("deit3_small_patch16_224", {"depth": 2, "embed_dim": 16, "num_heads": 2, "patch_size": 8}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"depths": [1, 1, 1, 1], "embed_dim": 8, "num_heads": [1, 1, 2, 2], "window_size": 4, "drop_path_rate": 0.0},
    ),
    "convnext": ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}),
    "efficientnet": ("test_efficientnet", {}),
    "eva": ("eva02_tiny_patch14_224", {"depth": 2, "embed_dim": 16, "num_heads": 2, "patch_size": 8}),
    "dinov2": ("vit_small_patch14_reg4_dinov2", {"depth": 2, "embed_dim": 16, "num_heads": 2, "patch_size": 8}),
}
SIZE = 32


def of(family: str, **more: Any) -> tuple[str, ...]:
    """Overrides of the tiny recipe for the network of a family, with further arguments of it."""
    name, kwargs = TINY[family]
    views = (f"views.{view}={json.dumps({'name': 'small', 'size': SIZE, 'cutout': 0})}" for view in ("query", "key"))
    evaluation = f"views.evaluation={json.dumps({'name': 'eval', 'size': SIZE, 'resize': SIZE})}"
    return (f"model.backbone=timm:{name}", f"model.kwargs={json.dumps({**kwargs, **more})}", *views, evaluation)
