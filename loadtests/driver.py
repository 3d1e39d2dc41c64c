"""Send requests at their due times in an open loop, independent of earlier replies.

A closed-loop client waits for its reply before its next request. It sends less to a slow service and so never measures
the real delay. Here all times are fixed beforehand, and latency counts from the due time. The driver's own delay
therefore counts against the service. It is reported, and a run with a late driver is invalid.
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
"""Maximum delay of the driver at the 99th percentile; a later driver would measure itself."""

TICK_S = 1.0
NUM_OTHER_DESCRIPTORS = 100


class DriverLateError(Exception):
    """The driver was too slow for its own plan, so its figures are invalid."""


async def run_open_loop(
    session: aiohttp.ClientSession, planned: Sequence[Planned], progress: Callable[[int, int], None] | None = None
) -> list[Outcome]:
    """Send every request at its time; return the outcomes in order of due time.

    Args:
        progress: Called about once per second with the number of sent and of ended requests.
    """
    raise_descriptor_limit(len(planned))
    num_ended = 0

    def count(_: asyncio.Task[Outcome]) -> None:
        nonlocal num_ended
        num_ended += 1

    tasks: list[asyncio.Task[Outcome]] = []
    start_s = reported_s = time.perf_counter()
    for request in planned:
        due_s = start_s + request.due_s
        # Yield even if late: replies must be read, and a loop of sends only would measure itself.
        await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
        task = asyncio.create_task(ask(session, request.question, due_s))
        task.add_done_callback(count)
        tasks.append(task)
        if progress is not None and time.perf_counter() > reported_s + TICK_S:
            reported_s = time.perf_counter()
            progress(len(tasks), num_ended)
    pending = set(tasks)
    while pending:
        _, pending = await asyncio.wait(pending, timeout=TICK_S)
        if progress is not None:
            progress(len(tasks), num_ended)
    return [task.result() for task in tasks]


def require_punctual(outcomes: Sequence[Outcome], max_late_s: float = MAX_LATE_S) -> None:
    """Reject a run with a late driver.

    Raises:
        DriverLateError: The delay of requests at the 99th percentile is above the limit.
    """
    late_s = percentile([outcome.late_s for outcome in outcomes], 99)
    if late_s is not None and late_s > max_late_s:
        raise DriverLateError(
            f"The driver sent its requests {1000 * late_s:.0f} ms late (p99; at most {1000 * max_late_s:.0f} ms are "
            "allowed): it, or the machine it shares with the service, is the bottleneck. Offer less, or drive from "
            "another core or machine."
        )


def raise_descriptor_limit(num_requests: int) -> None:
    """Raise the limit of file descriptors, usually 1024, for one connection per request, as far as allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = num_requests + NUM_OTHER_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
