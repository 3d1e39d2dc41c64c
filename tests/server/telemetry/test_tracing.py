"""Tests for server/telemetry/tracing.py: spans reach an OTLP receiver, with times and without content."""

from __future__ import annotations

import contextlib
import json
import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from hyper_model.errors import HyperError
from server.telemetry.tracing import trace_id_of, tracer_from
from tests.serving import Live, running, scripted, tone, wait_for

TRACE_ID, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE_ID}-{PARENT_ID}-01"
SECRET = "what does the penguin whisper"


@dataclass
class Receiver:
    """Spans received by an OTLP collector."""

    url: str
    bodies: list[bytes] = field(default_factory=list[bytes])

    @property
    def exports(self) -> list[ExportTraceServiceRequest]:
        return [ExportTraceServiceRequest.FromString(body) for body in self.bodies]

    @property
    def spans(self) -> list[Span]:
        return [
            span for export in self.exports for group in export.resource_spans for each in group.scope_spans
            for span in each.spans
        ]  # fmt: skip

    def trace(self, trace_id: str) -> dict[str, Span]:
        """Return a trace's spans by name, after the arrival of its root."""

        def found() -> list[Span]:
            return [span for span in self.spans if span.trace_id.hex() == trace_id]

        wait_for(lambda: any(span.kind == Span.SPAN_KIND_SERVER for span in found()))
        return {span.name: span for span in found()}


@contextlib.contextmanager
def receiving() -> Iterator[Receiver]:
    """Run an OTLP collector."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            receiver.bodies.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Log nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        receiver = Receiver(f"http://127.0.0.1:{server.server_address[1]}")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield receiver
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def traced() -> Iterator[tuple[Live, Receiver]]:
    """Service with traces sent to a receiver."""
    with receiving() as receiver, contextlib.ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.url)
            patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
            service = stack.enter_context(running(scripted(scripted_token_interval_s=0.003)))
        yield service, receiver


def ask(service: Live, clip: bytes, traceparent: str, **fields: Any) -> httpx.Response:
    data = {"question": SECRET, **fields}
    headers = {"traceparent": traceparent}
    return service.client.post("/v1/audio/qa", data=data, files={"file": ("clip", clip)}, headers=headers)


def attributes(span: Span) -> dict[str, object]:
    return {each.key: getattr(each.value, str(each.value.WhichOneof("value"))) for each in span.attributes}


def access_lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """Return the log lines of questions; each is written after its reply."""
    return [vars(record) for record in caplog.records if vars(record).get("endpoint") == "/v1/audio/qa"]


@pytest.mark.parametrize(("stream", "trace_id"), [("false", TRACE_ID), ("true", "a" * 32)])
def test_a_request_is_a_span_with_its_stages_below_it(
    traced: tuple[Live, Receiver], stream: str, trace_id: str
) -> None:
    service, receiver = traced
    reply = ask(service, tone(2.0), TRACEPARENT.replace(TRACE_ID, trace_id), stream=stream)
    assert reply.status_code == 200
    spans = receiver.trace(trace_id)
    root = spans["POST /v1/audio/qa"]
    assert reply.headers["traceparent"] == f"00-{trace_id}-{root.span_id.hex()}-01"
    assert root.parent_span_id.hex() == PARENT_ID and root.kind == Span.SPAN_KIND_SERVER
    below = {name for name, span in spans.items() if span.parent_span_id == root.span_id}
    stages = {"receive", "validate", "prompt", "decode_wait", "decode", "inspect", "queue", "first_token", "generate"}
    assert stages <= below
    parts = {name for name, span in spans.items() if span.parent_span_id == spans["first_token"].span_id}
    assert parts == {"features", "engine_queue", "prefill"}
    sections = {name for name, span in spans.items() if span.parent_span_id == spans["generate"].span_id}
    assert {"section ENV", "section REASONING", "section FINAL_ANSWER"} <= sections
    for span in spans.values():
        assert root.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
        assert span.end_time_unix_nano <= root.end_time_unix_nano
    found = attributes(root)
    assert found["hyper.outcome"] == "ok" and found["http.response.status_code"] == 200
    assert found["http.route"] == "/v1/audio/qa"
    assert found["hyper.audio_s"] == 2.0 and found["hyper.completion_tokens"] and "hyper.parse_ms" in found
    (resource,) = {
        tuple((each.key, each.value.string_value) for each in group.resource.attributes if each.key == "service.name")
        for export in receiver.exports
        for group in export.resource_spans
    }
    assert resource == (("service.name", "hyper"),)


def test_a_request_that_fails_is_an_error_with_the_stages_that_it_reached(traced: tuple[Live, Receiver]) -> None:
    service, receiver = traced
    assert ask(service, b"no audio", f"00-{'b' * 32}-{PARENT_ID}-01").status_code == 415
    refused = receiver.trace("b" * 32)
    assert "decode" in refused and "queue" not in refused
    assert refused["POST /v1/audio/qa"].status.code == Status.STATUS_CODE_UNSET, "the caller's error is none of ours"
    assert ask(service, tone(), f"00-{'c' * 32}-{PARENT_ID}-01", timeout_ms="150").status_code == 504
    late = receiver.trace("c" * 32)["POST /v1/audio/qa"]
    assert late.status.code == Status.STATUS_CODE_ERROR and attributes(late)["error.type"] == "deadline_exceeded"


def test_spans_hold_no_content_and_probes_none_at_all(
    traced: tuple[Live, Receiver], caplog: pytest.LogCaptureFixture
) -> None:
    service, receiver = traced
    with caplog.at_level(logging.INFO, "hyper.access"):
        reply = ask(service, tone(3.0), f"00-{'d' * 32}-{PARENT_ID}-01", choices=[SECRET, "nothing"])
        assert service.client.get("/livez").headers.get("traceparent") is None
        assert service.client.get("/metrics").status_code == 200
        wait_for(lambda: bool(access_lines(caplog)))
    receiver.trace("d" * 32)
    names = {span.name for span in receiver.spans}
    assert not [name for name in names if "livez" in name or "metrics" in name]
    sent = b"".join(receiver.bodies)
    for word in (SECRET.encode(), reply.json()["answer"]["text"].encode(), b"loud sound", b"Measure the"):
        assert word not in sent
    (line,) = access_lines(caplog)
    assert line["trace_id"] == "d" * 32 and line["stages_ms"]["generate"] > 0
    assert SECRET not in json.dumps({name: value for name, value in line.items() if name != "args"}, default=str)


def test_without_an_endpoint_there_is_no_tracer_and_the_log_still_names_the_callers_trace(
    live: Live, caplog: pytest.LogCaptureFixture
) -> None:
    assert live.service.tracer is None
    with caplog.at_level(logging.INFO, "hyper.access"):
        reply = ask(live, tone(), TRACEPARENT)
        assert "traceparent" not in reply.headers
        assert ask(live, tone(), "00-<script>-1").status_code == 200
        wait_for(lambda: len(access_lines(caplog)) == 2)
    assert [line.get("trace_id") for line in access_lines(caplog)] == [TRACE_ID, None]


def test_a_collector_that_is_away_costs_no_answer_and_no_end() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://127.0.0.1:9/v1/traces")
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        with running(scripted()) as service:
            assert service.ask().status_code == 200


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_SDK_DISABLED": "true"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_TRACES_EXPORTER": "none"},
    ],
)
def test_what_turns_traces_off(environment: dict[str, str]) -> None:
    assert tracer_from(environment) is None


def test_another_protocol_is_refused_by_name() -> None:
    with pytest.raises(HyperError, match="grpc"):
        tracer_from({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"})


@pytest.mark.parametrize(
    ("header", "trace_id"),
    [
        (TRACEPARENT, TRACE_ID),
        (f"01-{TRACE_ID}-{PARENT_ID}-00-more", TRACE_ID),
        (f"ff-{TRACE_ID}-{PARENT_ID}-01", None),
        (f"00-{'0' * 32}-{PARENT_ID}-01", None),
        (f"00-{TRACE_ID}-{'0' * 16}-01", None),
        (TRACEPARENT.upper(), None),
        ("", None),
    ],
)
def test_what_a_traceparent_is(header: str, trace_id: str | None) -> None:
    assert trace_id_of(header) == trace_id
