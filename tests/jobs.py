"""Requests about jobs, for tests over HTTP."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import httpx

from tests.serving import QUESTION, tone, wait_for

ENDED = ("succeeded", "failed", "cancelled", "expired")


def wait_until_up(client: httpx.Client) -> None:
    """Wait until the storage of jobs is open."""
    wait_for(lambda: client.get("/v1/jobs").status_code == 200, timeout_s=120)


def post_job(
    client: httpx.Client, clip: bytes | None = None, headers: Mapping[str, str] | None = None, **fields: Any
) -> httpx.Response:
    """Send a job as a form."""
    if "questions" not in fields:
        fields.setdefault("question", QUESTION)
    return client.post("/v1/jobs", data=fields, files={"file": ("clip", clip or tone())}, headers=headers)


def create(client: httpx.Client, clip: bytes | None = None, **fields: Any) -> str:
    """Send a job and return its address."""
    response = post_job(client, clip, **fields)
    assert response.status_code == 202, response.text
    return response.headers["location"]


def wait_for_end(client: httpx.Client, address: str, timeout_s: float = 120) -> dict[str, Any]:
    """Wait for the end of a job and return it."""
    deadline_s = time.monotonic() + timeout_s
    while (job := client.get(address).json())["status"] not in ENDED:
        assert time.monotonic() < deadline_s, job
        time.sleep(0.05)
    return job


def job_events(text: str) -> list[tuple[str, str]]:
    """Return ids and names of server-sent events."""
    found: list[tuple[str, str]] = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n") if line and not line.startswith(":"))
        if fields:
            found.append((fields["id"], fields["event"]))
    return found
