"""`POST /v1/chat/completions`: OpenAI's chat API, for questions about one clip.

The text of the last user message is the question. The conversation holds one clip, in any user message. The model
reads neither system messages nor earlier turns; a warning in `hyper.warnings` names what was left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Literal, cast

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from hyper_model.answer_tokens import AnswerToken
from hyper_model.answering import AnswerDelta, Event
from hyper_model.trace import Section
from hyper_model.trace_parser import SectionDelta
from server.api.answer_schema import HINT as SCHEMA_HINT
from server.api.answer_schema import PARAM as SCHEMA_PARAM
from server.api.answer_schema import AnswerSchema, read_schema
from server.api.forms import FileId, decode_base64, load_clip, parse_json, validate
from server.api.lifecycle import respond
from server.api.models import require_model
from server.api.openai_types import (
    AudioUrlPart,
    ChatBody,
    ChatChoice,
    ChatCompletion,
    ChatMessage,
    ChatUsage,
    ChoiceLogprobs,
    CompletionTokensDetails,
    FilePart,
    FileReference,
    InputAudioPart,
    Message,
    PromptTokensDetails,
    TextPart,
    TokenLogprob,
    drop_neutral,
)
from server.api.openapi import ANYWHERE, event_stream_responses, json_only, takes_body
from server.api.questions import Asked, check_bounds
from server.api.recordings import RecordingHandler, WindowDone, check_place
from server.api.stream import Emit, ServerSentEvent
from server.api.types import QaReply, Usage, WarningReply
from server.errors import RequestError
from server.request_context import RequestContext
from server.service import Service

RESPONSES = event_stream_responses(
    (), "The completion; with `stream=true`, its chunks as data-only events and `[DONE]` at the end."
)

router = APIRouter(responses=ANYWHERE)


@router.post(
    "/v1/chat/completions", summary="Ask about a clip (OpenAI)", response_model=ChatCompletion, responses=RESPONSES
)
@takes_body(json_only(ChatBody))
async def chat_completions(request: Request) -> Response:
    """Answer the last user message about the clip of the conversation, in OpenAI's format."""
    return await respond(request, Chat.read)


class Chat(RecordingHandler):
    """Answers a chat request; see `server.api.lifecycle.Handler`."""

    def __init__(
        self,
        service: Service,
        context: RequestContext,
        body: ChatBody,
        schema: AnswerSchema | None,
        data: bytes,
    ) -> None:
        asked = Asked(
            question=question_of(body.messages),
            choices=tuple(body.hyper.choices) or (schema.choices if schema else ()),
            pause=body.hyper.pause,
            max_tokens=body.max_completion_tokens or body.max_tokens,
            temperature=body.temperature or 0.0,
            seed=body.seed,
            wants_logprobs=bool(body.logprobs),
        )
        super().__init__(
            service,
            context,
            asked,
            data,
            timeout_ms=body.hyper.timeout_ms,
            is_stream=bool(body.stream),
            long_audio=body.hyper.long_audio,
            start_s=body.hyper.start_s,
            max_windows=service.settings.sync_windows,
        )
        self.model = body.model
        self.includes_usage = bool(body.stream_options and body.stream_options.include_usage)
        self.schema = schema
        self.warnings = warnings_of(body, schema)
        self.reasoning = ReasoningText()
        self.logprobs: list[TokenLogprob] = []

    @classmethod
    async def read(cls, request: Request, service: Service, context: RequestContext) -> Chat:
        """Read and check the body."""
        return await cls.of_json(service, context, await request.body())

    @classmethod
    async def of_json(cls, service: Service, context: RequestContext, content: bytes) -> Chat:
        """Return the handler of a JSON body, such as the one in a line of a batch.

        Raises:
            RequestError: 400, 404 or 413.
            ValidationError: A field has the wrong type or range.
        """
        body, clip = await service.in_pool(read_chat, content)
        require_model(service, body.model)
        check_bounds(
            service,
            max_tokens=body.max_completion_tokens or body.max_tokens,
            timeout_ms=body.hyper.timeout_ms,
            pause=body.hyper.pause,
        )
        check_place(body.hyper.long_audio, body.hyper.start_s)
        schema = await service.in_pool(schema_of, body)
        data = clip if isinstance(clip, bytes) else await load_clip(service, context, clip)
        return cls(service, context, body, schema, data)

    async def answer(self, emit: Emit) -> ChatCompletion:
        """Answer, and emit chunks with the trace as reasoning and the answer as content."""

        async def emit_delta(event: Event) -> None:
            delta: dict[str, str] = {}
            logprobs: list[TokenLogprob] = []
            if isinstance(event, AnswerDelta):
                if self.schema is None:
                    delta["content"] = event.text
                logprobs = [token_logprob(token) for token in event.tokens]
                self.logprobs += logprobs
            elif text := self.reasoning.add(event):
                delta |= {"reasoning": text, "reasoning_content": text}
            if delta and self.is_stream:
                await emit(self.chunk(delta, logprobs=self.choice_logprobs(logprobs)))

        async def emit_window(done: WindowDone) -> None:
            if self.is_stream:
                await emit(self.chunk({}, more={"hyper": {"window_done": dataclasses.asdict(done)}}))

        if self.is_stream:
            await emit(self.chunk({"role": "assistant", "content": ""}))
        reply = await self.answer_any(emit_delta, emit_window)
        if self.schema is not None and self.is_stream:
            # The whole JSON at once: its parts may come before the answer, and their values after it.
            content = {"content": self.schema.content(reply)}
            await emit(self.chunk(content, logprobs=self.choice_logprobs(self.logprobs)))
        warnings = [*reply.warnings, *self.warnings]
        if self.asked.wants_logprobs and self.recording_run is not None:
            text = "The answer about a recording is joined from its windows; `logprobs` is null."
            warnings.append(WarningReply(code="no_logprobs", message=text))
        return self.completion(reply.model_copy(update={"warnings": warnings}))

    def choice_logprobs(self, tokens: list[TokenLogprob]) -> ChoiceLogprobs | None:
        """Return tokens as `logprobs` of a choice; None if they were not requested, or the clip is a recording."""
        is_wanted = self.asked.wants_logprobs and self.recording_run is None
        return ChoiceLogprobs(content=tokens) if is_wanted else None

    def completion(self, reply: QaReply) -> ChatCompletion:
        """Write a reply of /v1/audio/qa as a chat completion."""
        reasoning = self.reasoning.text
        usage = reply.usage
        content = self.schema.content(reply) if self.schema else reply.answer.text
        message = ChatMessage(content=content, reasoning=reasoning, reasoning_content=reasoning)
        return ChatCompletion(
            id=self.completion_id,
            created=reply.created,
            model=self.model,
            choices=[
                ChatChoice(
                    finish_reason=finish_reason(reply), logprobs=self.choice_logprobs(self.logprobs), message=message
                )
            ],
            usage=ChatUsage(
                prompt_tokens=usage.prompt_tokens,
                completion_tokens=usage.completion_tokens + usage.pause_tokens,
                total_tokens=usage.total_tokens,
                prompt_tokens_details=PromptTokensDetails(
                    audio_tokens=usage.audio_tokens, cached_tokens=usage.cached_tokens
                ),
                completion_tokens_details=CompletionTokensDetails(
                    reasoning_tokens=self.num_reasoning_tokens(usage) + usage.pause_tokens,
                    pause_tokens=usage.pause_tokens,
                ),
            ),
            hyper=reply,
        )

    def num_reasoning_tokens(self, usage: Usage) -> int:
        """Count the visible tokens of all sections but the answer; of a recording, all tokens of its windows."""
        if self.recording_run is not None:
            return usage.completion_tokens
        counts = self.started_run.answering.parsed.section_num_tokens
        return sum(num for section, num in counts.items() if section is not Section.FINAL_ANSWER)

    @property
    def completion_id(self) -> str:
        """The id of the completion, the same in each chunk."""
        return f"chatcmpl-{self.answer_id}"

    def response(self, reply: ChatCompletion) -> Response:
        """Write the completion as JSON."""
        return JSONResponse(reply.model_dump(mode="json"))

    def last_events(self, reply: ChatCompletion) -> Iterable[ServerSentEvent]:
        """Write the last chunk, the usage where the caller wants it, and `[DONE]`."""
        hyper = {"hyper": reply.hyper.model_dump(mode="json")}
        yield self.chunk({}, finish_reason=reply.choices[0].finish_reason, more=hyper)
        if self.includes_usage:
            usage = reply.usage.model_dump(mode="json")
            yield ServerSentEvent(self.chunk_data() | {"choices": [], "usage": usage})
        yield ServerSentEvent("[DONE]")

    def chunk(
        self,
        delta: Mapping[str, str],
        *,
        finish_reason: str | None = None,
        logprobs: ChoiceLogprobs | None = None,
        more: Mapping[str, Any] | None = None,
    ) -> ServerSentEvent:
        """Write a chunk with a change of the message."""
        choice: dict[str, Any] = {"index": 0, "delta": dict(delta), "finish_reason": finish_reason, "logprobs": None}
        if logprobs is not None and "content" in delta:
            choice["logprobs"] = logprobs.model_dump(mode="json")
        return ServerSentEvent(self.chunk_data() | {"choices": [choice]} | dict(more or {}))

    def chunk_data(self) -> dict[str, Any]:
        """Return the members that all chunks share."""
        data: dict[str, Any] = {"id": self.completion_id, "object": "chat.completion.chunk", "created": self.created_s}
        data["model"] = self.model
        return data | ({"usage": None} if self.includes_usage else {})


class ReasoningText:
    """Writes the trace as plain text, one section per line, from its events.

    Attributes:
        text: What `add` has returned so far, joined.
    """

    def __init__(self) -> None:
        self.text = ""
        self._section: Section | None = None

    def add(self, event: Event) -> str:
        """Return the text that an event adds; empty for events without text and for the answer."""
        if not isinstance(event, SectionDelta) or event.section is Section.FINAL_ANSWER:
            return ""
        added = event.text
        if event.section is not self._section:
            self._section = event.section
            added = f"{chr(10) if self.text else ''}{event.section.value}: {added}"
        self.text += added
        return added


def finish_reason(reply: QaReply) -> Literal["stop", "length"]:
    """Return OpenAI's reason for the end of a completion; `hyper.termination` has the exact one."""
    return "length" if reply.termination == "truncated" else "stop"


def token_logprob(token: AnswerToken) -> TokenLogprob:
    """Write a token of the answer in OpenAI's format."""
    return TokenLogprob(
        token=token.data.decode("utf-8", errors="replace"), logprob=token.logprob, bytes=list(token.data)
    )


def read_chat(body: bytes) -> tuple[ChatBody, bytes | FileId]:
    """Read a chat request, and its clip or the id of its clip's file.

    Raises:
        RequestError: The body is no chat request, has a parameter without support, or not exactly one clip.
        ValidationError: A field has the wrong type or range.
    """
    fields = parse_json(body)
    if isinstance(fields, Mapping):
        fields = drop_neutral(cast("Mapping[str, Any]", fields))
    chat = validate(ChatBody, fields, strict=True)
    return chat, clip_of(chat.messages)


def clip_of(messages: Iterable[Message]) -> bytes | FileId:
    """Return the one clip of a conversation."""
    clips: list[bytes | FileId] = []
    for message in messages:
        if not isinstance(message.content, list):
            continue
        for part in message.content:
            match part:
                case InputAudioPart():
                    clips.append(decode_base64(part.input_audio.data, param="messages.content.input_audio.data"))
                case AudioUrlPart():
                    clips.append(read_url(part.audio_url.url))
                case FilePart():
                    clips.append(read_file_part(part.file))
                case TextPart():
                    pass
    if len(clips) == 1:
        return clips[0]
    if not clips:
        message = "The conversation holds no clip. Send one as an `input_audio` or `file` part of a user message."
        raise RequestError("missing_parameter", message, param="messages", limit=1, actual=0)
    message = f"A conversation is about one clip; this one holds {len(clips)}."
    raise RequestError("invalid_parameter", message, param="messages", limit=1, actual=len(clips))


def read_file_part(file: FileReference) -> bytes | FileId:
    """Return the clip of a `file` part.

    Raises:
        RequestError: The part has not exactly one of an id and base64, or the base64 is wrong.
    """
    param = "messages.content.file"
    match file.file_id, file.file_data:
        case str(file_id), None:
            return FileId(file_id)
        case None, str(data):
            return decode_base64(data, param=f"{param}.file_data")
        case _:
            message = f"`{param}` needs exactly one of `file_id` and `file_data`."
            raise RequestError("invalid_parameter", message, param=param)


def read_url(url: str) -> bytes:
    """Return the bytes of a `data:` URL.

    Raises:
        RequestError: Another kind of URL; this service fetches nothing.
    """
    param = "messages.content.audio_url.url"
    if url[:5].lower() != "data:":
        message = f"`{param}` must be a `data:` URL; this service fetches no remote addresses."
        raise RequestError("invalid_parameter", message, param=param, hint="Send the clip as base64 in `input_audio`.")
    return decode_base64(url, param=param)


def question_of(messages: list[Message]) -> str:
    """Return the text of the last message.

    Raises:
        RequestError: The last message is not a user's, or has no text.
    """
    last = messages[-1]
    if last.role != "user":
        message = f"The last message must have the role `user`, not `{last.role}`."
        raise RequestError("invalid_parameter", message, param="messages")
    question = text_of(last)
    if not question.strip():
        raise RequestError("missing_parameter", "The last user message has no text: the question.", param="messages")
    return question


def text_of(message: Message) -> str:
    """Return the text parts of a message, one per line."""
    if isinstance(message.content, list):
        return "\n".join(part.text for part in message.content if isinstance(part, TextPart))
    return message.content or ""


def schema_of(body: ChatBody) -> AnswerSchema | None:
    """Return the schema of the answer; None without one.

    Raises:
        RequestError: 400, if the service cannot fill the schema exactly for this request.
    """
    if body.response_format is None:
        return None
    schema = read_schema(body.response_format.json_schema.answer_schema)
    message = ""
    if schema.choices and body.hyper.choices:
        message = "`response_format` and `hyper.choices` both list the choices. Send one of them."
    elif schema.parts and body.hyper.long_audio == "chunk":
        message = "With `long_audio=chunk`, the schema can hold only the answer and constants."
    elif schema.needs_confidence and not (schema.choices or body.hyper.choices):
        message = "An open answer has no `confidence`. List its values, or let `confidence` be null."
    if message:
        raise RequestError("invalid_parameter", message, param=SCHEMA_PARAM, hint=SCHEMA_HINT)
    return schema


def warnings_of(body: ChatBody, schema: AnswerSchema | None) -> list[WarningReply]:
    """Name the texts of a request that the model does not read."""
    messages = body.messages
    warnings: list[WarningReply] = []
    described = body.response_format and body.response_format.json_schema.description
    if described or (schema and schema.is_described):
        text = "The model reads no descriptions of a JSON schema; they had no effect."
        warnings.append(WarningReply(code="schema_description_ignored", message=text))
    if any(message.role in ("system", "developer") for message in messages):
        text = "The model reads no system or developer messages; they had no effect."
        warnings.append(WarningReply(code="system_message_ignored", message=text))
    if any(message.role == "assistant" or (message.role == "user" and text_of(message)) for message in messages[:-1]):
        text = "The model reads the last user message alone; earlier turns had no effect."
        warnings.append(WarningReply(code="earlier_turns_ignored", message=text))
    return warnings
