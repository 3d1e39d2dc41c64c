"""State of the service: its parts, start, readiness, drain and stop.

It builds the parts shared by all requests and hands them out. `admission` admits requests, `answerer` is the small
context of an answer, and `decoder_pool` decodes clips. A request's own lifecycle is in `server.api.lifecycle`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import logging
import math
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeVar

from hyper_model.audio import AudioLimits
from hyper_model.checkpoint import Checkpoint
from hyper_model.errors import HyperError
from server.admission import Admission
from server.answering import Answerer
from server.api_keys import KeyRing
from server.decoding.pool import DecoderPool
from server.engines.protocol import Engine
from server.engines.supervisor import EngineFailedError, Quarantine, Supervisor
from server.errors import RequestError
from server.gauges import record_gauges
from server.limiter import PriorityLimiter
from server.quota_store import QuotaStore, SharedQuotas
from server.quotas import Quotas
from server.recordings.perceptions import PerceptionStore
from server.settings import MEBIBYTE, Settings
from server.storage import file_store
from server.telemetry.metrics import Metrics, version
from server.telemetry.tracing import Tracer

logger = logging.getLogger("hyper.server")

State = Literal["starting", "ready", "recovering", "draining", "failed", "stopped"]
Result = TypeVar("Result")

WATCH_INTERVAL_S = 0.25
SWEEP_INTERVAL_S = 60.0


class Service:
    """Owner of the parts shared by all requests; built once by `create_app`.

    Attributes:
        admission: Admits requests and counts those in flight.
        answerer: Answers questions about decoded clips.
        decoder_pool, decode_limiter: Decode clips, with limited concurrency.
        recording_limits: Limits of a recording, in place of a clip's.
        perceptions: Perceptions of recent recordings' windows.
        files: Stored files of all tenants.
        keys, quotas: Permitted callers and their limits; no keys for an open service.
        quota_store: Client of the store for the limits of several replicas; None with limits in memory.
        tasks: Tasks of requests in flight; cancelled after the drain timeout.
        failure: Reason of a permanent failure, or None.
    """

    def __init__(
        self,
        settings: Settings,
        checkpoint: Checkpoint,
        engine: Engine,
        metrics: Metrics,
        tracer: Tracer | None = None,
        keys: KeyRing | None = None,
    ) -> None:
        self.settings = settings
        self.checkpoint = checkpoint
        self.engine = engine
        self.metrics = metrics
        self.tracer = tracer
        self.state: State = "starting"
        self.created_at_s = int(time.time())
        self.failure: BaseException | None = None
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
        self.recording_limits = dataclasses.replace(
            audio_limits,
            max_duration_s=settings.max_recording_s,
            decode_timeout_s=settings.recording_decode_timeout_s,
            # As much per second as for a clip, at the default of ten minutes.
            max_source_samples=math.ceil(audio_limits.max_source_samples * max(1.0, settings.max_recording_s / 600)),
        )
        self.decode_limiter = PriorityLimiter(settings.decode_workers)
        metrics.decoders.set(settings.decode_workers)
        metrics.max_in_flight.set(settings.max_in_flight)
        self.describe_build()
        self.keys = keys
        self.files = file_store(settings)
        self.quota_store = None if settings.quota_url is None else QuotaStore(settings, metrics)
        self.quotas = Quotas() if self.quota_store is None else SharedQuotas(self.quota_store)
        # Cap concurrency at `max_num_seqs`; otherwise the engine queues internally and ignores our priorities.
        self.limiter = PriorityLimiter(settings.max_num_seqs)
        self.admission = Admission(settings, metrics, self.limiter, self.reasons_not_ready)
        self.quarantine = Quarantine()
        # The secret is new in each process, like the engine's cache.
        self.answerer = Answerer(
            settings, checkpoint, engine, metrics, self.limiter, self.quarantine, secret=secrets.token_bytes(32)
        )
        self.perceptions = PerceptionStore(
            self.answerer.secret, settings.recording_cache_mib * MEBIBYTE, settings.recording_ttl_s
        )
        self.supervisor: Supervisor | None = None
        self.pool = ThreadPoolExecutor(settings.decode_workers, thread_name_prefix="hyper-pool")
        self.tasks: set[asyncio.Task[Any]] = set()

    @property
    def num_in_flight(self) -> int:
        """Return the number of admitted requests without a complete reply."""
        return self.admission.num_in_flight

    def describe_build(self) -> None:
        """Report version, engine and checkpoint in the metrics; called again after the engine's start."""
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

    async def start(self) -> None:
        """Start the decoder and the engine, and keep the engine running until the service ends."""
        supervisor = self.supervisor = Supervisor(
            self.engine,
            self.metrics,
            self.quarantine,
            canary=self.answerer.warm_up,
            up=self.engine_is_up,
            down=self.engine_is_down,
            hang_timeout_s=self.settings.hang_timeout_s,
            max_restarts=self.settings.max_engine_restarts,
        )
        watching = [asyncio.create_task(self.watch())]
        try:
            await self.open_files()
            watching.append(asyncio.create_task(self.watch_files()))
            if self.quota_store is not None:
                await self.quota_store.start()
            await self.start_decoder()
            await supervisor.run()
        except Exception as error:
            # Stopping an engine during its start makes the start fail, without a failure of the service.
            if self.state != "stopped":
                self.fail(error)
        finally:
            for task in watching:
                task.cancel()
            await asyncio.gather(*watching, return_exceptions=True)

    def engine_is_up(self) -> None:
        """Accept requests from now on, unless the service is stopping."""
        self.metrics.engine_up.set(1)
        self.describe_build()
        if self.state in ("starting", "recovering"):
            self.state = "ready"
            self.metrics.ready.set(1)
            logger.info("ready", extra={"checkpoint": self.checkpoint.manifest.name, "engine": self.settings.engine})

    def engine_is_down(self) -> None:
        """Refuse requests until the engine is up again."""
        self.metrics.engine_up.set(0)
        self.metrics.ready.set(0)
        if self.state == "ready":
            self.state = "recovering"
        elif self.state == "draining" and self.supervisor is not None:
            # No new request is accepted and those in flight fail, so another engine would have no work.
            self.supervisor.is_over = True
            # Ctrl-C ends the engine's processes too; with nothing in flight that is only early.
            if self.num_in_flight:
                self.fail(EngineFailedError("the engine died while the service was draining"))

    async def watch(self) -> None:
        """Update gauges and reload a changed key file, several times per second."""
        while True:
            before = time.monotonic()
            await asyncio.sleep(WATCH_INTERVAL_S)
            self.metrics.event_loop_lag.observe(max(0.0, time.monotonic() - before - WATCH_INTERVAL_S))
            self.metrics.expected_wait.set(self.limiter.wait_s(self.num_in_flight))
            record_gauges(self.metrics, self.limiter, self.decode_limiter, self.decoder_pool, self.quarantine)
            if self.keys is not None:
                self.keys.refresh()
                self.quotas.forget({key.name for key in self.keys.keys})

    async def open_files(self) -> None:
        """Open the stored files; without a usable default folder, only endpoints of files fail.

        Raises:
            HyperError: If the settings name a folder, and it cannot be used.
        """
        try:
            await self.files.start()
        except HyperError as error:
            if self.settings.state_dir is not None:
                raise
            logger.warning("files cannot be stored: %s", error.message)

    async def watch_files(self) -> None:
        """Remove expired files, once per minute."""
        while True:
            try:
                usage = await self.files.sweep()
            except RequestError as error:
                logger.error("expired files stay stored", extra={"reason": error.message})
            else:
                self.metrics.stored_files.set(usage.num_files)
                self.metrics.stored_bytes.set(usage.num_bytes)
                self.metrics.expired_files.inc(usage.num_removed)
            await asyncio.sleep(SWEEP_INTERVAL_S)

    async def start_decoder(self) -> None:
        """Start the decoder and report its sandbox.

        Raises:
            HyperError: If the system has no sandbox and the settings require one.
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
        """Mark the service as permanently failed; its process reads `failure` and exits."""
        logger.critical("the engine failed", exc_info=error)
        self.state = "failed"
        self.metrics.engine_up.set(0)
        self.metrics.ready.set(0)
        self.failure = error

    async def drain(self) -> None:
        """Refuse new requests, wait for those in flight, and cancel them after the drain timeout."""
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
        """End the engine and the decoders."""
        self.state = "stopped"
        if self.supervisor is not None:
            self.supervisor.is_over = True
        await self.engine.stop()
        self.metrics.engine_up.set(0)
        await self.decoder_pool.stop()
        await self.files.stop()
        if self.quota_store is not None:
            await self.quota_store.close()
        if self.tracer is not None:
            await self.tracer.stop()
        self.pool.shutdown(wait=False, cancel_futures=True)

    def reasons_not_ready(self) -> list[str]:
        """Return the codes of the reasons to refuse requests; empty if they are accepted."""
        reasons: list[str] = []
        match self.state:
            case "starting":
                reasons.append("starting")
            case "draining" | "stopped":
                reasons.append("shutting_down")
            case "failed" | "recovering":
                reasons.append("engine_unavailable")
            case "ready":
                # The supervisor checks several times per second; a probe in between needs the current state too.
                if not self.engine.is_alive:
                    reasons.append("engine_unavailable")
        if self.admission.is_full:
            reasons.append("overloaded")
        return reasons

    async def in_pool(self, function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
        """Run a slow function in the bounded pool, off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, functools.partial(function, *args, **kwargs))
