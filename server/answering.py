"""One question about one clip, from the waveform to the reply: the only path, streamed or not.

The model writes its trace and this module reads along, telling each event to `emit` as it happens; a caller that does
not stream passes an `emit` that does nothing and takes the reply at the end. In two places the model does not have the
last word: among choices the answer is not written but scored, and a trace that breaks off is closed so that there is an
answer. This module knows no HTTP.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from hyper_model.audio import Waveform
from hyper_model.pause import GateSettings
from hyper_model.trace import PauseMode, Section, Termination, escape_markup, render_choice
from hyper_model.trace_parser import Event, PauseSeen, SectionDelta, SectionEnd, SectionStart, TraceParser
from server import replies
from server.api.types import Answer, QaReply
from server.engines.protocol import GenerationRequest, TokenChunk
from server.errors import EngineUnavailableError
from server.pause_budget import LoweredBy
from server.request_context import RequestContext
from server.service import Service

ANSWER_TOKENS = 64
"""What an answer may take after a trace that broke off; not part of `max_tokens`, so that a reply is never empty."""

CLOSING_TOKENS = 16
"""Room for the tags that close such a trace."""

Emit = Callable[[str, dict[str, Any]], Awaitable[None]]
End = Literal["stop", "length", "abort", "answer"]


@dataclass(frozen=True)
class Question:
    """Holds a question that has been checked against the model and the limits.

    Attributes:
        max_pauses: With 0 the gate still gives up a trace that repeats itself; None turns it off.
    """

    choices: tuple[str, ...]
    prompt_token_ids: tuple[int, ...]
    max_tokens: int
    max_pauses: int | None = None
    lowered_by: LoweredBy | None = None
    temperature: float = 0.0
    seed: int | None = None
    shows_reasoning: bool = True


class QaRun:
    """Answers one question; `run` once."""

    def __init__(self, service: Service, context: RequestContext, question: Question, waveform: Waveform) -> None:
        self.engine = service.engine
        self.limiter = service.limiter
        self.quarantine = service.quarantine
        self.queue_wait = service.metrics.queue_wait.labels(context.priority)
        self.cache_salt = service.cache_salt(context)
        self.manifest = service.checkpoint.manifest
        self.tokenizer = service.checkpoint.tokenizer
        self.context = context
        self.question = question
        self.waveform = waveform
        pause = self.manifest.pause
        budget = question.max_pauses
        self.gate = None if service.gate is None or budget is None else service.gate.with_budget(budget)
        self.clip_keys = (service.clip_key(waveform, context),)
        self.parser = TraceParser(self.tokenizer, pause_mode=PauseMode(pause.mode), latent_tokens=pause.latent_tokens)
        self.stats = replies.GenerationStats()
        self.written: list[int] = []
        self.num_parts = 0

    async def run(self, emit: Emit) -> QaReply:
        """Waits for its turn, answers, and tells `emit` every event of the stream in order, the last being `done`.

        Raises:
            EngineUnavailableError: The engine died.
            PoisonedClipError: It has died on this clip before.
        """
        self.context.phase = "queue"
        started_s = time.monotonic()
        async with AsyncExitStack() as stack:
            with self.context.timing("queue"):
                await stack.enter_async_context(self.limiter.slot(self.context.priority))
                await stack.enter_async_context(self.quarantine.enter(self.waveform.sha256))
            self.stats.line_s = time.monotonic() - started_s
            self.queue_wait.observe(self.stats.line_s)
            try:
                return await self.answer(emit)
            except EngineUnavailableError:
                if not self.engine.is_alive:
                    # At once, while all who were in it can be told.
                    self.quarantine.record_failure()
                raise
            finally:
                self.stats.record_stages(self.context)

    async def answer(self, emit: Emit) -> QaReply:
        """Writes trace and answer with a place in the engine."""
        self.stats.asked_s = time.monotonic()
        end = await self.write_trace(emit)
        hint = {"length": Termination.TRUNCATED, "abort": Termination.ABORTED}.get(end, Termination.COMPLETE)
        has_answer = end == "answer" or self.parser.result.answer_text is not None
        if hint is Termination.COMPLETE and not has_answer:
            hint = Termination.MALFORMED
        if self.question.choices:
            answer = await self.choose(emit)
        elif not has_answer:
            await self.write_answer(emit)
            answer = None
        else:
            answer = None
        for event in self.parser.finish(hint):
            await self.emit_event(event, emit)
        if answer is None:
            answer = await self.read_answer(emit)
        self.context.phase = "done"
        reply = replies.build(self, answer)
        await emit("answer.done", reply.answer.model_dump(mode="json"))
        await emit("usage", reply.usage.model_dump(mode="json"))
        await emit("done", reply.model_dump(mode="json"))
        return reply

    async def write_trace(self, emit: Emit) -> End:
        """Lets the model write until it ends its turn, spends its tokens, is given up, or comes to the choice."""
        ends = set(self.tokenizer.stop_ids)
        # Choices are scored, so the model's turn ends where the answer begins; else it ends with the answer.
        opens_answer, closes_answer = self.answer_tags
        stop = {*ends, *(opens_answer if self.question.choices else closes_answer)}
        gate = self.gate
        banned = self.pause_tags if gate is None else set[int]()
        request = self.request(self.question.max_tokens, stop, banned, gate)
        async with aclosing(self.engine.generate(request)) as chunks:
            async for chunk in chunks:
                self.record(chunk)
                await self.feed(chunk.span, emit)
                for token_id in chunk.token_ids:
                    self.stats.completion_tokens += 1
                    if token_id in ends:
                        return "stop"
                    await self.feed([token_id], emit)
                    # Where tags are plain text no single token opens the answer: the reader knows, not the engine.
                    if self.question.choices and Section.FINAL_ANSWER in self.parser.open_sections:
                        return "answer"
                if chunk.finish_reason is not None:
                    return chunk.finish_reason
        return "abort"

    async def write_answer(self, emit: Emit) -> None:
        """Closes a trace that broke off, and lets the model write its answer."""
        await self.feed(self.parser.ids_to_final_answer(), emit)
        _, closes_answer = self.answer_tags
        stop = {*self.tokenizer.stop_ids, *closes_answer}
        request = self.request(ANSWER_TOKENS, stop, self.pause_tags)
        async with aclosing(self.engine.generate(request)) as chunks:
            async for chunk in chunks:
                self.record(chunk)
                self.stats.completion_tokens += len(chunk.token_ids)
                await self.feed([each for each in chunk.token_ids if each not in self.tokenizer.stop_ids], emit)

    async def choose(self, emit: Emit) -> Answer:
        """Scores the choices as continuations of the trace, and writes the likeliest into it."""
        choices = self.question.choices
        await self.feed(self.parser.ids_to_final_answer(), emit)
        by_letter = self.manifest.trace.answer_style == "letter"
        candidates = self.tokenizer.choice_ids(choices, by_letter=by_letter)
        with self.context.timing("score"):
            logprobs = await self.engine.score(self.request(1, set(), set()), candidates)
        # Of the whole continuation, not its mean: the model has read the choices and is about to copy one of them.
        scores = softmax(logprobs)
        index = int(np.argmax(scores))
        words = escape_markup(render_choice(index, choices) if by_letter else " ".join(choices[index].split()))
        await self.feed([*self.tokenizer.encode_text(words), *self.tokenizer.close_ids(Section.FINAL_ANSWER)], emit)
        self.stats.record_first_answer()
        await emit("answer.delta", {"text": choices[index]})
        confidence = scores[index]
        return Answer(
            text=choices[index], choice_index=index, choice=choices[index], confidence=confidence, scores=scores
        )

    async def read_answer(self, emit: Emit) -> Answer:
        """Takes the answer to an open question out of the finished trace."""
        result = self.parser.result
        text = result.answer_text or ""
        if not result.texts.get(Section.FINAL_ANSWER):
            # Nothing was told as it was written: the answer is what RESPONSE says, or nothing.
            self.stats.record_first_answer()
            await emit("answer.delta", {"text": text})
        return Answer(text=text)

    async def feed(self, token_ids: Sequence[int], emit: Emit) -> None:
        """Adds tokens to the completion and tells what they say."""
        self.written += token_ids
        for token_id in token_ids:
            started_s = time.perf_counter()
            events = self.parser.feed(token_id)
            self.stats.parse_s += time.perf_counter() - started_s
            for event in events:
                await self.emit_event(event, emit)

    async def emit_event(self, event: Event, emit: Emit) -> None:
        """Passes one event of the trace on, where it is to be shown."""
        stats = self.stats
        match event:
            case SectionStart(section):
                stats.section_started_s[section] = time.monotonic()
                name, data = "section.start", {"section": section.value}
            case SectionEnd(section):
                stats.section_ended_s[section] = time.monotonic()
                name, data = "section.end", {"section": section.value}
            case SectionDelta(Section.FINAL_ANSWER, text):
                if not self.question.choices:
                    stats.record_first_answer()
                    await emit("answer.delta", {"text": text})
                return
            case SectionDelta(section, text):
                name, data = "section.delta", {"section": section.value, "text": text}
            case PauseSeen(section, num_latent):
                name, data = "pause", {"section": section and section.value, "latent_tokens": num_latent}
        is_answer = data["section"] == Section.FINAL_ANSWER
        if self.question.shows_reasoning and not is_answer:
            await emit(name, data)

    def request(
        self, max_tokens: int, stop: set[int], banned: set[int], gate: GateSettings | None = None
    ) -> GenerationRequest:
        """Asks for the continuation of the prompt and everything written so far."""
        self.num_parts += 1
        question = self.question
        return GenerationRequest(
            # The client's request id may repeat; the engine's may not.
            request_id=f"{self.stats.id}-{self.num_parts}",
            prompt_token_ids=[*question.prompt_token_ids, *self.written],
            clips=(self.waveform.samples_S,),
            max_tokens=max_tokens,
            temperature=question.temperature,
            # Every part continues the same draw; the same seed again would repeat the first part's random numbers.
            seed=None if question.seed is None else (question.seed + self.num_parts - 1) % 2**32,
            stop_token_ids=tuple(sorted(stop)),
            banned_token_ids=tuple(sorted(banned)),
            gate=gate,
            cache_salt=self.cache_salt,
            clip_keys=self.clip_keys,
        )

    @property
    def pause_tags(self) -> set[int]:
        """The tokens of a pause, where a pause is tokens."""
        return set(self.tokenizer.pause_ids)

    @property
    def answer_tags(self) -> tuple[set[int], set[int]]:
        """The tokens that open and close the answer; none where tags are plain text, which the reader alone can see."""
        tag_ids = self.tokenizer.tag_ids.get(Section.FINAL_ANSWER)
        return (set(), set()) if tag_ids is None else ({tag_ids[0]}, {tag_ids[1]})

    def record(self, chunk: TokenChunk) -> None:
        """Takes the engine's figures: those of the request from its first chunk, those of the gate from each."""
        stats = self.stats
        now_s = time.monotonic()
        if stats.first_token_s is None:
            stats.first_token_s = now_s
            stats.prompt_tokens = chunk.num_prompt_tokens
            stats.audio_tokens = chunk.num_prompt_tokens - len(self.question.prompt_token_ids) + 1
            stats.cached_tokens = chunk.num_cached_tokens
            # In our line and in the engine's own.
            stats.queue_s = None if chunk.queue_s is None else stats.line_s + chunk.queue_s
            stats.engine_queue_s = chunk.queue_s
            stats.prefill_s = chunk.prefill_s
            stats.features_s = chunk.features_s
            self.context.phase = "generate"
        stats.last_token_s = now_s
        if stats.paused_s is not None:
            stats.pause_s.append(now_s - stats.paused_s)
            stats.paused_s = None
        if chunk.span:
            stats.paused_s = now_s
            stats.num_pauses += 1
            stats.pause_tokens += len(chunk.span)
        if chunk.report is not None:
            stats.report = chunk.report

    def partial(self) -> dict[str, Any]:
        """Returns what stands so far, for a request that is cut short."""
        question = self.question
        return replies.partial(self.parser.result, question.choices, shows_reasoning=question.shows_reasoning)


def softmax(logprobs: Sequence[float]) -> list[float]:
    """Turns log-probabilities of alternatives into shares of 1."""
    values = np.nan_to_num(np.asarray(logprobs, dtype=np.float64), nan=-1e9, neginf=-1e9)
    shares = np.exp(values - values.max())
    return (shares / shares.sum()).tolist()
