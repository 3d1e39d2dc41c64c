"""HTTP/1.1 connections before their first request: limits and error replies missing from uvicorn.

An application is called only after a complete request head. Without this class, connections would have no deadline, no
error object and no limit on their number until then.
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
    """HTTP/1.1 connection of one client; `connection_type` sets its limits."""

    head_timeout_s: float
    max_connections: int
    metrics: Metrics
    head_timer: asyncio.TimerHandle | None = None
    has_bytes = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Accept the connection, or drop it above the limit."""
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            # No reply: clients with so many connections do not read it.
            self.metrics.connections_dropped.inc()
            transport.abort()
            return
        self.start_head_timer()

    def data_received(self, data: bytes) -> None:
        """Read data; the head timer ends with a complete head."""
        is_between = self.conn.their_state in (h11.IDLE, h11.DONE) and not self.conn.trailing_data[0]
        if is_between and data[:1] in (b"\r", b"\n"):
            # Old clients send a line break behind a body (RFC 9112, section 2.2).
            data = data.lstrip(b"\r\n")
            if not data:
                return
        self.has_bytes = True
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            self.start_head_timer()
        else:
            self.stop_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timer."""
        self.stop_head_timer()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """Prepare for the next request; its head has its own timer, from its first byte."""
        self.has_bytes = False
        behind, _ = self.conn.trailing_data
        if (num_breaks := len(behind) - len(behind.lstrip(b"\r\n"))) > 0:
            self.conn._receive_buffer.maybe_extract_at_most(num_breaks)  # pyright: ignore[reportPrivateUsage]
        super().on_response_complete()

    def start_head_timer(self) -> None:
        """Start the head timer unless it runs."""
        if self.head_timer is None:
            self.head_timer = self.loop.call_later(self.head_timeout_s, self.end_late)

    def stop_head_timer(self) -> None:
        """Stop the head timer."""
        if self.head_timer is not None:
            self.head_timer.cancel()
            self.head_timer = None

    def end_late(self) -> None:
        """Close a connection with a late head; reply with an error unless no byte has arrived."""
        self.head_timer = None
        if self.transport.is_closing():
            return
        if not self.has_bytes:
            self.transport.close()
            return
        message = f"The request head was not complete after {self.head_timeout_s:g} s."
        hint = "Send all headers at once."
        self.refuse(RequestError("head_timeout", message, limit=self.head_timeout_s, hint=hint))

    def send_400_response(self, msg: str) -> None:
        """Reply to invalid or oversized HTTP with an error object; called while h11's error is handled."""
        error = sys.exception()
        if isinstance(error, h11.RemoteProtocolError) and error.error_status_hint == 431:
            limit = self.conn._max_incomplete_event_size  # pyright: ignore[reportPrivateUsage]
            message = f"The request head exceeds {limit} bytes."
            self.refuse(RequestError("headers_too_large", message, limit=limit))
        else:
            self.refuse(RequestError("invalid_http", "The request is not valid HTTP/1.1."))

    def refuse(self, fault: RequestError) -> None:
        """Write an error reply and close the connection."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            # A reply is already being sent, so an error cannot be reported.
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
    """Return the connection class for uvicorn, with this service's limits."""
    limits: dict[str, Any] = {
        "head_timeout_s": settings.head_timeout_s,
        "max_connections": settings.max_connections,
        "metrics": metrics,
    }
    return type("Connection", (Connection,), limits)
