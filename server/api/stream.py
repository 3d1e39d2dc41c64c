"""Server-sent events: framing, pings during silence, and an end in bounded time.

The module is independent of questions and clips; an endpoint supplies the events.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from hyper_model.sse import to_json
from server.request_context import RequestContext
from server.telemetry.stages import StageTime

# Time for an unresponsive client to accept the last event. It is less than the server's timeout for connections at its
# shutdown.
LAST_EVENT_TIMEOUT_S = 3.0


@dataclass(frozen=True)
class ServerSentEvent:
    """One event.

    Attributes:
        data: Content, written as JSON; a string is written unchanged, such as OpenAI's `[DONE]`.
        name: The event's type; None omits the line, as in OpenAI's streams.
        id: The event's id, which a client sends back as `Last-Event-ID`; None omits the line.
    """

    data: Mapping[str, Any] | str
    name: str | None = None
    id: str | None = None

    def encode(self) -> bytes:
        """Return the event as bytes; JSON has no raw line break, so one `data` line is enough."""
        data = self.data if isinstance(self.data, str) else to_json(self.data)
        name = "" if self.name is None else f"event: {self.name}\n"
        id_line = "" if self.id is None else f"id: {self.id}\n"
        return f"{id_line}{name}data: {data}\n\n".encode()


Emit = Callable[[ServerSentEvent], Awaitable[None]]

Produce = Callable[[Emit, Receive], Awaitable[ServerSentEvent | None]]
"""Function to emit the events of a stream; it returns the event of an error, or None."""


async def discard(event: ServerSentEvent) -> None:
    """Drop an event: the `Emit` of a reply that is not streamed."""


class EventStream(Response):
    """ASGI response for events as they are produced, with pings during silence to keep the connection through proxies.

    Args:
        produce: Emits the events; called after the stream has begun.
        held: The request's resources (its place in the service), released at the end of the stream; None for none.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        produce: Produce,
        context: RequestContext,
        *,
        ping_interval_s: float,
        held: contextlib.AsyncExitStack | None = None,
    ) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.produce = produce
        self.context = context
        self.ping_interval_s = ping_interval_s
        self.held = held or contextlib.AsyncExitStack()
        self.last_sent_s = time.monotonic()
        self.lock = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream as an ASGI application."""
        async with self.held:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                error_event = await self.pump(receive, send)
            except ClientDisconnect:
                return
            await self.end(send, b"" if error_event is None else error_event.encode())

    async def pump(self, receive: Receive, send: Send) -> ServerSentEvent | None:
        """Write events and pings to the end."""
        serialize_s = 0.0

        async def emit(event: ServerSentEvent) -> None:
            nonlocal serialize_s
            started_s = time.perf_counter()
            body = event.encode()
            serialize_s += time.perf_counter() - started_s
            await self.write(send, body)

        pings = asyncio.create_task(self.ping(send))
        try:
            return await self.produce(emit, receive)
        finally:
            self.context.stages.append(StageTime("serialize", serialize_s))
            pings.cancel()
            await asyncio.gather(pings, return_exceptions=True)

    async def end(self, send: Send, last_event: bytes) -> None:
        """Close the stream in bounded time: an unresponsive client must not keep its place forever."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_EVENT_TIMEOUT_S):
                if last_event:
                    await self.write(send, last_event)
                await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def ping(self, send: Send) -> None:
        """Write a comment after every interval of silence."""
        while True:
            await asyncio.sleep(max(0.0, self.last_sent_s + self.ping_interval_s - time.monotonic()))
            if time.monotonic() - self.last_sent_s >= self.ping_interval_s:
                await self.write(send, b": ping\n\n")

    async def write(self, send: Send, body: bytes) -> None:
        """Send bytes, one writer at a time."""
        async with self.lock:
            await send({"type": "http.response.body", "body": body, "more_body": True})
            self.last_sent_s = time.monotonic()
