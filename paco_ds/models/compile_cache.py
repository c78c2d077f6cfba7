"""The files that torch's compiler keeps between runs, mended: a start that was killed may have left half of one.

For CPU, torch lets g++ write libraries and a precompiled header in place. At the next start it takes whatever stands
there, and that start and all later ones end with a traceback (torch 2.14, `_worker_compile_cpp`).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from paco_ds.errors import RecipeError

_ELF_HEADER = struct.Struct("<16s 24x Q 10x 3H")  # of 64 bits: magic; offset, entry size and entries of the last table


def mend_compile_cache() -> None:
    """Remove what a killed start left half written, and make sure that the compiler works here. Seconds at the first
    start on a host, half of one later.

    Raises:
        RecipeError: torch cannot compile on this host.
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir

    remove_unfinished_libraries(Path(cache_dir()))
    try:
        _compile(torch.sin)
    except Exception:
        for header in (Path(default_cache_dir()) / "precompiled_headers").glob("*.gch"):
            header.unlink(missing_ok=True)  # compiled anew; until then its source is taken
        try:
            _compile(torch.cos)  # torch would keep the error of the same code
        except Exception as error:
            raise RecipeError(
                "engine.compile: torch cannot compile on this host, which takes a C++ compiler and Python's headers "
                "(Debian, Ubuntu: apt install g++ python3-dev); set engine.compile=false, or install them: "
                + str(error).partition("\n")[0]
            ) from error


def remove_unfinished_libraries(cache: Path) -> list[Path]:
    """Remove the libraries of a cache folder that end too early; one that is being written now is left.

    Args:
        cache: torch's, with CODE/KEY.*so and locks/KEY.lock.

    Returns:
        What was removed.
    """
    removed = []
    for path in cache.glob("*/*.so"):
        if not _is_whole(path):
            lock = cache / "locks" / f"{path.name.split('.')[0]}.lock"
            lock.parent.mkdir(exist_ok=True)
            try:
                with FileLock(lock, timeout=0):
                    if not _is_whole(path):
                        path.unlink(missing_ok=True)
                        removed.append(path)
            except Timeout:
                pass  # torch is writing it
    return removed


def _is_whole(path: Path) -> bool:
    """Whether an ELF file reaches to the end of its last table, that of sections."""
    try:
        with path.open("rb") as file:
            magic, offset, size, entries, _ = _ELF_HEADER.unpack(file.read(_ELF_HEADER.size))
        return magic.startswith(b"\x7fELF") and path.stat().st_size >= offset + size * entries > 0
    except struct.error:  # too short for a header
        return False
    except FileNotFoundError:  # another rank removed it
        return True


def _compile(function: Callable[[Tensor], Tensor]) -> None:
    torch.compile(lambda values: function(values) + 1)(torch.zeros(8))
