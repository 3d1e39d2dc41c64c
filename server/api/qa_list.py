"""Several questions about one clip, or about both channels of it, in one request of `/v1/audio/qa`.

The clip is decoded once, and the engine encodes it once. Each question is a run of its own, with its own reply.
With `channel=each`, each channel is a clip: all questions about the left one come first.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterable
from typing import Any

from fastapi import Response
from fastapi.responses import JSONResponse

from hyper_model.answering import Event
from hyper_model.audio import Channel, Waveform
from hyper_model.errors import PromptError
from server.answering import AnswerRun
from server.api import replies
from server.api.lifecycle import decode_clip
from server.api.questions import Asked, asked_of, require_window, start_run, write_prompt
from server.api.stream import Emit, ServerSentEvent
from server.api.types import QaListReply, QaOptions, QaReply, Usage
from server.errors import RequestError
from server.request_context import RequestContext
from server.service import Service

MAX_PARALLEL = 4
"""Questions of one request in the engine at the same time. More would leave its places to one caller."""


class AudioQaList:
    """Answers several questions about one clip; see `server.api.lifecycle.Handler`.

    Args:
        data: Bytes of the clip.
    """

    def __init__(self, service: Service, context: RequestContext, options: QaOptions, data: bytes) -> None:
        self.service = service
        self.context = context
        self.options = options
        self.data = data
        self.timeout_ms = options.timeout_ms
        self.is_stream = options.stream
        self.shows_reasoning = options.reasoning == "full"
        self.channels: tuple[Channel, ...] = ("left", "right") if options.channel == "each" else (options.channel,)
        asked = (
            questions_of(options, service.settings.max_questions)
            if options.questions
            else [asked_of(options, options.question, options.choices)]
        )
        self.asked = asked * len(self.channels)
        self.runs: list[AnswerRun] = []
        self.answers: dict[int, QaReply] = {}

    async def prepare(self, deadline_s: float) -> None:
        """Write the prompts, then decode the clip: questions are cheaper to refuse."""
        service, context = self.service, self.context
        prompts: list[list[int]] = []
        for index, asked in enumerate(self.asked[: len(self.asked) // len(self.channels)]):
            try:
                prompts.append(await write_prompt(service, context, asked))
            except PromptError as error:
                if not self.options.questions:
                    raise
                message = f"questions[{index}]: {error.message}"
                raise RequestError("invalid_prompt", message, param="questions") from None
        if context.tenant is not None:
            await context.tenant.charge_requests(len(self.asked) - 1)
        waveforms = [await self.decode(channel) for channel in self.channels]
        # Each question has its share of the time, for its pauses.
        now_s, num_rounds = time.monotonic(), math.ceil(len(self.asked) / MAX_PARALLEL)
        share_ends_s = now_s + (deadline_s - now_s) / num_rounds
        self.runs = [
            start_run(service.answerer, context, asked, prompt_token_ids, waveform, share_ends_s)
            for waveform in waveforms
            for asked, prompt_token_ids in zip(self.asked[: len(prompts)], prompts, strict=True)
        ]

    async def decode(self, channel: Channel) -> Waveform:
        """Decode one channel of the clip.

        Raises:
            RequestError: 400, if each channel was asked for and the clip does not have two.
        """
        waveform = await decode_clip(self.service, self.context, self.data, track=self.options.track, channel=channel)
        if len(self.channels) > 1 and waveform.source_channels != 2:
            num = waveform.source_channels
            message = f"`channel=each` needs a clip of two channels; this one has {num}."
            hint = "Leave `channel` out; all channels are then mixed."
            raise RequestError("invalid_parameter", message, param="channel", limit=2, actual=num, hint=hint)
        require_window(waveform)
        return waveform

    def tagged(self, event: ServerSentEvent, index: int) -> ServerSentEvent:
        """Add the index of its answer to an event, and its channel where each is asked."""
        assert not isinstance(event.data, str)
        channel = {"channel": self.runs[index].waveform.channel} if len(self.channels) > 1 else {}
        return ServerSentEvent({"index": index, **channel, **event.data}, event.name)

    async def answer(self, emit: Emit) -> QaListReply:
        """Answer all questions, and emit the events of each with its index."""
        places = asyncio.Semaphore(MAX_PARALLEL)

        async def answer_one(index: int, run: AnswerRun) -> None:
            async def emit_on_wire(event: Event) -> None:
                found = replies.wire_event(event, shows_reasoning=self.shows_reasoning)
                if found is not None:
                    await emit(self.tagged(found, index))

            async with places:
                result = await run.run(emit_on_wire)
            reply = replies.build(run, result, shows_reasoning=self.shows_reasoning)
            await emit(self.tagged(ServerSentEvent(reply.answer.model_dump(mode="json"), "answer.done"), index))
            await emit(self.tagged(ServerSentEvent(reply.usage.model_dump(mode="json"), "usage"), index))
            self.answers[index] = reply

        tasks = [asyncio.create_task(answer_one(index, run)) for index, run in enumerate(self.runs)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        answers = self.answers_in_order()
        return QaListReply(
            id=f"qal_{self.runs[0].id}",
            created=answers[0].created,
            model=answers[0].model,
            data=answers,
            usage=total([reply.usage for reply in answers]),
        )

    def answers_in_order(self) -> list[QaReply]:
        """Return the complete answers, in the order of the questions."""
        return [self.answers[index] for index in sorted(self.answers)]

    def response(self, reply: QaListReply) -> Response:
        """Return the replies as JSON."""
        return JSONResponse(reply.model_dump(mode="json"))

    def last_events(self, reply: QaListReply) -> Iterable[ServerSentEvent]:
        """Return the event at the end of a stream."""
        yield ServerSentEvent(reply.model_dump(mode="json"), "done")

    def error_event(self, body: dict[str, Any]) -> ServerSentEvent:
        """Write the event that ends a stream with an error object."""
        return ServerSentEvent(body, "error")

    def partial(self) -> dict[str, Any]:
        """Write the complete answers, and the trace so far of the first question without one."""
        late = [index for index in range(len(self.runs)) if index not in self.answers]
        for index in late:
            self.runs[index].record_late()
        first = late[0] if late else len(self.runs) - 1
        parsed, choices = self.runs[first].answering.parsed, self.asked[first].choices
        answers = [reply.model_dump(mode="json") for reply in self.answers_in_order()]
        return replies.partial(parsed, choices, shows_reasoning=self.shows_reasoning) | {"answers": answers}


def questions_of(options: QaOptions, limit: int) -> list[Asked]:
    """Return the questions of a request with their own choices.

    Raises:
        RequestError: 400, for too many questions, or a question outside the list.
    """
    for name in ("question", "choices"):
        if name in options.model_fields_set:
            message = f"`{name}` and `questions` exclude each other."
            hint = "Send each item of `questions` as a text, or as an object with `question` and `choices`."
            raise RequestError("invalid_parameter", message, param=name, hint=hint)
    if len(options.questions) > limit:
        message = f"`questions` has {len(options.questions)} items; the limit is {limit}."
        actual = len(options.questions)
        raise RequestError("invalid_parameter", message, param="questions", limit=limit, actual=actual)
    return [asked_of(options, item.question, item.choices) for item in options.questions]


def total(usages: Iterable[Usage]) -> Usage:
    """Return the sum of the tokens of several answers."""
    dumps = [usage.model_dump() for usage in usages]
    return Usage(**{name: sum(dump[name] for dump in dumps) for name in Usage.model_fields})
