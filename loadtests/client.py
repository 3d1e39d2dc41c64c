"""Asks one question over HTTP and notes what came of it and when, counted from the moment it was due.

Reads replies and server-sent events by their public names only; it knows no type of the service and no meaning of a
section.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import aiohttp

QA_PATH = "/v1/audio/qa"
FIRST_TOKEN_EVENTS = ("section.start", "section.delta", "answer.delta")
CANCELLED = "client_cancelled"
"""What a request that its client gave up on purpose counts under."""

# The service closes idle connections after 5 s; one that is about to be closed must not be given to a request.
KEEP_ALIVE_S = 2.0


@dataclass(frozen=True)
class Question:
    """One request, ready to be sent.

    Attributes:
        body: The whole multipart body, made before the clock runs.
        headers: Its content type, and what the request says besides.
        is_stream: Whether the reply comes as events.
        cancel_after_s: When the client leaves, counted from when the request was due; None where it stays.
    """

    body: bytes
    headers: Mapping[str, str]
    is_stream: bool = False
    cancel_after_s: float | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of one request.

    Attributes:
        due_s: When it was to be sent, as a reading of `time.perf_counter()`.
        late_s: How much later than that the driver sent it: its own fault, not the service's.
        e2e_s: From when it was due to the last byte, or until it failed.
        ttft_s: From when it was due to the first event that carries model output; None when none came.
        error: None for an answer; else the service's error code, `http_NNN` for a reply without one, or `client_...`
            for a failure that the service never saw or never answered.
        is_sent: Whether its head left; a client may have given up before, and then there was no request.
        status: Of the reply; None when none came.
        has_retry_after: Whether the reply said when to come again.
        timings_ms: The reply's own account of its stages.
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
    """Opens what holds the connections: as many as there are requests, since an open loop never waits for one.

    Args:
        key: The API key, where the service asks for one.
        timeout_s: How long a reply may be silent.
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
    """Sends a question and reads the reply to its end. Failures are outcomes, never exceptions."""
    late_s = time.perf_counter() - due_s
    found = _Reply(due_s)
    try:
        async with asyncio.timeout(_left(question, due_s)):
            await found.read(session, question)
    except TimeoutError as fault:
        # aiohttp's own timeouts are of this class too.
        found.error = "client_timeout" if isinstance(fault, aiohttp.ServerTimeoutError) else CANCELLED
    except (aiohttp.ClientError, OSError) as fault:
        found.error = f"client_{type(fault).__name__}"
    return Outcome(
        due_s,
        late_s,
        time.perf_counter() - due_s,
        found.ttft_s,
        found.error,
        found.is_sent,
        found.status,
        found.has_retry_after,
        found.timings_ms,
    )


def _left(question: Question, due_s: float) -> float | None:
    if question.cancel_after_s is None:
        return None
    return max(0.0, due_s + question.cancel_after_s - time.perf_counter())


class _Reply:
    """What is known of a reply so far; kept outside of the reading, which may be cut short at any point."""

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
        async for name, data in events(response.content.iter_any()):
            if self.ttft_s is None and name in FIRST_TOKEN_EVENTS:
                self.ttft_s = time.perf_counter() - self.due_s
            if name == "done":
                self.timings_ms = timings(data)
                self.error = None
            elif name == "error":
                self.error = error_code(data, "error_event")
                return


async def events(chunks: AsyncIterator[bytes]) -> AsyncIterator[tuple[str, bytes]]:
    """Yields (name, data) of each server-sent event; comments, which keep a connection alive, are passed over."""
    rest = b""
    async for chunk in chunks:
        *blocks, rest = (rest + chunk).split(b"\n\n")
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
    """Returns the milliseconds of each stage that a reply tells of; none where it is something else."""
    with contextlib.suppress(ValueError, TypeError, LookupError, AttributeError):
        found: dict[str, Any] = json.loads(body)["timings_ms"]
        return {name: value for name, value in found.items() if isinstance(value, int | float)}
    return {}


def error_code(body: bytes, default: str) -> str:
    """Returns `error.code` of the service's error object, or the default where the body is something else."""
    try:
        parsed: Any = json.loads(body)
        return str(parsed["error"]["code"])
    except (ValueError, TypeError, LookupError):
        return default
