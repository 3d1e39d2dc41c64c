"""`POST /v1/audio/qa`: ask a clip a question."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from hyper_model.answering import Event
from server.api import replies
from server.api.forms import load_clip, read_clip_request, read_json
from server.api.lifecycle import Handler, respond
from server.api.openapi import ANYWHERE, event_stream_responses, form_and_json, takes_body
from server.api.qa_list import AudioQaList
from server.api.questions import asked_of, check_bounds
from server.api.recordings import RecordingHandler, WindowDone, check_place, window_event
from server.api.stream import Emit, ServerSentEvent
from server.api.types import QaBody, QaForm, QaListReply, QaOptions, QaReply
from server.errors import RequestError
from server.request_context import RequestContext
from server.service import Service

EVENTS = "section.start section.delta section.end pause window.done answer.delta answer.done usage done error".split()
RESPONSES = event_stream_responses(
    EVENTS, "The answer; with `stream=true`, its events. The event `done` contains the whole answer."
)
REPLY = QaReply | QaListReply

router = APIRouter(responses=ANYWHERE)


@router.post("/v1/audio/qa", summary="Ask a question about a clip", response_model=REPLY, responses=RESPONSES)
@takes_body(form_and_json(QaForm, QaBody))
async def audio_qa(request: Request) -> Response:
    """Answer one question about one clip, with the model's perception and reasoning, or several as `questions`.

    `channel=each` asks both channels of a stereo clip, each with a reply of its own.

    With `stream=true` the reply is a stream of server-sent events: `section.start`, `section.delta`, `section.end`,
    `pause`, `answer.delta`, `answer.done`, `usage`, `done` (the whole reply), or `error`. With `questions`, each event
    of a question has its `index`, and with `channel=each` its `channel`. A recording with `long_audio=chunk` has
    `window.done` for each window in place of the trace's events.
    """
    return await respond(request, read_qa)


async def read_qa(request: Request, service: Service, context: RequestContext) -> Handler[Any]:
    """Read and check the body: one question, or several."""
    options, data = await read_clip_request(request, service, form=QaForm, body=QaBody)
    return handler_of(service, context, options, data)


async def qa_of_json(service: Service, context: RequestContext, content: bytes) -> Handler[Any]:
    """Return the handler of a JSON body, such as the one in a line of a batch.

    Raises:
        RequestError: 400, 404 or 413.
        ValidationError: A field has the wrong type or range.
    """
    options, clip = await service.in_pool(read_json, content, QaBody)
    data = clip if isinstance(clip, bytes) else await load_clip(service, context, clip)
    return handler_of(service, context, options, data)


def handler_of(service: Service, context: RequestContext, options: QaOptions, data: bytes) -> Handler[Any]:
    """Check what the types cannot express, and return the handler of one question or several.

    Raises:
        RequestError: 400.
    """
    check_bounds(service, max_tokens=options.max_tokens, timeout_ms=options.timeout_ms, pause=options.pause)
    check_place(options.long_audio, options.start_s)
    name = "questions" if options.questions else "channel=each" if options.channel == "each" else None
    if name is not None and options.long_audio != "error":
        message = f"`long_audio={options.long_audio}` takes one `question` about one channel, not `{name}`."
        hint = "Send one request per question and channel; later ones use the kept perceptions of the recording."
        raise RequestError("invalid_parameter", message, param="long_audio", hint=hint)
    if not options.questions and "question" not in options.model_fields_set:
        raise RequestError("missing_parameter", "`question` is required.", param="question")
    if options.questions or options.channel == "each":
        return AudioQaList(service, context, options, data)
    return AudioQa(service, context, options, data)


class AudioQa(RecordingHandler):
    """Answers one question about one clip or recording; see `server.api.lifecycle.Handler`."""

    def __init__(self, service: Service, context: RequestContext, options: QaOptions, data: bytes) -> None:
        super().__init__(
            service,
            context,
            asked_of(options, options.question, options.choices),
            data,
            timeout_ms=options.timeout_ms,
            is_stream=options.stream,
            shows_reasoning=options.reasoning == "full",
            track=options.track,
            channel="mix" if options.channel == "each" else options.channel,
            long_audio=options.long_audio,
            start_s=options.start_s,
            max_windows=service.settings.sync_windows,
        )

    async def answer(self, emit: Emit) -> QaReply:
        """Answer, and emit the trace and the answer as they are written."""

        async def emit_on_wire(event: Event) -> None:
            found = replies.wire_event(event, shows_reasoning=self.shows_reasoning)
            if found is not None:
                await emit(found)

        async def emit_window(done: WindowDone) -> None:
            await emit(window_event(done))

        return await self.answer_any(emit_on_wire, emit_window)

    def response(self, reply: QaReply) -> Response:
        """Return the reply as JSON."""
        return JSONResponse(reply.model_dump(mode="json"))

    def last_events(self, reply: QaReply) -> Iterable[ServerSentEvent]:
        """Return the events at the end of a stream."""
        yield ServerSentEvent(reply.answer.model_dump(mode="json"), "answer.done")
        yield ServerSentEvent(reply.usage.model_dump(mode="json"), "usage")
        yield ServerSentEvent(reply.model_dump(mode="json"), "done")
