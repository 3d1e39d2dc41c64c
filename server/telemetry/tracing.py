"""Traces over OTLP: one span per request with one child span per stage, configured by the OTEL_* variables.

Without an endpoint in the variables there is no tracer, and OpenTelemetry is not imported. Otherwise a request's span
starts with the request, so the reply can carry its ids. Its stages' spans are made at the end, from recorded times
(`RequestContext.stages`). Spans hold names, numbers and codes, but no audio, questions, answers or keys.
"""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING

from hyper_model.errors import HyperError
from server.telemetry.metrics import version
from server.telemetry.stages import SectionTime, TracedRequest

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
PROTOCOL = "http/protobuf"
STOP_TIMEOUT_S = 5.0

TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
PARENTS = {"features": "first_token", "engine_queue": "first_token", "prefill": "first_token"}
"""Stages inside another stage."""


def trace_id_of(traceparent: str) -> str | None:
    """Return the trace id of a W3C `traceparent`, or None for an invalid one."""
    matched = TRACEPARENT.fullmatch(traceparent)
    return matched[1] if matched else None


def tracer_from(environment: Mapping[str, str]) -> Tracer | None:
    """Build the tracer configured by the OTEL_* variables, or return None if tracing is off.

    Raises:
        HyperError: If the protocol is not supported, or the packages are not installed.
    """
    is_off = (
        not any(environment.get(name) for name in ENDPOINTS)
        or environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
        or environment.get("OTEL_TRACES_EXPORTER", "otlp").strip().lower() == "none"
    )
    if is_off:
        return None
    protocol = next((environment[name] for name in PROTOCOLS if environment.get(name)), PROTOCOL)
    if protocol != PROTOCOL:
        raise HyperError(f"OTLP protocol {protocol} is not supported; use {PROTOCOL} (port 4318 of a collector).")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise HyperError(
            f"OTEL_EXPORTER_OTLP_ENDPOINT is set, but {error.name} is not installed; install it or unset the variable."
        ) from None
    attributes = {"service.version": version()}
    if not environment.get("OTEL_SERVICE_NAME") and "service.name=" not in environment.get(
        "OTEL_RESOURCE_ATTRIBUTES", ""
    ):
        attributes["service.name"] = "hyper"
    provider = TracerProvider(resource=Resource.create(attributes), shutdown_on_exit=False)
    # The processor runs in its own thread. If the collector is slow or absent, spans are dropped.
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracer(provider)


class Tracer:
    """Factory of request spans."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self.provider = provider
        self.tracer = provider.get_tracer("hyper", version())
        self.propagator = TraceContextTextMapPropagator()

    def begin(self, context: TracedRequest, headers: Mapping[str, str]) -> None:
        """Start a request's span, below the caller's if given, and write its ids into the context."""
        from opentelemetry.trace import SpanKind, set_span_in_context

        carrier = {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
        context.span = self.tracer.start_span(
            "request",
            context=self.propagator.extract(carrier),
            kind=SpanKind.SERVER,
            start_time=context.wall_ns(context.started_s),
        )
        injected: dict[str, str] = {}
        self.propagator.inject(injected, set_span_in_context(context.span))
        context.traceparent = injected.get("traceparent")
        context.trace_id = trace_id_of(context.traceparent or "")

    def end(self, context: TracedRequest, *, method: str, endpoint: str, status: int | None) -> None:
        """End a request's span, with child spans for its stages and the sections of its trace."""
        from opentelemetry.trace import StatusCode

        span = context.span
        if span is None or not span.is_recording():
            return
        method = method if method in METHODS else "_OTHER"
        span.update_name(f"{method} {endpoint}")
        span.set_attributes(
            {
                "http.request.method": method,
                "http.route": endpoint,
                "hyper.request_id": context.request_id,
                "hyper.outcome": context.outcome,
                "hyper.phase": context.phase,
                "hyper.priority": context.priority,
                "hyper.body_bytes": context.num_body_bytes,
                **{f"hyper.{name}": context.facts[name] for name in TOLD if name in context.facts},
            }
        )
        if status is not None:
            span.set_attribute("http.response.status_code", status)
        # A failed stream has status 200.
        if context.outcome != "ok" and (status is None or status >= 500 or status == 200):
            span.set_attribute("error.type", context.outcome)
            span.set_status(StatusCode.ERROR)
        stages: dict[str, Span] = {}
        ends_s: dict[str, float] = {}
        # In order of their start; of two with the same start the longer one first, because it contains the other.
        in_order = sorted(context.stages, key=lambda stage_time: (stage_time.started_s or 0.0, -stage_time.seconds))
        for stage, seconds, started_s in in_order:
            if started_s is None:
                span.set_attribute(f"hyper.{stage}_ms", round(seconds * 1000, 3))
                continue
            parent = stages.get(PARENTS.get(stage, ""), span)
            stages[stage] = self.child(context, parent, stage, started_s, started_s + seconds)
            ends_s[stage] = started_s + seconds
        for section in context.sections:
            # A chosen answer is written after the model's generation.
            is_generated = section.started_s <= ends_s.get("generate", 0.0)
            self.child(context, stages["generate"] if is_generated else span, *named(section))
        span.end()

    def child(self, context: TracedRequest, parent: Span, name: str, started_s: float, ended_s: float) -> Span:
        """Make a finished span."""
        from opentelemetry.trace import set_span_in_context

        start_time = context.wall_ns(started_s)
        span = self.tracer.start_span(name, context=set_span_in_context(parent), start_time=start_time)
        span.end(context.wall_ns(ended_s))
        return span

    async def stop(self) -> None:
        """Send the remaining spans, for a few seconds at most, so an absent collector cannot delay the exit."""
        # A daemon thread, unlike the event loop's own, may be abandoned.
        thread = threading.Thread(target=self.provider.shutdown, name="hyper-traces", daemon=True)
        thread.start()
        await asyncio.to_thread(thread.join, STOP_TIMEOUT_S)


TOLD = ("termination", "format", "audio_s", "completion_tokens", "pauses")
"""Fields of the log line copied to spans; the key's name, possibly a person's, is excluded."""


def named(section: SectionTime) -> tuple[str, float, float]:
    """Return the name, start and end of a section's span."""
    return f"section {section.section}", section.started_s, section.ended_s
