"""What the GPU bench measures of a step: images/s, the share of time the device computes, waits, peak memory.

On CPU, where the bench only shows that it runs to its end, there are images/s alone.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

PROFILED = 4  # steps


@dataclass(frozen=True)
class Figures:
    """Of one way to run a step.

    Attributes:
        images_per_second: over all measured steps, until the device is done.
        busy: share of the time in which the device runs a kernel or copies; None on CPU.
        waits: times in a step that the host waits for the device; None on CPU.
        peak_gib: allocated at most, since the step was made; None on CPU.
    """

    images_per_second: float
    busy: float | None = None
    waits: float | None = None
    peak_gib: float | None = None


def measure(
    step: Callable[[], object],
    images: int,
    device: torch.device,
    *,
    warm_up: int,
    steps: int,
    rate_alone: bool = False,
) -> Figures:
    """Run a step `warm_up` times, then time `steps` of them; on CUDA count waits and profile a few more.

    Args:
        images: of a step.
        rate_alone: leave out what is measured after the time.
    """
    for _ in range(warm_up):
        step()
    finish(device)
    began = time.perf_counter()
    for _ in range(steps):
        step()
    finish(device)
    rate = steps * images / (time.perf_counter() - began)
    if device.type != "cuda" or rate_alone:
        return Figures(rate)
    with counted_waits() as waits:
        for _ in range(PROFILED):
            step()
    found = waits[0]
    finish(device)
    return Figures(rate, busy_share(step), found / PROFILED, torch.cuda.max_memory_allocated(device) / 2**30)


def finish(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def counted_waits() -> Iterator[list[int]]:
    """Count, as the one entry of the list, calls that synchronize with the device: those that torch warns of, and
    `torch.cuda.synchronize` itself, of which it does not."""
    count, synchronize = [0], torch.cuda.synchronize

    def counted(*args: Any, **options: Any) -> Any:
        count[0] += 1
        return synchronize(*args, **options)

    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    torch.cuda.synchronize = counted
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield count
        count[0] += sum("synchronizing CUDA operation" in str(each.message) for each in caught)
    finally:
        torch.cuda.synchronize = synchronize
        torch.cuda.set_sync_debug_mode(mode)


def busy_share(step: Callable[[], object]) -> float:
    """Share of the wall time of a few steps in which the device runs a kernel or copies, by torch's profiler."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(PROFILED):
            step()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    events = (event for event in profiler.events() if event.device_type == DeviceType.CUDA)
    return covered((event.time_range.start, event.time_range.end) for event in events) / 1e6 / seconds


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals (start, end): kernels of several streams run at the same time."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
