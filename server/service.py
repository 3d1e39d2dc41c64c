"""The service as one object: the model it serves, its engine, admission, decoding, readiness, how work is cut short.

It knows what may run and for how long, not what a request asks; HTTP only in the shape of a disconnect to wait for.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import hmac
import logging
import math
import random
import secrets
import time
from collections.abc import Callable, Coroutine, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from hyper_model.audio import SAMPLE_RATE_HZ, AudioLimits, Waveform
from hyper_model.checkpoint import Checkpoint
from hyper_model.errors import HyperError
from hyper_model.pause import GateSettings
from server.api_keys import KeyRing
from server.decoding.pool import DecoderPool
from server.engines.protocol import Engine
from server.engines.supervisor import EngineFailedError, Quarantine, Supervisor
from server.errors import RequestError
from server.limiter import RANKS, PriorityLimiter
from server.pause_budget import Budget, PauseBudgeter
from server.quotas import Quotas
from server.request_context import RequestContext
from server.settings import MEBIBYTE, Settings
from server.telemetry.labels import AbortedBy
from server.telemetry.metrics import Metrics, version
from server.telemetry.tracing import Tracer

logger = logging.getLogger("hyper.server")

State = Literal["starting", "ready", "recovering", "draining", "failed", "stopped"]
Result = TypeVar("Result")

WATCH_INTERVAL_S = 0.25
MAX_RETRY_AFTER_S = 60
COME_AGAIN = "Retry after the Retry-After time."


class Service:
    """Owns what outlives a request; built once by `create_app` and passed to whoever needs it."""

    def __init__(
        self,
        settings: Settings,
        checkpoint: Checkpoint,
        engine: Engine,
        metrics: Metrics,
        tracer: Tracer | None = None,
    ) -> None:
        self.settings = settings
        self.checkpoint = checkpoint
        self.gate = GateSettings.of(checkpoint.manifest, checkpoint.tokenizer)
        self.engine = engine
        self.metrics = metrics
        self.tracer = tracer
        self.pause_budgeter = PauseBudgeter()
        self.state: State = "starting"
        self.failure: BaseException | None = None
        self.num_in_flight = 0
        audio_limits = AudioLimits(
            max_bytes=settings.max_audio_bytes,
            min_duration_s=checkpoint.manifest.audio.min_duration_s,
            max_duration_s=settings.max_audio_s,
            decode_timeout_s=settings.decode_timeout_s,
        )
        self.decoder_pool = DecoderPool(
            audio_limits,
            memory_bytes=settings.decode_memory_mib * MEBIBYTE,
            on_death=lambda reason: metrics.decoder_deaths.labels(reason).inc(),
        )
        self.decode_limiter = PriorityLimiter(settings.decode_workers)
        metrics.decoders.set(settings.decode_workers)
        metrics.max_in_flight.set(settings.max_in_flight)
        self.describe_build()
        # A fresh one a process, as what the engine keeps does not outlive it either.
        self.secret = secrets.token_bytes(32)
        self.keys = key_ring(settings)
        self.quotas = Quotas()
        # Where the engine would take more than it works on together, whose turn it is would be for it to say.
        self.limiter = PriorityLimiter(settings.max_num_seqs)
        self.quarantine = Quarantine()
        self.supervisor: Supervisor | None = None
        self.pool = ThreadPoolExecutor(settings.decode_workers, thread_name_prefix="hyper-pool")
        self.tasks: set[asyncio.Task[Any]] = set()

    def describe_build(self) -> None:
        """Says in the metrics what is running: again when the engine has started, and is known."""
        manifest = self.checkpoint.manifest
        self.metrics.build.info(
            {
                "version": version(),
                "engine": self.settings.engine,
                "checkpoint": manifest.name,
                "manifest_sha256": self.checkpoint.manifest_sha256,
                **self.engine.about,
            }
        )

    @property
    def max_pauses(self) -> int:
        """The pauses that an answer may take; none where the checkpoint has no gate."""
        return self.gate.max_pauses if self.gate else 0

    def auto_budget(self, left_s: float) -> Budget:
        """Returns the pauses of a request that leaves them to the service and has so many seconds left."""
        settings = self.settings
        # Of the requests that want the engine, not of all: an upload waits for its client alone.
        num_waiting = max(0, self.limiter.num_working + self.limiter.num_waiting + 1 - settings.max_num_seqs)
        num_places = max(0, settings.max_in_flight - settings.max_num_seqs)
        return self.pause_budgeter.budget(
            self.max_pauses, left_s=left_s, num_waiting=num_waiting, num_places=num_places
        )

    def cache_salt(self, context: RequestContext) -> str:
        """Keeps what the engine has computed for one caller from the next: how soon a reply comes would tell of it."""
        return hmac.new(self.secret, context.tenant_name.encode(), hashlib.sha256).hexdigest()

    def clip_key(self, waveform: Waveform, context: RequestContext) -> str:
        """Names a clip for the engine's caches: the same for a caller's same sound, and nothing that can be guessed.

        The engine takes the name for the sound itself: whoever could choose it could be answered about another's clip.
        """
        named = f"{self.cache_salt(context)} {SAMPLE_RATE_HZ} {waveform.sha256}"
        return hashlib.sha256(named.encode()).hexdigest()

    async def start(self, canary: Callable[[Service], Coroutine[Any, Any, float]]) -> None:
        """Starts the decoder and the engine, and keeps the engine running until the service ends."""
        supervisor = self.supervisor = Supervisor(
            self.engine,
            self.metrics,
            self.quarantine,
            canary=lambda: canary(self),
            up=self.engine_is_up,
            down=self.engine_is_down,
            hang_timeout_s=self.settings.hang_timeout_s,
            max_restarts=self.settings.max_engine_restarts,
        )
        watching = asyncio.create_task(self.watch())
        try:
            await self.start_box()
            await supervisor.run()
        except Exception as error:
            # Stopping an engine while it loads makes the loading fail; that is no failure of the service.
            if self.state != "stopped":
                self.fail(error)
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)

    def engine_is_up(self) -> None:
        """Takes requests from now on, unless the service is about to end."""
        self.metrics.engine_up.set(1)
        self.describe_build()
        if self.state in ("starting", "recovering"):
            self.state = "ready"
            self.metrics.ready.set(1)
            logger.info("ready", extra={"checkpoint": self.checkpoint.manifest.name, "engine": self.settings.engine})

    def engine_is_down(self) -> None:
        """Refuses requests until the engine is up again."""
        self.metrics.engine_up.set(0)
        self.metrics.ready.set(0)
        if self.state == "ready":
            self.state = "recovering"
        elif self.state == "draining" and self.supervisor is not None:
            # Nothing new will come, and what is in flight hears of it: another engine would have nothing to do.
            self.supervisor.is_over = True
            # Ctrl-C reaches the engine's processes too: when nothing is in flight their end is only early.
            if self.num_in_flight:
                self.fail(EngineFailedError("the engine died while the service was draining"))

    async def watch(self) -> None:
        """Keeps figures that nobody else would, and heeds changes of the key file."""
        while True:
            before = time.monotonic()
            await asyncio.sleep(WATCH_INTERVAL_S)
            metrics = self.metrics
            metrics.event_loop_lag.observe(max(0.0, time.monotonic() - before - WATCH_INTERVAL_S))
            for priority in RANKS:
                waits_s = self.limiter.waits_s(priority)
                metrics.waiting.labels(priority).set(len(waits_s))
                metrics.oldest_wait.labels(priority).set(max(waits_s, default=0.0))
            metrics.engine_in_flight.set(self.limiter.num_working)
            metrics.decoders_busy.set(self.decode_limiter.num_working)
            metrics.decoders_queued.set(self.decode_limiter.num_waiting)
            metrics.decode_peak.set(self.decoder_pool.peak_bytes)
            metrics.suspected_clips.set(len(self.quarantine.suspects))
            metrics.poisoned_clips.set(len(self.quarantine.banned))
            self.refresh_keys()

    def refresh_keys(self) -> None:
        """Heeds what has been added to the key file or taken out of it."""
        if self.keys is not None:
            self.keys.refresh()
            self.quotas.forget({key.name for key in self.keys.keys})

    async def start_box(self) -> None:
        """Starts the decoder and says what keeps it in.

        Raises:
            HyperError: Nothing does, and strangers can reach the service.
        """
        await self.decoder_pool.start()
        layers = {"layers": list(self.decoder_pool.layers)}
        self.metrics.sandbox.info({"layers": "+".join(self.decoder_pool.layers) or "none"})
        if self.decoder_pool.is_closed:
            logger.info("clips are decoded in a sandbox", extra=layers)
            return
        if self.settings.decode_sandbox == "require" or not self.settings.is_local:
            raise HyperError(
                "No decoder sandbox: this system has neither seccomp, Landlock nor bubblewrap. Install bubblewrap, or "
                "set HYPER_DECODE_SANDBOX=auto and HYPER_HOST=127.0.0.1 to decode without a sandbox."
            )
        logger.warning("clips are decoded WITHOUT a sandbox: this kernel offers none", extra=layers)

    def fail(self, error: BaseException) -> None:
        """Marks the service as beyond repair; the process that hosts it reads `failure` and exits."""
        logger.critical("the engine failed", exc_info=error)
        self.state = "failed"
        self.metrics.engine_up.set(0)
        self.metrics.ready.set(0)
        self.failure = error

    async def drain(self) -> None:
        """Refuses new work, waits for what is in flight, and cuts it short when the drain timeout has passed."""
        if self.state != "failed":
            self.state = "draining"
        self.metrics.ready.set(0)
        self.metrics.draining.set(1)
        logger.info("draining", extra={"in_flight": self.num_in_flight})
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.settings.drain_timeout_s):
                while self.num_in_flight > 0:
                    await asyncio.sleep(0.05)
        for task in self.tasks:
            task.cancel()

    async def stop(self) -> None:
        """Ends the engine and the decoders."""
        self.state = "stopped"
        if self.supervisor is not None:
            self.supervisor.is_over = True
        await self.engine.stop()
        self.metrics.engine_up.set(0)
        await self.decoder_pool.stop()
        if self.tracer is not None:
            await self.tracer.stop()
        self.pool.shutdown(wait=False, cancel_futures=True)

    def reasons_not_ready(self) -> list[str]:
        """Lists why requests would be refused now; empty when they are taken."""
        reasons: list[str] = []
        match self.state:
            case "starting":
                reasons.append("starting")
            case "draining" | "stopped":
                reasons.append("shutting_down")
            case "failed" | "recovering":
                reasons.append("engine_unavailable")
            case "ready":
                # The supervisor looks some times a second; a probe in between should see the truth as well.
                if not self.engine.is_alive:
                    reasons.append("engine_unavailable")
        if self.num_in_flight >= self.settings.max_in_flight:
            reasons.append("overloaded")
        return reasons

    @contextlib.contextmanager
    def admit(self, context: RequestContext) -> Generator[None]:
        """Holds one of the places for requests; taken before the body is read, as uploads and decoding cost too.

        Raises:
            RequestError: 429, when the caller has used what its key allows; 503, when the service is not ready or full.
        """
        messages = {
            "starting": "The model is still loading.",
            "shutting_down": "The service is shutting down.",
            "engine_unavailable": "The engine is not running.",
            "overloaded": f"The service has reached its limit of {self.settings.max_in_flight} requests in flight.",
        }
        with contextlib.ExitStack() as stack:
            if context.tenant is not None:
                stack.enter_context(context.tenant.enter())
            for reason in self.reasons_not_ready():
                if reason == "overloaded":
                    raise self.overloaded(messages[reason])
                raise RequestError(reason, messages[reason], hint=COME_AGAIN)
            if context.priority == "batch" and self.num_in_flight >= self.max_batch_in_flight:
                raise self.overloaded(
                    f"The service has reached its limit of {self.max_batch_in_flight} batch requests in flight."
                )
            wait_s = self.limiter.wait_s(self.num_in_flight)
            if wait_s > self.settings.max_queue_wait_s:
                limit_s = self.settings.max_queue_wait_s
                raise self.overloaded(
                    f"The expected wait for the engine is {math.ceil(wait_s)} s; the limit is {limit_s:g} s."
                )
            gauges = [self.metrics.in_flight, *([self.metrics.batch_in_flight] * (context.priority == "batch"))]
            self.num_in_flight += 1
            for gauge in gauges:
                stack.enter_context(gauge.track_inprogress())
            try:
                yield
            finally:
                self.num_in_flight -= 1

    @property
    def max_batch_in_flight(self) -> int:
        """The places that requests of the class batch may take."""
        return max(1, int(self.settings.max_in_flight * self.settings.max_batch_share))

    def overloaded(self, message: str) -> RequestError:
        """Says that there is no room, and when there will be: after as long as a place takes to become free of late."""
        excess_s = max(0.0, self.limiter.wait_s(self.num_in_flight) - self.settings.max_queue_wait_s)
        free_s = (self.limiter.work_s or 0.0) / self.limiter.num_places
        # Spread a little, so that those who are refused together do not come back together.
        wait_s = (excess_s + free_s) * random.uniform(1.0, 1.25)
        retry_after_s = min(MAX_RETRY_AFTER_S, max(1, math.ceil(wait_s)))
        return RequestError("overloaded", message, hint=COME_AGAIN, retry_after_s=retry_after_s)

    def require_time(self, context: RequestContext, deadline_s: float) -> None:
        """Refuses a request whose turn would come after its deadline; asked before its clip is decoded.

        Raises:
            RequestError: 503; nothing has been spent on it but its upload.
        """
        num_ahead = self.limiter.num_working + (self.limiter.num_waiting if context.priority == "batch" else 0)
        wait_s = self.limiter.wait_s(num_ahead)
        if wait_s > 0 and time.monotonic() + wait_s > deadline_s:
            raise self.overloaded("The expected wait for the engine exceeds the request's deadline.")

    async def in_pool(self, function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
        """Runs a function that takes long in the bounded pool, off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, functools.partial(function, *args, **kwargs))

    async def decode(self, data: bytes, context: RequestContext) -> Waveform:
        """Decodes a clip in the box, so many at a time, and charges its length; cancelling this kills the decoder.

        Raises:
            AudioError: The clip cannot be used.
            RequestError: 429, when the caller has used up its seconds of audio.
        """
        with self.metrics.decoding.track_inprogress():
            async with contextlib.AsyncExitStack() as stack:
                with context.timing("decode_wait"):
                    await stack.enter_async_context(self.decode_limiter.slot(context.priority))
                with context.timing("decode"):
                    waveform = await self.decoder_pool.decode(data)
            if context.tenant is not None:
                context.tenant.charge(waveform.duration_s)
            with context.timing("inspect"):
                await self.in_pool(precompute_quality, waveform)
            return waveform

    async def run_until_disconnect(
        self, work: Coroutine[Any, Any, Result], context: RequestContext, receive: Receive, deadline_s: float
    ) -> Result:
        """Runs work until it ends, the client leaves, the deadline passes or the service shuts down.

        Args:
            receive: The request's ASGI receive; its body must have been read.
            deadline_s: A reading of `time.monotonic()`.

        Raises:
            ClientDisconnect: The client left.
            RequestError: 504 or 503; the work was cancelled.
        """
        task = asyncio.create_task(work)
        gone = asyncio.create_task(wait_for_disconnect(receive))
        self.tasks.add(task)
        try:
            timeout = max(0.0, deadline_s - time.monotonic())
            done, _ = await asyncio.wait({task, gone}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            if task in done and not task.cancelled():
                return task.result()
            by: AbortedBy = "shutdown" if task in done else "client" if gone in done else "deadline"
            self.metrics.aborted.labels(context.phase, by).inc()
            match by:
                case "client":
                    raise ClientDisconnect
                case "shutdown":
                    raise RequestError("shutting_down", "The service shut down before it completed the answer.")
                case _:
                    limit = round((deadline_s - context.started_s) * 1000)
                    raise RequestError(
                        "deadline_exceeded",
                        f"The answer was not complete after {limit} ms.",
                        limit=limit,
                        hint="Raise `timeout_ms`, or lower `max_tokens`.",
                    )
        finally:
            self.tasks.discard(task)
            for each in (task, gone):
                each.cancel()
            await asyncio.gather(task, gone, return_exceptions=True)


def precompute_quality(waveform: Waveform) -> None:
    """Computes what takes a look at every sample, which the waveform then remembers."""
    _ = waveform.quality, waveform.sha256


def key_ring(settings: Settings) -> KeyRing | None:
    """Reads the keys; None where everybody may ask.

    Raises:
        HyperError: The keys cannot be read, or there are none and strangers can reach the service.
    """
    if settings.key_file is not None:
        return KeyRing(settings.key_file)
    if settings.is_local or settings.open_to_all:
        logger.warning("no HYPER_KEY_FILE: every client that can connect to %s has access without a key", settings.host)
        return None
    raise HyperError(
        f"HYPER_HOST={settings.host} would give every client access without a key. Create keys with `hyper keys add` "
        "and set HYPER_KEY_FILE, listen on 127.0.0.1, or allow access without a key with HYPER_OPEN_TO_ALL=true."
    )


async def wait_for_disconnect(receive: Receive) -> None:
    """Returns when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
