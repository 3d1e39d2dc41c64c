"""Measurements of one answer during its generation, recorded in the metrics at the end.

The figures come from the engine's chunks and from `AnswerResult`, never from a reply, so all endpoints are measured
alike.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field

from hyper_model.answering import AnswerDelta, AnswerResult, Event, Question, changed_answer
from hyper_model.pause import GateSettings
from hyper_model.trace import Section
from hyper_model.trace_parser import ParsedTrace, SectionEnd, SectionStart, TraceFormat
from server.engines.protocol import TokenChunk
from server.pause_budget import LoweredBy
from server.request_context import RequestContext
from server.telemetry.labels import FormFailure, Stage
from server.telemetry.metrics import Metrics
from server.telemetry.stages import SectionTime, StageTime

NUM_KEY_DIGITS = 12


@dataclass
class GenerationStats:
    """Counts and times of one answer during its generation; the clock is `time.monotonic()`.

    Attributes:
        num_prompt_ids: Length of the question's prompt, with the clip as one placeholder; `num_before_clip` ids precede
            it.
        created_s: Seconds since 1970.
        started_s: Time of the decision on token and pause budgets.
        limiter_s: Seconds of waiting for a slot of the limiter; `queue_s` adds the engine's own queue.
        asked_s: Time of the first request to the engine; None before.
        paused_s: Start of the current pause; `pause_s` holds the seconds of each finished one.
        parse_s: Seconds spent in the answering procedure itself.
        num_piece_tokens: Tokens written about pieces of a long clip, before its trace.
    """

    num_prompt_ids: int
    num_before_clip: int = 0
    created_s: int = field(default_factory=lambda: int(time.time()))
    prompt_tokens: int = 0
    audio_tokens: int = 0
    cached_tokens: int = 0
    pause_s: list[float] = field(default_factory=list[float])
    paused_s: float | None = None
    limiter_s: float = 0.0
    queue_s: float | None = None
    prefill_s: float | None = None
    engine_queue_s: float | None = None
    features_s: float | None = None
    parse_s: float = 0.0
    num_piece_tokens: int = 0
    asked_s: float | None = None
    started_s: float = field(default_factory=time.monotonic)
    first_token_s: float | None = None
    last_token_s: float | None = None
    first_answer_s: float | None = None
    section_started_s: dict[Section, float] = field(default_factory=dict[Section, float])
    section_ended_s: dict[Section, float] = field(default_factory=dict[Section, float])

    def record_chunk(self, chunk: TokenChunk) -> None:
        """Record the engine's figures: those of the request from its first chunk, those of pauses from each."""
        now_s = time.monotonic()
        if self.first_token_s is None:
            self.first_token_s = now_s
            self.prompt_tokens = chunk.num_prompt_tokens
            self.audio_tokens = chunk.num_prompt_tokens - self.num_prompt_ids + 1
            self.cached_tokens = chunk.num_cached_tokens
            self.queue_s = None if chunk.queue_s is None else self.limiter_s + chunk.queue_s
            self.engine_queue_s = chunk.queue_s
            self.prefill_s = chunk.prefill_s
            self.features_s = chunk.features_s
        self.last_token_s = now_s
        if self.paused_s is not None:
            self.pause_s.append(now_s - self.paused_s)
            self.paused_s = None
        if chunk.span:
            self.paused_s = now_s

    def record_event(self, event: Event) -> None:
        """Record the start and end of sections, and the time of the answer's first word."""
        match event:
            case SectionStart(section):
                self.section_started_s[section] = time.monotonic()
            case SectionEnd(section):
                self.section_ended_s[section] = time.monotonic()
            case AnswerDelta() if self.first_answer_s is None:
                self.first_answer_s = time.monotonic()
            case _:
                pass

    def record_stages(self, context: RequestContext) -> None:
        """Add the engine's stages to the request's, as far as it has come.

        The engine reports durations, not times. They are placed before the first token.
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

    @property
    def is_clip_cached(self) -> bool:
        """Return whether more than half of the clip was in the engine's cache; it caches whole blocks of tokens."""
        return 2 * (self.cached_tokens - self.num_before_clip) > self.audio_tokens

    def section_seconds(self) -> dict[Section, float]:
        """Return the seconds of writing each finished section."""
        started = self.section_started_s
        return {section: ended - started[section] for section, ended in self.section_ended_s.items()}


def record_metrics(
    metrics: Metrics,
    context: RequestContext,
    *,
    question: Question,
    result: AnswerResult,
    stats: GenerationStats,
    duration_s: float,
    lowered_by: LoweredBy | None,
) -> None:
    """Record a finished answer in the metrics, and add its key figures to the request's log line.

    Args:
        duration_s: Length of the clip.
        lowered_by: Reason for a `pause=auto` budget below the checkpoint's.
    """
    parsed = result.parsed
    context.facts |= {
        "termination": parsed.termination.value,
        "format": parsed.format.value,
        "audio_s": round(duration_s, 3),
        "completion_tokens": result.num_completion_tokens,
        "pauses": result.num_pauses,
    }
    _record_times(metrics, context, stats)
    if stats.first_token_s is not None:
        (metrics.audio_cache_hits if stats.is_clip_cached else metrics.audio_cache_misses).inc()
    _record_pauses(metrics, question.gate, result)
    for seconds in stats.pause_s:
        metrics.pause_seconds.observe(seconds)
    if lowered_by is not None:
        metrics.pause_budget_lowered.labels(lowered_by).inc()
    _record_trace(metrics, question, parsed)
    metrics.prompt_tokens.inc(stats.prompt_tokens)
    metrics.audio_tokens.inc(stats.audio_tokens)
    metrics.cached_tokens.inc(stats.cached_tokens)
    metrics.completion_tokens.inc(result.num_completion_tokens)
    if result.confidence is not None:
        metrics.answer_confidence.observe(result.confidence)
    if not result.text:
        metrics.answer_empty.inc()
    metrics.audio_processed.inc(duration_s)
    metrics.audio_rtf.observe(context.elapsed_ms() / 1000 / duration_s)


def record_audio_of_key(metrics: Metrics, context: RequestContext, duration_s: float) -> None:
    """Count seconds of audio by the digest of the caller's key; its name may be a person's."""
    if context.tenant is not None:
        digest = hashlib.sha256(context.tenant_name.encode()).hexdigest()
        metrics.key_audio.labels(digest[:NUM_KEY_DIGITS]).inc(duration_s)


def _record_times(metrics: Metrics, context: RequestContext, stats: GenerationStats) -> None:
    if stats.first_token_s is not None:
        metrics.time_to_first_token.observe(context.elapsed_ms(stats.first_token_s) / 1000)
    if stats.section_started_s:
        metrics.time_to_first_section.observe(context.elapsed_ms(min(stats.section_started_s.values())) / 1000)
    if stats.first_answer_s is not None:
        metrics.time_to_first_answer_token.observe(context.elapsed_ms(stats.first_answer_s) / 1000)
    for section, seconds in stats.section_seconds().items():
        metrics.section_seconds.labels(section.value).observe(seconds)


def _record_pauses(metrics: Metrics, gate: GateSettings | None, result: AnswerResult) -> None:
    max_pauses = gate.max_pauses if gate else 0
    for pause in result.parsed.pauses:
        metrics.pauses.labels(pause.section or "none").inc()
    metrics.pause_tokens.inc(result.num_pause_tokens)
    for confidence in result.report.confidences:
        if confidence is not None:
            metrics.pause_confidence.observe(confidence)
    if result.num_pauses and result.num_pauses >= max_pauses:
        metrics.pause_budget_spent.inc()
    if gate and max_pauses:
        metrics.pauses_per_answer.observe(result.num_pauses)
        metrics.pause_tokens_per_answer.labels(gate.mode.value).observe(result.num_pause_tokens)
    if result.report.lowest is not None:
        metrics.lowest_confidence.observe(result.report.lowest)
    metrics.draft_tokens.labels("accepted").inc(result.report.num_accepted)
    metrics.draft_tokens.labels("rejected").inc(result.report.num_drafted - result.report.num_accepted)


def _record_trace(metrics: Metrics, question: Question, parsed: ParsedTrace) -> None:
    for section, count in parsed.section_num_tokens.items():
        metrics.section_tokens.labels(section.value).observe(count)
    metrics.traces.labels(parsed.format.value, parsed.termination.value).inc()
    for kind in form_failures(parsed):
        metrics.parse_failures.labels(kind).inc()
    for section in parsed.missing_sections:
        metrics.sections_missing.labels(section.value).inc()
    has_changed = changed_answer(parsed.trace, question.choices)
    if has_changed is not None:
        metrics.reflections.labels("true" if has_changed else "false").inc()


def form_failures(parsed: ParsedTrace) -> list[FormFailure]:
    """Return the faults of a trace's form."""
    found: list[FormFailure] = []
    if parsed.format is TraceFormat.MALFORMED:
        found.append("malformed")
    elif parsed.format is TraceFormat.WEAK:
        found.append("weak")
    if parsed.trailing_text:
        found.append("trailing_text")
    return found
