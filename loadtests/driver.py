"""Sends requests when they are due, whatever became of those before them: an open loop.

A client that waits for its last answer before it asks again sends less when the service slows down, and so never sees
how slow it is. Here the times are decided beforehand, and latency counts from the time a request was due: what the
driver itself is late by is counted against the service too, and shown, and a run in which it was late is no result.
"""

from __future__ import annotations

import asyncio
import resource
import time
from collections.abc import Callable, Sequence

import aiohttp

from loadtests.client import Outcome, ask
from loadtests.report import percentile
from loadtests.workload import Planned

MAX_LATE_S = 0.1
"""A driver whose requests leave later than this, at the 99th percentile, measures itself."""

TICK_S = 1.0
NUM_OTHER_DESCRIPTORS = 100


class DriverLateError(Exception):
    """The driver could not keep up with its own plan; its figures would be about itself."""


async def run_open_loop(
    session: aiohttp.ClientSession, planned: Sequence[Planned], progress: Callable[[int, int], None] | None = None
) -> list[Outcome]:
    """Sends every request at its time and returns what became of them, in the order in which they were due.

    Args:
        progress: Called about once a second with the number of requests sent and of requests ended.
    """
    raise_descriptor_limit(len(planned))
    num_ended = 0

    def count(_: asyncio.Task[Outcome]) -> None:
        nonlocal num_ended
        num_ended += 1

    tasks: list[asyncio.Task[Outcome]] = []
    start_s = told_s = time.perf_counter()
    for each in planned:
        due_s = start_s + each.due_s
        # Also when it is late already: replies must be read, and a loop that only sends would measure itself.
        await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
        task = asyncio.create_task(ask(session, each.question, due_s))
        task.add_done_callback(count)
        tasks.append(task)
        if progress is not None and time.perf_counter() > told_s + TICK_S:
            told_s = time.perf_counter()
            progress(len(tasks), num_ended)
    pending = set(tasks)
    while pending:
        _, pending = await asyncio.wait(pending, timeout=TICK_S)
        if progress is not None:
            progress(len(tasks), num_ended)
    return [task.result() for task in tasks]


def require_punctual(outcomes: Sequence[Outcome], max_late_s: float = MAX_LATE_S) -> None:
    """Refuses a run in which the driver was late.

    Raises:
        DriverLateError: At the 99th percentile, requests left later than allowed.
    """
    late_s = percentile([each.late_s for each in outcomes], 99)
    if late_s is not None and late_s > max_late_s:
        raise DriverLateError(
            f"The driver sent its requests {1000 * late_s:.0f} ms late (p99; at most {1000 * max_late_s:.0f} ms are "
            "allowed): it, or the machine it shares with the service, is the bottleneck. Offer less, or drive from "
            "another core or machine."
        )


def raise_descriptor_limit(num_requests: int) -> None:
    """Makes room for a connection each, as far as this process may: the usual soft limit is 1024 descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = num_requests + NUM_OTHER_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
