"""Driver of the answering procedure over an engine, for one request among many.

The procedure itself is `hyper_model.answering`. This module adds the wait for a slot, cache keys, times and metrics. It
is independent of HTTP and wire formats: it forwards events as dataclasses and returns an `AnswerResult`.
"""

from __future__ import annotations

import hashlib
import hmac
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field, replace

import numpy as np

from hyper_model.answering import (
    NOTHING_HEARD,
    Answering,
    AnswerResult,
    Event,
    Generate,
    Heard,
    Question,
    Score,
    join_heard,
)
from hyper_model.audio import SAMPLE_RATE_HZ, WINDOW_S, Waveform
from hyper_model.checkpoint import Checkpoint
from hyper_model.pause import GateSettings
from hyper_model.silence import MIN_SPOKEN_S, FittedClip, cut_pieces, whole
from hyper_model.trace import Section, Termination, build_prompt
from hyper_model.trace_parser import SectionEnd
from server.engines.protocol import Engine, GenerationRequest, TokenChunk
from server.engines.supervisor import Quarantine
from server.errors import EngineUnavailableError
from server.generation_stats import GenerationStats, record_audio_of_key, record_metrics
from server.limiter import PriorityLimiter
from server.pause_budget import Budget, LoweredBy, PauseBudgeter
from server.request_context import RequestContext
from server.settings import Settings
from server.telemetry.metrics import Metrics

PIECE_TOKENS = 96
"""Tokens about a piece of a clip beside its words, which SPEAKER and ASR both contain."""

PIECE_TOKENS_PER_S = 24

Emit = Callable[[Event], Awaitable[None]]


async def discard(event: Event) -> None:
    """Drop an event: the `Emit` of an answer that is not streamed."""


@dataclass
class Answerer:
    """Parts of the service shared by all answers: engine, checkpoint, queue, budgets and cache keys.

    Attributes:
        secret: Key of the engine's cache names for clips and prompts; new in each process.
        gate: The checkpoint's gate with its full budget; None without a gate.
    """

    settings: Settings
    checkpoint: Checkpoint
    engine: Engine
    metrics: Metrics
    limiter: PriorityLimiter
    quarantine: Quarantine
    secret: bytes
    pause_budgeter: PauseBudgeter = field(default_factory=PauseBudgeter)
    gate: GateSettings | None = field(init=False)

    def __post_init__(self) -> None:
        self.gate = GateSettings.of(self.checkpoint.manifest, self.checkpoint.tokenizer)

    @property
    def max_pauses(self) -> int:
        """Return the maximum number of pauses per answer; 0 without a gate."""
        return self.gate.max_pauses if self.gate else 0

    def auto_budget(self, left_s: float) -> Budget:
        """Compute the `pause=auto` budget from the seconds until the deadline and the queue's length."""
        settings = self.settings
        # Count only requests waiting for the engine; unfinished uploads do not compete for it.
        num_waiting = max(0, self.limiter.num_working + self.limiter.num_waiting + 1 - settings.max_num_seqs)
        num_places = max(0, settings.max_in_flight - settings.max_num_seqs)
        return self.pause_budgeter.budget(
            self.max_pauses, left_s=left_s, num_waiting=num_waiting, num_places=num_places
        )

    def cache_salt(self, context: RequestContext) -> str:
        """Return a tenant's cache salt. Tenants share no cached prefix, because reply times would reveal a hit."""
        return hmac.new(self.secret, context.tenant_name.encode(), hashlib.sha256).hexdigest()

    def clip_key(self, waveform: Waveform, context: RequestContext) -> str:
        """Return an unguessable cache key for a clip, the same for the same sound of the same tenant.

        The engine identifies a sound by its key. A caller able to choose the key could read another tenant's clip.
        """
        named = f"{self.cache_salt(context)} {SAMPLE_RATE_HZ} {waveform.sha256}"
        return hashlib.sha256(named.encode()).hexdigest()

    def fit(self, waveform: Waveform) -> FittedClip:
        """Return the clip as the model receives it: without long silence, unless `trim_silence` is off."""
        return waveform.fitted if self.settings.trim_silence else whole(waveform.samples_S)

    async def warm_up(self) -> float:
        """Ask two questions about a known sound before the service is ready; return the seconds of the second.

        The first fills a whole window, so the engine allocates the memory of the largest request. Both end in a scored
        choice. The answers are not checked: a checkpoint may be untrained and its engine healthy.
        """
        seconds = 0.0
        for duration_s in (WINDOW_S, 1.0):
            times_S = np.arange(int(duration_s * SAMPLE_RATE_HZ), dtype=np.float32) / SAMPLE_RATE_HZ
            waveform = Waveform.from_samples(0.1 * np.sin(2 * np.pi * 440 * times_S), SAMPLE_RATE_HZ)
            choices = ("yes", "no")
            prompt_token_ids = build_prompt(self.checkpoint.tokenizer, "Is there a tone?", choices)
            question = Question(tuple(prompt_token_ids), choices, max_tokens=16)
            context = RequestContext(request_id="canary", is_body_complete=True)
            # Without limiter and quarantine: the engine has no other request, and this clip is not suspect.
            await AnswerRun(self, context, question, waveform).answer(discard)
            seconds = context.elapsed_ms() / 1000
        return seconds


class AnswerRun:
    """Run of one question about one clip; call `run` once.

    Attributes:
        waveform: The clip as decoded; `fitted` is the clip as the model receives it.
        answering: The procedure, with the trace so far after an early end.
        stats: Times and token counts so far.
        lowered_by: Reason for a `pause=auto` budget below the checkpoint's.
        pieces: Parts of the fitted clip whose words are recognised one by one, in samples; one for most clips.
        has_words: False for a clip too short for words; its transcript is empty.
    """

    def __init__(
        self,
        answerer: Answerer,
        context: RequestContext,
        question: Question,
        waveform: Waveform,
        *,
        lowered_by: LoweredBy | None = None,
    ) -> None:
        checkpoint = answerer.checkpoint
        self.answerer = answerer
        self.context = context
        self.question = question
        self.waveform = waveform
        self.fitted = answerer.fit(waveform)
        self.has_words = not answerer.settings.trim_silence or self.fitted.sound_s >= MIN_SPOKEN_S
        single_pass_s = checkpoint.manifest.audio.single_pass_s if answerer.settings.trim_silence else None
        self.pieces = cut_pieces(self.fitted.samples_S, single_pass_s) if self.has_words else []
        if not self.has_words:
            self.question = question = replace(question, heard=NOTHING_HEARD)
        self.lowered_by: LoweredBy | None = lowered_by
        self.answering = Answering(question, checkpoint.tokenizer, checkpoint.manifest)
        self.stats = GenerationStats(
            num_prompt_ids=len(question.prompt_token_ids),
            num_before_clip=question.prompt_token_ids.index(checkpoint.tokenizer.audio_id),
        )
        # The client's request id may repeat; the engine's may not.
        self.id = uuid.uuid4().hex
        self.num_requests = 0
        self.cache_salt = answerer.cache_salt(context)
        self.clip_keys = (answerer.clip_key(waveform, context),)

    async def run(self, emit: Emit) -> AnswerResult:
        """Wait for a slot, answer, pass every event to `emit` in order, and record the answer in the metrics.

        Raises:
            EngineUnavailableError: If the engine dies.
            PoisonedClipError: If the engine has died on this clip before.
        """
        answerer, context = self.answerer, self.context
        context.phase = "queue"
        started_s = time.monotonic()
        async with AsyncExitStack() as stack:
            with context.timing("queue"):
                await stack.enter_async_context(answerer.limiter.slot(context.priority))
                await stack.enter_async_context(answerer.quarantine.enter(self.waveform.sha256))
            self.stats.limiter_s = time.monotonic() - started_s
            answerer.metrics.queue_wait.labels(context.priority).observe(self.stats.limiter_s)
            try:
                result = await self.answer(emit)
            except EngineUnavailableError:
                if not answerer.engine.is_alive:
                    # At once, while the clips of all failed requests still count as inside the engine.
                    answerer.quarantine.record_failure()
                raise
            finally:
                self.stats.record_stages(context)
        self.record(result)
        return result

    async def answer(self, emit: Emit) -> AnswerResult:
        """Drive the procedure without waiting for a slot."""
        self.stats.asked_s = time.monotonic()
        if len(self.pieces) > 1:
            heard = [await self.hear(start, end, Section.ASR) for start, end in self.pieces]
            if not all(heard):
                # Words of a piece are missing; the trace of the whole clip is better than part of its words.
                self.pieces = []
            else:
                # Only the whole clip tells the voices of two pieces apart.
                whole_clip = await self.hear(0, len(self.fitted.samples_S), Section.SPEAKER)
                people = whole_clip.speakers if whole_clip else ()
                question = replace(self.question, heard=join_heard([piece for piece in heard if piece], people))
                checkpoint = self.answerer.checkpoint
                self.answering = Answering(question, checkpoint.tokenizer, checkpoint.manifest)
        answering, engine = self.answering, self.answerer.engine
        while (step := answering.next_step) is not None:
            match step:
                case Generate():
                    async with aclosing(engine.generate(self.generation_request(step))) as chunks:
                        async for chunk in chunks:
                            await self.pass_on(self.receive(chunk), emit)
                            if answering.next_step is not step:
                                break
                        else:
                            # An end without a reason means an abort by the engine.
                            await self.pass_on(answering.receive_tokens((), "abort"), emit)
                case Score():
                    with self.context.timing("score"):
                        logprobs = await engine.score(self.scoring_request(step), step.candidates)
                    await self.pass_on(answering.receive_scores(logprobs), emit)
        self.context.phase = "done"
        return answering.result

    async def hear(self, start: int, end: int, last: Section) -> Heard | None:
        """Recognise the speakers and words of a piece of the clip: the beginning of a trace of its own.

        Args:
            start: First sample of the piece in the fitted clip.
            end: Its end.
            last: The trace ends behind this section.

        Returns:
            None if the trace ends before this section does.
        """
        checkpoint = self.answerer.checkpoint
        max_tokens = PIECE_TOKENS + round((end - start) / SAMPLE_RATE_HZ * PIECE_TOKENS_PER_S)
        question = replace(
            self.question, choices=(), max_tokens=min(max_tokens, self.question.max_tokens), wants_logprobs=False
        )
        answering = Answering(question, checkpoint.tokenizer, checkpoint.manifest)
        step = answering.next_step
        assert isinstance(step, Generate)
        request = self.generation_request(step)
        if end - start < len(self.fitted.samples_S):
            key = hashlib.sha256(f"{self.clip_keys[0]} {start} {end}".encode()).hexdigest()
            request = replace(request, clips=(self.fitted.samples_S[start:end],), clip_keys=(key,))
        async with aclosing(self.answerer.engine.generate(request)) as chunks:
            async for chunk in chunks:
                self.stats.num_piece_tokens += len(chunk.token_ids)
                events = answering.receive_tokens(chunk.token_ids, span=chunk.span)
                if any(isinstance(event, SectionEnd) and event.section is last for event in events):
                    trace = answering.parsed.trace
                    return Heard(trace.speakers, trace.transcript or "")
        return None

    def receive(self, chunk: TokenChunk) -> list[Event]:
        """Give a chunk to the procedure, and time both."""
        self.stats.record_chunk(chunk)
        if self.context.phase == "queue":
            self.context.phase = "generate"
        started_s = time.perf_counter()
        events = self.answering.receive_tokens(
            chunk.token_ids, chunk.finish_reason, span=chunk.span, report=chunk.report, logprobs=chunk.logprobs
        )
        self.stats.parse_s += time.perf_counter() - started_s
        return events

    async def pass_on(self, events: Sequence[Event], emit: Emit) -> None:
        """Time events and pass them on."""
        for event in events:
            self.stats.record_event(event)
            await emit(event)

    def generation_request(self, step: Generate) -> GenerationRequest:
        """Return a step of the procedure as a request to the engine."""
        return GenerationRequest(
            request_id=self.next_request_id(),
            prompt_token_ids=step.prompt_token_ids,
            clips=(self.fitted.samples_S,),
            max_tokens=step.max_tokens,
            temperature=step.temperature,
            seed=step.seed,
            stop_token_ids=step.stop_token_ids,
            banned_token_ids=step.banned_token_ids,
            gate=step.gate,
            wants_logprobs=step.wants_logprobs,
            cache_salt=self.cache_salt,
            clip_keys=self.clip_keys,
        )

    def scoring_request(self, step: Score) -> GenerationRequest:
        """Return the engine request with the prompt of the candidates."""
        return GenerationRequest(
            request_id=self.next_request_id(),
            prompt_token_ids=step.prompt_token_ids,
            clips=(self.fitted.samples_S,),
            max_tokens=1,
            cache_salt=self.cache_salt,
            clip_keys=self.clip_keys,
        )

    def next_request_id(self) -> str:
        """Return an id for the next request to the engine."""
        self.num_requests += 1
        return f"{self.id}-{self.num_requests}"

    def record(self, result: AnswerResult) -> None:
        """Record a finished answer, for the metrics and for later `pause=auto` budgets."""
        answerer, duration_s = self.answerer, self.waveform.duration_s
        record_metrics(
            answerer.metrics,
            self.context,
            question=self.question,
            result=result,
            stats=self.stats,
            duration_s=duration_s,
            lowered_by=self.lowered_by,
        )
        if answerer.settings.metrics_by_key:
            record_audio_of_key(answerer.metrics, self.context, duration_s)
        if self.stats.last_token_s is not None and result.parsed.termination is Termination.COMPLETE:
            answerer.pause_budgeter.record(self.stats.last_token_s - self.stats.started_s, self.stats.pause_s)

    def record_late(self) -> None:
        """Record a missed deadline for later `pause=auto` budgets."""
        self.answerer.pause_budgeter.record_late(time.monotonic() - self.stats.started_s, self.stats.pause_s)
