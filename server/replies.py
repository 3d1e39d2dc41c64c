"""Builds the reply of one question, whole or as far as it came, and counts it. Plain functions, no waiting."""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hyper_model.audio import Waveform
from hyper_model.pause import GateReport
from hyper_model.trace import Section, Trace, environment_labels, render_choice
from hyper_model.trace_parser import ParsedTrace, TraceFormat
from server.api.types import (
    Answer,
    AudioReply,
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
    WarningReply,
)
from server.request_context import RequestContext, SectionTime, StageTime
from server.telemetry.labels import FormFailure, Stage

if TYPE_CHECKING:
    from server.answering import QaRun
    from server.service import Service

SILENT_RATIO = 0.98
CLIPPED_RATIO = 0.01
NUM_KEY_DIGITS = 12


@dataclass
class GenerationStats:
    """Counts and times one answer while it is written; the clock is `time.monotonic()`."""

    id: str = field(default_factory=lambda: f"qa_{uuid.uuid4().hex}")
    created_s: int = field(default_factory=lambda: int(time.time()))
    prompt_tokens: int = 0
    audio_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    pause_tokens: int = 0
    num_pauses: int = 0
    report: GateReport = field(default_factory=GateReport)
    pause_s: list[float] = field(default_factory=list[float])
    paused_s: float | None = None
    line_s: float = 0.0
    queue_s: float | None = None
    prefill_s: float | None = None
    engine_queue_s: float | None = None
    features_s: float | None = None
    parse_s: float = 0.0
    asked_s: float | None = None
    started_s: float = field(default_factory=time.monotonic)
    first_token_s: float | None = None
    last_token_s: float | None = None
    first_answer_s: float | None = None
    section_started_s: dict[Section, float] = field(default_factory=dict[Section, float])
    section_ended_s: dict[Section, float] = field(default_factory=dict[Section, float])

    def record_first_answer(self) -> None:
        """Marks the moment of the first word of the answer."""
        if self.first_answer_s is None:
            self.first_answer_s = time.monotonic()

    def record_stages(self, context: RequestContext) -> None:
        """Adds what the engine took to the request's stages, as far as it came.

        Its own figures are lengths of time. They end with the first token, so that is where they are put.
        """
        if self.asked_s is None:
            return
        started = self.section_started_s
        for section, ended_s in self.section_ended_s.items():
            context.sections.append(SectionTime(section.value, started[section], ended_s))
        context.record("first_token", self.asked_s, self.first_token_s)
        if self.first_token_s is None or self.last_token_s is None:
            return
        at_s = self.first_token_s
        parts: tuple[tuple[Stage, float | None], ...] = (
            ("prefill", self.prefill_s),
            ("engine_queue", self.engine_queue_s),
        )
        for stage, seconds in parts:
            if seconds is not None:
                context.record(stage, at_s - seconds, at_s)
                at_s -= seconds
        if self.features_s is not None:
            context.record("features", self.asked_s, self.asked_s + self.features_s)
        context.record("generate", self.first_token_s, self.last_token_s)
        context.stages.append(StageTime("parse", self.parse_s))

    def section_seconds(self) -> dict[Section, float]:
        """Returns how long each finished section took to write."""
        started = self.section_started_s
        return {section: ended - started[section] for section, ended in self.section_ended_s.items()}


def build(run: QaRun, answer: Answer) -> QaReply:
    """Writes the reply of a finished run."""
    result = run.parser.result
    stats, context, waveform = run.stats, run.context, run.waveform
    shows_reasoning = run.question.shows_reasoning
    return QaReply(
        id=stats.id,
        created=stats.created_s,
        model=run.manifest.name,
        answer=answer,
        perception=perception(result.trace) if shows_reasoning else None,
        reasoning=reasoning(result.trace, run.question.choices) if shows_reasoning else None,
        trace=trace_reply(result, shows_reasoning=shows_reasoning),
        termination=result.termination.value,
        pause=PauseReply(
            mode=run.manifest.pause.mode if run.question.max_pauses else "off",
            budget=run.question.max_pauses or 0,
            lowered_by=run.question.lowered_by,
            count=stats.num_pauses,
            latent_tokens=stats.pause_tokens,
            at=[
                PauseAt(section=pause.section, confidence=rounded(confidence))
                for pause, confidence in zip(result.pauses, known_confidences(run), strict=True)
            ],
            lowest_group_confidence=rounded(stats.report.lowest),
        ),
        audio=[audio_reply(waveform)],
        usage=Usage(
            prompt_tokens=stats.prompt_tokens,
            audio_tokens=stats.audio_tokens,
            cached_tokens=stats.cached_tokens,
            completion_tokens=stats.completion_tokens,
            pause_tokens=stats.pause_tokens,
            total_tokens=stats.prompt_tokens + stats.completion_tokens + stats.pause_tokens,
        ),
        timings_ms=timings(stats, context),
        warnings=warnings(result, waveform, answer),
    )


def known_confidences(run: QaRun) -> Sequence[float | None]:
    """Returns the confidence at each pause of the trace; None for the first ones where a report has been forgotten."""
    num_pauses = len(run.parser.result.pauses)
    padded = (*[None] * num_pauses, *run.stats.report.confidences)
    return padded[len(padded) - num_pauses :]


def rounded(confidence: float | None) -> float | None:
    """Writes a probability in four digits: more are noise of the arithmetic."""
    return None if confidence is None else round(confidence, 4)


def partial(result: ParsedTrace, choices: Sequence[str] = (), *, shows_reasoning: bool) -> dict[str, Any]:
    """Writes what stands of an answer that was cut short."""
    parts: dict[str, Any] = {"trace": trace_reply(result, shows_reasoning=shows_reasoning).model_dump(mode="json")}
    if shows_reasoning:
        parts["perception"] = perception(result.trace).model_dump(mode="json")
        parts["reasoning"] = reasoning(result.trace, choices).model_dump(mode="json")
    return parts


def perception(trace: Trace) -> Perception:
    """Collects what the model says it heard."""
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
    """Collects how the model came to its answer; the answer changed where RESPONSE and FINAL_ANSWER differ in words.

    Args:
        choices: What the question offers: its second choice is the same answer as `two` and as `B. two`.
    """
    reflection = None
    if trace.reflection is not None:
        own_words = {folded(render_choice(index, choices)): folded(choice) for index, choice in enumerate(choices)}
        first, last = (own_words.get(folded(text), folded(text)) for text in (trace.response, trace.final_answer))
        reflection = Reflection(text=trace.reflection, changed_answer=bool(first and last and first != last))
    return Reasoning(planning=trace.planning, reasoning=trace.reasoning, summary=trace.summary, reflection=reflection)


def folded(text: str | None) -> str:
    """Returns the words alone, without their case and spacing."""
    return " ".join((text or "").casefold().split())


def trace_reply(result: ParsedTrace, *, shows_reasoning: bool) -> TraceReply:
    """Writes the trace and how well it kept its form."""
    return TraceReply(
        raw=result.raw if shows_reasoning else None,
        format=result.format.value,
        missing_sections=[section.value for section in result.missing_sections],
    )


def audio_reply(waveform: Waveform) -> AudioReply:
    """Describes the clip; while a clip must fit one window, all of it is used."""
    quality = waveform.quality
    return AudioReply(
        duration_s=round(waveform.duration_s, 4),
        used_s=round(waveform.duration_s, 4),
        truncated=False,
        windows=1,
        sample_rate_hz=waveform.source_sample_rate_hz,
        channels=waveform.source_channels,
        codec=waveform.codec,
        quality=QualityReply(
            silence_ratio=round(quality.silence_ratio, 4),
            clipping_ratio=round(quality.clipping_ratio, 4),
            peak_dbfs=round(quality.peak_dbfs, 2),
        ),
    )


def timings(stats: GenerationStats, context: RequestContext) -> Timings:
    """Writes the clock readings as milliseconds."""

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


def warnings(result: ParsedTrace, waveform: Waveform, answer: Answer) -> list[WarningReply]:
    """Lists what a caller should know before trusting the answer."""
    found: list[WarningReply] = []

    def warn(code: str, message: str) -> None:
        found.append(WarningReply(code=code, message=message))

    quality = waveform.quality
    if quality.silence_ratio >= SILENT_RATIO:
        warn("silent_audio", "The clip is silent; an answer about its content is a guess.")
    if quality.clipping_ratio >= CLIPPED_RATIO:
        warn("clipped_audio", "Many samples of the clip are at full scale; the recording level was probably too high.")
    match result.termination.value:
        case "truncated":
            warn("truncated_trace", "The trace reached its token limit; the answer comes from an incomplete trace.")
        case "malformed":
            warn("malformed_trace", "The trace has a wrong format; trust its sections less.")
        case "aborted":
            warn("aborted_trace", "The gate aborted the trace; the answer comes from an incomplete trace.")
        case _:
            pass
    if not answer.text:
        warn("empty_answer", "The answer is empty.")
    return found


def record_metrics(service: Service, run: QaRun, reply: QaReply) -> None:
    """Counts a finished answer that somebody asked for, and notes it for the request's log line."""
    metrics, stats, context = service.metrics, run.stats, run.context
    context.facts |= {
        "termination": reply.termination,
        "format": reply.trace.format,
        "audio_s": round(run.waveform.duration_s, 3),
        "completion_tokens": reply.usage.completion_tokens,
        "pauses": reply.pause.count,
    }
    if stats.first_token_s is not None:
        metrics.time_to_first_token.observe(context.elapsed_ms(stats.first_token_s) / 1000)
        # Most of it, as what the engine keeps is in blocks. The clip is what a prompt begins with, but for some words.
        before_clip = list(run.question.prompt_token_ids).index(run.tokenizer.audio_id)
        is_cached = 2 * (stats.cached_tokens - before_clip) > stats.audio_tokens
        (metrics.audio_cache_hits if is_cached else metrics.audio_cache_misses).inc()
    if stats.section_started_s:
        metrics.time_to_first_section.observe(context.elapsed_ms(min(stats.section_started_s.values())) / 1000)
    if stats.last_token_s is not None and reply.termination == "complete":
        service.pause_budgeter.record(stats.last_token_s - stats.started_s, stats.pause_s)
    if stats.first_answer_s is not None:
        metrics.time_to_first_answer_token.observe(context.elapsed_ms(stats.first_answer_s) / 1000)
    for section, seconds in stats.section_seconds().items():
        metrics.section_seconds.labels(section.value).observe(seconds)
    for section, count in run.parser.result.section_num_tokens.items():
        metrics.section_tokens.labels(section.value).observe(count)
    for pause in reply.pause.at:
        metrics.pauses.labels(pause.section or "none").inc()
    metrics.pause_tokens.inc(stats.pause_tokens)
    for seconds in stats.pause_s:
        metrics.pause_seconds.observe(seconds)
    for confidence in stats.report.confidences:
        if confidence is not None:
            metrics.pause_confidence.observe(confidence)
    if stats.num_pauses and stats.num_pauses >= (run.question.max_pauses or 0):
        metrics.pause_budget_spent.inc()
    if run.question.lowered_by is not None:
        metrics.pause_budget_lowered.labels(run.question.lowered_by).inc()
    if run.question.max_pauses:
        metrics.pauses_per_answer.observe(stats.num_pauses)
        metrics.pause_tokens_per_answer.labels(reply.pause.mode).observe(stats.pause_tokens)
    if stats.report.lowest is not None:
        metrics.lowest_confidence.observe(stats.report.lowest)
    metrics.traces.labels(reply.trace.format, reply.termination).inc()
    for kind in failures(run.parser.result):
        metrics.parse_failures.labels(kind).inc()
    for section in run.parser.result.missing_sections:
        metrics.sections_missing.labels(section.value).inc()
    reflection = reasoning(run.parser.result.trace, run.question.choices).reflection
    if reflection is not None:
        metrics.reflections.labels("true" if reflection.changed_answer else "false").inc()
    metrics.prompt_tokens.inc(stats.prompt_tokens)
    metrics.audio_tokens.inc(stats.audio_tokens)
    metrics.cached_tokens.inc(stats.cached_tokens)
    metrics.completion_tokens.inc(stats.completion_tokens)
    if reply.answer.confidence is not None:
        metrics.answer_confidence.observe(reply.answer.confidence)
    if not reply.answer.text:
        metrics.answer_empty.inc()
    duration_s = run.waveform.duration_s
    metrics.audio_processed.inc(duration_s)
    metrics.audio_rtf.observe(context.elapsed_ms() / 1000 / duration_s)
    if service.settings.metrics_by_key and context.tenant is not None:
        # As many as there are keys. Names may be those of people, and metrics are read by many.
        digest = hashlib.sha256(context.tenant_name.encode()).hexdigest()
        metrics.key_audio.labels(digest[:NUM_KEY_DIGITS]).inc(duration_s)


def failures(result: ParsedTrace) -> list[FormFailure]:
    """Lists how a trace did not keep to the form."""
    found: list[FormFailure] = []
    if result.format is TraceFormat.MALFORMED:
        found.append("malformed")
    elif result.format is TraceFormat.WEAK:
        found.append("weak")
    if result.trailing_text:
        found.append("trailing_text")
    return found
