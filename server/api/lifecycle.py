"""Lifecycle of every request about a clip, from admission to its reply.

In order: admit it, read its body, set its deadline, prepare (prompts, decoding), answer, and reply whole or as a
stream. Work is cancelled if the client disconnects, the deadline passes or the service shuts down. A reply after the
deadline contains the partial trace.

An endpoint supplies a `Handler` and calls `respond`:

    @router.post("/v1/audio/qa", ...)
    async def audio_qa(request: Request) -> Response:
        return await respond(request, AudioQa.read)

Handlers share `decode_clip` and `server.api.questions`. A handler may decode several clips, answer several questions
about one clip, or answer one question per window of a long recording. `prepare` and `answer` may loop, without a change
of the lifecycle around them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterable
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

from fastapi import Request, Response
from starlette.requests import ClientDisconnect
from starlette.types import Receive

from hyper_model.audio import WINDOW_S, Channel, Quality, Waveform
from server.api.stream import Emit, EventStream, ServerSentEvent, discard
from server.errors import RequestError, to_request_error
from server.request_context import RequestContext
from server.service import Service
from server.telemetry.labels import AbortedBy

logger = logging.getLogger("hyper.server")

Result = TypeVar("Result")
Reply = TypeVar("Reply")


class Handler(Protocol[Reply]):
    """Handler of one request of one endpoint, made after its body is read.

    Attributes:
        is_stream: Whether the reply is a stream of events.
        timeout_ms: The caller's deadline; None uses the service's default.
    """

    is_stream: bool
    timeout_ms: int | None

    async def prepare(self, deadline_s: float) -> None:
        """Write prompts, decode clips and decide on budgets. Errors up to here have a status, in streams too."""
        ...

    async def answer(self, emit: Emit) -> Reply:
        """Answer, and emit events during generation."""
        ...

    def response(self, reply: Reply) -> Response:
        """Return the reply of a request without a stream."""
        ...

    def last_events(self, reply: Reply) -> Iterable[ServerSentEvent]:
        """Return the events at the end of a stream."""
        ...

    def error_event(self, body: dict[str, Any]) -> ServerSentEvent:
        """Return the event to end a stream with an error object."""
        ...

    def partial(self) -> dict[str, Any] | None:
        """Return the trace so far, for a request after its deadline; None for an endpoint without a trace."""
        ...


Read = Callable[[Request, Service, RequestContext], Awaitable[Handler[Reply]]]
"""Function to read and check the body of a request."""


async def respond(request: Request, read: Read[Reply]) -> Response:
    """Handle a request from admission to its reply or the start of its stream."""
    service: Service = request.app.state.service
    context = RequestContext.of(request.scope)
    async with contextlib.AsyncExitStack() as held:
        await held.enter_async_context(service.admission.admit(context))
        handler = await read_body(request, service, context, read)
        timeout_ms = handler.timeout_ms or service.settings.default_timeout_ms
        life = Lifecycle(service, context, handler, context.started_s + timeout_ms / 1000)
        service.admission.require_time(context, life.deadline_s)
        context.phase = "decode"
        await life.run(handler.prepare(life.deadline_s), request.receive)
        if handler.is_stream:
            interval_s = service.settings.ping_interval_s
            return EventStream(life.stream, context, ping_interval_s=interval_s, held=held.pop_all())
        try:
            reply = await life.run(handler.answer(discard), request.receive)
        except RequestError as error:
            raise life.cut_short(error) from None
        with context.timing("serialize"):
            return handler.response(reply)


async def read_body(request: Request, service: Service, context: RequestContext, read: Read[Reply]) -> Handler[Reply]:
    """Read the body, and time the upload and the checks."""
    with receiving(service, context):
        return await read(request, service, context)


@contextlib.contextmanager
def receiving(service: Service, context: RequestContext) -> Generator[None]:
    """Time the upload and the checks inside the block, and count a client that disconnects."""
    try:
        yield
    except ClientDisconnect:
        service.metrics.aborted.labels("upload", "client").inc()
        raise
    finally:
        context.record("receive", context.started_s, context.received_s)
        if context.received_s is not None:
            context.record("validate", context.received_s)


@dataclass(frozen=True)
class Lifecycle(Generic[Reply]):
    """Runner of one request's work; `deadline_s` is a reading of `time.monotonic()`."""

    service: Service
    context: RequestContext
    handler: Handler[Reply]
    deadline_s: float

    async def run(self, work: Coroutine[Any, Any, Result], receive: Receive) -> Result:
        """Run work until it ends, the client disconnects, the deadline passes or the service shuts down.

        Args:
            work: The work.
            receive: The request's ASGI receive; its body must have been read.

        Raises:
            ClientDisconnect: If the client disconnects.
            RequestError: 504 or 503, after cancelling the work.
        """
        task = asyncio.create_task(work)
        gone = asyncio.create_task(wait_for_disconnect(receive))
        self.service.tasks.add(task)
        try:
            timeout_s = max(0.0, self.deadline_s - time.monotonic())
            done, _ = await asyncio.wait({task, gone}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if task in done and not task.cancelled():
                return task.result()
            by: AbortedBy = "shutdown" if task in done else "client" if gone in done else "deadline"
            self.service.metrics.aborted.labels(self.context.phase, by).inc()
            raise self.abort_error(by)
        finally:
            self.service.tasks.discard(task)
            for each in (task, gone):
                each.cancel()
            await asyncio.gather(task, gone, return_exceptions=True)

    def abort_error(self, by: AbortedBy) -> Exception:
        """Return the error of a request whose work was cancelled."""
        match by:
            case "client":
                return ClientDisconnect()
            case "shutdown":
                return RequestError("shutting_down", "The service shut down before it completed the answer.")
            case _:
                limit = round((self.deadline_s - self.context.started_s) * 1000)
                return RequestError(
                    "deadline_exceeded",
                    f"The answer was not complete after {limit} ms.",
                    limit=limit,
                    hint="Raise `timeout_ms`, or lower `max_tokens`.",
                )

    async def stream(self, emit: Emit, receive: Receive) -> ServerSentEvent | None:
        """Answer as a stream of events; return the event of an error, or None."""
        context, metrics = self.context, self.service.metrics
        try:
            await self.run(self.emit_all(emit), receive)
        except ClientDisconnect as error:
            context.outcome = to_request_error(error).code
            raise
        except Exception as error:
            fault = self.cut_short(to_request_error(error))
            context.outcome = fault.code
            metrics.stream_errors.labels(fault.code).inc()
            if fault.code == "internal_error":
                logger.error("stream failed", exc_info=error, extra={"request_id": context.request_id})
            return self.handler.error_event(fault.body(context.request_id))
        return None

    async def emit_all(self, emit: Emit) -> None:
        """Answer and emit every event, the last ones included."""
        for event in self.handler.last_events(await self.handler.answer(emit)):
            await emit(event)

    def cut_short(self, error: RequestError) -> RequestError:
        """Add the partial trace to the error of a deadline."""
        if error.code == "deadline_exceeded":
            error.partial = self.handler.partial()
        return error


async def decode_clip(
    service: Service, context: RequestContext, data: bytes, *, track: int | None = None, channel: Channel = "mix"
) -> Waveform:
    """Decode a clip in the sandbox, charge its length to the caller and count it; cancelling kills the decoder.

    Args:
        track: Audio track to decode, from 1; None for the file's default.
        channel: Channel to use.

    Raises:
        AudioError: If the clip cannot be used.
        RequestError: 429, if the caller has no seconds of audio left.
    """
    metrics = service.metrics
    started_s = time.monotonic()
    with metrics.decoding.track_inprogress():
        async with contextlib.AsyncExitStack() as stack:
            with context.timing("decode_wait"):
                await stack.enter_async_context(service.decode_limiter.slot(context.priority))
            with context.timing("decode"):
                decoded = await service.decoder_pool.decode(data, track=track, channel=channel)
        waveform = replace(decoded, channel=channel)
        if context.tenant is not None:
            await context.tenant.charge(waveform.duration_s)
        with context.timing("inspect"):
            await service.in_pool(precompute_quality, waveform)
    context.decode_s = time.monotonic() - started_s
    record_clip(service, len(data), waveform.codec, waveform.duration_s, waveform.quality)
    return waveform


def record_clip(service: Service, num_bytes: int, codec: str, duration_s: float, quality: Quality) -> None:
    """Count a decoded clip or recording in the metrics."""
    metrics = service.metrics
    metrics.audio_bytes.observe(num_bytes)
    metrics.audio_duration.observe(duration_s)
    metrics.audio_codec.labels(codec).inc()
    metrics.audio_silence_ratio.observe(quality.silence_ratio)


def precompute_quality(waveform: Waveform) -> None:
    """Compute measures and the silence of a clip, stored in the waveform, because they read every sample."""
    _ = waveform.quality, waveform.sha256
    if waveform.duration_s <= WINDOW_S:
        _ = waveform.fitted


async def wait_for_disconnect(receive: Receive) -> None:
    """Return when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
