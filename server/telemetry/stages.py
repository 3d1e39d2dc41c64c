"""Times of a request, and the interface of a request for tracers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from server.telemetry.labels import Phase, Priority, Stage

if TYPE_CHECKING:
    from opentelemetry.trace import Span

Fact = str | int | float | bool | None
"""A field of a request's log line."""


class StageTime(NamedTuple):
    """Duration of a request's stage, and its start time; None for a stage in several pieces."""

    stage: Stage
    seconds: float
    started_s: float | None = None


class SectionTime(NamedTuple):
    """Start and end of a section of the trace, with its name but no text."""

    section: str
    started_s: float
    ended_s: float


class TracedRequest(Protocol):
    """The part of a `RequestContext` used for a span; see there for its attributes."""

    span: Span | None
    traceparent: str | None
    trace_id: str | None

    @property
    def request_id(self) -> str: ...
    @property
    def started_s(self) -> float: ...
    @property
    def outcome(self) -> str: ...
    @property
    def phase(self) -> Phase: ...
    @property
    def priority(self) -> Priority: ...
    @property
    def num_body_bytes(self) -> int: ...
    @property
    def facts(self) -> Mapping[str, Fact]: ...
    @property
    def stages(self) -> Sequence[StageTime]: ...
    @property
    def sections(self) -> Sequence[SectionTime]: ...

    def wall_ns(self, moment_s: float) -> int:
        """Return a clock reading as nanoseconds since 1970."""
        ...
