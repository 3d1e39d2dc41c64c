"""Another endpoint is one module and one `include_router`: here one with its own wire format on the same lifecycle."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import PlainTextResponse
from pydantic import Field

from hyper_model.answering import AnswerDelta, AnswerResult, Event
from server.answering import AnswerRun
from server.api.forms import read_clip_request
from server.api.lifecycle import decode_clip, respond
from server.api.openapi import ANYWHERE, event_stream_responses, form_and_json, takes_body
from server.api.questions import Asked, require_window, start_run, write_prompt
from server.api.stream import Emit, ServerSentEvent
from server.api.types import AudioData, Wire
from server.request_context import RequestContext
from server.service import Service
from tests.serving import Live, assert_error, running, scripted, slow_down, tone, wait_for

router = APIRouter(responses=ANYWHERE)


class Options(Wire):
    """Fields of the endpoint."""

    prompt: str
    stream: bool = False
    timeout_ms: int | None = Field(default=None, ge=1)


class Body(Options):
    """Fields of its JSON body."""

    audio: AudioData


@router.post("/v1/describe", responses=event_stream_responses(["chunk"], "The answer as text."))
@takes_body(form_and_json(Options, Body))
async def describe(request: Request) -> Response:
    """Answer one question in plain text, or in events without names that end with `[DONE]`."""
    return await respond(request, Describe.read)


class Describe:
    """The handler of this endpoint."""

    def __init__(self, service: Service, context: RequestContext, options: Options, data: bytes) -> None:
        self.service, self.context, self.data = service, context, data
        self.is_stream, self.timeout_ms = options.stream, options.timeout_ms
        self.asked = Asked(options.prompt)
        self.run: AnswerRun | None = None

    @classmethod
    async def read(cls, request: Request, service: Service, context: RequestContext) -> Describe:
        options, data = await read_clip_request(request, service, form=Options, body=Body)
        return cls(service, context, options, data)

    async def prepare(self, deadline_s: float) -> None:
        prompt = await write_prompt(self.service, self.context, self.asked)
        waveform = await decode_clip(self.service, self.context, self.data)
        require_window(waveform)
        self.run = start_run(self.service.answerer, self.context, self.asked, prompt, waveform, deadline_s)

    async def answer(self, emit: Emit) -> AnswerResult:
        assert self.run is not None

        async def emit_text(event: Event) -> None:
            if isinstance(event, AnswerDelta):
                await emit(ServerSentEvent({"text": event.text}))

        return await self.run.run(emit_text)

    def response(self, reply: AnswerResult) -> Response:
        return PlainTextResponse(reply.text)

    def last_events(self, reply: AnswerResult) -> Iterable[ServerSentEvent]:
        yield ServerSentEvent("[DONE]")

    def error_event(self, body: dict[str, Any]) -> ServerSentEvent:
        return ServerSentEvent(body)

    def partial(self) -> dict[str, Any]:
        assert self.run is not None
        return {"trace": self.run.answering.parsed.raw}


@pytest.fixture(scope="module")
def extended() -> Iterator[Live]:
    with running(scripted()) as live:
        app: FastAPI = live.server.config.app  # pyright: ignore[reportAssignmentType]
        app.include_router(router)
        yield live


def post(live: Live, **fields: Any) -> httpx.Response:
    fields = {"prompt": "What is heard?", **fields}
    return live.client.post("/v1/describe", data=fields, files={"file": ("clip", tone())})


def test_the_endpoint_replies_in_its_own_format_and_is_counted(extended: Live) -> None:
    before = extended.metric("hyper_traces_total")
    reply = post(extended)
    assert reply.status_code == 200 and reply.headers["content-type"].startswith("text/plain")
    assert reply.text == extended.ask().json()["answer"]["text"]
    assert extended.metric("hyper_traces_total") == before + 2
    assert extended.metric("hyper_requests_total", endpoint="/v1/describe", code="200") == 1


def test_its_stream_has_its_own_framing(extended: Live) -> None:
    reply = post(extended, stream="true")
    lines = [line for line in reply.text.split("\n") if line and not line.startswith(":")]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    text = "".join(json.loads(line.removeprefix("data: "))["text"] for line in lines[:-1])
    assert text == post(extended).text


def test_its_errors_deadlines_and_limits_are_those_of_every_endpoint(extended: Live) -> None:
    assert_error(post(extended, prompt="  "), 400, "invalid_prompt", "question")
    assert_error(post(extended, temperature=1), 400, "unknown_parameter", "temperature")
    slow_down(extended, 0.02)
    try:
        late = post(extended, timeout_ms=1500)
        assert_error(late, 504, "deadline_exceeded")
        assert late.json()["partial"]["trace"].startswith("<THINK>")
        last = post(extended, timeout_ms=1500, stream="true").text.rstrip().rpartition("data: ")[2]
        assert json.loads(last)["error"]["code"] == "deadline_exceeded"
    finally:
        slow_down(extended, 0.0)
    wait_for(lambda: extended.service.num_in_flight == 0)


def test_its_body_is_described(extended: Live) -> None:
    extended.server.config.app.openapi_schema = None  # pyright: ignore[reportAttributeAccessIssue, reportFunctionMemberAccess]
    described = extended.client.get("/openapi.json").json()["paths"]["/v1/describe"]["post"]
    content = described["requestBody"]["content"]
    form, body = (content[kind]["schema"] for kind in ("multipart/form-data", "application/json"))
    assert form["required"] == ["file", "prompt"] and set(form["properties"]) == {
        "file",
        "prompt",
        "stream",
        "timeout_ms",
    }
    assert form["properties"]["timeout_ms"]["anyOf"][0]["maximum"] == 600_000, "this service's own limit"
    assert body["properties"]["audio"]["properties"]["data"]["format"] == "byte"
    assert "encoding" not in content["multipart/form-data"], "without choices there is none"
    assert set(described["responses"]) >= {"200", "400", "413", "503", "504"}
