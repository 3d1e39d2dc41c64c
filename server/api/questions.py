"""Conversion of a caller's question to a run of the answering procedure: prompt, token limit and pause budget.

All endpoints with questions about clips share it, whatever their wire format.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hyper_model.answering import Question, max_trace_tokens
from hyper_model.audio import SAMPLE_RATE_HZ, Channel, Waveform, require_single_window
from hyper_model.errors import AudioTooLongError
from hyper_model.trace import build_prompt
from server.answering import Answerer, AnswerRun
from server.api import replies
from server.api.lifecycle import decode_clip
from server.api.stream import ServerSentEvent
from server.api.types import QaOptions
from server.errors import RequestError
from server.pause_budget import Budget
from server.request_context import RequestContext
from server.service import Service


@dataclass(frozen=True)
class Asked:
    """One question from a caller; see `server.api.types.QaOptions` for the fields."""

    question: str
    choices: tuple[str, ...] = ()
    pause: Literal["auto", "off"] | int = "auto"
    max_tokens: int | None = None
    temperature: float = 0.0
    seed: int | None = None
    wants_logprobs: bool = False


def asked_of(options: QaOptions, question: str, choices: Sequence[str]) -> Asked:
    """Return a question with the options of its request."""
    return Asked(
        question=question,
        choices=tuple(choices),
        pause=options.pause,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        seed=options.seed,
    )


class ClipHandler:
    """Common part of the handlers that answer one question about one clip; see `server.api.lifecycle.Handler`.

    Args:
        data: Bytes of the clip.
    """

    def __init__(
        self,
        service: Service,
        context: RequestContext,
        asked: Asked,
        data: bytes,
        *,
        timeout_ms: int | None,
        is_stream: bool,
        shows_reasoning: bool = True,
        track: int | None = None,
        channel: Channel = "mix",
    ) -> None:
        self.service = service
        self.context = context
        self.asked = asked
        self.data = data
        self.timeout_ms = timeout_ms
        self.is_stream = is_stream
        self.shows_reasoning = shows_reasoning
        self.track = track
        self.channel: Channel = channel
        self.run: AnswerRun | None = None

    @property
    def started_run(self) -> AnswerRun:
        """The run that `prepare` has made."""
        assert self.run is not None
        return self.run

    async def prepare(self, deadline_s: float) -> None:
        """Write the prompt, then decode the clip: the question is cheaper to refuse."""
        prompt_token_ids = await write_prompt(self.service, self.context, self.asked)
        waveform = await decode_clip(self.service, self.context, self.data, track=self.track, channel=self.channel)
        require_window(waveform)
        answerer = self.service.answerer
        self.run = start_run(answerer, self.context, self.asked, prompt_token_ids, waveform, deadline_s)

    def error_event(self, body: dict[str, Any]) -> ServerSentEvent:
        """Write the event that ends a stream with an error object."""
        return ServerSentEvent(body, "error")

    def partial(self) -> dict[str, Any]:
        """Write the trace so far, and let later pause budgets learn that this answer came too late."""
        run = self.started_run
        run.record_late()
        return replies.partial(run.answering.parsed, self.asked.choices, shows_reasoning=self.shows_reasoning)


async def write_prompt(service: Service, context: RequestContext, asked: Asked) -> list[int]:
    """Encode the prompt, off the event loop.

    Raises:
        PromptError: If the question or the choices cannot be used.
    """
    with context.timing("prompt"):
        return await service.in_pool(build_prompt, service.checkpoint.tokenizer, asked.question, asked.choices)


def start_run(
    answerer: Answerer,
    context: RequestContext,
    asked: Asked,
    prompt_token_ids: Sequence[int],
    waveform: Waveform,
    deadline_s: float,
) -> AnswerRun:
    """Decide on the budgets of a question, and return its run."""
    question, budget = plan(answerer, asked, prompt_token_ids, waveform, deadline_s - time.monotonic())
    lowered_by = budget.lowered_by if budget else None
    return AnswerRun(answerer, context, question, waveform, lowered_by=lowered_by)


def plan(
    answerer: Answerer, asked: Asked, prompt_token_ids: Sequence[int], waveform: Waveform, left_s: float
) -> tuple[Question, Budget | None]:
    """Compute the available tokens, and the pauses for the seconds left.

    Returns:
        The question, and its pause budget; None turns the gate off.

    Raises:
        RequestError: If the model has no room for an answer, or for the requested tokens.
    """
    checkpoint, settings = answerer.checkpoint, answerer.settings
    manifest = checkpoint.manifest
    match asked.pause:
        case "auto":
            budget = answerer.auto_budget(left_s)
        case "off":
            budget = None
        case number:
            budget = Budget(number)
    gate = answerer.gate.with_budget(budget.max_pauses) if answerer.gate and budget else None
    room = max_trace_tokens(
        prompt_token_ids,
        asked.choices,
        num_audio_tokens=round(len(answerer.fit(waveform).samples_S) / SAMPLE_RATE_HZ * manifest.audio.tokens_per_s),
        gate=gate,
        tokenizer=checkpoint.tokenizer,
        manifest=manifest,
    )
    if room < 1:
        message = (
            "The question, the choices and the clip exceed the model's context; no tokens are left for the answer."
        )
        limit = manifest.max_model_len
        raise RequestError("invalid_prompt", message, param="question", limit=limit, actual=limit - room + 1)
    if asked.max_tokens is not None and asked.max_tokens > room:
        message = f"`max_tokens` exceeds the limit of {room} for this clip and question."
        raise RequestError("invalid_parameter", message, param="max_tokens", limit=room, actual=asked.max_tokens)
    question = Question(
        prompt_token_ids=tuple(prompt_token_ids),
        choices=asked.choices,
        max_tokens=asked.max_tokens or min(room, settings.default_max_tokens),
        gate=gate,
        temperature=asked.temperature,
        seed=asked.seed,
        wants_logprobs=asked.wants_logprobs,
    )
    return question, budget


def check_bounds(service: Service, **values: int | str | None) -> None:
    """Refuse numbers beyond the limits of this service or its checkpoint.

    Args:
        values: Any of `max_tokens`, `timeout_ms` and `pause`, under the caller's names.

    Raises:
        RequestError: 400, with the limit.
    """
    settings = service.settings
    limits = {
        "max_tokens": settings.max_tokens,
        "timeout_ms": settings.max_timeout_ms,
        "pause": service.answerer.max_pauses,
    }
    for param, value in values.items():
        if isinstance(value, int) and value > limits[param]:
            message = f"`{param}` exceeds the limit of {limits[param]}."
            raise RequestError("invalid_parameter", message, param=param, limit=limits[param], actual=value)


def require_window(waveform: Waveform) -> None:
    """Refuse a clip longer than one window; no clip is ever cut silently.

    Raises:
        AudioTooLongError: With the limit and a hint.
    """
    try:
        require_single_window(waveform)
    except AudioTooLongError as error:
        error.hint = "Send `long_audio=chunk` to use all of it, `window` with `start_s` for a part, or a shorter clip."
        raise
