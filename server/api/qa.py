"""`POST /v1/audio/qa`: ask a clip a question."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from hyper_model.answering import Event
from hyper_model.audio import Channel
from server.answering import AnswerRun
from server.api import replies
from server.api.forms import read_clip_request
from server.api.lifecycle import decode_clip, respond
from server.api.openapi import ANYWHERE, event_stream_responses, form_and_json, takes_body
from server.api.questions import Asked, check_bounds, require_window, start_run, write_prompt
from server.api.stream import Emit, ServerSentEvent
from server.api.types import QaBody, QaOptions, QaReply
from server.errors import RequestError
from server.request_context import RequestContext
from server.service import Service

EVENTS = "section.start section.delta section.end pause answer.delta answer.done usage done error".split()
RESPONSES = event_stream_responses(
    EVENTS, "The answer; with `stream=true`, its events. The event `done` contains the whole answer."
)

router = APIRouter(responses=ANYWHERE)


@router.post("/v1/audio/qa", summary="Ask a question about a clip", response_model=QaReply, responses=RESPONSES)
@takes_body(form_and_json(QaOptions, QaBody))
async def audio_qa(request: Request) -> Response:
    """Answer one question about one clip, with the model's perception and reasoning.

    With `stream=true` the reply is a stream of server-sent events: `section.start`, `section.delta`, `section.end`,
    `pause`, `answer.delta`, `answer.done`, `usage`, `done` (the whole reply), or `error`.
    """
    return await respond(request, AudioQa.read)


class AudioQa:
    """Handler of one question about one clip; see `server.api.lifecycle.Handler`."""

    def __init__(self, service: Service, context: RequestContext, options: QaOptions, data: bytes) -> None:
        self.service = service
        self.context = context
        self.is_stream = options.stream
        self.timeout_ms = options.timeout_ms
        self.shows_reasoning = options.reasoning == "full"
        self.asked = Asked(
            question=options.question,
            choices=tuple(options.choices),
            pause=options.pause,
            max_tokens=options.max_tokens,
            temperature=options.temperature,
            seed=options.seed,
        )
        self.data = data
        self.track = options.track
        self.channel: Channel = options.channel
        self.run: AnswerRun | None = None

    @classmethod
    async def read(cls, request: Request, service: Service, context: RequestContext) -> AudioQa:
        """Read and check the body."""
        options, data = await read_clip_request(request, service, form=QaOptions, body=QaBody)
        check_bounds(service, max_tokens=options.max_tokens, timeout_ms=options.timeout_ms, pause=options.pause)
        if options.long_audio != "error":
            message = f"`long_audio={options.long_audio}` is not supported; only `error` is."
            raise RequestError("invalid_parameter", message, param="long_audio")
        return cls(service, context, options, data)

    async def prepare(self, deadline_s: float) -> None:
        """Write the prompt, then decode the clip, because refusing a question is cheaper."""
        prompt_token_ids = await write_prompt(self.service, self.context, self.asked)
        waveform = await decode_clip(self.service, self.context, self.data, track=self.track, channel=self.channel)
        require_window(waveform)
        answerer = self.service.answerer
        self.run = start_run(answerer, self.context, self.asked, prompt_token_ids, waveform, deadline_s)

    async def answer(self, emit: Emit) -> QaReply:
        """Answer, and emit the trace and the answer during generation."""
        assert self.run is not None

        async def emit_on_wire(event: Event) -> None:
            found = replies.wire_event(event, shows_reasoning=self.shows_reasoning)
            if found is not None:
                await emit(found)

        result = await self.run.run(emit_on_wire)
        return replies.build(self.run, result, shows_reasoning=self.shows_reasoning)

    def response(self, reply: QaReply) -> Response:
        """Return the reply as JSON."""
        return JSONResponse(reply.model_dump(mode="json"))

    def last_events(self, reply: QaReply) -> Iterable[ServerSentEvent]:
        """Return the events at the end of a stream."""
        yield ServerSentEvent(reply.answer.model_dump(mode="json"), "answer.done")
        yield ServerSentEvent(reply.usage.model_dump(mode="json"), "usage")
        yield ServerSentEvent(reply.model_dump(mode="json"), "done")

    def error_event(self, body: dict[str, Any]) -> ServerSentEvent:
        """Return the event to end a stream with an error object."""
        return ServerSentEvent(body, "error")

    def partial(self) -> dict[str, Any]:
        """Return the trace so far, and record the missed deadline for later pause budgets."""
        assert self.run is not None
        self.run.record_late()
        return replies.partial(self.run.answering.parsed, self.asked.choices, shows_reasoning=self.shows_reasoning)
