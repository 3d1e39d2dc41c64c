"""The simulated fleet: queues, caches, bounds and deaths, with figures known by arithmetic."""

from __future__ import annotations

from dataclasses import replace

import pytest

from loadtests.simulation import POLICIES, Distribution, Fleet, Plan, Ring, distributions
from server.telemetry.metrics import Metrics


def around(seconds: float) -> Distribution:
    """Return durations within a hundredth of a mean."""
    return Distribution((0.99 * seconds, 1.01 * seconds), (0.0, 1.0), seconds)


STAGES = {"decode": around(0.01), "first_token": around(0.2), "generate": around(0.8)}
PLAN = Plan(num_replicas=1, policy="random", rate_per_s=1.0, num_requests=500, stages=STAGES, cached_clips=0)


def test_the_pace_is_the_histogram_of_a_run() -> None:
    metrics = Metrics()
    histogram = metrics.stage_seconds.labels("generate")
    for _ in range(100):
        histogram.observe(0.6)
    before = metrics.render().decode()
    for seconds in (2.0, 2.2, 2.4):
        histogram.observe(seconds)
    found = distributions(metrics.render().decode(), before)
    assert found.keys() == {"generate"} and found["generate"].mean_s == pytest.approx(2.2)
    run = replace(PLAN, stages=found, rate_per_s=0.01, num_requests=2000)
    assert Fleet(run).run()["p50_s"] == pytest.approx(2.2, rel=0.15)


def test_a_request_without_a_queue_takes_its_stages_and_one_behind_another_waits() -> None:
    assert Fleet(replace(PLAN, rate_per_s=0.05)).run()["p99_s"] == pytest.approx(1.01, rel=0.02)
    both = Fleet(replace(PLAN, places=1, trace=((0.0, 0), (0.0, 0)), num_requests=2)).run()
    assert both["p99_s"] == pytest.approx(2.01, rel=0.03)


def test_a_replica_answers_at_most_its_capacity_and_refuses_the_rest() -> None:
    figures = Fleet(replace(PLAN, places=4, max_in_flight=6, rate_per_s=12.0, num_requests=3000)).run()
    assert figures["goodput_per_s"] == pytest.approx(4.0, rel=0.05)
    assert figures["refused"] == pytest.approx(2 / 3, rel=0.05)


def test_hashing_uses_caches_that_random_routing_does_not() -> None:
    run = replace(PLAN, num_replicas=20, rate_per_s=200.0, num_requests=4000, num_clips=1200, cached_clips=60)
    rates = {policy: Fleet(replace(run, policy=policy)).run()["cache_hit_rate"] for policy in POLICIES}
    assert rates["hash"] > 1.3 * rates["random"] and rates["bounded"] > 1.2 * rates["random"]
    assert rates["two_choices"] == pytest.approx(rates["random"], rel=0.2)


def test_a_death_loses_its_own_requests_and_costs_a_cold_start() -> None:
    run = replace(PLAN, num_replicas=3, rate_per_s=20.0, num_requests=4000, deaths_per_hour=60.0)
    figures, steady = Fleet(run).run(), Fleet(replace(run, deaths_per_hour=0.0)).run()
    assert 0 < figures["lost"] <= 24 * 3 * 10 and steady["lost"] == 0
    assert steady["replica_hours"] == pytest.approx(3 * 4000 / 20 / 3600, rel=0.1)


def test_a_ring_moves_only_the_clips_of_the_lost_replica() -> None:
    ring, smaller = Ring(range(10)), Ring([name for name in range(10) if name != 3])
    owners = [next(ring.successors(clip)) for clip in range(500)]
    after = [next(smaller.successors(clip)) for clip in range(500)]
    assert all(one == two for one, two in zip(owners, after, strict=True) if one != 3)
    assert 20 < owners.count(3) < 90 and sorted(ring.successors(1)) == list(range(10))
