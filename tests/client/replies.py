"""HTTP server with given replies, to show a client the errors of unhealthy services."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Canned:
    """One reply; without a body the connection is closed."""

    body: bytes | None
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass
class Sent:
    """The requests so far."""

    url: str
    headers: list[dict[str, str]] = field(default_factory=list[dict[str, str]])
    bodies: list[bytes] = field(default_factory=list[bytes])


def error_reply(status: int, code: str, *, retryable: bool = False, **headers: str) -> Canned:
    """Write an error object of the API."""
    error = {
        "type": "service_unavailable_error",
        "code": code,
        "message": f"This is {code}.",
        "param": None,
        "request_id": "req_1",
        "retryable": retryable,
        "limit": None,
        "actual": None,
        "hint": None,
    }
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Canned(json.dumps({"error": error}).encode(), status, named)


@contextlib.contextmanager
def replying(*replies: Canned) -> Iterator[Sent]:
    """Serve these replies, one per request."""
    pending = list(replies)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            sent.headers.append({name.lower(): value for name, value in self.headers.items()})
            sent.bodies.append(self.rfile.read(int(self.headers.get("content-length", 0))))
            reply = pending.pop(0)
            if reply.body is None:
                self.close_connection = True
                return
            self.send_response(reply.status)
            for name, value in {"content-length": str(len(reply.body)), **reply.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(reply.body)

        do_GET = do_POST  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        sent = Sent(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield sent
        finally:
            server.shutdown()
            thread.join(10)
    assert not pending, f"{len(pending)} replies were not used"


def stream_of(*events: tuple[str, Any]) -> Canned:
    """Write a stream of events."""
    body = "".join(f"event: {name}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n" for name, data in events)
    return Canned(body.encode(), headers={"content-type": "text/event-stream; charset=utf-8"})
