"""Turns outcomes into figures: a table for a person and one line of JSON for a program. Knows no HTTP."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from loadtests.client import Outcome


@dataclass(frozen=True)
class Report:
    """Figures of one run; a latency is None when nothing was answered.

    Attributes:
        wall_s: From the first request sent to the last one ended.
        answers_per_s: Answered requests over `wall_s`; failures do not count.
        errors: Failed requests by code.
    """

    num_requests: int
    num_answers: int
    wall_s: float
    answers_per_s: float
    e2e_p50_s: float | None
    e2e_p95_s: float | None
    ttft_p50_s: float | None
    ttft_p95_s: float | None
    errors: dict[str, int]


def summarize(outcomes: Sequence[Outcome]) -> Report:
    """Returns the figures of a run; latencies are of answered requests alone."""
    answers = [outcome for outcome in outcomes if outcome.error is None]
    e2e_s = [outcome.e2e_s for outcome in answers]
    ttft_s = [outcome.ttft_s for outcome in answers if outcome.ttft_s is not None]
    wall_s = 0.0
    if outcomes:
        wall_s = max(each.started_s + each.e2e_s for each in outcomes) - min(each.started_s for each in outcomes)
    return Report(
        num_requests=len(outcomes),
        num_answers=len(answers),
        wall_s=round(wall_s, 3),
        answers_per_s=round(len(answers) / wall_s, 3) if wall_s else 0.0,
        e2e_p50_s=percentile(e2e_s, 50),
        e2e_p95_s=percentile(e2e_s, 95),
        ttft_p50_s=percentile(ttft_s, 50),
        ttft_p95_s=percentile(ttft_s, 95),
        errors=dict(sorted(Counter(each.error for each in outcomes if each.error is not None).items())),
    )


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Returns the smallest value that at least `percent` of all values do not exceed (nearest rank), or None."""
    if not values:
        return None
    rank = max(1, ceil(percent / 100 * len(values)))
    return round(sorted(values)[rank - 1], 4)


def table(report: Report) -> str:
    """Formats the figures for a person."""

    def seconds(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f} s"

    rows = [
        ("requests", str(report.num_requests)),
        ("answers", f"{report.num_answers} in {report.wall_s:.2f} s"),
        ("answers a second", f"{report.answers_per_s:.2f}"),
        ("e2e p50 / p95", f"{seconds(report.e2e_p50_s)} / {seconds(report.e2e_p95_s)}"),
        ("ttft p50 / p95", f"{seconds(report.ttft_p50_s)} / {seconds(report.ttft_p95_s)}"),
        *((f"error {code}", str(count)) for code, count in report.errors.items()),
    ]
    return "\n".join(f"{name:<20}{value}" for name, value in rows)
