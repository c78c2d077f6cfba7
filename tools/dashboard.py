#!/usr/bin/env python3
"""Draw the Grafana dashboard's expressions, as a Prometheus server answers them, as a PNG.

example:
  tools/dashboard.py --prometheus http://127.0.0.1:9090 --run demo --output docs/images/dashboard.png

For places without Grafana, such as a report or a test. The panels, their places, units and legends are those of
tools/monitoring/grafana/dashboards/paco_ds.json; the look is matplotlib's, not Grafana's. The range is that of the run.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from paco_ds.command import report_user_errors, say
from paco_ds.errors import UserError

DASHBOARD = Path(__file__).resolve().parent / "monitoring" / "grafana" / "dashboards" / "paco_ds.json"
POINTS = 300
COLUMNS = 24  # of Grafana's grid
Series = tuple[str, list[float], list[float]]  # legend, seconds since the first step, values


class Server:
    """The HTTP API of a Prometheus server.

    Raises:
        UserError: it does not answer, or refuses.
    """

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")

    def span(self, run: str, hours: int = 24) -> tuple[float, float]:
        """Unix times between which the run was scraped within the last hours.

        Raises:
            UserError: it was not.
        """
        series = self._get("query", query=f'paco_step{{run="{run}"}}[{hours}h]')
        times = [float(time) for each in series for time, _ in each["values"]]
        if not times:
            raise UserError(f"{self._url} has no paco_step of a run {run!r} within the last {hours} hours")
        return min(times), max(times)

    def series(self, expression: str, legend: str, span: tuple[float, float]) -> list[Series]:
        """The series of an expression over a span, in at most `POINTS` points."""
        start, end = span
        step = max(1.0, (end - start) / POINTS)
        found = self._get("query_range", query=expression, start=f"{start}", end=f"{end}", step=f"{step}")
        return [
            (
                _legend(each["metric"], legend),
                [float(time) - start for time, _ in each["values"]],
                [float(value) for _, value in each["values"]],
            )
            for each in found
        ]

    def _get(self, what: str, **parameters: str) -> list[dict[str, Any]]:
        url = f"{self._url}/api/v1/{what}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=60) as response:
                result: list[dict[str, Any]] = json.loads(response.read())["data"]["result"]
        except (urllib.error.URLError, OSError, ValueError) as error:
            raise UserError(f"{self._url} does not answer as Prometheus ({error}): give its address") from None
        return result


def _legend(labels: dict[str, str], template: str) -> str:
    """`rank {{rank}}` with the label's value."""
    return re.sub(r"{{(\w+)}}", lambda name: labels.get(name[1], ""), template)


def draw(server: Server, run: str, output: Path) -> list[str]:
    """Draw every panel; returns the expressions that had no data."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    panels = json.loads(DASHBOARD.read_text())["panels"]
    span, empty = server.span(run), list[str]()
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    with pyplot.rc_context({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}):
        figure = pyplot.figure(figsize=(15, 0.3 * rows), dpi=80)
        for panel in panels:
            place = panel["gridPos"]
            left, top = place["x"] / COLUMNS, 1 - place["y"] / rows
            if panel["type"] == "row":
                figure.text(left + 0.01, top - 0.9 / rows, panel["title"], fontsize=14, weight="bold")
                continue
            width, height = place["w"] / COLUMNS, place["h"] / rows
            # within the panel, room for its title above and the axes' labels below and on the left
            axes = figure.add_axes((left + 0.06, top - height + 1.2 / rows, width - 0.075, height - 3.0 / rows))
            figure.text(left + 0.06, top - 0.5 / rows, panel["title"], fontsize=9, weight="bold")
            found = []
            for target in panel["targets"]:
                series = server.series(target["expr"].replace("$run", run), target["legendFormat"], span)
                empty += [] if series else [target["expr"]]
                found += series
            _draw_panel(axes, panel, found)
        figure.savefig(output)
        pyplot.close(figure)
    return empty


def _draw_panel(axes: Any, panel: dict[str, Any], found: list[Series]) -> None:
    unit = panel["fieldConfig"]["defaults"].get("unit", "none")
    if not found:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "no data", ha="center", transform=axes.transAxes, color="gray")
    elif panel["type"] != "timeseries":  # a stat or a gauge: the newest value, and for states which one
        axes.set_axis_off()
        name, _, values = max(found, key=lambda series: series[1][-1])
        text = name if panel["title"] == "State" else _with_unit(values[-1], unit)
        axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes, fontsize=24)
    else:
        for name, times, values in found:
            axes.plot(times, values, linewidth=1.1, label=name, linestyle="--" if "optimum" in name else "-")
        axes.yaxis.set_major_formatter(lambda value, _: _with_unit(value, unit))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0f} s")
        axes.grid(alpha=0.25)
        if power := _power(axes.get_ylim()[1], unit):  # ticks at 100 KiB, not at 97.7
            from matplotlib.ticker import MaxNLocator

            low, high = (limit / 1024**power for limit in axes.get_ylim())
            ticks = [tick for tick in MaxNLocator(5).tick_values(low, high) if low <= tick <= high]
            axes.set_yticks([tick * 1024**power for tick in ticks])
        axes.legend(
            fontsize=6.5,
            frameon=False,
            ncols=4 if len(found) > 6 else 3,
            loc="lower left",
            bbox_to_anchor=(-0.03, 0.97),
            columnspacing=1,
        )


def _with_unit(value: float, unit: str) -> str:
    """As short as Grafana writes it."""
    if unit == "percentunit":
        return f"{100 * value:.3g} %"
    if unit in ("bytes", "Bps") and value:
        power = _power(value, unit)
        return f"{value / 1024**power:.3g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}{'/s' if unit == 'Bps' else ''}"
    return f"{value:.3g}{' s' if unit == 's' else ''}"


def _power(value: float, unit: str) -> int:
    """That of 1024 in which a number of bytes is written; 0 for other units."""
    return min(4, max(0, int(math.log(abs(value), 1024)))) if unit in ("bytes", "Bps") and value else 0


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prometheus", required=True, metavar="URL", help="address of the server")
    parser.add_argument("--run", required=True, help="label `run`: the name of the run directory")
    parser.add_argument("--output", type=Path, required=True, help="FILE.png")
    arguments = parser.parse_args(argv)
    with report_user_errors():
        for expression in draw(Server(arguments.prometheus), arguments.run, arguments.output):
            say(f"no data: {expression}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
