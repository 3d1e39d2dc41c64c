"""The interface between service and engine, and a scripted engine without a model.

An engine handles token ids, clips as arrays, and log-probabilities. It is independent of sections, questions and HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from hyper_model.audio import SAMPLE_RATE_HZ, Waveform
from hyper_model.pause import Gate, GateReport, GateSettings, Verdict
from hyper_model.trace import PauseMode, Section, Trace, TraceTokenizer, render
from server.errors import EngineUnavailableError

Clip = NDArray[np.float32]  # [S] mono samples at SAMPLE_RATE_HZ
FinishReason = Literal["stop", "length", "abort"]
Script = Callable[[Sequence[Clip], TraceTokenizer], list[int]]

SCRIPTED_CONFIDENCE = 1.0
"""Confidence of every scripted token; pauses come from the script."""

SCRIPTED_LOGPROB = 0.0
"""Log-probability of every scripted token: the script is certain."""


@dataclass(frozen=True, eq=False)
class GenerationRequest:
    """Request for a continuation of a prompt.

    Attributes:
        request_id: Unique among the requests in flight.
        prompt_token_ids: The prompt with one audio placeholder per clip, expanded by the engine. It may end with an
            earlier completion.
        clips: The clips in the order of their placeholders.
        max_tokens: Maximum number of new tokens, including the stop token and excluding pauses.
        temperature: 0 takes the likeliest token.
        stop_token_ids: The completion ends with the first of these tokens.
        banned_token_ids: Tokens never written.
        gate: Settings of the pause gate: it inserts pauses up to its budget and may abort the completion.
        cache_salt: Cached prefixes are shared only between requests with the same salt.
        clip_keys: An unguessable unique cache key per clip. None lets the engine choose keys.
        wants_logprobs: Whether chunks have the log-probability of each visible token.
    """

    request_id: str
    prompt_token_ids: Sequence[int]
    clips: tuple[Clip, ...]
    max_tokens: int
    temperature: float = 0.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    banned_token_ids: tuple[int, ...] = ()
    gate: GateSettings | None = None
    cache_salt: str | None = None
    clip_keys: tuple[str, ...] | None = None
    wants_logprobs: bool = False


@dataclass(frozen=True)
class TokenChunk:
    """New tokens of a completion; only its last chunk has a finish reason.

    Attributes:
        token_ids: Visible tokens; empty for a pause.
        finish_reason: "abort" if the gate aborted the completion.
        span: Hidden tokens of a pause, between the tokens of the previous and the next chunk.
        report: Summary of the gate, in the last chunk of a completion with a gate.
        num_prompt_tokens: Length of the prompt with every audio placeholder expanded.
        num_cached_tokens: Number of prompt tokens from the engine's cache.
        queue_s: Seconds in the engine's queue, once known.
        prefill_s: Seconds from the queue to the first token, once known.
        features_s: Seconds to compute the clips' features, before the queue; in the first chunk.
        logprobs: Natural log-probability of each of `token_ids` by the model, before temperature, bans and the gate;
            empty unless requested.
    """

    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    span: tuple[int, ...] = ()
    report: GateReport | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    queue_s: float | None = None
    prefill_s: float | None = None
    features_s: float | None = None
    logprobs: tuple[float, ...] = ()


class Engine(Protocol):
    """Concurrent generation and scoring of continuations of prompts with clips."""

    @property
    def is_alive(self) -> bool:
        """Return whether the engine accepts requests."""
        ...

    @property
    def num_in_flight(self) -> int:
        """Return the number of requests in the engine."""
        ...

    @property
    def about(self) -> Mapping[str, str]:
        """Return the vLLM version, the model runner and the dtype; known after the start."""
        ...

    @property
    def last_sign_s(self) -> float:
        """Return the time of its last token, by `time.monotonic()`; 0 before the first."""
        ...

    async def start(self) -> None:
        """Load the model and return when the engine accepts requests; may be called again after `stop` or `kill`."""
        ...

    async def stop(self) -> None:
        """End the engine and all its processes."""
        ...

    async def kill(self) -> None:
        """End an unresponsive engine; requests in flight fail at once."""
        ...

    async def ping(self) -> None:
        """Return after the engine has written one test token.

        Raises:
            EngineUnavailableError: If the engine is not running, or died.
        """
        ...

    def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk, None]:
        """Yield the completion in chunks. Closing the generator aborts the request in the engine.

        Raises:
            EngineUnavailableError: If the engine is not running, or died.
        """
        ...

    async def score(self, request: GenerationRequest, candidates: Sequence[Sequence[int]]) -> list[float]:
        """Return the log-probability of each candidate as the continuation of the prompt.

        Candidates of one token share one engine step; longer ones cost a prefill each.

        Raises:
            EngineUnavailableError: If the engine is not running, or died.
        """
        ...


class ScriptedEngine:
    """Deterministic engine without model or weights: it writes a well-formed trace from measurements of the clip.

    It measures length, level and silence. It does not understand speech or the question; its choice is a hash. It lets
    clients, dashboards and all HTTP code run anywhere at once. Another `script` simulates another model.
    """

    def __init__(
        self,
        tokenizer: TraceTokenizer,
        *,
        script: Script | None = None,
        audio_tokens_per_s: float = 25.0,
        token_interval_s: float = 0.0,
    ) -> None:
        self.tokenizer = tokenizer
        self.script = script or measuring_script
        self.audio_tokens_per_s = audio_tokens_per_s
        self.token_interval_s = token_interval_s
        self.num_in_flight = 0
        self.about: Mapping[str, str] = {"vllm": "none", "runner": "none", "dtype": "none", "compiled": "none"}
        self.last_sign_s = 0.0
        self.ended = asyncio.Event()
        self.ended.set()

    @property
    def is_alive(self) -> bool:
        """Return whether it accepts requests."""
        return not self.ended.is_set()

    async def start(self) -> None:
        """Start to accept requests."""
        self.ended = asyncio.Event()

    async def stop(self) -> None:
        """Stop; requests in flight fail as with a dead engine."""
        self.ended.set()

    async def kill(self) -> None:
        """Stop as `stop` does."""
        self.ended.set()

    async def ping(self) -> None:
        """Wait for the duration of one token."""
        await self.pace(self.ended)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk, None]:
        """Yield the script one token per chunk, continuing after the prompt's own completion.

        A <PAUSE> in the script is the model's wish; the gate decides.
        """
        self.num_in_flight += 1
        ended = self.ended
        try:
            num_prompt_tokens = self.count_prompt_tokens(request)
            token_ids = self.remaining_script(request)
            gate = None if request.gate is None else Gate(request.gate)
            num_written = at = 0
            while at < len(token_ids):
                await self.pace(ended)
                self.last_sign_s = time.monotonic()
                token_id = token_ids[at]
                at += 1
                if gate is not None:
                    decision = gate.decide(SCRIPTED_CONFIDENCE)
                    if decision.verdict is Verdict.ABORT:
                        yield TokenChunk((), "abort", report=gate.report(), num_prompt_tokens=num_prompt_tokens)
                        return
                    if token_id in decision.banned_ids:
                        continue
                    if token_id == gate.settings.open_id:
                        span = self.span(gate, token_ids[at:])
                        at += len(span) - 1 if gate.settings.mode is PauseMode.SAMPLED else 0
                        yield TokenChunk((), span=span, num_prompt_tokens=num_prompt_tokens)
                        continue
                    gate.push(token_id, SCRIPTED_CONFIDENCE)
                num_written += 1
                finish_reason: FinishReason | None = None
                if token_id in request.stop_token_ids or at == len(token_ids):
                    finish_reason = "stop"
                elif num_written == request.max_tokens:
                    finish_reason = "length"
                yield TokenChunk(
                    (token_id,),
                    finish_reason,
                    report=gate.report() if gate and finish_reason else None,
                    num_prompt_tokens=num_prompt_tokens,
                    queue_s=0.0,
                    prefill_s=0.0,
                    features_s=0.0,
                    logprobs=(SCRIPTED_LOGPROB,) if request.wants_logprobs else (),
                )
                if finish_reason:
                    return
            report = gate.report() if gate else None
            yield TokenChunk((), "stop", report=report, num_prompt_tokens=num_prompt_tokens)
        finally:
            self.num_in_flight -= 1

    def span(self, gate: Gate, following: Sequence[int]) -> tuple[int, ...]:
        """Return the tokens of a pause: the gate's span, or the script's hidden tokens, closed when forced."""
        gate.push(gate.settings.open_id, SCRIPTED_CONFIDENCE)
        if gate.settings.mode is PauseMode.PARALLEL:
            return gate.feed_span()
        span = [gate.settings.open_id]
        while gate.is_pausing:
            forced_id = gate.decide(SCRIPTED_CONFIDENCE).forced_id
            is_over = len(span) > len(following)
            token_id = gate.settings.close_id if is_over else forced_id or following[len(span) - 1]
            gate.push(token_id, SCRIPTED_CONFIDENCE)
            span.append(token_id)
        return tuple(span)

    async def score(self, request: GenerationRequest, candidates: Sequence[Sequence[int]]) -> list[float]:
        """Return log-probabilities derived from a hash of the clip, the prompt and the candidate."""
        await self.pace(self.ended)
        prompt_hash = hashlib.sha256(np.asarray(request.prompt_token_ids, dtype=np.int64).tobytes())
        for clip in request.clips:
            prompt_hash.update(clip.tobytes())
        logits = np.empty(len(candidates))
        for index, candidate in enumerate(candidates):
            digest = hashlib.sha256(prompt_hash.digest() + np.asarray(candidate, dtype=np.int64).tobytes()).digest()
            logits[index] = int.from_bytes(digest[:4]) / 2**31
        return (logits - np.logaddexp.reduce(logits)).tolist()

    async def pace(self, ended: asyncio.Event) -> None:
        """Wait for the duration of one token.

        Args:
            ended: The stop event of the engine's life at the start of the request; a later life has another.
        """
        if self.token_interval_s:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.token_interval_s):
                    await ended.wait()
        else:
            await asyncio.sleep(0)
        if ended.is_set():
            raise EngineUnavailableError("The engine is not running.")

    def count_prompt_tokens(self, request: GenerationRequest) -> int:
        """Return the length of the prompt with each placeholder expanded, as in a real engine."""
        num_samples = sum(len(clip) for clip in request.clips)
        num_audio_tokens = round(num_samples / SAMPLE_RATE_HZ * self.audio_tokens_per_s)
        return len(request.prompt_token_ids) - len(request.clips) + num_audio_tokens

    def remaining_script(self, request: GenerationRequest) -> list[int]:
        """Return the script's tokens after those already in the prompt."""
        tokenizer = self.tokenizer
        prompt = list(request.prompt_token_ids)
        turn = len(prompt) - 1 - prompt[::-1].index(tokenizer.im_start_id)
        written = prompt[turn + 1 + len(tokenizer.encode_text("assistant\n")) :]
        script = self.script(request.clips, tokenizer)
        pauses = (tokenizer.pause_id, tokenizer.pause_close_id)
        at = 0
        for token_id in written:
            while at < len(script) and script[at] in pauses and script[at] != token_id:
                at += 1  # It was banned then.
            if at < len(script) and script[at] == token_id:
                at += 1
        opening = tokenizer.open_ids(Section.FINAL_ANSWER)
        if written[-len(opening) :] == opening and opening[-1] in script:
            at = script.index(opening[-1]) + 1  # Skip to the answer of a trace closed early.
        remaining = [token_id for token_id in script[at:] if token_id not in request.banned_token_ids]
        return remaining or [tokenizer.im_end_id]


def measuring_script(clips: Sequence[Clip], tokenizer: TraceTokenizer) -> list[int]:
    """Return the whole trace about the clips, with one <PAUSE> if they are mostly silent."""
    waveform = Waveform(np.concatenate(clips) if clips else np.zeros(0, dtype=np.float32))
    quality, duration_s = waveform.quality, waveform.duration_s
    environment = "loud sound"
    if quality.silence_ratio > 0.98:
        environment = "silence"
    elif quality.peak_dbfs < -20:
        environment = "quiet sound"
    finding = f"{duration_s:.1f} s of {environment}"
    text = render(
        Trace(
            planning="Measure the length, the level and the silence of the clip.",
            environment=environment,
            speakers=(),
            transcript="",
            description=f"≈ {duration_s:.1f} s, peak {quality.peak_dbfs:.0f} dBFS, {quality.silence_ratio:.0%} silent",
            reasoning="This engine follows a script: it measures and does not understand.",
            summary=f"The clip is {finding}.",
            response=finding,
            reflection=None,
            final_answer=finding,
        )
    )
    token_ids = [*tokenizer.encode_trace(text), tokenizer.im_end_id]
    if quality.silence_ratio > 0.5 and tokenizer.pause_id is not None:
        opening = tokenizer.encode_trace(text.partition("<REASONING>")[0] + "<REASONING>")
        token_ids.insert(len(opening), tokenizer.pause_id)
    return token_ids
