"""Answers, events and traces in the wire format of `/v1/audio/qa`, as pure functions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from hyper_model.answering import AnswerDelta, AnswerResult, Event, changed_answer
from hyper_model.audio import SAMPLE_RATE_HZ, Quality, Waveform
from hyper_model.audio_warnings import AudioWarning
from hyper_model.trace import Section, Termination, Trace, environment_labels
from hyper_model.trace_parser import ParsedTrace, PauseSeen, SectionDelta, SectionEnd, SectionStart
from server.answering import AnswerRun
from server.api.stream import ServerSentEvent
from server.api.types import (
    Answer,
    AudioReply,
    ClipWarning,
    PauseAt,
    PauseReply,
    Perception,
    QaReply,
    QualityReply,
    Reasoning,
    Reflection,
    SpeakerReply,
    Timings,
    TraceReply,
    Usage,
    UsedPart,
    WarningReply,
)
from server.generation_stats import GenerationStats
from server.request_context import RequestContext

SILENT_RATIO = 0.98
CLIPPED_RATIO = 0.01
TERMINATION_WARNINGS = {
    Termination.TRUNCATED: "The trace reached its token limit; the answer comes from an incomplete trace.",
    Termination.MALFORMED: "The trace has a wrong format; trust its sections less.",
    Termination.ABORTED: "The gate aborted the trace; the answer comes from an incomplete trace.",
}


def build(run: AnswerRun, result: AnswerResult, *, shows_reasoning: bool) -> QaReply:
    """Return the reply of a finished run."""
    stats, context, waveform, parsed = run.stats, run.context, run.waveform, result.parsed
    manifest, gate = run.answerer.checkpoint.manifest, run.question.gate
    budget = gate.max_pauses if gate else 0
    return QaReply(
        id=f"qa_{run.id}",
        created=stats.created_s,
        model=manifest.name,
        answer=answer_reply(result, run.question.choices),
        perception=perception(parsed.trace) if shows_reasoning else None,
        reasoning=reasoning(parsed.trace, run.question.choices) if shows_reasoning else None,
        trace=trace_reply(parsed, shows_reasoning=shows_reasoning),
        termination=parsed.termination.value,
        pause=PauseReply(
            mode=manifest.pause.mode if budget else "off",
            budget=budget,
            lowered_by=run.lowered_by,
            count=result.num_pauses,
            latent_tokens=result.num_pause_tokens,
            at=[
                PauseAt(section=pause.section, confidence=rounded(confidence))
                for pause, confidence in zip(parsed.pauses, result.pause_confidences, strict=True)
            ],
            lowest_group_confidence=rounded(result.report.lowest),
        ),
        audio=[audio_reply(run)],
        usage=Usage(
            prompt_tokens=stats.prompt_tokens,
            audio_tokens=stats.audio_tokens,
            cached_tokens=stats.cached_tokens,
            completion_tokens=result.num_completion_tokens + stats.num_piece_tokens,
            pause_tokens=result.num_pause_tokens,
            total_tokens=stats.prompt_tokens
            + result.num_completion_tokens
            + stats.num_piece_tokens
            + result.num_pause_tokens,
        ),
        timings_ms=timings(stats, context),
        warnings=warnings(result, waveform),
    )


def answer_reply(result: AnswerResult, choices: Sequence[str]) -> Answer:
    """Return the answer, with a score per choice if there are choices."""
    if result.choice_index is None:
        return Answer(text=result.text, confidence=result.confidence)
    return Answer(
        text=result.text,
        choice_index=result.choice_index,
        choice=choices[result.choice_index],
        confidence=result.confidence,
        scores=list(result.scores),
    )


def wire_event(event: Event, *, shows_reasoning: bool) -> ServerSentEvent | None:
    """Return an event of the trace or the answer; None for events hidden from the caller."""
    match event:
        case AnswerDelta(text):
            return ServerSentEvent({"text": text}, "answer.delta")
        case SectionStart(section):
            name, data = "section.start", {"section": section.value}
        case SectionEnd(section):
            name, data = "section.end", {"section": section.value}
        case SectionDelta(section, text):
            name, data = "section.delta", {"section": section.value, "text": text}
        case PauseSeen(section, num_latent):
            name, data = "pause", {"section": section and section.value, "latent_tokens": num_latent}
    # FINAL_ANSWER is sent only as `answer.delta`.
    is_shown = shows_reasoning and data["section"] != Section.FINAL_ANSWER
    return ServerSentEvent(data, name) if is_shown else None


def rounded(confidence: float | None) -> float | None:
    """Round a probability to four digits; more digits are numerical noise."""
    return None if confidence is None else round(confidence, 4)


def partial(result: ParsedTrace, choices: Sequence[str] = (), *, shows_reasoning: bool) -> dict[str, Any]:
    """Return the content so far of an answer cut short."""
    parts: dict[str, Any] = {"trace": trace_reply(result, shows_reasoning=shows_reasoning).model_dump(mode="json")}
    if shows_reasoning:
        parts["perception"] = perception(result.trace).model_dump(mode="json")
        parts["reasoning"] = reasoning(result.trace, choices).model_dump(mode="json")
    return parts


def perception(trace: Trace) -> Perception:
    """Return the model's perception sections."""
    return Perception(
        environment=environment_labels(trace.environment or ""),
        environment_text=trace.environment,
        speakers=[
            SpeakerReply(id=speaker.id, description=speaker.description, quotes=list(speaker.quotes))
            for speaker in trace.speakers
        ],
        transcript=trace.transcript,
        description=trace.description,
    )


def reasoning(trace: Trace, choices: Sequence[str] = ()) -> Reasoning:
    """Return the model's reasoning sections."""
    reflection = None
    if trace.reflection is not None:
        has_changed = changed_answer(trace, choices)
        reflection = Reflection(text=trace.reflection, changed_answer=bool(has_changed))
    return Reasoning(planning=trace.planning, reasoning=trace.reasoning, summary=trace.summary, reflection=reflection)


def trace_reply(result: ParsedTrace, *, shows_reasoning: bool) -> TraceReply:
    """Return the trace and the grade of its form."""
    return TraceReply(
        raw=result.raw if shows_reasoning else None,
        format=result.format.value,
        missing_sections=[section.value for section in result.missing_sections],
    )


def audio_reply(run: AnswerRun) -> AudioReply:
    """Describe the clip and the parts of it that the model received."""
    waveform, fitted = run.waveform, run.fitted
    parts = [(start / SAMPLE_RATE_HZ, end / SAMPLE_RATE_HZ) for start, end in fitted.parts]
    reply = describe_audio(waveform, waveform.duration_s, waveform.quality, parts)
    found = [*waveform.warnings, *fitting_warnings(run)]
    return reply.model_copy(
        update={"padded_s": round(fitted.padded_s, 4), "warnings": [clip_warning(each) for each in found]}
    )


def describe_audio(
    waveform: Waveform,
    duration_s: float,
    quality: Quality,
    parts: Sequence[tuple[float, float]],
    *,
    num_windows: int = 1,
) -> AudioReply:
    """Describe a clip or a recording.

    Args:
        waveform: Codec, rate, channels, track and warnings.
        duration_s: Length in seconds.
        quality: Measures of all samples.
        parts: Start and end in seconds of the parts that the model received.
        num_windows: Windows of the recording.
    """
    return AudioReply(
        duration_s=round(duration_s, 4),
        used_s=round(sum(end_s - start_s for start_s, end_s in parts), 4),
        parts=[UsedPart(start_s=round(start_s, 4), end_s=round(end_s, 4)) for start_s, end_s in parts],
        truncated=waveform.missing_s > 0,
        missing_s=round(waveform.missing_s, 3),
        num_tracks=waveform.num_tracks,
        track=waveform.track,
        channel=waveform.channel,
        warnings=[clip_warning(warning) for warning in waveform.warnings],
        windows=num_windows,
        sample_rate_hz=waveform.source_sample_rate_hz,
        channels=waveform.source_channels,
        codec=waveform.codec,
        quality=QualityReply(
            silence_ratio=round(quality.silence_ratio, 4),
            clipping_ratio=round(quality.clipping_ratio, 4),
            peak_dbfs=round(quality.peak_dbfs, 2),
        ),
    )


def clip_warning(warning: AudioWarning) -> ClipWarning:
    """Return a warning about a clip in wire format."""
    return ClipWarning(code=warning.code, message=warning.message, seconds=warning.seconds)


def fitting_warnings(run: AnswerRun) -> Iterator[AudioWarning]:
    """Yield a warning for each difference between the clip and the sound that the model received."""
    waveform, fitted = run.waveform, run.fitted
    trimmed_s = waveform.duration_s - fitted.used_s
    if trimmed_s > 0:
        message = f"{trimmed_s:.2f} s of silence were left out for the model; `parts` names the parts that it received."
        yield AudioWarning("silence_trimmed", message, round(trimmed_s, 3))
    if fitted.padded_s > 0:
        message = "The clip is shorter than the model's training clips; quiet was added around it for the model."
        yield AudioWarning("quiet_added", message, round(fitted.padded_s, 3))
    if not run.has_words:
        message = f"{fitted.sound_s:.2f} s of sound are too short for words; the transcript is empty."
        yield AudioWarning("too_short_for_words", message, round(fitted.sound_s, 3))
    if len(run.pieces) > 1:
        message = (
            f"The words come from {len(run.pieces)} pieces of the clip, cut at quiet places; the answer from all of it."
        )
        yield AudioWarning("heard_in_pieces", message)


def timings(stats: GenerationStats, context: RequestContext) -> Timings:
    """Return the clock readings in milliseconds."""

    def since_start(moment_s: float | None) -> float | None:
        return None if moment_s is None else round(context.elapsed_ms(moment_s), 1)

    def ms(seconds: float | None) -> float | None:
        return None if seconds is None else round(seconds * 1000, 1)

    return Timings(
        receive=since_start(context.received_s) or 0.0,
        decode=ms(context.decode_s) or 0.0,
        queue=ms(stats.queue_s),
        prefill=ms(stats.prefill_s),
        first_token=since_start(stats.first_token_s),
        first_answer_token=since_start(stats.first_answer_s),
        sections={section.value: round(seconds * 1000, 1) for section, seconds in stats.section_seconds().items()},
        total=round(context.elapsed_ms(), 1),
    )


def warnings(result: AnswerResult, waveform: Waveform) -> list[WarningReply]:
    """Return warnings to consider before trusting the answer."""
    return [*clip_warnings(waveform), *answer_warnings(result)]


def clip_warnings(waveform: Waveform) -> Iterator[WarningReply]:
    """Yield warnings about a clip."""
    return quality_warnings(waveform.quality)


def quality_warnings(quality: Quality) -> Iterator[WarningReply]:
    """Yield warnings about the sound of a clip or a recording."""
    if quality.silence_ratio >= SILENT_RATIO:
        yield WarningReply(code="silent_audio", message="The clip is silent; an answer about its content is a guess.")
    if quality.clipping_ratio >= CLIPPED_RATIO:
        message = "Many samples of the clip are at full scale; the recording level was probably too high."
        yield WarningReply(code="clipped_audio", message=message)


def answer_warnings(result: AnswerResult) -> Iterator[WarningReply]:
    """Yield warnings about an incomplete trace and an empty answer."""
    message = TERMINATION_WARNINGS.get(result.parsed.termination)
    if message is not None:
        yield WarningReply(code=f"{result.parsed.termination.value}_trace", message=message)
    if not result.text:
        yield WarningReply(code="empty_answer", message="The answer is empty.")
