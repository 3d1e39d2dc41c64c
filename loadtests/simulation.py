"""Simulation of a fleet: replicas with the service's own limiter, at the pace of measured stages.

SimPy supplies the clock. Each replica decides and queues with `server.limiter.PriorityLimiter`, so admission, order and
expected waits are the service's. Durations are drawn from the stage histograms of a real run.
"""

from __future__ import annotations

import bisect
import hashlib
import heapq
import itertools
import math
import random
from collections import OrderedDict
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import simpy
from prometheus_client.parser import text_string_to_metric_families

from loadtests.report import percentile
from server.limiter import RANKS, PriorityLimiter
from server.pause_budget import smooth

STAGES_BEFORE = ("receive", "validate", "prompt", "inspect")
STAGES_IN_ENGINE = ("first_token", "generate", "score")
NUM_VIRTUAL_NODES = 100
NUM_FALLBACKS = 2
BOUND = 1.25
"""Largest load of a replica relative to the mean, for the policy `bounded`."""

Process = Generator[Any, Any, None]


@dataclass(frozen=True)
class Distribution:
    """Durations by the buckets of a histogram, in seconds.

    Attributes:
        bounds: Upper bounds of the buckets.
        counts: Cumulative counts.
        mean_s: Exact mean; draws within a bucket are scaled to it.
    """

    bounds: tuple[float, ...]
    counts: tuple[float, ...]
    mean_s: float

    def draw(self, rng: random.Random) -> float:
        """Draw a duration, evenly within its bucket."""
        if not self.counts or not self.counts[-1]:
            return 0.0
        rank = rng.random() * self.counts[-1]
        index = bisect.bisect_left(self.counts, rank)
        lower = self.bounds[index - 1] if index else 0.0
        before = self.counts[index - 1] if index else 0.0
        upper = self.bounds[index] if math.isfinite(self.bounds[index]) else 2 * lower
        return self.scale * (lower + (upper - lower) * (rank - before) / (self.counts[index] - before))

    @property
    def scale(self) -> float:
        """Return the factor between the exact mean and the mean of even draws."""
        even_s, before, lower = 0.0, 0.0, 0.0
        for bound, count in zip(self.bounds, self.counts, strict=True):
            upper = bound if math.isfinite(bound) else 2 * lower
            even_s += (count - before) * (lower + upper) / 2
            before, lower = count, upper
        return self.mean_s * self.counts[-1] / even_s if even_s else 1.0


def distributions(after: str, before: str = "") -> dict[str, Distribution]:
    """Read the stage histograms of /metrics, as the difference of two scrapes."""
    new, old = _stages(after), _stages(before)
    found: dict[str, Distribution] = {}
    for stage, (buckets, total_s) in new.items():
        old_buckets, old_s = old.get(stage, ({}, 0.0))
        bounds = tuple(sorted(buckets))
        counts = tuple(buckets[bound] - old_buckets.get(bound, 0.0) for bound in bounds)
        if counts[-1]:
            found[stage] = Distribution(bounds, counts, (total_s - old_s) / counts[-1])
    return found


def _stages(text: str) -> dict[str, tuple[dict[float, float], float]]:
    stages: dict[str, tuple[dict[float, float], float]] = {}
    for family in text_string_to_metric_families(text):
        if family.name == "hyper_stage_seconds":
            for sample in family.samples:
                buckets, total_s = stages.get(sample.labels["stage"], ({}, 0.0))
                if sample.name.endswith("_bucket"):
                    buckets[float(sample.labels["le"])] = sample.value
                elif sample.name.endswith("_sum"):
                    total_s = sample.value
                stages[sample.labels["stage"]] = (buckets, total_s)
    return stages


@dataclass(frozen=True)
class Plan:
    """One simulated run.

    Attributes:
        num_replicas: Replicas at the start.
        policy: A key of `POLICIES`.
        rate_per_s: Offered requests per second, in sum.
        num_requests: Number of requests.
        stages: Durations of each stage.
        places: Engine slots per replica (HYPER_MAX_NUM_SEQS).
        max_in_flight, max_queue_wait_s, decoders: Other limits of each replica.
        num_clips, zipf: Number of clips, and the exponent of their popularity.
        cached_clips: Clips in an engine's cache; 0 without a cache.
        hit_factor: Time to first token of a cached clip, relative to a new one.
        deaths_per_hour: Deaths per replica and hour.
        cold_start_s: Shortest and longest time to replace a replica.
        slo_s: Latency of a good answer, at most.
        trace: Due time and replica of each request, as in a real run; empty draws both.
    """

    num_replicas: int
    policy: str
    rate_per_s: float
    num_requests: int
    stages: Mapping[str, Distribution]
    places: int = 16
    max_in_flight: int = 24
    max_queue_wait_s: float = 60.0
    decoders: int = 2
    num_clips: int = 2000
    zipf: float = 1.0
    cached_clips: int = 64
    hit_factor: float = 0.25
    deaths_per_hour: float = 0.0
    cold_start_s: tuple[float, float] = (24.0, 120.0)
    slo_s: float = 10.0
    seed: int = 0
    trace: tuple[tuple[float, int], ...] = ()


@dataclass
class SlotEvent:
    """SimPy event with the interface of the future in the limiter's queue."""

    event: simpy.Event

    def done(self) -> bool:
        """Return whether the slot was given."""
        return self.event.triggered

    def set_result(self, _: None) -> None:
        """Give the slot."""
        self.event.succeed()


class Replica:
    """One simulated replica."""

    def __init__(self, env: simpy.Environment, name: int, plan: Plan) -> None:
        self.env = env
        self.name = name
        self.plan = plan
        self.limiter = PriorityLimiter(plan.places)
        self.decoders = simpy.Resource(env, plan.decoders)
        self.num_in_flight = 0
        self.cache: OrderedDict[int, None] = OrderedDict()
        self.running: set[simpy.Process] = set()
        self.since_s = env.now

    @property
    def is_full(self) -> bool:
        """Return whether the service would refuse a request now."""
        wait_s = self.limiter.wait_s(self.num_in_flight)
        return self.num_in_flight >= self.plan.max_in_flight or wait_s > self.plan.max_queue_wait_s

    def slot(self) -> Process:
        """Wait for a slot of the engine as `PriorityLimiter.take` does."""
        limiter = self.limiter
        if limiter.num_working < limiter.num_places and not limiter.num_waiting:
            limiter.num_working += 1
            return
        ticket: Any = SlotEvent(self.env.event())
        heapq.heappush(limiter.waiting, (RANKS["interactive"], next(limiter.numbers), self.env.now, ticket))
        yield ticket.event

    def is_hit(self, clip: int) -> bool:
        """Return whether the engine's cache has the clip, and keep it there."""
        if not self.plan.cached_clips:
            return False
        is_hit = clip in self.cache
        self.cache[clip] = None
        self.cache.move_to_end(clip)
        if len(self.cache) > self.plan.cached_clips:
            self.cache.popitem(last=False)
        return is_hit


@dataclass
class Outcomes:
    """Counts of a simulated run."""

    latencies_s: list[float] = field(default_factory=list[float])
    num_hits: int = 0
    num_asked: int = 0
    num_refused: int = 0
    num_lost: int = 0
    replica_s: float = 0.0


class Ring:
    """Consistent hash ring with virtual nodes, as in Ray's router."""

    def __init__(self, names: Sequence[int]) -> None:
        points = sorted((_hash(f"{name}:{node}"), name) for name in names for node in range(NUM_VIRTUAL_NODES))
        self.hashes = [point for point, _ in points]
        self.names = [name for _, name in points]

    def successors(self, clip: int) -> Generator[int, None, None]:
        """Yield the replicas of a clip, its own first."""
        start = bisect.bisect_right(self.hashes, _hash(f"clip {clip}"))
        seen: set[int] = set()
        for offset in range(len(self.names)):
            name = self.names[(start + offset) % len(self.names)]
            if name not in seen:
                seen.add(name)
                yield name


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


class Fleet:
    """A simulated fleet with its load."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.env = simpy.Environment()
        self.rng = random.Random(f"{plan.seed} {plan.policy} {plan.num_replicas}")
        self.numbers = itertools.count()
        self.replicas: dict[int, Replica] = {}
        self.outcomes = Outcomes()
        self.is_over = False
        for _ in range(plan.num_replicas):
            self.add()
        weights = itertools.accumulate(1 / (rank + 1) ** plan.zipf for rank in range(plan.num_clips))
        self.popularity = list(weights)

    def add(self) -> None:
        """Add a ready replica."""
        replica = Replica(self.env, next(self.numbers), self.plan)
        self.replicas[replica.name] = replica
        self.ring = Ring(list(self.replicas))
        if self.plan.deaths_per_hour:
            self.env.process(self.die(replica))

    def die(self, replica: Replica) -> Process:
        """Kill a replica at a random time and replace it after a cold start."""
        yield self.env.timeout(self.rng.expovariate(self.plan.deaths_per_hour / 3600))
        if self.is_over:
            return
        del self.replicas[replica.name]
        self.ring = Ring(list(self.replicas))
        self.outcomes.replica_s += self.env.now - replica.since_s
        for process in list(replica.running):
            process.interrupt("died")
        started_s = self.env.now
        yield self.env.timeout(self.rng.uniform(*self.plan.cold_start_s))
        self.outcomes.replica_s += self.env.now - started_s
        self.add()

    def arrive(self) -> Process:
        """Send the requests of a Poisson process, or of the trace."""
        for due_s, owner in self.plan.trace:
            yield self.env.timeout(due_s - self.env.now)
            self.outcomes.num_asked += 1
            self.start(self.replicas[owner], clip=0)
        if self.plan.trace:
            return
        for _ in range(self.plan.num_requests):
            yield self.env.timeout(self.rng.expovariate(self.plan.rate_per_s))
            clip = bisect.bisect_left(self.popularity, self.rng.random() * self.popularity[-1])
            self.outcomes.num_asked += 1
            chosen = next((each for each in POLICIES[self.plan.policy](self, clip) if not each.is_full), None)
            if chosen is None:
                self.outcomes.num_refused += 1
                continue
            self.start(chosen, clip)
        self.is_over = True

    def start(self, replica: Replica, clip: int) -> None:
        """Start a request at a replica."""
        process = self.env.process(self.answer(replica, clip))
        replica.running.add(process)
        callbacks: Any = process.callbacks
        callbacks.append(replica.running.discard)

    def answer(self, replica: Replica, clip: int) -> Process:
        """Answer one request."""
        started_s, draw = self.env.now, self.draw
        replica.num_in_flight += 1
        try:
            for stage in STAGES_BEFORE:
                yield self.env.timeout(draw(stage))
            with replica.decoders.request() as decoder:
                yield decoder
                yield self.env.timeout(draw("decode"))
            yield from replica.slot()
            is_hit = replica.is_hit(clip)
            work_s = sum(
                draw(stage) * (self.plan.hit_factor if is_hit and stage == "first_token" else 1.0)
                for stage in STAGES_IN_ENGINE
            )
            yield self.env.timeout(work_s)
            replica.limiter.work_s = smooth(replica.limiter.work_s, work_s)
            replica.limiter.give()
        except simpy.Interrupt:
            self.outcomes.num_lost += 1
            return
        replica.num_in_flight -= 1
        self.outcomes.num_hits += is_hit
        self.outcomes.latencies_s.append(self.env.now - started_s)

    def draw(self, stage: str) -> float:
        """Draw the duration of a stage; 0 if it was not measured."""
        known = self.plan.stages.get(stage)
        return 0.0 if known is None else known.draw(self.rng)

    def run(self) -> dict[str, float]:
        """Run to the last answer and return the figures."""
        arrivals = self.env.process(self.arrive())
        self.env.run(until=arrivals)
        while any(replica.running for replica in self.replicas.values()):
            self.env.step()
        outcomes = self.outcomes
        outcomes.replica_s += sum(self.env.now - replica.since_s for replica in self.replicas.values())
        latencies_s = outcomes.latencies_s
        good = sum(latency_s <= self.plan.slo_s for latency_s in latencies_s)
        return {
            "p50_s": round(percentile(latencies_s, 50) or 0.0, 4),
            "p95_s": round(percentile(latencies_s, 95) or 0.0, 4),
            "p99_s": round(percentile(latencies_s, 99) or 0.0, 4),
            "cache_hit_rate": round(outcomes.num_hits / max(1, len(latencies_s)), 4),
            "goodput_per_s": round(good / self.env.now, 3),
            "refused": round(outcomes.num_refused / outcomes.num_asked, 4),
            "lost": outcomes.num_lost,
            "replica_hours": round(outcomes.replica_s / 3600, 4),
        }


def _random(fleet: Fleet, clip: int) -> list[Replica]:
    return fleet.rng.sample(list(fleet.replicas.values()), min(1 + NUM_FALLBACKS, len(fleet.replicas)))


def _two_choices(fleet: Fleet, clip: int) -> list[Replica]:
    drawn = fleet.rng.sample(list(fleet.replicas.values()), min(2, len(fleet.replicas)))
    return sorted(drawn, key=lambda replica: replica.num_in_flight)


def _hashed(fleet: Fleet, clip: int) -> list[Replica]:
    return [fleet.replicas[name] for name in itertools.islice(fleet.ring.successors(clip), 1 + NUM_FALLBACKS)]


def _bounded(fleet: Fleet, clip: int) -> Generator[Replica, None, None]:
    total = 1 + sum(replica.num_in_flight for replica in fleet.replicas.values())
    bound = math.ceil(BOUND * total / max(1, len(fleet.replicas)))
    for name in fleet.ring.successors(clip):
        if fleet.replicas[name].num_in_flight < bound:
            yield fleet.replicas[name]


POLICIES: Mapping[str, Callable[[Fleet, int], Any]] = {
    "random": _random,
    "two_choices": _two_choices,
    "hash": _hashed,
    "bounded": _bounded,
}
"""Routing policies: each returns the replicas of a request in the order in which it tries them."""
