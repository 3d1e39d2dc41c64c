"""Send one question over HTTP and record its outcome and latency, counted from its due time.

Replies and server-sent events are read by their public names only, without types of the service.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import aiohttp

QA_PATH = "/v1/audio/qa"
FIRST_TOKEN_EVENTS = ("section.start", "section.delta", "answer.delta")
CANCELLED = "client_cancelled"
"""Code of requests cancelled by the client on purpose."""

# The service closes idle connections after 5 s, so the client drops them earlier.
KEEP_ALIVE_S = 2.0


@dataclass(frozen=True)
class Question:
    """One request, ready to send.

    Attributes:
        body: The whole multipart body, built before the measurement.
        headers: Content type and further headers.
        is_stream: True for a reply as events.
        cancel_after_s: Time of the client's cancellation, from the due time; None for no cancellation.
    """

    body: bytes
    headers: Mapping[str, str]
    is_stream: bool = False
    cancel_after_s: float | None = None


@dataclass(frozen=True)
class Outcome:
    """The outcome of one request.

    Attributes:
        due_s: Due time, as a reading of `time.perf_counter()`.
        late_s: Delay of the driver itself, not of the service.
        e2e_s: From the due time to the last byte or the failure.
        ttft_s: From the due time to the first event with model output; None without one.
        error: None for an answer. Else the service's error code, `http_NNN` for a reply without one, or `client_...`
            for a failure unseen or unanswered by the service.
        is_sent: True if the request's head was sent; a client may cancel earlier, without any request.
        status: Status of the reply; None without a reply.
        has_retry_after: True if the reply has Retry-After.
        timings_ms: Timings of the stages from the reply.
    """

    due_s: float
    late_s: float
    e2e_s: float
    ttft_s: float | None
    error: str | None
    is_sent: bool = True
    status: int | None = None
    has_retry_after: bool = False
    timings_ms: Mapping[str, float] = field(default_factory=dict[str, float])


def open_session(url: str, key: str | None, timeout_s: float) -> aiohttp.ClientSession:
    """Open a session with unlimited connections, since an open loop never waits for one.

    Args:
        key: The API key, if the service requires one.
        timeout_s: Maximum silence of a reply.
    """

    async def note_sent(_: aiohttp.ClientSession, context: SimpleNamespace, __: object) -> None:
        context.trace_request_ctx.is_sent = True

    trace = aiohttp.TraceConfig()
    trace.on_request_headers_sent.append(note_sent)
    return aiohttp.ClientSession(
        url,
        trace_configs=[trace],
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=timeout_s, sock_read=timeout_s),
        headers={} if key is None else {"authorization": f"Bearer {key}"},
    )


async def ask(session: aiohttp.ClientSession, question: Question, due_s: float) -> Outcome:
    """Send a question and read the whole reply. Failures are outcomes, never exceptions."""
    late_s = time.perf_counter() - due_s
    reply = _Reply(due_s)
    try:
        async with asyncio.timeout(_left(question, due_s)):
            await reply.read(session, question)
    except TimeoutError as fault:
        # aiohttp's own timeouts have this class too.
        reply.error = "client_timeout" if isinstance(fault, aiohttp.ServerTimeoutError) else CANCELLED
    except (aiohttp.ClientError, OSError) as fault:
        reply.error = f"client_{type(fault).__name__}"
    return Outcome(
        due_s,
        late_s,
        time.perf_counter() - due_s,
        reply.ttft_s,
        reply.error,
        reply.is_sent,
        reply.status,
        reply.has_retry_after,
        reply.timings_ms,
    )


def _left(question: Question, due_s: float) -> float | None:
    if question.cancel_after_s is None:
        return None
    return max(0.0, due_s + question.cancel_after_s - time.perf_counter())


class _Reply:
    """State of a partial reply, kept outside of the reader, since a cancellation may interrupt it at any point."""

    def __init__(self, due_s: float) -> None:
        self.due_s = due_s
        self.ttft_s: float | None = None
        self.error: str | None = "client_no_done_event"
        self.is_sent = False
        self.status: int | None = None
        self.has_retry_after = False
        self.timings_ms: Mapping[str, float] = {}

    async def read(self, session: aiohttp.ClientSession, question: Question) -> None:
        async with session.post(
            QA_PATH, data=question.body, headers=question.headers, trace_request_ctx=self
        ) as response:
            self.status = response.status
            self.has_retry_after = "retry-after" in response.headers
            if response.status != 200:
                self.error = error_code(await response.read(), f"http_{response.status}")
            elif question.is_stream:
                await self.read_events(response)
            else:
                self.timings_ms = timings(await response.read())
                self.error = None

    async def read_events(self, response: aiohttp.ClientResponse) -> None:
        reader = EventReader()
        async for chunk in response.content.iter_any():
            for name, data in reader.feed(chunk):
                if self.ttft_s is None and name in FIRST_TOKEN_EVENTS:
                    self.ttft_s = time.perf_counter() - self.due_s
                if name == "done":
                    self.timings_ms = timings(data)
                    self.error = None
                elif name == "error":
                    self.error = error_code(data, "error_event")
                    return


class EventReader:
    """An incremental reader of server-sent events, without keep-alive comments.

    It reads bytes of any client in few operations: under load, the reader must not compete with the service for cores.
    """

    def __init__(self) -> None:
        self.rest = b""

    def feed(self, chunk: bytes) -> Iterator[tuple[str, bytes]]:
        """Yield (name, data) of each event completed by these bytes."""
        *blocks, self.rest = (self.rest + chunk).split(b"\n\n")
        for block in blocks:
            name, data = "message", list[bytes]()
            for line in block.split(b"\n"):
                if line.startswith(b"event:"):
                    name = line.removeprefix(b"event:").strip().decode()
                elif line.startswith(b"data:"):
                    data.append(line.removeprefix(b"data:").removeprefix(b" "))
            if data:
                yield name, b"\n".join(data)


def timings(body: bytes) -> dict[str, float]:
    """Return the milliseconds of each stage from a reply; empty for other bodies."""
    with contextlib.suppress(ValueError, TypeError, LookupError, AttributeError):
        stages: dict[str, Any] = json.loads(body)["timings_ms"]
        return {name: value for name, value in stages.items() if isinstance(value, int | float)}
    return {}


def error_code(body: bytes, default: str) -> str:
    """Return `error.code` of the service's error object, or the default for other bodies."""
    try:
        parsed: Any = json.loads(body)
        return str(parsed["error"]["code"])
    except (ValueError, TypeError, LookupError):
        return default
