"""A client's connection before there is a request: what uvicorn leaves without a limit or answers in its own words.

Applications see a request when its head is complete. Until then nothing of ours would run: no deadline, no error
object, and no bound on how many connections just stand there.
"""

from __future__ import annotations

import asyncio
import json
import sys
import uuid
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from server.errors import RequestError
from server.settings import Settings
from server.telemetry.metrics import Metrics


class Connection(H11Protocol):
    """Speaks HTTP/1.1 with one client; made by `connection_type`, which sets the limits."""

    head_timeout_s: float
    max_connections: int
    metrics: Metrics
    head_timer: asyncio.TimerHandle | None = None
    has_bytes = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Takes the connection, or drops it where there are too many."""
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            # Without a word: who opens so many does not read.
            self.metrics.connections_dropped.inc()
            transport.abort()
            return
        self.start_head_timer()

    def data_received(self, data: bytes) -> None:
        """Reads on; the time for the head ends with the head."""
        self.has_bytes = True
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            self.start_head_timer()
        else:
            self.stop_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forgets the timer."""
        self.stop_head_timer()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """Waits for the next request: its head has its own time, from its first byte."""
        self.has_bytes = False
        super().on_response_complete()

    def start_head_timer(self) -> None:
        """Starts the time for the head, once."""
        if self.head_timer is None:
            self.head_timer = self.loop.call_later(self.head_timeout_s, self.end_late)

    def stop_head_timer(self) -> None:
        """Ends it."""
        if self.head_timer is not None:
            self.head_timer.cancel()
            self.head_timer = None

    def end_late(self) -> None:
        """Closes a connection whose head did not come in time; one that never sent a byte asked nothing."""
        self.head_timer = None
        if self.transport.is_closing():
            return
        if not self.has_bytes:
            self.transport.close()
            return
        message = f"The head of the request took longer than {self.head_timeout_s:g} s."
        self.refuse(RequestError("head_timeout", message, limit=self.head_timeout_s))

    def send_400_response(self, msg: str) -> None:
        """Answers what is no HTTP, or too much of it, with an error object; called while h11's error is handled."""
        error = sys.exception()
        if isinstance(error, h11.RemoteProtocolError) and error.error_status_hint == 431:
            limit = self.conn._max_incomplete_event_size  # pyright: ignore[reportPrivateUsage]
            message = f"The head of a request may have {limit} bytes."
            self.refuse(RequestError("headers_too_large", message, limit=limit))
        else:
            self.refuse(RequestError("invalid_http", "This is not a valid HTTP/1.1 request."))

    def refuse(self, fault: RequestError) -> None:
        """Writes an error and closes the connection."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            # A reply is on its way: there is no honest way to say anything else.
            self.transport.close()
            return
        self.metrics.rejected.labels(str(fault.status), fault.code).inc()
        request_id = f"req_{uuid.uuid4().hex}"
        body = json.dumps(fault.body(request_id)).encode()
        headers = [
            ("content-type", "application/json"),
            ("content-length", str(len(body))),
            ("x-request-id", request_id),
            ("connection", "close"),
        ]
        for event in (h11.Response(status_code=fault.status, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def connection_type(settings: Settings, metrics: Metrics) -> type[Connection]:
    """Returns the class that uvicorn makes of each connection, with this service's limits."""
    limits: dict[str, Any] = {
        "head_timeout_s": settings.head_timeout_s,
        "max_connections": settings.max_connections,
        "metrics": metrics,
    }
    return type("Connection", (Connection,), limits)
