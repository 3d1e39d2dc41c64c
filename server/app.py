"""Puts the service together: settings in, an ASGI application out, with every part built here and passed on."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncGenerator
from pathlib import Path

import numpy as np
from fastapi import FastAPI

from hyper_model.audio import SAMPLE_RATE_HZ, WINDOW_S, Waveform
from hyper_model.checkpoint import Checkpoint, open_checkpoint
from hyper_model.errors import CheckpointError
from hyper_model.trace import build_prompt
from server import error_handlers
from server.answering import QaRun, Question
from server.api import qa as routes
from server.api.openapi import document
from server.engines.protocol import Engine, ScriptedEngine
from server.engines.scripted import scripted_checkpoint
from server.middleware import RequestMiddleware
from server.request_context import RequestContext
from server.service import Service
from server.settings import Settings
from server.telemetry.metrics import Metrics, version
from server.telemetry.tracing import tracer_from

EMBEDDED_CHECKPOINT = Path(__file__).parent.parent / "checkpoints/hyper-mini"

DESCRIPTION = """Questions about audio clips. Each answer comes with background sounds, speakers, transcript and
reasoning. Every error is `{"error": {...}}` with a `code`; every reply has an `x-request-id`."""


def create_app(settings: Settings, engine: Engine | None = None) -> FastAPI:
    """Builds the application; the engine starts with its lifespan, and the ports answer while it loads.

    Args:
        engine: Taken as it is instead of the one that the settings name; the application starts and stops it.

    Raises:
        CheckpointError: The checkpoint cannot be served.
        HyperError: Traces cannot be sent as the environment asks.
    """
    checkpoint = load_checkpoint(settings)
    metrics = Metrics()
    engine = engine or build_engine(settings, checkpoint)
    service = Service(settings, checkpoint, engine, metrics, tracer_from(os.environ))

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        life = asyncio.create_task(service.start(canary))
        try:
            yield
        finally:
            await service.stop()
            life.cancel()
            await asyncio.gather(life, return_exceptions=True)

    app = FastAPI(title="HyPeR", version=version(), description=DESCRIPTION, lifespan=lifespan, redoc_url=None)
    app.state.service = service
    app.include_router(routes.router)
    app.openapi = lambda: document(app, settings, max_pauses=service.max_pauses, asks_for_keys=service.keys is not None)
    error_handlers.install(app)
    app.add_middleware(RequestMiddleware, service=service)
    return app


def load_checkpoint(settings: Settings) -> Checkpoint:
    """Opens the checkpoint that the settings name, else the embedded one; the scripted engine can do without."""
    if settings.checkpoint is not None:
        return open_checkpoint(settings.checkpoint, verify=settings.verify_checkpoint)
    if settings.engine == "scripted":
        return scripted_checkpoint()
    if EMBEDDED_CHECKPOINT.is_dir():
        return open_checkpoint(EMBEDDED_CHECKPOINT, verify=settings.verify_checkpoint)
    # An installed package has no checkpoints beside it.
    raise CheckpointError(
        "HYPER_CHECKPOINT is not set, and there is no embedded checkpoint; set it to a checkpoint directory"
    )


def build_engine(settings: Settings, checkpoint: Checkpoint) -> Engine:
    """Builds the engine that the settings name; vLLM is imported only where it is asked for."""
    if settings.engine == "scripted":
        return ScriptedEngine(
            checkpoint.tokenizer,
            audio_tokens_per_s=checkpoint.manifest.audio.tokens_per_s,
            token_interval_s=settings.scripted_token_interval_s,
        )
    from server.engines.vllm import VllmEngine

    return VllmEngine(settings, checkpoint)


async def canary(service: Service) -> float:
    """Asks two questions of a known sound before anybody else may, and returns the seconds that the second took.

    The first, of a full window, makes the engine allocate what the largest request needs; both go all the way to a
    scored choice. Whether the answers are good is not looked at: a checkpoint may be untrained, an engine not dead.
    """
    seconds = 0.0
    for duration_s in (WINDOW_S, 1.0):
        times_S = np.arange(int(duration_s * SAMPLE_RATE_HZ), dtype=np.float32) / SAMPLE_RATE_HZ
        waveform = Waveform.from_samples(0.1 * np.sin(2 * np.pi * 440 * times_S), SAMPLE_RATE_HZ)
        choices = ("yes", "no")
        prompt_token_ids = build_prompt(service.checkpoint.tokenizer, "Is there a tone?", choices)
        question = Question(choices=choices, prompt_token_ids=tuple(prompt_token_ids), max_tokens=16)
        context = RequestContext(request_id="canary", is_body_complete=True)
        # Past the line and the quarantine: nobody else is in the engine, and its own question is no suspect.
        reply = await QaRun(service, context, question, waveform).answer(routes.drop)
        json.dumps(reply.model_dump(mode="json"), allow_nan=False)
        seconds = context.elapsed_ms() / 1000
    return seconds
