"""Tensors from files of other programs: `.safetensors`, those of `torch.save`, folders as on the HuggingFace hub.

Nothing is unpickled but tensors: files of `torch.save` are read with torch's `weights_only`.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paco_ds.checkpoint.tensors import load_tensors
from paco_ds.config.parse import one_line
from paco_ds.errors import RecipeError

_FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")  # of the hub
# What holds the state dict in files of MAE, DINO, EVA, BEiT, timm, MoCo and DeepSpeed; averaged weights go first.
_NESTED = ("state_dict_ema", "model_ema", "teacher", "state_dict", "model", "module")
_WRAPPERS = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
# What files hold beside tensors: settings and scores. Each is read as a placeholder; nothing is imported.
_PLACEHOLDERS = (
    "argparse.Namespace",
    "parse_config.ConfigParser",
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "_codecs.encode",
)


class _Placeholder:
    """Takes the place of a foreign object in a file, and forgets what it is given."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


def read_tensors(path: Path, where: str) -> Any:
    """The content of a file of safetensors, which may lack its ending, or of one of `torch.save` with tensors alone:
    nothing in it is executed.

    Raises:
        RecipeError: it cannot be read; begins with ``where``.
    """
    if not path.is_file():
        raise RecipeError(f"{where}: there is no such file")
    try:
        with path.open("rb") as file:
            header = file.read(9)  # of safetensors eight bytes of a length, then JSON
        if path.suffix == ".safetensors" or (not path.suffix and header.endswith(b"{")):
            return load_tensors(path)
        with torch.serialization.safe_globals([(_Placeholder, name) for name in _PLACEHOLDERS]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's own text advises to read it unsafely
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it asks for {found[1]}" if found else "it is no file of torch.save, or damaged"
        raise RecipeError(
            f"{where} holds no weights that can be read safely: {what}; nothing in a file is executed: give one of "
            f"tensors alone, as torch.save(model.state_dict(), FILE) writes it"
        ) from error
    except Exception as error:  # a damaged file, or one that asks for code, raises nearly anything
        raise RecipeError(f"{where} holds no weights that can be read safely: {one_line(error)}") from error


def state_dict_of(content: Any) -> dict[str, Tensor]:
    """The tensors by name in the content of a file, nested or not, without `module.`; empty where there are none."""
    while isinstance(content, Mapping):
        inner = [content[key] for key in _NESTED if isinstance(content.get(key), Mapping)]
        if not inner:
            break
        content = inner[0]
    if not isinstance(content, Mapping):
        return {}
    return {_unwrapped(str(name)): tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}


def _unwrapped(name: str) -> str:
    while name.startswith(_WRAPPERS):
        name = name.partition(".")[2]
    return name


def is_hub_folder(path: Path) -> bool:
    """Whether a folder is one of the hub, with config.json and weights."""
    return (path / "config.json").is_file() and any((path / name).is_file() for name in _FOLDER_FILES)


def weights_file(path: Path) -> Path:
    """The file, or that in a folder of the hub; RecipeError if it has none."""
    if not path.is_dir():
        return path
    for name in _FOLDER_FILES:
        if (path / name).is_file():
            return path / name
    raise RecipeError(f"{path} has neither {' nor '.join(_FOLDER_FILES)}: give a file of weights, or a hub's folder")


def hub_config(path: Path) -> Mapping[str, Any]:
    """The config.json of a folder of the hub, or beside a file; empty where there is none that can be read."""
    config = (path if path.is_dir() else path.parent) / "config.json"
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}  # none, or another program's
    return content if isinstance(content, Mapping) else {}
