"""The methods of the package, by name: every `Method` of a module of this folder. A new method is a new file here."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Mapping

from paco_ds.config.methods.base import Method
from paco_ds.config.plugins import is_plugin, load_plugin
from paco_ds.errors import RecipeError

__all__ = ["METHODS", "Method", "find_method"]


def _found() -> dict[str, type[Method]]:
    methods: dict[str, type[Method]] = {}
    for module in sorted(info.name for info in pkgutil.iter_modules(__path__)):
        contents = vars(importlib.import_module(f"{__name__}.{module}")).values()
        methods |= {m.name: m for m in contents if isinstance(m, type) and issubclass(m, Method) and hasattr(m, "name")}
    return methods


METHODS: Mapping[str, type[Method]] = _found()
"""What `loss.method` can be, besides `module:name`."""


def find_method(name: str) -> type[Method]:
    """The method that `loss.method` names: one of `METHODS`, or `module:name` of a subclass of `Method`.

    Raises:
        RecipeError: an unknown name, code that is not allowed, or an object that is no method.
    """
    if name in METHODS:
        return METHODS[name]
    if is_plugin(name):
        found = load_plugin(name, "loss.method")
        if not (isinstance(found, type) and issubclass(found, Method) and hasattr(found, "name")):
            raise RecipeError(f"loss.method {name} is no subclass of paco_ds.config.methods.Method with a name")
        return found
    near = difflib.get_close_matches(name, METHODS, n=1, cutoff=0.0)[0]
    raise RecipeError(f"unknown method {name!r}; nearest valid name: {near!r} (valid: {', '.join(sorted(METHODS))})")
