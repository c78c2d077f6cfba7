"""Reads files of safetensors, wherever they are: the library itself opens paths of UTF-8 alone."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from paco_ds.files import utf8_path


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, on the CPU.

    Raises:
        OSError, SafetensorError: it cannot be read.
    """
    with utf8_path(path) as place:
        return load_file(place)
