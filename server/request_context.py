"""Context of one HTTP request, shared by reply, log line and metrics.

It holds names, numbers and clock readings, never audio or text, so all of it may be logged.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, MutableMapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from server.telemetry.labels import Phase, Priority, Stage
from server.telemetry.stages import Fact, SectionTime, StageTime

if TYPE_CHECKING:
    from opentelemetry.trace import Span

    from server.quotas import Tenant

SCOPE_KEY = "hyper.context"


@dataclass
class RequestContext:
    """Identity, phase and figures of one request, from the middleware to the handlers and back.

    Attributes:
        request_id: Generated, or the client's `x-request-id` if it is a plain token.
        is_body_complete: Whether the whole body has arrived.
        started_s: `time.monotonic()` at the first byte of the request; all timings count from here.
        tenant: Account of the request's key; None if the service is open to all.
        priority: Its class in every queue.
        received_s: Time of the complete body, by the same clock.
        decode_s: Seconds to decode the clip, including the wait for a decoder.
        phase: Progress of the request, for the abort counter.
        outcome: "ok", or the code of the final error.
        facts: Additional fields of the log line.
        stages: Durations of the stages so far, for the metrics, the log line and the trace's spans.
        sections: Times of the trace's sections.
        started_ns: Wall clock at the start, in nanoseconds since 1970.
        span: The request's span, if tracing is on.
        traceparent: Identifier of the span for other services.
        trace_id: Identifier of the request's trace, ours or the caller's; None without a trace.
    """

    request_id: str
    is_body_complete: bool
    started_s: float = field(default_factory=time.monotonic)
    tenant: Tenant | None = None
    priority: Priority = "interactive"
    received_s: float | None = None
    decode_s: float | None = None
    num_body_bytes: int = 0
    phase: Phase = "upload"
    outcome: str = "ok"
    facts: dict[str, Fact] = field(default_factory=dict[str, Fact])
    stages: list[StageTime] = field(default_factory=list[StageTime])
    sections: list[SectionTime] = field(default_factory=list[SectionTime])
    started_ns: int = field(default_factory=time.time_ns)
    span: Span | None = None
    traceparent: str | None = None
    trace_id: str | None = None

    @property
    def tenant_name(self) -> str:
        """Return the name of the request's key, or an empty string; tenants share no engine cache."""
        return "" if self.tenant is None else self.tenant.key.name

    @classmethod
    def of(cls, scope: MutableMapping[str, Any]) -> RequestContext:
        """Return the context stored in an ASGI scope by the middleware."""
        context = scope[SCOPE_KEY]
        assert isinstance(context, cls)
        return context

    def elapsed_ms(self, until_s: float | None = None) -> float:
        """Return the milliseconds since the first byte, until now or until a reading of the same clock."""
        return ((time.monotonic() if until_s is None else until_s) - self.started_s) * 1000

    def wall_ns(self, moment_s: float) -> int:
        """Convert a clock reading to nanoseconds since 1970, by the wall clock at the request's start."""
        return self.started_ns + round((moment_s - self.started_s) * 1e9)

    def record(self, stage: Stage, started_s: float, ended_s: float | None = None) -> None:
        """Record a stage between two clock readings; the end defaults to now."""
        self.stages.append(StageTime(stage, (time.monotonic() if ended_s is None else ended_s) - started_s, started_s))

    @contextlib.contextmanager
    def timing(self, stage: Stage) -> Generator[None]:
        """Time a stage, also if it fails or is cancelled, because it has used the request's time."""
        started_s = time.monotonic()
        try:
            yield
        finally:
            self.record(stage, started_s)
