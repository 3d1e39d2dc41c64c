"""Concurrency limit with two priority classes and an estimate of waiting times.

The estimate comes from recent work. It lets the service refuse a hopeless request at once, before its body is read,
with a time to retry. The module is independent of HTTP and engines.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from server.pause_budget import smooth
from server.telemetry.labels import Priority

RANKS: dict[Priority, int] = {"interactive": 0, "batch": 1}


@dataclass
class PriorityLimiter:
    """Concurrency limit with queues by class, first in, first out within a class.

    Attributes:
        num_places: Maximum number of concurrent tasks.
        work_s: Running mean of a task's duration in seconds; None before the first.
        num_working: Number of occupied places.
    """

    num_places: int
    work_s: float | None = None
    num_working: int = 0
    waiting: list[tuple[int, int, float, asyncio.Future[None]]] = field(
        default_factory=list[tuple[int, int, float, asyncio.Future[None]]]
    )
    numbers: itertools.count[int] = field(default_factory=itertools.count)

    @property
    def num_waiting(self) -> int:
        """Return the number of waiting tasks."""
        return sum(not future.done() for *_, future in self.waiting)

    def waits_s(self, priority: Priority) -> list[float]:
        """Return the waiting time so far, in seconds, of each waiting task of a class."""
        now_s = time.monotonic()
        rank = RANKS[priority]
        return [
            now_s - since_s
            for class_rank, _, since_s, future in self.waiting
            if class_rank == rank and not future.done()
        ]

    @contextlib.asynccontextmanager
    async def slot(self, priority: Priority) -> AsyncGenerator[None]:
        """Wait for a place and hold it; release it at the end, also on cancellation."""
        await self.take(priority)
        started_s = time.monotonic()
        try:
            yield
        except BaseException:
            # The duration of interrupted work is not representative.
            self.give()
            raise
        self.work_s = smooth(self.work_s, time.monotonic() - started_s)
        self.give()

    async def take(self, priority: Priority) -> None:
        """Take a place, at once or after waiting for one."""
        if self.num_working < self.num_places and not self.num_waiting:
            self.num_working += 1
            return
        future = asyncio.get_running_loop().create_future()
        heapq.heappush(self.waiting, (RANKS[priority], next(self.numbers), time.monotonic(), future))
        try:
            await future
        except asyncio.CancelledError:
            # The place may have been given at the same moment; then pass it on.
            if future.done() and not future.cancelled():
                self.give()
            raise

    def give(self) -> None:
        """Pass a place to the first waiting task, or free it."""
        while self.waiting:
            *_, future = heapq.heappop(self.waiting)
            if not future.done():
                future.set_result(None)
                return
        self.num_working -= 1

    def wait_s(self, num_ahead: int) -> float:
        """Return the expected wait in seconds behind other tasks; 0 without an estimate.

        Args:
            num_ahead: Number of tasks ahead, working or waiting. It may exceed the current number, to include later
                arrivals from uploads and decoding.
        """
        if self.work_s is None or num_ahead < self.num_places:
            return 0.0
        return (num_ahead - self.num_places + 1) * self.work_s / self.num_places
