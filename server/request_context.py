"""What the service remembers about one HTTP request while it lasts: the thread that ties reply, log line and metrics.

It holds names, numbers and clock readings, never audio or text, so all of it may be logged.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, MutableMapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from server.api_keys import Priority
from server.telemetry.labels import Phase, Stage

if TYPE_CHECKING:
    from opentelemetry.trace import Span

    from server.quotas import Tenant

SCOPE_KEY = "hyper.context"

Fact = str | int | float | bool | None


class StageTime(NamedTuple):
    """Says how long a request was in a stage, and since which reading of the clock; None where it was in pieces."""

    stage: Stage
    seconds: float
    started_s: float | None = None


class SectionTime(NamedTuple):
    """Says when a section of the trace was written; its name, no words of it."""

    section: str
    started_s: float
    ended_s: float


@dataclass
class RequestContext:
    """Carries one request's identity, phase and figures from the edge to the handlers and back.

    Attributes:
        request_id: Ours, or the client's `x-request-id` where it is a plain token.
        started_s: `time.monotonic()` at the first byte of the request; all timings count from here.
        tenant: The account of the key that came with the request; None where the service is open to all.
        priority: Its class in every line.
        received_s: The same clock when the body was complete.
        decode_s: Seconds that decoding the clip took, its wait for a decoder included.
        phase: How far the request has come, for the abort counter.
        outcome: "ok" or the code of the fault that ended it.
        facts: Further fields of the log line.
        stages: Where the time went, as far as the request came: for the metrics, the log line and the trace's spans.
        sections: The same of what the model wrote.
        span: The request's span, where traces are made.
        traceparent: How others name that span.
        trace_id: The trace that the request belongs to: ours, or the caller's; None where there is none.
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
        """Whose request it is; callers of different names share nothing that the engine keeps."""
        return "" if self.tenant is None else self.tenant.key.name

    @classmethod
    def of(cls, scope: MutableMapping[str, Any]) -> RequestContext:
        """Returns the context that the edge put into an ASGI scope."""
        context = scope[SCOPE_KEY]
        assert isinstance(context, cls)
        return context

    def elapsed_ms(self, until_s: float | None = None) -> float:
        """Returns milliseconds since the first byte came in, until now or until a reading of the same clock."""
        return ((time.monotonic() if until_s is None else until_s) - self.started_s) * 1000

    def wall_ns(self, moment_s: float) -> int:
        """Returns a reading of the clock as nanoseconds since 1970, by the wall clock when the request began."""
        return self.started_ns + round((moment_s - self.started_s) * 1e9)

    def record(self, stage: Stage, started_s: float, ended_s: float | None = None) -> None:
        """Says that a stage took from then to then, or until now."""
        self.stages.append(StageTime(stage, (time.monotonic() if ended_s is None else ended_s) - started_s, started_s))

    @contextlib.contextmanager
    def timing(self, stage: Stage) -> Generator[None]:
        """Times a stage, also one that fails or is cut short: that is where the request has spent its time."""
        started_s = time.monotonic()
        try:
            yield
        finally:
            self.record(stage, started_s)
