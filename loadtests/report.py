"""Compute figures from outcomes: results of a load period, and an account of every request, without HTTP."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from loadtests.client import CANCELLED, Outcome

WARM_UP_SHARE = 0.2
"""Share of a period excluded from rates, while the service fills up."""

REFUSED = frozenset({429, 503})


@dataclass(frozen=True)
class Percentiles:
    """Percentiles of a latency in seconds, None without values, and their number of requests."""

    num: int
    p50_s: float | None
    p95_s: float | None
    p99_s: float | None
    max_s: float | None

    @classmethod
    def of(cls, values: Iterable[float]) -> Percentiles:
        """Return the percentiles of some values in seconds."""
        ordered = sorted(values)
        return cls(len(ordered), *(percentile(ordered, percent) for percent in (50, 95, 99, 100)))


@dataclass(frozen=True)
class Report:
    """Figures of one period of load at one offered rate.

    Attributes:
        offered_per_s: Planned requests per second.
        num_good: Answers within the objective `slo_s`.
        answers_per_s: Answers per second, without the first fifth of the period.
        goodput_per_s: The same for good answers.
        e2e: Latency of answers, from the due time to the last byte.
        ttft: Latency of streamed answers, to the first model output.
        refusals: Latency of replies 429 and 503.
        refusals_without_retry_after: Number of refusals without Retry-After.
        stages: Timings from the replies.
        late: Delay of the driver.
        errors: Failed requests by code, cancelled ones included.
    """

    name: str
    offered_per_s: float
    duration_s: float
    slo_s: float
    num_requests: int
    num_answers: int
    num_good: int
    answers_per_s: float
    goodput_per_s: float
    e2e: Percentiles
    ttft: Percentiles
    refusals: Percentiles
    refusals_without_retry_after: int
    stages: dict[str, Percentiles]
    late: Percentiles
    errors: dict[str, int]

    @property
    def failures(self) -> dict[str, int]:
        """Return the errors without deliberate cancellations."""
        return {code: num for code, num in self.errors.items() if code != CANCELLED}


def summarize(
    outcomes: Sequence[Outcome], *, name: str, offered_per_s: float, duration_s: float, slo_s: float
) -> Report:
    """Return the figures of a period; all latencies except those of refusals cover answered requests only."""
    answers = [outcome for outcome in outcomes if outcome.error is None]
    refusals = [outcome for outcome in outcomes if outcome.status in REFUSED]
    start_s = min((outcome.due_s for outcome in outcomes), default=0.0)
    counted = [
        outcome
        for outcome in answers
        if WARM_UP_SHARE * duration_s <= outcome.due_s + outcome.e2e_s - start_s <= duration_s
    ]
    seconds = (1 - WARM_UP_SHARE) * duration_s
    stages = sorted({stage for outcome in answers for stage in outcome.timings_ms})
    return Report(
        name=name,
        offered_per_s=round(offered_per_s, 3),
        duration_s=round(duration_s, 3),
        slo_s=slo_s,
        num_requests=len(outcomes),
        num_answers=len(answers),
        num_good=sum(outcome.e2e_s <= slo_s for outcome in answers),
        answers_per_s=round(len(counted) / seconds, 3),
        goodput_per_s=round(sum(outcome.e2e_s <= slo_s for outcome in counted) / seconds, 3),
        e2e=Percentiles.of(outcome.e2e_s for outcome in answers),
        ttft=Percentiles.of(outcome.ttft_s for outcome in answers if outcome.ttft_s is not None),
        refusals=Percentiles.of(outcome.e2e_s for outcome in refusals),
        refusals_without_retry_after=sum(not outcome.has_retry_after for outcome in refusals),
        stages={
            stage: Percentiles.of(
                outcome.timings_ms[stage] / 1000 for outcome in answers if stage in outcome.timings_ms
            )
            for stage in stages
        },
        late=Percentiles.of(outcome.late_s for outcome in outcomes),
        errors=dict(sorted(Counter(outcome.error for outcome in outcomes if outcome.error is not None).items())),
    )


@dataclass(frozen=True)
class Account:
    """Counts of the same requests by clients and service.

    Attributes:
        sent: Requests sent, without those cancelled before.
        counted: Ended requests by the service's count.
        lost: Requests broken off without a reply, although the client stayed.
        contradictions: Outcomes seen by clients and not counted by the service.
    """

    sent: int
    counted: int
    lost: int
    contradictions: int

    @property
    def unaccounted(self) -> int:
        """Return the number of requests with an unknown fate."""
        return self.lost + abs(self.sent - self.counted) + self.contradictions


def account(outcomes: Sequence[Outcome], before: Mapping[str, int], after: Mapping[str, int]) -> Account:
    """Compare the clients' counts with the service's counters by outcome, before and after a run.

    The service may count a cancelled request under any outcome. Its count of an outcome may therefore exceed the
    clients' count, but never fall below it.
    """
    seen = Counter(outcome.error or "ok" for outcome in outcomes)
    ended = {code: after[code] - before.get(code, 0) for code in after}
    replies = {code: num for code, num in seen.items() if not code.startswith("client_")}
    return Account(
        sent=sum(outcome.is_sent for outcome in outcomes),
        counted=sum(ended.values()),
        lost=sum(num for code, num in seen.items() if code.startswith("client_") and code != CANCELLED),
        contradictions=sum(max(0, num - ended.get(code, 0)) for code, num in replies.items()),
    )


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Return the smallest value with at least `percent` of all values at or below it (nearest rank), or None."""
    if not values:
        return None
    rank = max(1, ceil(percent / 100 * len(values)))
    return round(sorted(values)[rank - 1], 4)


COLUMNS = (
    ("period", 14),
    ("offered/s", 10),
    ("requests", 9),
    ("answers", 8),
    ("good/s", 8),
    ("p50", 8),
    ("p95", 8),
    ("p99", 8),
    ("ttft p50", 9),
    ("refused", 8),
    ("ref. p99", 9),
    ("late p99", 9),
)


def table(reports: Sequence[Report]) -> str:
    """Format periods as text, one line each, followed by stages and errors. Times are in ms."""

    def ms(seconds: float | None) -> str:
        return "-" if seconds is None else f"{1000 * seconds:.0f}"

    lines = ["".join(f"{head:>{width}}" for head, width in COLUMNS)]
    for report in reports:
        cells = (
            *(
                report.name,
                f"{report.offered_per_s:.2f}",
                report.num_requests,
                report.num_answers,
                f"{report.goodput_per_s:.2f}",
            ),
            *(ms(report.e2e.p50_s), ms(report.e2e.p95_s), ms(report.e2e.p99_s), ms(report.ttft.p50_s)),
            *(report.refusals.num, ms(report.refusals.p99_s), ms(report.late.p99_s)),
        )
        lines.append("".join(f"{cell!s:>{width}}" for cell, (_, width) in zip(cells, COLUMNS, strict=True)))
    for report in reports:
        stages = (f"{name} {ms(of.p50_s)}/{ms(of.p99_s)}" for name, of in report.stages.items())
        lines.append(f"{report.name}: stages p50/p99 " + ", ".join(stages))
        if report.errors:
            lines.append(f"{report.name}: " + ", ".join(f"{code} {num}" for code, num in report.errors.items()))
    return "\n".join(lines)
