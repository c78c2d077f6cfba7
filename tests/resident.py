"""Resident memory of a process as Linux counts it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any


def reset_peak() -> None:
    """Set VmHWM back to VmRSS (man 5 proc)."""
    Path("/proc/self/clear_refs").write_text("5")


def status_bytes(field: str) -> int:
    """A field of /proc/self/status in bytes: VmRSS, resident memory, or VmHWM, its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def peak_extra_bytes(prepare: Callable[..., Callable[[], object]], *arguments: Any) -> int:
    """Growth of the peak while the work that `prepare(*arguments)` returns runs once, in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_peak_growth, prepare, arguments).result()


def _peak_growth(prepare: Callable[..., Callable[[], object]], arguments: tuple[Any, ...]) -> int:
    work = prepare(*arguments)
    reset_peak()
    before = status_bytes("VmRSS")
    kept = work()
    growth = status_bytes("VmHWM") - before
    del kept
    return growth
