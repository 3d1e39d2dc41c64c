"""Draws periods of load as a PNG: latency over offered load, where the time goes, and what is answered in time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from loadtests.report import Percentiles, Report

STAGES = ("receive", "decode", "queue", "prefill", "first_token", "total")
COLOURS = ("#4e79a7", "#f28e2b", "#e15759", "#76b7b2", "#59a14f", "#b07aa1")


def draw(reports: Sequence[Report], path: Path, title: str) -> None:
    """Draws the periods by offered load; one period alone is a column of points."""
    periods = sorted(reports, key=lambda each: each.offered_per_s)
    offered = [each.offered_per_s for each in periods]
    figure = Figure(figsize=(12, 4), layout="constrained")
    latency, stages, answers = figure.subplots(1, 3)
    for percent, style in ((50, "-"), (95, "--"), (99, ":")):
        latency.plot(offered, [at(each.e2e, percent) for each in periods], f"o{style}", label=f"answer p{percent}")
    latency.plot(offered, [at(each.ttft, 50) for each in periods], "s-", label="first token p50")
    latency.plot(offered, [at(each.refusals, 99) for each in periods], "x:", label="refusal p99")
    for name, colour in zip(STAGES, COLOURS, strict=True):
        for percent, style in ((50, "o-"), (99, "o:")):
            values = [at(each.stages[name], percent) if name in each.stages else float("nan") for each in periods]
            label = name if percent == 50 else None
            stages.plot(offered, values, style, color=colour, markersize=4, label=label)
    answers.plot(offered, offered, color="#bbbbbb", label="offered")
    answers.plot(offered, [each.answers_per_s for each in periods], "o-", label="answered")
    answers.plot(offered, [each.goodput_per_s for each in periods], "s--", label=f"within {periods[0].slo_s:g} s")
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
    """Returns a percentile in milliseconds; where there is none, nothing is drawn."""
    seconds: float | None = getattr(of, f"p{percent}_s")
    # A logarithmic axis has no zero.
    return float("nan") if seconds is None else max(0.1, 1000 * seconds)
