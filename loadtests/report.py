"""Turns outcomes into figures: what a period of load came to, and whether every request is accounted for. No HTTP."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from loadtests.client import CANCELLED, Outcome

WARM_UP_SHARE = 0.2
"""How much of a period is left out of rates: the service is still filling up."""

REFUSED = frozenset({429, 503})


@dataclass(frozen=True)
class Percentiles:
    """A latency in seconds, and of how many requests; None where there were none."""

    num: int
    p50_s: float | None
    p95_s: float | None
    p99_s: float | None
    max_s: float | None

    @classmethod
    def of(cls, values: Iterable[float]) -> Percentiles:
        """Returns those of some values in seconds."""
        found = sorted(values)
        return cls(len(found), *(percentile(found, percent) for percent in (50, 95, 99, 100)))


@dataclass(frozen=True)
class Report:
    """Figures of one period of load at one offered rate.

    Attributes:
        offered_per_s: Requests due a second, as planned.
        num_good: Answers within the objective `slo_s`.
        answers_per_s: Answers that ended within the period, but for its first fifth, a second.
        goodput_per_s: The same, of good answers.
        e2e: Of answers, from when a request was due to the last byte.
        ttft: Of streamed answers, to the first model output.
        refusals: Of replies 429 and 503.
        refusals_without_retry_after: How many of these did not say when to come again.
        stages: By the replies' own account.
        late: How late the driver sent.
        errors: Failed requests by code; those that their client gave up on purpose are among them.
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
        """The errors but for clients that left on purpose."""
        return {code: num for code, num in self.errors.items() if code != CANCELLED}


def summarize(
    outcomes: Sequence[Outcome], *, name: str, offered_per_s: float, duration_s: float, slo_s: float
) -> Report:
    """Returns the figures of a period; latencies but those of refusals are of answered requests alone."""
    answers = [each for each in outcomes if each.error is None]
    refusals = [each for each in outcomes if each.status in REFUSED]
    start_s = min((each.due_s for each in outcomes), default=0.0)
    counted = [
        each for each in answers if WARM_UP_SHARE * duration_s <= each.due_s + each.e2e_s - start_s <= duration_s
    ]
    seconds = (1 - WARM_UP_SHARE) * duration_s
    stages = sorted({stage for each in answers for stage in each.timings_ms})
    return Report(
        name=name,
        offered_per_s=round(offered_per_s, 3),
        duration_s=round(duration_s, 3),
        slo_s=slo_s,
        num_requests=len(outcomes),
        num_answers=len(answers),
        num_good=sum(each.e2e_s <= slo_s for each in answers),
        answers_per_s=round(len(counted) / seconds, 3),
        goodput_per_s=round(sum(each.e2e_s <= slo_s for each in counted) / seconds, 3),
        e2e=Percentiles.of(each.e2e_s for each in answers),
        ttft=Percentiles.of(each.ttft_s for each in answers if each.ttft_s is not None),
        refusals=Percentiles.of(each.e2e_s for each in refusals),
        refusals_without_retry_after=sum(not each.has_retry_after for each in refusals),
        stages={
            stage: Percentiles.of(each.timings_ms[stage] / 1000 for each in answers if stage in each.timings_ms)
            for stage in stages
        },
        late=Percentiles.of(each.late_s for each in outcomes),
        errors=dict(sorted(Counter(each.error for each in outcomes if each.error is not None).items())),
    )


@dataclass(frozen=True)
class Account:
    """What clients and service say of the same requests.

    Attributes:
        sent: Requests that left; not those whose client gave up before.
        counted: Requests whose end the service counted.
        lost: Requests that broke off without a reply, though their client stayed.
        contradictions: Ends that clients saw and the service did not count.
    """

    sent: int
    counted: int
    lost: int
    contradictions: int

    @property
    def unaccounted(self) -> int:
        """Requests whose fate nobody can tell."""
        return self.lost + abs(self.sent - self.counted) + self.contradictions


def account(outcomes: Sequence[Outcome], before: Mapping[str, int], after: Mapping[str, int]) -> Account:
    """Compares clients' tallies with the service's counters by outcome, before and after a run.

    A client that left may have been counted under any outcome, so the service may have counted more of one than
    clients saw, never fewer.
    """
    seen = Counter(each.error or "ok" for each in outcomes)
    ended = {code: after[code] - before.get(code, 0) for code in after}
    replies = {code: num for code, num in seen.items() if not code.startswith("client_")}
    return Account(
        sent=sum(each.is_sent for each in outcomes),
        counted=sum(ended.values()),
        lost=sum(num for code, num in seen.items() if code.startswith("client_") and code != CANCELLED),
        contradictions=sum(max(0, num - ended.get(code, 0)) for code, num in replies.items()),
    )


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Returns the smallest value that at least `percent` of all values do not exceed (nearest rank), or None."""
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
    """Formats periods for a person, a line each, and below them the stages of each and its errors. Times in ms."""

    def ms(seconds: float | None) -> str:
        return "-" if seconds is None else f"{1000 * seconds:.0f}"

    lines = ["".join(f"{head:>{width}}" for head, width in COLUMNS)]
    for each in reports:
        cells = (
            *(each.name, f"{each.offered_per_s:.2f}", each.num_requests, each.num_answers, f"{each.goodput_per_s:.2f}"),
            *(ms(each.e2e.p50_s), ms(each.e2e.p95_s), ms(each.e2e.p99_s), ms(each.ttft.p50_s)),
            *(each.refusals.num, ms(each.refusals.p99_s), ms(each.late.p99_s)),
        )
        lines.append("".join(f"{cell!s:>{width}}" for cell, (_, width) in zip(cells, COLUMNS, strict=True)))
    for each in reports:
        stages = (f"{name} {ms(of.p50_s)}/{ms(of.p99_s)}" for name, of in each.stages.items())
        lines.append(f"{each.name}: stages p50/p99 " + ", ".join(stages))
        if each.errors:
            lines.append(f"{each.name}: " + ", ".join(f"{code} {num}" for code, num in each.errors.items()))
    return "\n".join(lines)
