"""The service as one object: the model it serves, its engine, admission, decoding, readiness, how work is cut short.

It knows what may run and for how long, not what a request asks; HTTP only in the shape of a disconnect to wait for.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import logging
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
from server.box import Box
from server.engine import Engine
from server.exchange import Exchange
from server.faults import RequestError
from server.metrics import Metrics
from server.pacing import Budget, Pace
from server.settings import MEBIBYTE, Settings

logger = logging.getLogger("hyper.server")

State = Literal["starting", "ready", "draining", "failed", "stopped"]
Result = TypeVar("Result")

WATCH_INTERVAL_S = 0.25


class Service:
    """Owns what outlives a request; built once by `create_app` and passed to whoever needs it."""

    def __init__(self, settings: Settings, checkpoint: Checkpoint, engine: Engine, metrics: Metrics) -> None:
        self.settings = settings
        self.checkpoint = checkpoint
        self.gate = GateSettings.of(checkpoint.manifest, checkpoint.tokenizer)
        self.engine = engine
        self.metrics = metrics
        self.pace = Pace()
        self.state: State = "starting"
        self.failure: BaseException | None = None
        self.num_in_flight = 0
        audio_limits = AudioLimits(
            max_bytes=settings.max_audio_bytes,
            min_duration_s=checkpoint.manifest.audio.min_duration_s,
            max_duration_s=settings.max_audio_s,
            decode_timeout_s=settings.decode_timeout_s,
        )
        self.box = Box(
            audio_limits, memory_bytes=settings.decode_memory_mib * MEBIBYTE, on_death=metrics.decoder_deaths.inc
        )
        self.decoders = asyncio.Semaphore(settings.decode_workers)
        # One salt for all while there are no tenants; a fresh one a process, as the cache does not outlive it either.
        self.cache_salt = secrets.token_hex(16)
        self.pool = ThreadPoolExecutor(settings.decode_workers, thread_name_prefix="hyper-pool")
        self.tasks: set[asyncio.Task[Any]] = set()

    @property
    def max_pauses(self) -> int:
        """The pauses that an answer may take; none where the checkpoint has no gate."""
        return self.gate.max_pauses if self.gate else 0

    def auto_budget(self, left_s: float) -> Budget:
        """Returns the pauses of a request that leaves them to the service and has so many seconds left."""
        settings = self.settings
        # Of the engine's requests, not the service's: an upload waits for its client alone.
        num_waiting = max(0, self.engine.num_in_flight + 1 - settings.max_num_seqs)
        num_places = max(0, settings.max_in_flight - settings.max_num_seqs)
        return self.pace.budget(self.max_pauses, left_s=left_s, num_waiting=num_waiting, num_places=num_places)

    def clip_key(self, waveform: Waveform) -> str:
        """Names a clip for the engine's caches: the same for the same sound, and nothing that a stranger can guess.

        The engine takes the name for the sound itself: whoever could choose it could be answered about another's clip.
        """
        return hashlib.sha256(f"{self.cache_salt} {SAMPLE_RATE_HZ} {waveform.sha256}".encode()).hexdigest()

    async def start(self, canary: Callable[[Service], Coroutine[Any, Any, float]]) -> None:
        """Starts decoder and engine, asks the canary question, and watches the engine until it ends."""
        try:
            await self.start_box()
            await self.engine.start()
            self.metrics.canary_seconds.set(await canary(self))
        except Exception as error:
            # Stopping an engine while it loads makes the loading fail; that is no failure of the service.
            if self.state != "stopped":
                self.fail(error)
            return
        self.metrics.engine_up.set(1)
        if self.state == "starting":
            self.state = "ready"
            self.metrics.ready.set(1)
            logger.info("ready", extra={"checkpoint": self.checkpoint.manifest.name, "engine": self.settings.engine})
        while self.engine.is_alive:
            before = time.monotonic()
            await asyncio.sleep(WATCH_INTERVAL_S)
            self.metrics.event_loop_lag.observe(max(0.0, time.monotonic() - before - WATCH_INTERVAL_S))
        # Ctrl-C reaches the engine's processes too: when nothing is in flight their end is only early, not a failure.
        if self.state != "stopped" and not (self.state == "draining" and self.num_in_flight == 0):
            self.fail(RuntimeError("the engine died"))

    async def start_box(self) -> None:
        """Starts the decoder and says what keeps it in.

        Raises:
            HyperError: Nothing does, and strangers can reach the service.
        """
        await self.box.start()
        layers = {"layers": list(self.box.layers)}
        self.metrics.sandbox.info({"layers": "+".join(self.box.layers) or "none"})
        if self.box.is_closed:
            logger.info("clips are decoded in a sandbox", extra=layers)
            return
        if self.settings.decode_sandbox == "require" or not self.settings.is_local:
            raise HyperError(
                "There is neither seccomp, Landlock nor bubblewrap here, so a process that may open files and sockets "
                "would decode the clips of strangers. HYPER_DECODE_SANDBOX=auto allows that on 127.0.0.1 alone."
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
        await self.engine.stop()
        self.metrics.engine_up.set(0)
        await self.box.stop()
        self.pool.shutdown(wait=False, cancel_futures=True)

    def reasons_not_ready(self) -> list[str]:
        """Lists why requests would be refused now; empty when they are taken."""
        reasons: list[str] = []
        match self.state:
            case "starting":
                reasons.append("starting")
            case "draining" | "stopped":
                reasons.append("shutting_down")
            case "failed":
                reasons.append("engine_unavailable")
            case "ready":
                # The supervisor looks a few times a second; a probe in between should see the truth as well.
                if not self.engine.is_alive:
                    reasons.append("engine_unavailable")
        if self.num_in_flight >= self.settings.max_in_flight:
            reasons.append("overloaded")
        return reasons

    @contextlib.contextmanager
    def admit(self) -> Generator[None]:
        """Holds one of the places for requests; taken before the body is read, as uploads and decoding cost too.

        Raises:
            RequestError: 503, when the service is not ready or full.
        """
        messages = {
            "starting": "The model is still loading.",
            "shutting_down": "The service is shutting down.",
            "engine_unavailable": "The engine is not running.",
            "overloaded": f"The service is full: {self.settings.max_in_flight} requests are in flight.",
        }
        for reason in self.reasons_not_ready():
            raise RequestError(reason, messages[reason], hint="Try again after the Retry-After time.")
        self.num_in_flight += 1
        self.metrics.in_flight.inc()
        try:
            yield
        finally:
            self.num_in_flight -= 1
            self.metrics.in_flight.dec()

    async def in_pool(self, function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
        """Runs a function that takes long in the bounded pool, off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, functools.partial(function, *args, **kwargs))

    async def decode(self, data: bytes) -> Waveform:
        """Decodes a clip in the box, so many at a time; cancelling this kills the decoder."""
        with self.metrics.decoding.track_inprogress():
            async with self.decoders:
                waveform = await self.box.decode(data)
            await self.in_pool(look_at, waveform)
            return waveform

    async def carry(
        self, work: Coroutine[Any, Any, Result], exchange: Exchange, receive: Receive, deadline_s: float
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
            by = "shutdown" if task in done else "client" if gone in done else "deadline"
            self.metrics.aborted.labels(exchange.phase, by).inc()
            match by:
                case "client":
                    raise ClientDisconnect
                case "shutdown":
                    raise RequestError("shutting_down", "The service shut down before the answer was complete.")
                case _:
                    limit = round((deadline_s - exchange.started_s) * 1000)
                    raise RequestError(
                        "deadline_exceeded", f"The answer was not complete after {limit} ms.", limit=limit
                    )
        finally:
            self.tasks.discard(task)
            for each in (task, gone):
                each.cancel()
            await asyncio.gather(task, gone, return_exceptions=True)


def look_at(waveform: Waveform) -> None:
    """Computes what takes a look at every sample, which the waveform then remembers."""
    _ = waveform.quality, waveform.sha256


async def wait_for_disconnect(receive: Receive) -> None:
    """Returns when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
