"""Asks one question over HTTP and notes when the first and the last of the answer came.

Reads server-sent events by their public names only; it knows no type of the service and no meaning of a section.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

FIRST_TOKEN_EVENTS = ("section.start", "section.delta", "answer.delta")


@dataclass(frozen=True)
class Outcome:
    """What became of one request.

    Attributes:
        started_s: Reading of `time.perf_counter()` when the request was sent.
        e2e_s: Until the last byte, or until it failed.
        ttft_s: Until the first event that carries model output; None when none came.
        error: None for an answer; else the service's error code, `http_NNN` for a reply without one, or `client_...`
            for a failure that the service never saw or never answered.
    """

    started_s: float
    e2e_s: float
    ttft_s: float | None
    error: str | None


async def ask(client: httpx.AsyncClient, clip: Path, question: str) -> Outcome:
    """Sends one clip and question as a stream and reads it to its end. Failures are outcomes, never exceptions."""
    started_s = time.perf_counter()
    ttft_s = None
    error: str | None = "client_no_done_event"
    try:
        async with client.stream(
            "POST",
            "/v1/audio/qa",
            files={"file": (clip.name, clip.read_bytes())},
            data={"question": question, "stream": "true"},
        ) as response:
            if response.status_code != httpx.codes.OK:
                error = error_code(await response.aread(), f"http_{response.status_code}")
            else:
                async for name, data in events(response.aiter_lines()):
                    if ttft_s is None and name in FIRST_TOKEN_EVENTS:
                        ttft_s = time.perf_counter() - started_s
                    if name == "done":
                        error = None
                    elif name == "error":
                        error = error_code(data.encode(), "error_event")
                        break
    except httpx.TimeoutException:
        error = "client_timeout"
    except httpx.TransportError as fault:
        error = f"client_{type(fault).__name__}"
    return Outcome(started_s, time.perf_counter() - started_s, ttft_s, error)


async def events(lines: AsyncIterator[str]) -> AsyncIterator[tuple[str, str]]:
    """Yields (name, data) of each server-sent event; comments, which keep a connection alive, are passed over."""
    name, data = "message", list[str]()
    async for line in lines:
        if not line:
            if data:
                yield name, "\n".join(data)
            name, data = "message", []
        elif line.startswith("event:"):
            name = line.removeprefix("event:").strip()
        elif line.startswith("data:"):
            data.append(line.removeprefix("data:").removeprefix(" "))


def error_code(body: bytes, default: str) -> str:
    """Returns `error.code` of the service's error object, or the default where the body is something else."""
    try:
        parsed: Any = json.loads(body)
        return str(parsed["error"]["code"])
    except (ValueError, TypeError, LookupError):
        return default
