"""Assembly of the service: from settings to an ASGI application, with every part built here and passed on."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncGenerator
from importlib import import_module

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from hyper_model.checkpoint import Checkpoint
from hyper_model.errors import HyperError
from server import error_handlers
from server.api import batches, chat, files, health, info, jobs, models, page, qa, transcriptions, webhook_secrets
from server.api.batch_steps import BatchSteps
from server.api.openapi import document
from server.api_keys import KeyRing
from server.embedded import choose_checkpoint
from server.engines.protocol import Engine
from server.middleware import RequestMiddleware
from server.quantization import choose_weights
from server.service import Service
from server.settings import ENGINES, Settings
from server.telemetry.metrics import Metrics, version
from server.telemetry.tracing import tracer_from

logger = logging.getLogger("hyper.server")

DESCRIPTION = """Questions about audio clips. Each answer comes with background sounds, speakers, transcript and
reasoning. Every error is `{"error": {...}}` with a `code`; every reply has an `x-request-id`."""


ROUTED = (
    qa,
    chat,
    transcriptions,
    files,
    jobs,
    batches,
    webhook_secrets,
    models,
    info,
    health,
    page,
)
"""Modules with endpoints."""


def create_app(settings: Settings, engine: Engine | None = None) -> FastAPI:
    """Build the application; its lifespan starts the engine, and the ports respond while it loads.

    Args:
        settings: The settings.
        engine: An engine to use instead of the configured one; the application starts and stops it.

    Raises:
        CheckpointError: If the checkpoint cannot be served.
        HyperError: If traces cannot be sent as configured.
    """
    checkpoint = choose_checkpoint(settings)
    if engine is None:
        checkpoint = choose_weights(settings, checkpoint)
    metrics = Metrics()
    engine = engine or build_engine(settings, checkpoint)
    service = Service(settings, checkpoint, engine, metrics, tracer_from(os.environ), key_ring(settings))

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        life = [asyncio.create_task(service.start())]
        if settings.jobs:
            life.append(asyncio.create_task(start_jobs(app, service)))
        try:
            yield
        finally:
            if app.state.jobs is not None:
                await app.state.jobs.stop()
            await service.stop()
            for task in life:
                task.cancel()
            await asyncio.gather(*life, return_exceptions=True)

    app = FastAPI(
        title="HyPeR", version=version(), description=DESCRIPTION, lifespan=lifespan, docs_url=None, redoc_url=None
    )
    app.state.service = service
    app.state.jobs = None
    for module in ROUTED:
        app.include_router(module.router)
    max_pauses, asks_for_keys = service.answerer.max_pauses, service.keys is not None
    app.openapi = lambda: document(app, settings, max_pauses=max_pauses, asks_for_keys=asks_for_keys)
    error_handlers.install(app)
    app.add_middleware(RequestMiddleware, service=service)
    if settings.cors_origins:
        # Outside of the keys: a browser sends its preflight request without one.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origin_list),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["authorization", "content-type", "x-request-id", "x-hyper-priority", "x-hyper-clip"],
            expose_headers=["x-request-id", "retry-after"],
        )
    return app


async def start_jobs(app: FastAPI, service: Service) -> None:
    """Start the jobs; without a usable default folder, only their endpoints fail.

    The modules are imported here, in a thread: DBOS takes seconds and 50 MiB, and a service without jobs needs neither.
    """
    folder = service.settings.state_path / "jobs"
    try:
        module = await asyncio.to_thread(import_module, "server.jobs.job_service")
        steps = BatchSteps(service)
        found = await asyncio.to_thread(module.JobService, service.settings, folder, service.metrics, steps)
    except HyperError as error:
        if service.settings.state_dir is not None or service.settings.jobs_database_url is not None:
            service.fail(error)
        logger.warning("jobs cannot be stored: %s", error.message)
        return
    app.state.jobs = found
    await found.start()


def key_ring(settings: Settings) -> KeyRing | None:
    """Open the key file; return None if no key is required.

    Raises:
        HyperError: If the keys cannot be read, or are missing although other machines can reach the service.
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


def build_engine(settings: Settings, checkpoint: Checkpoint) -> Engine:
    """Build the configured engine; its module is imported only if needed."""
    return import_module(ENGINES[settings.engine]).build(settings, checkpoint)
