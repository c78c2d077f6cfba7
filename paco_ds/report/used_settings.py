"""Which settings of a recipe a run uses: the page shows these, and folds the rest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from paco_ds.config.methods import METHODS
from paco_ds.files import is_url
from paco_ds.report.history import section

Rows = list[tuple[str, list[tuple[str, str]]]]

_ONE_SOFTMAX = ("cross_entropy", "balanced_softmax", "logit_adjustment", "class_balanced")
_PACO = ("alpha", "beta", "gamma", "temperature", "supt", "smoothing", "class_prior", "normalization")


def used_and_rest(recipe: Mapping[str, Any]) -> tuple[Rows, Rows]:
    """(section, rows of (key, value)) of the settings that the run uses, and of the others, in the recipe's order.

    What is not known to be without effect counts as used. A setting that is null or empty is among the others.
    """
    unused = set(_unused(recipe))
    used: dict[str, list[tuple[str, str]]] = {}
    rest: dict[str, list[tuple[str, str]]] = {}
    for key, value in _leaves(recipe):
        parts = key.split(".")
        without_effect = any(".".join(parts[:n]) in unused for n in range(1, len(parts) + 1))
        name, _, inner = key.partition(".")
        where = rest if without_effect or value in (None, [], {}) else used
        shown = "-" if value is None else str(value)
        where.setdefault(name if inner else "run", []).append((inner or name, shown))
    return list(used.items()), list(rest.items())


def _unused(recipe: Mapping[str, Any]) -> Iterator[str]:
    """Dotted keys, of sections too, that have no effect beside the others."""
    loss, model, data = (section(recipe, name) for name in ("loss", "model", "data"))
    name = loss.get("method", "paco")
    method = METHODS.get(name) if isinstance(name, str) else None
    yield from (f"loss.{other}" for other in METHODS if other != name)
    if method is not None:
        if not method.contrastive:
            yield from () if method.uses_both_views else ("views.key",)
            yield from ("key_encoder", "queue", "loss.contrast_scope", "model.projection_hidden")
            yield from ("model.projection", "model.projection_dim")
        if name not in ("paco", "bcl", "multi_task", "supcon"):  # the forms of the general loss, `losses.paco`
            yield from (f"loss.{key}" for key in _PACO if key != "smoothing" or name not in _ONE_SOFTMAX)
    if model.get("trained") not in ("centers", "center_scales", "routers"):
        yield "model.frozen_batch_norm"
    yield from (f"model.{adapters}" for adapters in ("lora", "adaptformer") if model.get("trained") != adapters)
    if model.get("trained") != "routers":
        yield "model.routers"
    if model.get("centers") != "cosine":
        yield "model.centers_scale"
    if not model.get("experts"):
        yield "model.expert_width"
    if not model.get("start_from"):
        yield "model.start_from_min_share"
    if not str(model.get("backbone", "cifar")).startswith("cifar"):
        yield "model.width"
    if not is_url(str(data.get("shards", ""))):
        yield from ("data.storage", "data.cache", "data.allow_pipe_urls")
    if not section(recipe, "metrics").get("serve", True):
        yield "metrics.port"


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping) and (tree or not prefix):
        for key, value in tree.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree
