"""`POST /v1/audio/transcriptions`: OpenAI's transcription API, from the trace's ASR and SPEAKER sections.

Times are those of the window (`hyper.timing` is `window`): the trace has no times of words, and none are made up.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse

from hyper_model.answering import AnswerResult, Event
from hyper_model.trace import Section
from hyper_model.trace_parser import SectionDelta
from server.api.forms import read_clip_form
from server.api.lifecycle import respond
from server.api.models import require_model
from server.api.openai_types import (
    DiarizedTranscription,
    DurationUsage,
    SpeakerSegment,
    Timing,
    Transcription,
    TranscriptionForm,
    TranscriptSegment,
    VerboseTranscription,
)
from server.api.openapi import ANYWHERE, Responses, event_stream_responses, form_only, takes_body
from server.api.questions import Asked, ClipHandler, check_bounds
from server.api.stream import Emit, ServerSentEvent
from server.errors import RequestError
from server.request_context import RequestContext
from server.service import Service

QUESTION = "What is said?"
LANGUAGES = {"en": "english", "eng": "english", "english": "english"}
DONE = "transcript.text.done"


def transcription_responses() -> Responses:
    """Describe the replies: JSON, plain text by `response_format`, or a stream."""
    found = event_stream_responses((), "The transcript; `text`, `srt` and `vtt` are plain text.")
    found[200]["content"]["text/plain"] = {"schema": {"type": "string"}}
    return found


router = APIRouter(responses=ANYWHERE)


@router.post(
    "/v1/audio/transcriptions",
    summary="Transcribe a clip (OpenAI)",
    response_model=Transcription | VerboseTranscription | DiarizedTranscription,
    responses=transcription_responses(),
)
@takes_body(form_only(TranscriptionForm))
async def transcriptions(request: Request) -> Response:
    """Transcribe one clip, in OpenAI's format."""
    return await respond(request, Transcribe.read)


class Transcribe(ClipHandler):
    """Answers a transcription request; see `server.api.lifecycle.Handler`."""

    def __init__(self, service: Service, context: RequestContext, form: TranscriptionForm, data: bytes) -> None:
        asked = Asked(question=QUESTION, temperature=form.temperature)
        super().__init__(service, context, asked, data, timeout_ms=form.timeout_ms, is_stream=form.stream)
        self.form = form

    @classmethod
    async def read(cls, request: Request, service: Service, context: RequestContext) -> Transcribe:
        """Read and check the form."""
        form, data = await read_clip_form(request, TranscriptionForm)
        require_model(service, form.model)
        check_bounds(service, timeout_ms=form.timeout_ms)
        if form.language and form.language.lower() not in LANGUAGES:
            message = f"`language` must be one of {', '.join(LANGUAGES)}."
            raise RequestError("invalid_parameter", message, param="language")
        if form.stream and form.response_format not in ("json", "text"):
            message = f"`stream=true` needs `response_format` json or text, not {form.response_format}."
            raise RequestError("invalid_parameter", message, param="response_format")
        return cls(service, context, form, data)

    async def answer(self, emit: Emit) -> AnswerResult:
        """Answer, and emit the words of the transcript as they are written."""

        async def emit_delta(event: Event) -> None:
            if self.is_stream and isinstance(event, SectionDelta) and event.section is Section.ASR:
                await emit(ServerSentEvent({"type": "transcript.text.delta", "delta": event.text}))

        return await self.started_run.run(emit_delta)

    def response(self, reply: AnswerResult) -> Response:
        """Write the transcript in the format that the caller wants."""
        match self.form.response_format:
            case "text":
                return PlainTextResponse(f"{text_of(reply)}\n")
            case "srt":
                return PlainTextResponse(srt(text_of(reply), self.duration_s))
            case "vtt":
                return PlainTextResponse(vtt(text_of(reply), self.duration_s))
            case "verbose_json":
                return json_response(self.verbose(reply))
            case "diarized_json":
                return json_response(self.diarized(reply))
            case _:
                return json_response(Transcription(**self.shared(reply)))

    def last_events(self, reply: AnswerResult) -> Iterable[ServerSentEvent]:
        """Write the whole transcript, which ends a stream."""
        data = Transcription(**self.shared(reply)).model_dump(mode="json")
        yield ServerSentEvent({"type": DONE, **data})

    @property
    def duration_s(self) -> float:
        """The length of the clip in seconds."""
        return round(self.started_run.waveform.duration_s, 3)

    def shared(self, result: AnswerResult) -> dict[str, Any]:
        """Return the members of every JSON format."""
        return {
            "text": text_of(result),
            "usage": DurationUsage(seconds=self.duration_s),
            "hyper": Timing(termination=result.parsed.termination.value),
        }

    def verbose(self, result: AnswerResult) -> VerboseTranscription:
        """Write the transcript with one segment per window."""
        text = text_of(result)
        segment = TranscriptSegment(
            id=0,
            start=0.0,
            end=self.duration_s,
            text=text,
            temperature=self.form.temperature,
            compression_ratio=compression_ratio(text),
        )
        return VerboseTranscription(
            **self.shared(result),
            language="english",
            duration=self.duration_s,
            segments=[segment] if text else [],
        )

    def diarized(self, result: AnswerResult) -> DiarizedTranscription:
        """Write the quotes of each speaker as segments."""
        quotes = [(speaker.id, quote) for speaker in result.parsed.trace.speakers for quote in speaker.quotes]
        segments = [
            SpeakerSegment(id=f"seg_{number}", start=0.0, end=self.duration_s, speaker=speaker, text=quote)
            for number, (speaker, quote) in enumerate(quotes)
        ]
        return DiarizedTranscription(**self.shared(result), duration=self.duration_s, segments=segments)


def json_response(reply: Transcription) -> JSONResponse:
    """Write a reply as JSON."""
    return JSONResponse(reply.model_dump(mode="json"))


def text_of(result: AnswerResult) -> str:
    """Return the transcript; empty for a clip without speech."""
    return result.parsed.texts.get(Section.ASR, "")


def compression_ratio(text: str) -> float:
    """Return bytes over compressed bytes, by zlib as in Whisper; 0 for no text."""
    data = text.encode()
    return round(len(data) / len(zlib.compress(data)), 4) if data else 0.0


def srt(text: str, duration_s: float) -> str:
    """Write a transcript as one SubRip cue; no cue for no text."""
    return f"1\n{_clock(0.0, ',')} --> {_clock(duration_s, ',')}\n{text}\n\n" if text else ""


def vtt(text: str, duration_s: float) -> str:
    """Write a transcript as one WebVTT cue; no cue for no text."""
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    cue = f"{_clock(0.0, '.')} --> {_clock(duration_s, '.')}\n{escaped}\n\n" if text else ""
    return f"WEBVTT\n\n{cue}"


def _clock(seconds: float, separator: str) -> str:
    milliseconds = round(seconds * 1000)
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{rest // 1000:02}{separator}{rest % 1000:03}"
