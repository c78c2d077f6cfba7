"""Sinks of metrics beside metrics.jsonl, as TensorBoard and MLflow. A new sink is a new file here with `open_sink`."""

from __future__ import annotations

import difflib
import importlib
import logging
import pkgutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from paco_ds.config.parse import one_line
from paco_ds.errors import RecipeError
from paco_ds.metrics.sinks.base import Sink

logger = logging.getLogger(__name__)

_NO_FIGURES = ("kind", "step", "steps", "split", "skips", "range")


class Sinks:
    """Passes on the lines of steps and evaluations. A sink that fails is left out, with a warning.

    Args:
        names: `metrics.sinks`.
        run: the run directory, whose name is that of the sinks' runs.
        first: whether this is the first rank: others open none.
        steps_done: of a run that is resumed; later figures of before are replaced where a sink can.

    Raises:
        RecipeError: an unknown name, or a library that is not installed.
    """

    def __init__(self, names: Sequence[str], run: Path, first: bool, steps_done: int) -> None:
        self._open: dict[str, Sink] = {}
        for name in names:
            if name not in (known := sink_names()):
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
                raise RecipeError(f"metrics.sinks: {name!r} is none of {', '.join(known)}; did you mean {near!r}?")
        for name in names if first else ():
            try:
                self._open[name] = importlib.import_module(f"{__name__}.{name}").open_sink(run, steps_done)
            except ImportError as error:
                raise RecipeError(
                    f"metrics.sinks: {name} is not installed ({one_line(error)}): pip install 'paco_ds[{name}]'"
                ) from error
            except Exception as error:
                self._drop(name, error)

    def line(self, line: Mapping[str, Any]) -> None:
        """Pass on a line of metrics.jsonl, if it is one of those; the range of a figure as its /min and /max."""
        if line["kind"] not in ("step", "evaluation"):
            return
        group = "train" if line["kind"] == "step" else line["split"]
        rest = {key: value for key, value in line.items() if key not in _NO_FIGURES}
        figures = dict(_figures(group, rest))
        for name, (low, high) in line.get("range", {}).items():
            figures |= {f"{group}/{name}/min": low, f"{group}/{name}/max": high}
        for name, sink in list(self._open.items()):
            try:
                sink.log(line["step"], figures)
            except Exception as error:  # whatever a library or its server does, training goes on
                self._drop(name, error)

    def close(self) -> None:
        """Close all; what was logged is kept."""
        for name, sink in list(self._open.items()):
            try:
                sink.close()
            except Exception as error:
                self._drop(name, error)

    def _drop(self, name: str, error: Exception) -> None:
        self._open.pop(name, None)
        logger.warning("metrics.sinks: %s failed and is left out, training goes on: %s", name, one_line(error))


def sink_names() -> list[str]:
    """What `metrics.sinks` may name."""
    return sorted({info.name for info in pkgutil.iter_modules(__path__)} - {"base"})


def _figures(prefix: str, value: Any) -> Iterator[tuple[str, float]]:
    """Numbers by path, as train/center_probability/many; null has none."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from _figures(f"{prefix}/{key}", each)
    elif isinstance(value, int | float):
        yield prefix, float(value)
