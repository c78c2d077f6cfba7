"""Owns what every bench shares: timing in turn, peak extra memory, the table to read and the lines under `--json`."""

import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

MIB = 2**20
Result = TypeVar("Result")


@dataclass(frozen=True)
class Bar:
    """A figure held against what it has to reach; its fields are the keys of its JSON line.

    Attributes:
        name: what was measured, with size and unit.
        ours: our figure.
        rival: the figure of the other way to do the same work, or None.
        floor: the figure of what cannot be left out, or None.
        ratio: the number that the bar is about: a quotient of the above, or ours.
        bar: the bar in words of one comparison, `>= 8` or `<= 0.75`.
        holds: whether it does.
    """

    name: str
    ours: float
    rival: float | None
    floor: float | None
    ratio: float
    bar: str
    holds: bool


def at_least(name: str, ratio: float, limit: float, **figures: float) -> Bar:
    """A bar that holds if ratio >= limit; figures are `ours` and, where there are any, `rival` and `floor`."""
    return _bar(name, ratio, f">= {limit:g}", ratio >= limit, figures)


def at_most(name: str, ratio: float, limit: float, **figures: float) -> Bar:
    """A bar that holds if ratio <= limit; figures as in :func:`at_least`."""
    return _bar(name, ratio, f"<= {limit:g}", ratio <= limit, figures)


def _bar(name: str, ratio: float, bar: str, holds: bool, figures: Mapping[str, float]) -> Bar:
    return Bar(name, figures["ours"], figures.get("rival"), figures.get("floor"), ratio, bar, holds)


def median_seconds(
    works: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    warm_up: bool = True,
    before: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """Median wall seconds of each piece of work, all run in turn so that a noisy spell falls on all of them.

    Each is called once unmeasured, unless without `warm_up`. The order rotates from round to round: nobody always
    follows the same. `before` is called before each, off the clock; off it, too, what a work returns is freed: that
    gives memory of all works back to the system, whoever's it was.

    Raises:
        ValueError: repeats below 1.
    """
    if repeats < 1:
        raise ValueError(f"--repeats must be at least 1, got {repeats}")
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values() if warm_up else ():
        before()
        work()
    names = list(works)
    for round_number in range(repeats):
        first = round_number % len(names)
        for name in names[first:] + names[:first]:
            before()
            start = time.perf_counter()
            result = works[name]()
            seconds[name].append(time.perf_counter() - start)
            del result
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_extra_bytes(prepare: Callable[..., Callable[[], object]], *arguments: Any) -> int:
    """Growth of peak resident memory while prepared work runs once, in a process of its own (Linux only).

    Args:
        prepare: a function at the top of a module, called there as `prepare(*arguments)`: it makes the inputs,
            which are not counted, and returns the work, which is.
        arguments: picklable.

    Raises:
        OSError: the kernel does not let a process reset its own peak (`/proc/self/clear_refs`).
    """
    return in_own_process(_peak_growth, prepare, arguments)


def in_own_process(function: Callable[..., Result], *arguments: Any) -> Result:
    """What a function at the top of a module returns, called in a process that has done nothing before: neither
    the peak nor the allocator's memory of earlier work shows in its figures."""
    # A fork server that has torch loaded but has run none of it: 60 ms a process instead of 3 s.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def _peak_growth(prepare: Callable[..., Callable[[], object]], arguments: Sequence[Any]) -> int:
    work = prepare(*arguments)
    reset_peak()
    before = status_bytes("VmRSS")
    kept = work()
    growth = status_bytes("VmHWM") - before
    del kept
    return max(growth, 0)


def reset_peak() -> None:
    """Let this process's peak (VmHWM) begin at what is resident now, or the peak of the imports would hide ours."""
    Path("/proc/self/clear_refs").write_text("5")  # man 5 proc


def status_bytes(field: str) -> int:
    """A field of /proc/self/status in bytes: VmRSS, resident memory, or VmHWM, its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise OSError(f"/proc/self/status has no {field}: memory can only be measured on Linux")


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> None:
    """Print a table, first column to the left and figures to the right, as wide as it needs to be."""
    table = Table(title=title, caption=caption or None, title_justify="left", caption_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    # A pipe or a log has no width of its own, and 80 columns would cut figures off.
    Console(width=150).print(table)


def print_bars(bars: Sequence[Bar], *, as_json: bool) -> None:
    """Print the bars as a table and, if asked for, one JSON line each as the last lines of the output."""
    rows = [
        [bar.name, *map(_figure, (bar.ours, bar.rival, bar.floor, bar.ratio)), bar.bar, "yes" if bar.holds else "NO"]
        for bar in bars
    ]
    print_table("Bars", ["name", "ours", "rival", "floor", "ratio", "bar", "holds"], rows)
    if as_json:
        for bar in bars:
            print(json.dumps(asdict(bar)))


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
