"""Measure two replicas of the scripted service, and simulate larger fleets at their pace.

The simulation is believed only where its p50 and p95 agree with the real run within 15 %. Both get the same arrivals,
and each request goes to the same replica in both.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
from matplotlib.figure import Figure as Picture

from loadtests.client import Outcome, open_session
from loadtests.driver import require_punctual, run_open_loop
from loadtests.report import percentile
from loadtests.simulation import POLICIES, STAGES_IN_ENGINE, Distribution, Fleet, Plan, distributions
from loadtests.target import Target, target_of
from loadtests.workload import Clips, Mix, Planned, plan

PLACES = 4
SETTINGS = {
    "HYPER_ENGINE": "scripted",
    "HYPER_SCRIPTED_TOKEN_INTERVAL_S": "0.1",
    "HYPER_MAX_NUM_SEQS": str(PLACES),
    "HYPER_MAX_IN_FLIGHT": "64",
}
"""An engine of four slots that spends its time in sleep, so that two replicas share a small machine without a loss."""

MIX = Mix(stream=0.0, follow_up=0.0, cut=1.0, fields={"max_tokens": "20", "pause": "off"})
LOADS = (0.4, 0.7, 0.9)
MAX_DEVIATION = 0.15
SIZES = (1, 2, 5, 10, 20, 50, 100, 200, 500)
SIMULATED_LOAD = 0.8
REQUESTS_PER_REPLICA = 60
TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Comparison:
    """Percentiles of the real run and of its simulation at one load."""

    load: float
    rate_per_s: float
    num: int
    real_s: tuple[float, float]
    simulated_s: tuple[float, float]

    @property
    def deviations(self) -> tuple[float, float]:
        """Return the relative deviations of p50 and p95."""
        p50, p95 = (simulated / real - 1 for simulated, real in zip(self.simulated_s, self.real_s, strict=True))
        return p50, p95

    @property
    def agrees(self) -> bool:
        """Return whether both percentiles are close."""
        return all(abs(deviation) <= MAX_DEVIATION for deviation in self.deviations)

    def as_json(self) -> dict[str, Any]:
        """Return the comparison as plain data."""
        p50, p95 = self.deviations
        return {
            "load": self.load,
            "rate_per_s": round(self.rate_per_s, 3),
            "requests": self.num,
            "real_p50_s": round(self.real_s[0], 3),
            "simulated_p50_s": round(self.simulated_s[0], 3),
            "p50_deviation": round(p50, 3),
            "real_p95_s": round(self.real_s[1], 3),
            "simulated_p95_s": round(self.simulated_s[1], 3),
            "p95_deviation": round(p95, 3),
            "agrees": self.agrees,
        }


def send(targets: Sequence[Target], planned: Sequence[Planned], owners: Sequence[int]) -> list[Outcome]:
    """Send every request to its replica at its time; return the outcomes in order of due time."""

    async def run() -> list[Outcome]:
        async with contextlib.AsyncExitStack() as stack:
            sessions = [await stack.enter_async_context(open_session(each.url, None, TIMEOUT_S)) for each in targets]
            shares = [
                [one for one, owner in zip(planned, owners, strict=True) if owner == n] for n in range(len(targets))
            ]
            runs = await asyncio.gather(
                *(run_open_loop(session, share) for session, share in zip(sessions, shares, strict=True))
            )
        return sorted((outcome for run in runs for outcome in run), key=lambda outcome: outcome.due_s)

    return asyncio.run(run())


def burst(targets: Sequence[Target], clips: Clips, num_per_target: int, seed: int) -> float:
    """Send requests to all replicas at once; return the answers per second.

    Raises:
        click.ClickException: A request was not answered.
    """
    planned = [replace(one, due_s=0.0) for one in plan(clips, MIX, 10.0, 60.0, seed)][: num_per_target * len(targets)]
    started_s = time.perf_counter()
    outcomes = send(targets, planned, [number % len(targets) for number in range(len(planned))])
    require_answers(outcomes)
    return len(outcomes) / (time.perf_counter() - started_s)


def require_answers(outcomes: Sequence[Outcome]) -> None:
    """Require an answer to every request.

    Raises:
        click.ClickException: If one is missing.
    """
    if errors := sorted({outcome.error for outcome in outcomes if outcome.error}):
        raise click.ClickException(f"requests failed: {', '.join(errors)}")


def scrape(targets: Sequence[Target]) -> list[str]:
    """Return the text of each replica's /metrics."""
    return [target.scrape()[0] for target in targets]


def work_s(stages: Mapping[str, Distribution]) -> float:
    """Return the mean time that a request holds a slot of the engine."""
    return sum(stages[stage].mean_s for stage in STAGES_IN_ENGINE if stage in stages)


def compare(
    targets: Sequence[Target], clips: Clips, stages: Mapping[str, Distribution], load: float, num: int, seed: int
) -> Comparison:
    """Run a load for real and in the simulation, with the same arrivals and the same replica for each request."""
    rate_per_s = load * len(targets) * PLACES / work_s(stages)
    planned = plan(clips, MIX, rate_per_s, num / rate_per_s, seed)
    rng = random.Random(seed)
    owners = [rng.randrange(len(targets)) for _ in planned]
    outcomes = send(targets, planned, owners)
    require_punctual(outcomes)
    require_answers(outcomes)
    run = Plan(
        num_replicas=len(targets),
        policy="random",
        rate_per_s=rate_per_s,
        num_requests=len(planned),
        stages=stages,
        places=PLACES,
        max_in_flight=int(SETTINGS["HYPER_MAX_IN_FLIGHT"]),
        cached_clips=0,
        seed=seed,
        trace=tuple((one.due_s, owner) for one, owner in zip(planned, owners, strict=True)),
    )
    figures = Fleet(run).run()
    latencies_s = [outcome.e2e_s for outcome in outcomes]
    real = percentile(latencies_s, 50) or 0.0, percentile(latencies_s, 95) or 0.0
    return Comparison(load, rate_per_s, len(planned), real, (figures["p50_s"], figures["p95_s"]))


def simulate(stages: Mapping[str, Distribution], sizes: Sequence[int], seed: int) -> list[dict[str, Any]]:
    """Simulate each policy at each size: at 0.8 of the capacity, and again with deaths and cold starts."""
    rows: list[dict[str, Any]] = []
    for size in sizes:
        for policy in POLICIES:
            for deaths_per_hour in (0.0, 20.0):
                run = Plan(
                    num_replicas=size,
                    policy=policy,
                    rate_per_s=SIMULATED_LOAD * size * PLACES / work_s(stages),
                    num_requests=REQUESTS_PER_REPLICA * size,
                    stages=stages,
                    places=PLACES,
                    max_in_flight=int(1.5 * PLACES),
                    num_clips=100 * size,
                    deaths_per_hour=deaths_per_hour,
                    seed=seed,
                )
                rows.append(
                    {"replicas": size, "policy": policy, "deaths_per_hour": deaths_per_hour, **Fleet(run).run()}
                )
    return rows


def measure(
    clips: Clips, log: Path, sizes: Sequence[int], num: int, seed: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Measure one and two replicas, compare with the simulation, and simulate the sizes."""

    def serve() -> contextlib.AbstractContextManager[Target]:
        return target_of(None, key=None, metrics_url=None, settings=SETTINGS, log=log)

    with serve() as one, serve() as two:
        targets = [one, two]
        before = scrape([one])
        # The pace comes from requests that do not wait, at a fifth of the capacity.
        probe = plan(clips, MIX, 0.4, num / 2 / 0.4, seed)
        require_answers(send([one], probe, [0] * len(probe)))
        stages = distributions(scrape([one])[0], before[0])
        say(f"pace: {work_s(stages):.2f} s in the engine per answer, from {len(probe)} requests")
        num_burst = 10 * PLACES
        single_per_s = burst([one], clips, num_burst, seed)
        double_per_s = burst(targets, clips, num_burst, seed)
        say(f"throughput: {single_per_s:.2f}/s with one replica, {double_per_s:.2f}/s with two")
        comparisons: list[Comparison] = []
        for number, load in enumerate(LOADS):
            comparisons.append(compare(targets, clips, stages, load, num, seed + number))
            say(f"load {load}: {comparisons[-1].as_json()}")
    return {
        "throughput_ratio": round(double_per_s / single_per_s, 3),
        "one_replica_per_s": round(single_per_s, 3),
        "two_replicas_per_s": round(double_per_s, 3),
        "agreement": [each.as_json() for each in comparisons],
        "is_believed": all(each.agrees for each in comparisons),
        "work_s": round(work_s(stages), 4),
        "simulated": simulate(stages, sizes, seed),
    }


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot the simulated figures over the size of the fleet, one line per policy; dashes are runs with deaths."""
    picture = Picture(figsize=(14, 4), layout="constrained")
    panels = (
        ("p99_s", "p99 latency", "s"),
        ("cache_hit_rate", "Cache hit rate", "share"),
        ("goodput_per_s", "Good answers", "per second"),
        ("refused", "Refused requests", "share"),
    )
    for axes, (name, title, unit) in zip(picture.subplots(1, len(panels)), panels, strict=True):
        for number, policy in enumerate(POLICIES):
            for deaths, style in ((0.0, "o-"), (20.0, "o--")):
                chosen = [row for row in rows if row["policy"] == policy and row["deaths_per_hour"] == deaths]
                xs, ys = [row["replicas"] for row in chosen], [row[name] for row in chosen]
                label = policy if not deaths else None
                axes.plot(xs, ys, style, color=f"C{number}", markersize=3, label=label)
        axes.set(title=title, xlabel="replicas", ylabel=unit, xscale="log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    picture.suptitle("Simulated fleet at 0.8 of its capacity; dashed: 20 deaths per replica and hour", fontsize=9)
    picture.savefig(path, dpi=100)
