"""Load test scenarios as data: offered load, duration, service settings and aims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from loadtests.workload import Mix


@dataclass(frozen=True)
class Ladder:
    """A search for the peak: rates grow by a factor until the rate of answers stops growing."""

    first_per_s: float = 2.0
    factor: float = 1.5
    seconds: float = 15.0
    max_rungs: int = 14


@dataclass(frozen=True)
class Step:
    """One period of load at a rate, or at a multiple of the peak.

    Attributes:
        num_requests: Mean number of requests, the basis of the duration; None uses `seconds`.
    """

    name: str
    per_s: float | None = None
    of_peak: float | None = None
    seconds: float = 30.0
    num_requests: int | None = None


@dataclass(frozen=True)
class Scenario:
    """One run of load steps and faults.

    Attributes:
        ladder: Search for the peak before the steps, if a step needs it and no peak is given.
        faults: Names of `loadtests.chaos`, each caused after the steps.
        environment: Settings of the service, if started here.
        slo_s: Latency objective: a good answer ends within this time from its due time.
        allows: Error codes accepted in this scenario.
    """

    about: str
    mix: Mix
    ladder: Ladder | None = None
    steps: tuple[Step, ...] = ()
    faults: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    slo_s: float = 10.0
    allows: frozenset[str] = frozenset()

    def scaled(self, scale: float, slo_s: float | None = None) -> Scenario:
        """Return the scenario with scaled durations, and another latency objective if given."""
        return replace(
            self,
            ladder=None if self.ladder is None else replace(self.ladder, seconds=self.ladder.seconds * scale),
            steps=tuple(
                replace(
                    step,
                    seconds=step.seconds * scale,
                    num_requests=None if step.num_requests is None else round(step.num_requests * scale),
                )
                for step in self.steps
            ),
            slo_s=self.slo_s if slo_s is None else slo_s,
        )


SHORT = {"max_tokens": "48", "pause": "off"}
REFUSALS = frozenset({"overloaded", "rate_limit_exceeded", "too_many_in_flight", "audio_quota_exceeded"})

SCENARIOS: Mapping[str, Scenario] = {
    "smoke": Scenario(
        about="Two questions a second for 15 s: everything is answered, or the run fails.",
        mix=Mix(fields=SHORT),
        steps=(Step("smoke", per_s=2.0, seconds=15.0),),
    ),
    "capacity": Scenario(
        about="Rates that grow until answers no longer do: the peak, and latency by stage over the offered load.",
        mix=Mix(fields=SHORT),
        ladder=Ladder(),
        allows=REFUSALS,
    ),
    "overload": Scenario(
        about="The peak (see capacity), then 0.8 and 3 times as much: what is still answered, how late, and how soon "
        "the rest is refused.",
        mix=Mix(batch=0.2, fields=SHORT),
        ladder=Ladder(),
        steps=(Step("0.8x peak", of_peak=0.8, seconds=60.0), Step("3x peak", of_peak=3.0, seconds=60.0)),
        allows=REFUSALS,
    ),
    "soak": Scenario(
        about="11,000 requests at 0.7 of the peak, with clients that leave: memory afterwards, and every request "
        "accounted for. The first 1,000 warm the service up.",
        mix=Mix(cancel=0.05, batch=0.2, fields=SHORT),
        ladder=Ladder(),
        steps=(Step("warm-up", of_peak=0.7, num_requests=1_000), Step("soak", of_peak=0.7, num_requests=10_200)),
        allows=REFUSALS,
    ),
    "chaos": Scenario(
        about="Clients that leave; the engine killed, then stopped; SIGTERM with 50 in flight. For a service that this "
        "starts itself.",
        mix=Mix(stream=0.5, cut=1.0, fields={"max_tokens": "400", "pause": "off"}),
        faults=("clients_leave", "engine_is_killed", "engine_hangs", "sigterm"),
        environment={"HYPER_MAX_IN_FLIGHT": "64", "HYPER_DRAIN_TIMEOUT_S": "120"},
    ),
}

AIMS: Mapping[str, tuple[str, float]] = {
    "audio_5xx": ("<=", 0),
    "decoder_outbound": ("<=", 0),
    "foreign_reads": ("<=", 0),
    "decode_peak_mib": ("<=", 256),
    "odd_files_lost_silently": ("<=", 0),
    "odd_files_refused": ("<=", 0),
    "odd_files_decoder_deaths": ("<=", 0),
    "http_5xx": ("<=", 0),
    "quota_overrun": ("<=", 0),
    "store_outage_5xx": ("<=", 0),
    "replica_kill_other_streams_lost": ("<=", 0),
    "scale_in_streams_lost": ("<=", 0),
    "job_steps_lost": ("<=", 0),
    "job_steps_twice": ("<=", 0),
    "webhooks_delivered": (">=", 1.0),
    "unauthenticated_reached": ("<=", 0),
    "engine_kill_clients_answered": (">=", 1.0),
    "hung_engine_detected_s": ("<=", 30),
    "sigterm_lost": ("<=", 0),
    "overload_goodput_ratio": (">=", 0.9),
    "overload_p99_ratio": ("<=", 2),
    "rejection_p99_ms": ("<=", 100),
    "unaccounted": ("<=", 0),
    "rss_growth_mib_10k": ("<=", 50),
    "scrape_p99_ms": ("<=", 200),
    "sandbox_overhead_ms": ("<=", 30),
    "http_undescribed": ("<=", 0),
    "traps_sprung_unboxed": (">=", 1),
    "failures": ("<=", 0),
    "rejections_without_retry_after": ("<=", 0),
    "held_by_clients_that_left": ("<=", 0),
    "engine_kill_not_ready_s": ("<=", 1),
    "sigterm_exit_code": ("<=", 0),
}
"""Aim of each figure; figures without an entry have no aim."""


@dataclass(frozen=True)
class Figure:
    """One result: its value, and its number of requests, files or probes."""

    name: str
    value: float
    num: int

    @property
    def aim(self) -> str:
        """Return the aim in words."""
        return " ".join(map(str, AIMS[self.name])) if self.name in AIMS else ""

    @property
    def is_met(self) -> bool:
        """Return True if the figure reaches its aim or has none."""
        if self.name not in AIMS:
            return True
        relation, bound = AIMS[self.name]
        return self.value <= bound if relation == "<=" else self.value >= bound


def figures_json(figures: Sequence[Figure]) -> dict[str, dict[str, Any]]:
    """Return figures by name as plain data."""
    return {figure.name: {"value": figure.value, "of": figure.num, "aim": figure.aim} for figure in figures}


def figures_table(figures: Sequence[Figure]) -> str:
    """Format figures as a text table."""
    lines = [f"{'figure':<34}{'value':>12}{'of':>10}   aim"]
    for figure in figures:
        missed = "" if figure.is_met else "   MISSED"
        lines.append(f"{figure.name:<34}{figure.value:>12g}{figure.num:>10}   {figure.aim}{missed}")
    return "\n".join(lines)
