"""Who is let in, and who goes first: bounded lines with two classes, and how long a wait in them will be.

The wait is foretold by what work has taken here of late, so that a caller who would wait in vain is told so at once,
before its body is read, with a time after which there is room. Knows no HTTP and no engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from server.api_keys import Priority
from server.pause_budget import smooth

RANKS: dict[Priority, int] = {"interactive": 0, "batch": 1}


@dataclass
class PriorityLimiter:
    """Lets so many work at a time; those who wait go by class, and within a class in the order in which they came.

    Attributes:
        num_places: Work that goes on at the same time.
        work_s: Running mean of what one piece of work takes; None before the first.
        num_working: Places that are taken.
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
        """How many stand in line."""
        return sum(not future.done() for *_, future in self.waiting)

    def waits_s(self, priority: Priority) -> list[float]:
        """Returns how long each of a class has been in line."""
        now_s = time.monotonic()
        rank = RANKS[priority]
        return [now_s - since_s for of, _, since_s, future in self.waiting if of == rank and not future.done()]

    @contextlib.asynccontextmanager
    async def slot(self, priority: Priority) -> AsyncGenerator[None]:
        """Waits for a place and holds it. Leaving early, by cancellation too, gives it to the next."""
        await self.take(priority)
        started_s = time.monotonic()
        try:
            yield
        except BaseException:
            # Work that was cut short says nothing about how long work takes.
            self.give()
            raise
        self.work_s = smooth(self.work_s, time.monotonic() - started_s)
        self.give()

    async def take(self, priority: Priority) -> None:
        """Takes a place at once or when one is given."""
        if self.num_working < self.num_places and not self.num_waiting:
            self.num_working += 1
            return
        future = asyncio.get_running_loop().create_future()
        heapq.heappush(self.waiting, (RANKS[priority], next(self.numbers), time.monotonic(), future))
        try:
            await future
        except asyncio.CancelledError:
            # The place may have been given in the same moment; then it goes on to the next.
            if future.done() and not future.cancelled():
                self.give()
            raise

    def give(self) -> None:
        """Hands a place to the first in line, else leaves it free."""
        while self.waiting:
            *_, future = heapq.heappop(self.waiting)
            if not future.done():
                future.set_result(None)
                return
        self.num_working -= 1

    def wait_s(self, num_ahead: int) -> float:
        """Returns how long somebody waits who finds so many before it, working or waiting; 0 where that is not known.

        Args:
            num_ahead: May be more than stand in line now: those who upload or decode will.
        """
        if self.work_s is None or num_ahead < self.num_places:
            return 0.0
        return (num_ahead - self.num_places + 1) * self.work_s / self.num_places
