"""Plot periods of load as a PNG: latency over offered load, time by stage, and goodput."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from loadtests.report import Percentiles, Report

STAGES = ("receive", "decode", "queue", "prefill", "first_token", "total")
COLOURS = ("#4e79a7", "#f28e2b", "#e15759", "#76b7b2", "#59a14f", "#b07aa1")


def draw(reports: Sequence[Report], path: Path, title: str) -> None:
    """Plot the periods by offered load; a single period is a column of points."""
    periods = sorted(reports, key=lambda period: period.offered_per_s)
    offered = [period.offered_per_s for period in periods]
    figure = Figure(figsize=(12, 4), layout="constrained")
    latency, stages, answers = figure.subplots(1, 3)
    for percent, style in ((50, "-"), (95, "--"), (99, ":")):
        latency.plot(offered, [at(period.e2e, percent) for period in periods], f"o{style}", label=f"answer p{percent}")
    latency.plot(offered, [at(period.ttft, 50) for period in periods], "s-", label="first token p50")
    latency.plot(offered, [at(period.refusals, 99) for period in periods], "x:", label="refusal p99")
    for name, colour in zip(STAGES, COLOURS, strict=True):
        for percent, style in ((50, "o-"), (99, "o:")):
            values = [at(period.stages[name], percent) if name in period.stages else float("nan") for period in periods]
            label = name if percent == 50 else None
            stages.plot(offered, values, style, color=colour, markersize=4, label=label)
    answers.plot(offered, offered, color="#bbbbbb", label="offered")
    answers.plot(offered, [period.answers_per_s for period in periods], "o-", label="answered")
    answers.plot(offered, [period.goodput_per_s for period in periods], "s--", label=f"within {periods[0].slo_s:g} s")
    for axes, text, unit in (
        (latency, "From when a request was due", "ms"),
        (stages, "By stage, p50 and p99 (dotted)", "ms"),
        (answers, "Goodput", "answers a second"),
    ):
        axes.set(title=text, xlabel="offered requests a second", ylabel=unit)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    for axes in (latency, stages):
        axes.set_yscale("log")
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=110)


def at(of: Percentiles, percent: int) -> float:
    """Return a percentile in milliseconds, or NaN to skip the point."""
    seconds: float | None = getattr(of, f"p{percent}_s")
    # A logarithmic axis has no zero.
    return float("nan") if seconds is None else max(0.1, 1000 * seconds)
