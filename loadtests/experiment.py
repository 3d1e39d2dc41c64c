"""Run a scenario against a service, through driver and target, and compute its figures."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from loadtests import chaos
from loadtests.client import Outcome, open_session
from loadtests.driver import require_punctual, run_open_loop
from loadtests.report import Account, Report, account, percentile, summarize
from loadtests.scenarios import Figure, Ladder, Scenario, Step, figures_json
from loadtests.target import Reading, Target
from loadtests.workload import Clips, Mix, plan

SCRAPE_INTERVAL_S = 0.5
REPLY_TIMEOUT_S = 120.0
GOOD_SHARE = 0.85
"""A rung with a lower share of good answers is beyond the peak; two of them end the ladder."""

OVERLOAD = 1.0
"""A step above this multiple of the peak is an overload."""


@dataclass
class Experiment:
    """A run of load periods with its results.

    Attributes:
        say: Callback for progress messages.
        scrapes_s: Duration of each scrape under load, by the period's name.
        rss_mib: Memory of the idle service after a period, by the period's name.
        info: The service's /v1/info.
    """

    target: Target
    clips: Clips
    seed: int
    say: Callable[[str], None]
    peak_per_s: float | None = None
    reports: list[Report] = field(default_factory=list[Report])
    accounts: dict[str, Account] = field(default_factory=dict[str, Account])
    scrapes_s: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    rss_mib: dict[str, float] = field(default_factory=dict[str, float])
    info: dict[str, Any] = field(default_factory=dict[str, Any])

    def carry_out(self, scenario: Scenario) -> list[Figure]:
        """Run the whole scenario and return its figures.

        Raises:
            DriverLateError: The driver was too slow for its plan.
        """
        # Read now, since a fault may end the service.
        self.info = self.target.info()
        needs_peak = not scenario.steps or any(step.of_peak is not None for step in scenario.steps)
        if scenario.ladder is not None and needs_peak and self.peak_per_s is None:
            self.peak_per_s = self.climb(scenario.ladder, scenario)
            self.say(f"peak: {self.peak_per_s:.2f} answers a second")
        for step in scenario.steps:
            self.run_step(step, scenario)
        figures = self.figures(scenario)
        for fault in scenario.faults:
            measured = chaos.FAULTS[fault](self.target, self.clips, scenario.mix, self.seed, self.say)
            self.say(
                ", ".join(f"{figure.name} {figure.value:g} of {figure.num}" for figure in measured)
                or f"{fault}: left out"
            )
            figures += measured
        return figures

    def climb(self, ladder: Ladder, scenario: Scenario) -> float:
        """Increase the rate step by step; return the maximum rate of good answers."""
        rate_per_s, num_beyond = ladder.first_per_s, 0
        best_per_s = 0.0
        for number in range(ladder.max_rungs):
            report = self.load(f"rung {number + 1}", rate_per_s, ladder.seconds, scenario.mix, scenario.slo_s)
            best_per_s = max(best_per_s, report.goodput_per_s)
            num_beyond = num_beyond + 1 if report.num_good < GOOD_SHARE * report.num_requests else 0
            if num_beyond == 2:
                break
            rate_per_s *= ladder.factor
        return best_per_s

    def run_step(self, step: Step, scenario: Scenario) -> Report:
        """Run one step."""
        if step.per_s is not None:
            rate_per_s = step.per_s
        else:
            assert step.of_peak is not None and self.peak_per_s is not None
            rate_per_s = step.of_peak * self.peak_per_s
            if rate_per_s == 0:
                raise click.ClickException("the service answered nothing in time, so it has no peak")
        seconds = step.seconds if step.num_requests is None else step.num_requests / rate_per_s
        return self.load(step.name, rate_per_s, seconds, scenario.mix, scenario.slo_s)

    def load(self, name: str, rate_per_s: float, seconds: float, mix: Mix, slo_s: float) -> Report:
        """Offer one rate for some time, then wait until the service is idle."""
        planned = plan(self.clips, mix, rate_per_s, seconds, self.seed)
        self.say(f"{name}: {len(planned)} requests, {rate_per_s:.2f} a second for {seconds:.0f} s")
        before = self.target.when_idle()

        async def drive() -> list[Outcome]:
            async with open_session(self.target.url, self.target.key, REPLY_TIMEOUT_S) as session:
                return await run_open_loop(
                    session, planned, lambda sent, ended: self.say(f"  {name}: {sent} sent, {ended} ended")
                )

        with self.scraping() as scrapes_s:
            outcomes = asyncio.run(drive())
        after = self.target.when_idle()
        report = summarize(outcomes, name=name, offered_per_s=rate_per_s, duration_s=seconds, slo_s=slo_s)
        self.keep(report, outcomes, before, after, scrapes_s)
        require_punctual(outcomes)
        return report

    def keep(
        self, report: Report, outcomes: list[Outcome], before: Reading, after: Reading, scrapes_s: list[float]
    ) -> None:
        """Store the results of a period."""
        self.reports.append(report)
        self.accounts[report.name] = account(outcomes, before.ended, after.ended)
        self.scrapes_s[report.name] = scrapes_s
        self.rss_mib[report.name] = after.rss_mib

    @contextmanager
    def scraping(self) -> Iterator[list[float]]:
        """Scrape /metrics in a thread, as a Prometheus would during the load; collect the durations."""
        seconds: list[float] = []
        is_over = threading.Event()

        def work() -> None:
            while not is_over.wait(SCRAPE_INTERVAL_S):
                seconds.append(self.target.scrape()[1])

        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield seconds
        finally:
            is_over.set()
            thread.join()

    def figures(self, scenario: Scenario) -> list[Figure]:
        """Compute the figures of all periods so far."""
        figures: list[Figure] = []
        if not self.reports:
            return figures
        figures.append(
            Figure(
                "unaccounted",
                sum(entry.unaccounted for entry in self.accounts.values()),
                sum(entry.sent for entry in self.accounts.values()),
            )
        )
        if self.peak_per_s is not None:
            figures.append(
                Figure("peak_per_s", round(self.peak_per_s, 3), sum(entry.num_answers for entry in self.reports))
            )
        steps = {step.name: step for step in scenario.steps}
        failures = sum(
            num for report in self.reports for code, num in report.failures.items() if code not in scenario.allows
        )
        figures.append(Figure("failures", failures, sum(entry.num_requests for entry in self.reports)))
        reports = {entry.name: entry for entry in self.reports}
        over = [reports[name] for name, step in steps.items() if (step.of_peak or 0) > OVERLOAD]
        under = [reports[name] for name, step in steps.items() if 0 < (step.of_peak or 0) < OVERLOAD]
        if over and under and self.peak_per_s:
            figures += overload_figures(over[0], under[0], self.peak_per_s)
            scrapes_s = self.scrapes_s[over[0].name]
            figures.append(Figure("scrape_p99_ms", to_ms(percentile(scrapes_s, 99)), len(scrapes_s)))
        if len(under) == 2:
            first, last = under
            growth_mib = self.rss_mib[last.name] - self.rss_mib[first.name]
            per_10k = growth_mib * 10_000 / last.num_requests
            figures.append(Figure("rss_growth_mib_10k", round(per_10k, 2), last.num_requests))
        return figures

    def result(self, name: str, figures: list[Figure]) -> dict[str, Any]:
        """Return the whole result of a run as plain data."""
        return {
            "scenario": name,
            "figures": figures_json(figures),
            "is_met": all(entry.is_met for entry in figures),
            "seed": self.seed,
            "service": {key: self.info.get(key) for key in ("version", "engine", "checkpoint", "decoding", "limits")},
            "machine": machine(),
            "periods": [asdict(entry) for entry in self.reports],
            "accounts": {key: asdict(entry) for key, entry in self.accounts.items()},
            "rss_mib": self.rss_mib,
        }


def overload_figures(over: Report, under: Report, peak_per_s: float) -> list[Figure]:
    """Compare a period beyond the peak with one below it."""
    figures = [Figure("overload_goodput_ratio", round(over.goodput_per_s / peak_per_s, 3), over.num_answers)]
    if over.e2e.p99_s and under.e2e.p99_s:
        figures.append(Figure("overload_p99_ratio", round(over.e2e.p99_s / under.e2e.p99_s, 3), over.num_answers))
    if over.refusals.num:
        figures.append(Figure("rejection_p99_ms", to_ms(over.refusals.p99_s), over.refusals.num))
        figures.append(Figure("rejections_without_retry_after", over.refusals_without_retry_after, over.refusals.num))
    return figures


def to_ms(seconds: float | None) -> float:
    """Return milliseconds; a missing value is infinity."""
    return float("inf") if seconds is None else round(1000 * seconds, 1)


def machine() -> dict[str, Any]:
    """Return time, commit and hardware of a measurement."""

    def git(*arguments: str) -> str:
        run = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
        return run.stdout.strip()

    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "HEAD") or None,
        "has_local_changes": bool(git("status", "--porcelain", "--untracked-files=no")),
        "cpu": names[0].partition(":")[2].strip() if names else platform.processor(),
        "cores": os.cpu_count(),
        "cores_used": len(os.sched_getaffinity(0)),
        "load_1_min": round(os.getloadavg()[0], 2),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def write(out: Path, result: dict[str, Any], reports: list[Report]) -> None:
    """Write a run as JSON and, if it has periods, a plot."""
    out.mkdir(parents=True, exist_ok=True)
    name = result["scenario"]
    (out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    if reports:
        from loadtests.plot import draw

        draw(reports, out / f"{name}.png", title=f"{name}, {result['machine']['commit']}")
