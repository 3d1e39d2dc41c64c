"""Engine supervisor: start, failure detection, cleanup and restart, with a quarantine for clips.

Meanwhile the service stays up and replies with 503. Clips in a failing engine become suspects; later they run in the
engine alone. A clip alone in the engine at a second failure is banned, so one file cannot keep the service down
(decision 0009). The module is independent of HTTP; it notifies the service through callbacks.
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
"""Seconds without a token before the engine is pinged, and the ping interval of an idle engine."""
CANARY_TIMEOUT_S = 180.0
RESTART_WINDOW_S = 600.0
FIRST_BACKOFF_S = 1.0
MAX_BACKOFF_S = 30.0

SUSPECT_S = 3600.0
BANNED_S = 24 * 3600.0
MAX_REMEMBERED = 1_000


class EngineFailedError(HyperError):
    """Error for an engine with too many failures."""


class Quarantine:
    """Record of clips in failed engines, by hash; suspects run alone.

    Innocent clips are not banned. A clip in the engine with others is only suspected, and a successful answer clears
    it.

    Args:
        clock: Monotonic clock in seconds.
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
        """Hold a clip's stay in the engine; a suspect waits to be alone, and others wait for it.

        Raises:
            PoisonedClipError: If the clip is banned.
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
        """Suspect all clips in the engine; ban a previous suspect alone in it.

        It counts once per life of the engine (see `renew`), because each request in flight reports the failure.
        """
        if self.is_noted:
            return
        self.is_noted = True
        now_s = self.clock()
        for clip_sha256 in self.working:
            if self.working.total() == 1 and self._holds(self.suspects, clip_sha256):
                del self.suspects[clip_sha256]
                self._remember(self.banned, clip_sha256, now_s + BANNED_S)
                # The hash reveals nothing of the clip's content, and owners of the clip can compute it.
                logger.error("the engine failed twice on one clip: refused from now on", extra={"clip": clip_sha256})
            else:
                self._remember(self.suspects, clip_sha256, now_s + SUSPECT_S)

    def renew(self) -> None:
        """Start a new life of the engine, with a separate failure."""
        self.is_noted = False

    def _refuse_banned(self, clip_sha256: str) -> None:
        if self._holds(self.banned, clip_sha256):
            raise PoisonedClipError("The engine failed twice on this clip.")

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
    """Owner of the engine's life cycle.

    Args:
        canary: Sends the engine a complete question and returns its duration in seconds.
        up, down: Called when the engine starts or stops accepting requests.
        hang_timeout_s: Maximum silence of the engine after a ping.
        max_restarts: Maximum number of restarts in ten minutes.
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
            # Initialised to 0: otherwise a rate would miss the first restart.
            metrics.engine_restarts.labels(reason)

    async def run(self) -> None:
        """Keep the engine running until `is_over` is set or this task is cancelled.

        Raises:
            Exception: If the engine fails at its first start.
            EngineFailedError: If it fails too often.
        """
        await self.bring_up()
        while not self.is_over:
            reason = await self.watch()
            self.down()
            while not self.is_over:
                # Before its processes end: no request has reported a hung engine yet.
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
        """Start the engine and send it a question; it is up after the answer."""
        self.metrics.canary_ok.set(0)
        await self.engine.start()
        self.quarantine.renew()
        canary = asyncio.ensure_future(self.canary())
        watching = asyncio.ensure_future(self.watch())
        # A raised hang timeout means a slow model, and the first question fills a whole window.
        timeout_s = max(CANARY_TIMEOUT_S, self.hang_timeout_s)
        try:
            done, _ = await asyncio.wait({canary, watching}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if canary not in done:
                how = watching.result() if watching in done else f"took more than {timeout_s:g} s"
                raise EngineFailedError(f"the engine {how} before it had answered its first question")
            self.metrics.canary_seconds.set(canary.result())
        finally:
            for task in (canary, watching):
                task.cancel()
            await asyncio.gather(canary, watching, return_exceptions=True)
        self.metrics.canary_ok.set(1)
        self.up()

    async def watch(self) -> Reason:
        """Return when the engine has died or hangs.

        Any token of any request is a sign of life. After a silence the engine is pinged. It hangs if neither a token
        nor a reply to the ping arrives. Waiting requests prove nothing, because their clients may read slowly.
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
                    # A failed ping proves nothing: the engine is pinged again, or has died.
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
        """Count a restart and return whether it is within the limit."""
        now_s = time.monotonic()
        while self.restarts_s and now_s - self.restarts_s[0] > RESTART_WINDOW_S:
            self.restarts_s.popleft()
        self.restarts_s.append(now_s)
        return len(self.restarts_s) <= self.max_restarts

    async def back_off(self) -> None:
        """Wait before a restart: 0 s the first time, then 1, 2, 4 ... s."""
        num_before = len(self.restarts_s) - 1
        wait_s = min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2 ** (num_before - 1)) if num_before else 0.0
        until_s = time.monotonic() + wait_s
        while not self.is_over and time.monotonic() < until_s:
            await asyncio.sleep(WATCH_INTERVAL_S)
