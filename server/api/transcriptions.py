"""`POST /v1/audio/transcriptions`: OpenAI's transcription API, from the trace's ASR and SPEAKER sections.

A recording longer than one window is cut at quiet places; each window gives one segment. Times are those of the window
(`hyper.timing` is `window`): the trace has no times of words, and none are made up.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse

from hyper_model.answering import AnswerResult, Event
from hyper_model.audio import SAMPLE_RATE_HZ
from hyper_model.trace import Section, Speaker
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
from server.api.questions import Asked, check_bounds
from server.api.recordings import RecordingHandler
from server.api.stream import Emit, ServerSentEvent
from server.errors import RequestError
from server.recordings.perceptions import WindowPerception
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


@dataclass(frozen=True)
class Segment:
    """The transcript of one window; `start_s` and `end_s` are the window's."""

    start_s: float
    end_s: float
    text: str
    speakers: Sequence[Speaker] = ()
    window: int = 0


@dataclass(frozen=True)
class Transcript:
    """The transcript of a clip or a recording.

    Attributes:
        segments: Windows with words, in order.
        termination: End of the trace; for a recording, the first that is not `complete`.
        failed: Numbers of the windows without a transcript because of an error.
    """

    segments: Sequence[Segment]
    termination: str
    failed: Sequence[int] = ()

    @property
    def text(self) -> str:
        """Return all words."""
        return " ".join(segment.text for segment in self.segments if segment.text)


class Transcribe(RecordingHandler):
    """Answers a transcription request; see `server.api.lifecycle.Handler`."""

    def __init__(self, service: Service, context: RequestContext, form: TranscriptionForm, data: bytes) -> None:
        asked = Asked(question=QUESTION, temperature=form.temperature)
        super().__init__(
            service,
            context,
            asked,
            data,
            timeout_ms=form.timeout_ms,
            is_stream=form.stream,
            long_audio=form.long_audio,
            # Clients of OpenAI's API send ten minutes in one request, so the limit is that of clips, in seconds.
            limits=service.decoder_pool.limits,
        )
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

    async def answer(self, emit: Emit) -> Transcript:
        """Answer, and emit the words of the transcript as they are written."""
        if self.recording_run is not None:
            return await self.transcribe_windows(emit)

        async def emit_delta(event: Event) -> None:
            if self.is_stream and isinstance(event, SectionDelta) and event.section is Section.ASR:
                await emit(delta_event(event.text))

        return self.transcript_of(await self.started_run.run(emit_delta))

    async def transcribe_windows(self, emit: Emit) -> Transcript:
        """Transcribe each window, and emit the words of the windows in order."""
        shown = num_shown = 0
        async with self.recording_work() as run, contextlib.aclosing(run.perceive()) as progress:
            async for _ in progress:
                if not self.is_stream:
                    continue
                windows = run.in_order
                while num_shown < len(windows) and windows[num_shown].span.index == num_shown:
                    if text := windows[num_shown].transcript:
                        await emit(delta_event(f"{' ' if shown else ''}{text}"))
                        shown += 1
                    num_shown += 1
        return transcript_of_windows(run.in_order)

    def transcript_of(self, result: AnswerResult) -> Transcript:
        """Return the transcript of one window."""
        text, speakers = result.parsed.texts.get(Section.ASR, ""), result.parsed.trace.speakers
        segments = [Segment(0.0, self.duration_s, text, speakers)] if text or speakers else []
        return Transcript(segments, result.parsed.termination.value)

    def response(self, reply: Transcript) -> Response:
        """Write the transcript in the format that the caller wants."""
        match self.form.response_format:
            case "text":
                return PlainTextResponse(f"{reply.text}\n")
            case "srt":
                return PlainTextResponse(srt(reply.segments))
            case "vtt":
                return PlainTextResponse(vtt(reply.segments))
            case "verbose_json":
                return json_response(self.verbose(reply))
            case "diarized_json":
                return json_response(self.diarized(reply))
            case _:
                return json_response(Transcription(**self.shared(reply)))

    def last_events(self, reply: Transcript) -> Iterable[ServerSentEvent]:
        """Write the whole transcript, which ends a stream."""
        data = Transcription(**self.shared(reply)).model_dump(mode="json")
        yield ServerSentEvent({"type": DONE, **data})

    @property
    def duration_s(self) -> float:
        """The length of the clip in seconds."""
        if self.recording_run is not None:
            return round(self.recording_run.recording.duration_s, 3)
        return round(self.started_run.waveform.duration_s, 3)

    def shared(self, reply: Transcript) -> dict[str, Any]:
        """Return the members of every JSON format."""
        return {
            "text": reply.text,
            "usage": DurationUsage(seconds=self.duration_s),
            "hyper": Timing(termination=reply.termination, failed_windows=list(reply.failed)),
        }

    def verbose(self, reply: Transcript) -> VerboseTranscription:
        """Write the transcript with one segment per window."""
        segments = [
            TranscriptSegment(
                id=number,
                start=segment.start_s,
                end=segment.end_s,
                text=segment.text,
                temperature=self.form.temperature,
                compression_ratio=compression_ratio(segment.text),
            )
            for number, segment in enumerate(each for each in reply.segments if each.text)
        ]
        return VerboseTranscription(
            **self.shared(reply), language="english", duration=self.duration_s, segments=segments
        )

    def diarized(self, reply: Transcript) -> DiarizedTranscription:
        """Write the quotes of each speaker as segments; in a recording, speakers are those of a window."""
        is_long = self.recording_run is not None
        quotes = [
            (segment, f"w{segment.window}.{speaker.id}" if is_long else speaker.id, quote)
            for segment in reply.segments
            for speaker in segment.speakers
            for quote in speaker.quotes
        ]
        segments = [
            SpeakerSegment(id=f"seg_{number}", start=segment.start_s, end=segment.end_s, speaker=speaker, text=quote)
            for number, (segment, speaker, quote) in enumerate(quotes)
        ]
        return DiarizedTranscription(**self.shared(reply), duration=self.duration_s, segments=segments)


def transcript_of_windows(windows: Sequence[WindowPerception]) -> Transcript:
    """Return the transcript of a recording; a shared second belongs to the earlier window."""
    segments = [
        Segment(
            round(window.span.start_s + window.span.num_shared / SAMPLE_RATE_HZ, 3),
            round(window.span.end_s, 3),
            window.transcript,
            window.trace.speakers,
            window.span.index,
        )
        for window in windows
        if window.trace is not None and (window.transcript or window.trace.speakers)
    ]
    terminations = [window.termination for window in windows if window.termination != "complete"]
    failed = [window.span.index for window in windows if window.status == "failed"]
    return Transcript(segments, terminations[0] if terminations else "complete", failed)


def delta_event(text: str) -> ServerSentEvent:
    """Return the event of further words."""
    return ServerSentEvent({"type": "transcript.text.delta", "delta": text})


def json_response(reply: Transcription) -> JSONResponse:
    """Write a reply as JSON."""
    return JSONResponse(reply.model_dump(mode="json"))


def compression_ratio(text: str) -> float:
    """Return bytes over compressed bytes, by zlib as in Whisper; 0 for no text."""
    data = text.encode()
    return round(len(data) / len(zlib.compress(data)), 4) if data else 0.0


def srt(segments: Sequence[Segment]) -> str:
    """Write a transcript as SubRip, one cue per segment with words."""
    cues = [segment for segment in segments if segment.text]
    return "".join(
        f"{number}\n{_clock(cue.start_s, ',')} --> {_clock(cue.end_s, ',')}\n{cue.text}\n\n"
        for number, cue in enumerate(cues, 1)
    )


def vtt(segments: Sequence[Segment]) -> str:
    """Write a transcript as WebVTT, one cue per segment with words."""
    cues = "".join(
        f"{_clock(cue.start_s, '.')} --> {_clock(cue.end_s, '.')}\n{_escaped(cue.text)}\n\n"
        for cue in segments
        if cue.text
    )
    return f"WEBVTT\n\n{cues}"


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _clock(seconds: float, separator: str) -> str:
    milliseconds = round(seconds * 1000)
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{rest // 1000:02}{separator}{rest % 1000:03}"
