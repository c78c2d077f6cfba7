"""Code from outside the package that a setting names as `module:name`: a method, a backbone, a data source.

A recipe is data, and data never runs code unasked: a module is imported only after `allow_code()`, which the commands
call for `--allow-code`. A module that the program has imported itself (the Python API) is used as it is.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from paco_ds.errors import RecipeError

_allowed = False


def allow_code() -> None:
    """Let settings name code of the working directory and of PYTHONPATH, for the rest of this process."""
    global _allowed
    _allowed = True
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that nothing there hides an installed package


class AllowCode(argparse.Action):
    """The option `--allow-code` of a command: calls `allow_code`."""

    HELP = "import the code that settings name as module:name, from the working directory or PYTHONPATH"

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help=self.HELP)

    def __call__(self, *_: object) -> None:
        allow_code()


def code_is_allowed() -> bool:
    """Whether `allow_code` was called."""
    return _allowed


def is_plugin(name: str) -> bool:
    """Whether a setting names code, `package.module:name`."""
    module, colon, attribute = name.partition(":")
    return bool(colon) and attribute.isidentifier() and all(part.isidentifier() for part in module.split("."))


def load_plugin(name: str, setting: str) -> Any:
    """The object that `module:name` names.

    Args:
        setting: dotted key of the setting, for the message.

    Raises:
        RecipeError: code is not allowed, the module cannot be imported, or has no such name.
    """
    module_name, _, attribute = name.partition(":")
    if module_name not in sys.modules and not _allowed:
        raise RecipeError(f"{setting} {name} is code from outside paco_ds: give --allow-code if you trust it")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise RecipeError(
            f"{setting} {name}: {error}; put the module into the working directory or on PYTHONPATH"
        ) from error
    if not hasattr(module, attribute):
        raise RecipeError(f"{setting} {name}: {getattr(module, '__file__', module_name)} has no {attribute}")
    return getattr(module, attribute)
