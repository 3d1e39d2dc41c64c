"""Draw the Grafana dashboard without Grafana: send its panels' queries to Prometheus and write a PNG.

It supports the features of `deploy/grafana/dashboards/hyper.json`: rows, time series and stats.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import httpx
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LinearLocator

NUM_POINTS = 240
GRID_COLUMNS = 24
INCHES_A_ROW = 0.3
INCHES_A_COLUMN = 0.8
MAX_IN_LEGEND = 16
TEXT_COLOURS = {"green": "#2c7a3f", "yellow": "#b58900", "red": "#b02a2a"}

Series = tuple[str, list[float], list[float]]  # legend text, seconds since 1970, values


@dataclass(frozen=True)
class Window:
    """The time range of the plot, with values for the dashboard's variables.

    Attributes:
        instance: A regular expression of instances.
        rate_interval: Interval of rates in Prometheus notation; at least four times the scrape interval.
    """

    start_s: float
    end_s: float
    instance: str = ".*"
    rate_interval: str = "1m"

    @property
    def step_s(self) -> float:
        """Return the time between two points."""
        return max(1.0, math.ceil((self.end_s - self.start_s) / NUM_POINTS))

    def fill(self, expression: str) -> str:
        """Replace the variables by values, as Grafana does."""
        return expression.replace("$__rate_interval", self.rate_interval).replace("$instance", self.instance)


class Prometheus:
    """A client of Prometheus' HTTP API."""

    def __init__(self, url: str) -> None:
        self.client = httpx.Client(base_url=url.rstrip("/"), timeout=30)

    def close(self) -> None:
        """Close the connections."""
        self.client.close()

    def read(self, target: Mapping[str, Any], window: Window) -> list[Series]:
        """Return the series of one target of a panel.

        Raises:
            click.ClickException: Prometheus is unreachable or rejects the expression.
        """
        query = {
            "query": window.fill(target["expr"]),
            "start": window.start_s,
            "end": window.end_s,
            "step": window.step_s,
        }
        try:
            reply = self.client.get("/api/v1/query_range", params=query)
            body = reply.json()
        except (httpx.TransportError, ValueError) as error:
            raise click.ClickException(f"{self.client.base_url} is no Prometheus: {error}") from None
        if body.get("status") != "success":
            raise click.ClickException(f"{body.get('error')}: {query['query']}")
        return [
            (
                legend(target["legendFormat"], series["metric"]),
                [float(moment) for moment, _ in series["values"]],
                [float(value) for _, value in series["values"]],
            )
            for series in body["data"]["result"]
        ]


def legend(pattern: str, labels: Mapping[str, str]) -> str:
    """Return a series' name in Grafana's form."""
    return re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda match: labels.get(match[1], ""), pattern)


def draw(dashboard_file: Path, prometheus: Prometheus, window: Window, path: Path) -> int:
    """Draw every panel at its dashboard position; return the number of panels with data."""
    dashboard = json.loads(dashboard_file.read_text(encoding="utf-8"))
    num_rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in dashboard["panels"])
    figure = Figure(figsize=(GRID_COLUMNS * INCHES_A_COLUMN, num_rows * INCHES_A_ROW))
    num_with_data = 0
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        # Each panel has a margin for titles above, and axes below and to the left.
        left, width = place["x"] / GRID_COLUMNS + 0.03, place["w"] / GRID_COLUMNS - 0.04
        top = 1 - place["y"] / num_rows
        if panel["type"] == "row":
            figure.text(0.008, top - 0.6 / num_rows, panel["title"], fontsize=13, fontweight="bold", va="center")
            continue
        height = place["h"] / num_rows
        axes = figure.add_axes((left, top - height + 1.1 / num_rows, width, height - 2.3 / num_rows))
        axes.set_title(panel["title"], fontsize=9, loc="left")
        with_values = [series for target in panel["targets"] for series in prometheus.read(target, window)]
        with_values = [series for series in with_values if any(map(math.isfinite, series[2]))]
        num_with_data += bool(with_values)
        if panel["type"] == "stat":
            write_stat(axes, panel, with_values)
        else:
            draw_lines(axes, panel, with_values, window)
    start, end = (datetime.fromtimestamp(moment_s, UTC) for moment_s in (window.start_s, window.end_s))
    about = f"{dashboard['title']}, {start:%Y-%m-%d %H:%M:%S} to {end:%H:%M:%S} UTC"
    figure.text(0.992, 1 - 0.3 / num_rows, about, fontsize=8, ha="right", va="center", color="#666666")
    figure.savefig(path, dpi=72)
    return num_with_data


def draw_lines(axes: Axes, panel: Mapping[str, Any], found: Sequence[Series], window: Window) -> None:
    """Draw a time series panel."""
    defaults = panel["fieldConfig"]["defaults"]
    moments = [window.start_s + number * window.step_s for number in range(NUM_POINTS + 1)]
    columns = [on_grid(series, window) for series in found]
    names = [name for name, _, _ in found]
    if not found:
        axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center", va="center", color="#999999")
    elif defaults["custom"]["stacking"]["mode"] == "normal":
        filled = [[0.0 if math.isnan(value) else value for value in column] for column in columns]
        axes.stackplot(moments, filled, labels=names, alpha=0.75)
    else:
        for name, column in zip(names, columns, strict=True):
            axes.plot(moments, column, linewidth=1, label=name)
    axes.set_xlim(window.start_s, window.end_s)
    axes.xaxis.set_major_locator(LinearLocator(4))
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda moment_s, _: f"{datetime.fromtimestamp(moment_s, UTC):%H:%M:%S}")
    )
    axes.set_ylim(bottom=defaults.get("min"), top=defaults.get("max"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: formatted(value, defaults["unit"])))
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.25)
    if 0 < len(found) <= MAX_IN_LEGEND:
        axes.legend(fontsize=7, loc="upper left", framealpha=0.5, ncols=1 + len(found) // 5)


def on_grid(series: Series, window: Window) -> list[float]:
    """Return the value of a series at each plotted time, NaN if missing."""
    _, moments, values = series
    known = {
        round((moment - window.start_s) / window.step_s): value for moment, value in zip(moments, values, strict=True)
    }
    return [known.get(number, math.nan) for number in range(NUM_POINTS + 1)]


def write_stat(axes: Axes, panel: Mapping[str, Any], found: Sequence[Series]) -> None:
    """Write the last value in the colour of its threshold, or the names for panels with names."""
    defaults = panel["fieldConfig"]["defaults"]
    axes.set_axis_off()
    if not found:
        text, colour, size = "no data", "#999999", 12
    elif panel["options"]["textMode"] == "name":
        text, colour, size = "\n".join(sorted({name for name, _, _ in found})), "#333333", 11
    else:
        last = next(value for value in reversed(found[0][2]) if math.isfinite(value))
        steps = [step for step in defaults["thresholds"]["steps"] if step["value"] is None or last >= step["value"]]
        text, colour, size = formatted(last, defaults["unit"]), TEXT_COLOURS[steps[-1]["color"]], 20
    axes.text(0, 0.4, text, transform=axes.transAxes, fontsize=size, color=colour, va="center")


def formatted(value: float, unit: str) -> str:
    """Return a value with its unit."""
    match unit:
        case "percentunit":
            return f"{100 * value:.3g} %"
        case "s" if 0 < abs(value) < 1:
            return f"{1000 * value:.3g} ms"
        case "s":
            return f"{value:.3g} s"
        case "reqps":
            return f"{value:.3g}/s"
        case "bytes":
            return f"{value / 2**20:.3g} MiB"
        case _:
            return f"{value:.4g}"


def window_of(minutes: float, end: datetime | None, instance: str, rate_interval: str) -> Window:
    """Return the window with this end, by default now."""
    end_s = time.time() if end is None else end.replace(tzinfo=UTC).timestamp()
    return Window(end_s - 60 * minutes, end_s, instance, rate_interval)
