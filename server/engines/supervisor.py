"""Keeps the engine running: starts it, notices that it died or hangs, ends what is left of it, and starts it again.

The service stays up meanwhile and says 503. A clip that was in the engine at its death is suspected and afterwards goes
through it alone; one that was alone when the engine died a second time is refused from then on, so that nobody can keep
the service down with one file (decision 0009). Knows no HTTP; what is up and down it tells the service.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from typing import Any, Literal, get_args

from hyper_model.errors import HyperError
from server.engines.protocol import Engine
from server.errors import PoisonedClipError
from server.telemetry.metrics import Metrics

logger = logging.getLogger("hyper.server")

Reason = Literal["died", "hung", "not_started"]

WATCH_INTERVAL_S = 0.1
PING_INTERVAL_S = 5.0
"""Silence after which the engine is asked for a sign of life; an idle one is asked as often."""
CANARY_TIMEOUT_S = 180.0
RESTART_WINDOW_S = 600.0
FIRST_BACKOFF_S = 1.0
MAX_BACKOFF_S = 30.0

SUSPECT_S = 3600.0
BANNED_S = 24 * 3600.0
MAX_REMEMBERED = 1_000


class EngineFailedError(HyperError):
    """Says that the engine could not be kept running."""


class Quarantine:
    """Remembers by their hash the clips that the engine died on, and lets suspects into it one by one.

    Bystanders are not banned: whoever was in the engine together with others is only suspected, and a suspect that is
    answered is none any more.

    Args:
        clock: Seconds, never set back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.suspects: OrderedDict[str, float] = OrderedDict()
        self.banned: OrderedDict[str, float] = OrderedDict()
        self.working: Counter[str] = Counter()
        self.is_closed = False
        self.is_noted = False
        self.turn = asyncio.Lock()
        self.changed = asyncio.Event()

    @contextlib.asynccontextmanager
    async def enter(self, clip_sha256: str) -> AsyncGenerator[None]:
        """Holds a clip's stay in the engine; a suspect waits until it is alone there, and others wait for it.

        Raises:
            PoisonedClipError: The clip is banned.
        """
        while True:
            self._refuse_banned(clip_sha256)
            if self._holds(self.suspects, clip_sha256):
                async with self.turn:
                    self.is_closed = True
                    try:
                        while self.working:
                            await self.changed.wait()
                        self._refuse_banned(clip_sha256)
                        with self._inside(clip_sha256):
                            yield
                        self.suspects.pop(clip_sha256, None)
                    finally:
                        self.is_closed = False
                        self._tell()
                return
            if not self.is_closed:
                with self._inside(clip_sha256):
                    yield
                return
            await self.changed.wait()

    @contextlib.contextmanager
    def _inside(self, clip_sha256: str) -> Generator[None]:
        self.working[clip_sha256] += 1
        try:
            yield
        finally:
            self.working -= Counter([clip_sha256])
            self._tell()

    def _tell(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()

    def record_failure(self) -> None:
        """Suspects what is in the engine now; bans the clip that was suspected before and is in it alone.

        Counts once for a life of the engine (`renew`): those who were in it hear of its death one after the other.
        """
        if self.is_noted:
            return
        self.is_noted = True
        now_s = self.clock()
        for clip_sha256 in self.working:
            if self.working.total() == 1 and self._holds(self.suspects, clip_sha256):
                del self.suspects[clip_sha256]
                self._remember(self.banned, clip_sha256, now_s + BANNED_S)
                # The hash tells nothing of what is in the clip, and whoever has the clip can find it by that.
                logger.error("the engine failed twice on one clip: refused from now on", extra={"clip": clip_sha256})
            else:
                self._remember(self.suspects, clip_sha256, now_s + SUSPECT_S)

    def renew(self) -> None:
        """Says that an engine is up again, whose failure would be another one."""
        self.is_noted = False

    def _refuse_banned(self, clip_sha256: str) -> None:
        if self._holds(self.banned, clip_sha256):
            raise PoisonedClipError("The engine failed on this clip before, twice.")

    def _holds(self, among: OrderedDict[str, float], clip_sha256: str) -> bool:
        until_s = among.get(clip_sha256)
        if until_s is not None and until_s < self.clock():
            del among[clip_sha256]
            until_s = None
        return until_s is not None

    @staticmethod
    def _remember(among: OrderedDict[str, float], clip_sha256: str, until_s: float) -> None:
        among.pop(clip_sha256, None)
        among[clip_sha256] = until_s
        if len(among) > MAX_REMEMBERED:
            among.popitem(last=False)


class Supervisor:
    """Owns the engine's life.

    Args:
        canary: Asks the engine a whole question and returns the seconds that it took.
        up, down: Told that the engine takes requests, or does not.
        hang_timeout_s: How long an engine that was asked for a sign of life may be silent.
        max_restarts: So many in ten minutes are tried.
    """

    def __init__(
        self,
        engine: Engine,
        metrics: Metrics,
        quarantine: Quarantine,
        *,
        canary: Callable[[], Coroutine[Any, Any, float]],
        up: Callable[[], None],
        down: Callable[[], None],
        hang_timeout_s: float,
        max_restarts: int,
    ) -> None:
        self.engine = engine
        self.metrics = metrics
        self.quarantine = quarantine
        self.canary = canary
        self.up = up
        self.down = down
        self.hang_timeout_s = hang_timeout_s
        self.max_restarts = max_restarts
        self.restarts_s: deque[float] = deque()
        self.is_over = False
        for reason in get_args(Reason):
            # From 0 on: a rate from nothing to the first restart would be lost.
            metrics.engine_restarts.labels(reason)

    async def run(self) -> None:
        """Keeps the engine running until `is_over` is set or this is cancelled.

        Raises:
            Exception: The engine did not start the first time, or failed too often.
        """
        await self.bring_up()
        while not self.is_over:
            reason = await self.watch()
            self.down()
            while not self.is_over:
                # Before its processes are ended: of a hung engine nobody has heard yet.
                self.quarantine.record_failure()
                await self.engine.kill()
                if not self.may_restart():
                    raise EngineFailedError(f"the engine failed {len(self.restarts_s)} times in ten minutes: {reason}")
                self.metrics.engine_restarts.labels(reason).inc()
                logger.error("the engine is started again", extra={"reason": reason, "count": len(self.restarts_s)})
                await self.back_off()
                if self.is_over:
                    return
                try:
                    await self.bring_up()
                    break
                except Exception as error:
                    logger.error("the engine did not start again", exc_info=error)
                    reason = "not_started"

    async def bring_up(self) -> None:
        """Starts the engine and asks it a question; only then is it up."""
        self.metrics.canary_ok.set(0)
        await self.engine.start()
        self.quarantine.renew()
        canary = asyncio.ensure_future(self.canary())
        watching = asyncio.ensure_future(self.watch())
        try:
            done, _ = await asyncio.wait(
                {canary, watching}, timeout=CANARY_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED
            )
            if canary not in done:
                how = watching.result() if watching in done else f"took more than {CANARY_TIMEOUT_S:g} s"
                raise EngineFailedError(f"the engine {how} before it had answered its first question")
            self.metrics.canary_seconds.set(canary.result())
        finally:
            for task in (canary, watching):
                task.cancel()
            await asyncio.gather(canary, watching, return_exceptions=True)
        self.metrics.canary_ok.set(1)
        self.up()

    async def watch(self) -> Reason:
        """Returns when the engine has died or hangs.

        Any token of any request is a sign of life; where none comes for a while the engine is asked for one. It hangs
        when neither comes. Requests that wait are no proof: their clients may be slow to read.
        """
        answered_s = time.monotonic()
        ping: asyncio.Future[None] | None = None
        try:
            while True:
                await asyncio.sleep(WATCH_INTERVAL_S)
                if not self.engine.is_alive:
                    return "died"
                now_s = time.monotonic()
                if ping is not None and ping.done():
                    # One that failed is no sign, and no proof either: the engine is asked again, or has died.
                    if ping.exception() is None:
                        answered_s = now_s
                    ping = None
                silent_s = now_s - max(answered_s, self.engine.last_sign_s)
                if silent_s >= PING_INTERVAL_S + self.hang_timeout_s:
                    return "hung"
                if ping is None and silent_s >= PING_INTERVAL_S:
                    ping = asyncio.ensure_future(self.engine.ping())
        finally:
            if ping is not None:
                ping.cancel()
                await asyncio.gather(ping, return_exceptions=True)

    def may_restart(self) -> bool:
        """Counts a restart, and says whether it is not one too many."""
        now_s = time.monotonic()
        while self.restarts_s and now_s - self.restarts_s[0] > RESTART_WINDOW_S:
            self.restarts_s.popleft()
        self.restarts_s.append(now_s)
        return len(self.restarts_s) <= self.max_restarts

    async def back_off(self) -> None:
        """Waits before a restart: not at all the first time, then 1, 2, 4 ... seconds."""
        num_before = len(self.restarts_s) - 1
        wait_s = min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2 ** (num_before - 1)) if num_before else 0.0
        until_s = time.monotonic() + wait_s
        while not self.is_over and time.monotonic() < until_s:
            await asyncio.sleep(WATCH_INTERVAL_S)
