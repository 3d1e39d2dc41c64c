"""Records of jobs, webhook deliveries and webhook secrets, as they are stored.

The module is independent of HTTP, databases and engines.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from server.telemetry.labels import JobStatus

JobKind = Literal["qa", "batch"]
STATUSES: tuple[JobStatus, ...] = get_args(JobStatus)
ACTIVE: tuple[JobStatus, ...] = ("queued", "running")
"""Statuses of jobs that still have work."""

StepOutcome = dict[str, Any]
"""Outcome of a step, as JSON: `{"reply": {...}}`, or `{"error": {...}}` with an error object.

A step of a batch has `line`, its line of the result files; beside an error too. That of a window has `window`, its
perception."""

ReadClip = Callable[[], Awaitable[bytes]]
"""Reads the clip of a job, or the line of a batch's step."""


@dataclass(frozen=True)
class Job:
    """One job.

    Attributes:
        tenant: Name of the key that sent it; empty if the service is open to all.
        request: The checked fields of the request, as JSON.
        clip: Name of the clip in the spool folder, or of the lines of a batch; None if the job has none.
        num_steps: Number of steps: windows and questions, or lines.
        num_done: Number of finished steps.
        audio_s: Seconds of audio, charged when the job was taken.
        keep_s: Seconds to keep the job after its end.
        created_s, started_s, ended_s, expires_s: Seconds since 1970.
        result, error: The outcome as JSON; both None before the end. A batch counts its failed lines in `result`.
    """

    id: str
    tenant: str
    kind: JobKind
    request: dict[str, Any]
    num_steps: int
    keep_s: float
    clip: str | None = None
    audio_s: float = 0.0
    webhook_url: str | None = None
    status: JobStatus = "queued"
    num_done: int = 0
    created_s: float = field(default_factory=time.time)
    started_s: float | None = None
    ended_s: float | None = None
    expires_s: float | None = None
    result: Any = None
    error: dict[str, Any] | None = None

    @property
    def is_active(self) -> bool:
        """Whether the job still has work."""
        return self.status in ACTIVE


@dataclass(frozen=True)
class Ending:
    """End of a job: its status, and its result or its error."""

    status: JobStatus
    result: Any = None
    error: dict[str, Any] | None = None


@dataclass(frozen=True)
class Delivery:
    """One attempt to deliver a webhook.

    Attributes:
        event_id: The `webhook-id` header, the same for every attempt.
        attempt: Its number, from 1.
        at_s: Time of the attempt, in seconds since 1970.
        seconds: Its duration.
        status_code: Status of the receiver's reply; None without a reply.
        error: Reason of a failure, for people; None after a success.
        next_at_s: Time of the next attempt; None if there is none.
    """

    job_id: str
    event_id: str
    attempt: int
    at_s: float
    seconds: float
    status_code: int | None
    error: str | None
    next_at_s: float | None


@dataclass(frozen=True)
class WebhookSecret:
    """A secret that signs the webhooks of one key.

    Attributes:
        secret: `whsec_` and the random bytes as base64.
        expires_s: End of a replaced secret, in seconds since 1970; None for the current one.
    """

    id: str
    tenant: str
    secret: str
    created_s: float
    expires_s: float | None


def new_id(prefix: str) -> str:
    """Return an unguessable id."""
    return f"{prefix}_{secrets.token_hex(16)}"
