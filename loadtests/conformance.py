"""Check the service against the official `openai` client and against its own OpenAPI document.

Part one makes a list of calls with the unchanged client: each must return a value of the client's type, or the client's
exception with the right code. Part two sends generated requests to every endpoint. All replies are checked against
`/openapi.json`. This module depends on the service's HTTP API alone.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import httpx
import jsonschema
import numpy as np
import openai
from openai import OpenAI
from openai.types import FileObject, Model
from openai.types.audio import Transcription, TranscriptionDiarized, TranscriptionVerbose
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel

from loadtests.clips import SAMPLE_RATE_HZ, wav
from loadtests.fuzz_http import bearer, describe, generate

MODEL = "hyper"
TIMEOUT_S = 300.0
MAX_SHOWN = 20
# Members that the client's own types lack and every completion has.
TYPED_REPLY = "hyper"


class MismatchError(Exception):
    """A call with another result than the client's types promise."""


@dataclass
class Conformance:
    """Result of all checks.

    Attributes:
        passed: Calls with the right result.
        failed: The other calls, each with its fault.
        violations: Replies that the document does not allow.
        num_5xx: Replies with a 5xx status that their request did not ask for.
    """

    passed: list[str] = field(default_factory=list[str])
    failed: dict[str, str] = field(default_factory=dict[str, str])
    violations: list[str] = field(default_factory=list[str])
    num_violations: int = 0
    num_5xx: int = 0
    num_generated: int = 0

    @property
    def is_met(self) -> bool:
        """Return whether every check holds."""
        return not (self.failed or self.num_violations or self.num_5xx)

    def as_json(self) -> dict[str, Any]:
        """Return the figures for one line of JSON."""
        return {
            "openai_calls": len(self.passed),
            "openai_calls_total": len(self.passed) + len(self.failed),
            "openai_calls_failed": dict(list(self.failed.items())[:MAX_SHOWN]),
            "schema_violations": self.num_violations,
            "http_5xx": self.num_5xx,
            "generated_requests": self.num_generated,
            "wrong": self.violations[:MAX_SHOWN],
        }


@dataclass(frozen=True)
class Context:
    """Client and clip of the calls."""

    client: OpenAI
    clip: bytes

    def audio(self) -> dict[str, Any]:
        """Return the clip as a content part."""
        data = base64.b64encode(self.clip).decode()
        return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}

    def url_part(self) -> dict[str, Any]:
        """Return the clip as a `data:` URL, a part that vLLM's API has."""
        url = f"data:audio/wav;base64,{base64.b64encode(self.clip).decode()}"
        return {"type": "audio_url", "audio_url": {"url": url}}

    def chat(self, *parts: Any, before: Any = (), **fields: Any) -> Any:
        """Ask about the clip in a chat; `parts` replace clip and question."""
        content = list(parts) or [self.audio(), {"type": "text", "text": "What is said?"}]
        fields = {"model": MODEL, "messages": [*before, {"role": "user", "content": content}], **fields}
        return self.client.chat.completions.create(**fields)

    def transcribe(self, **fields: Any) -> Any:
        """Transcribe the clip."""
        return self.client.audio.transcriptions.create(**{"model": MODEL, "file": ("clip.wav", self.clip), **fields})

    def upload(self, **fields: Any) -> FileObject:
        """Store the clip."""
        return self.client.files.create(**{"file": ("clip.wav", self.clip), "purpose": "user_data", **fields})


Call = Callable[[Context], object]


def tone() -> bytes:
    """Write a second of tone as a WAV file."""
    times_S = np.arange(SAMPLE_RATE_HZ) / SAMPLE_RATE_HZ
    return wav((0.3 * np.sin(2765 * times_S)).astype(np.float32))


def require(is_right: object, message: str) -> None:
    """Raise a `MismatchError` unless a condition holds."""
    if not is_right:
        raise MismatchError(message)


def completion(**fields: Any) -> Call:
    """Return a chat call that must give a completion with an answer, the trace and usage."""

    def call(context: Context) -> None:
        found = context.chat(**fields)
        require(isinstance(found, ChatCompletion), f"is a {type(found).__name__}")
        (choice,) = found.choices
        require(choice.finish_reason in ("stop", "length"), f"finish_reason {choice.finish_reason}")
        require(choice.message.role == "assistant" and choice.message.content is not None, "has no message")
        require(found.usage and found.usage.total_tokens >= found.usage.prompt_tokens, "usage is wrong")
        require(TYPED_REPLY in (found.model_extra or {}), "has no typed reply")

    return call


def stream(*, usage: bool = False, **fields: Any) -> Call:
    """Return a streamed chat call whose deltas must equal the answer of the typed reply."""

    def call(context: Context) -> None:
        options = {"stream_options": {"include_usage": True}} if usage else {}
        chunks = list(context.chat(stream=True, **options, **fields))
        require(all(isinstance(chunk, ChatCompletionChunk) for chunk in chunks), "has other chunks")
        require(len({chunk.id for chunk in chunks}) == 1, "changes its id")
        with_choice = [chunk for chunk in chunks if chunk.choices]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in with_choice)
        last: Any = with_choice[-1]
        require(last.choices[0].finish_reason in ("stop", "length"), "has no finish_reason")
        require(text == last.model_extra[TYPED_REPLY]["answer"]["text"], "deltas differ from the answer")
        require(bool(chunks[-1].usage) == usage, "usage stands where it was not wanted, or is missing")

    return call


def transcript(kind: type | None, **fields: Any) -> Call:
    """Return a transcription call with a result of the client's type; None for text."""

    def call(context: Context) -> None:
        found = context.transcribe(**fields)
        require(isinstance(found, kind or str), f"is a {type(found).__name__}")
        if kind in (TranscriptionVerbose, TranscriptionDiarized):
            require(all(0 <= segment.start <= segment.end <= found.duration for segment in found.segments), "times")

    return call


def transcript_stream(context: Context) -> None:
    """Check that the deltas of a streamed transcript equal its end."""
    events = list(context.transcribe(stream=True))
    require(events[-1].type == "transcript.text.done", "does not end")
    require("".join(event.delta for event in events[:-1]) == events[-1].text, "deltas differ from the text")


def refused(kind: type[openai.APIStatusError], call: Call, param: str | None = None, code: str | None = None) -> Call:
    """Return a call that must raise an exception of the client, with the name of the field or a code."""

    def check(context: Context) -> None:
        try:
            call(context)
        except openai.APIStatusError as error:
            require(type(error) is kind, f"raises {type(error).__name__}: {error.code}")
            require(param is None or error.param == param, f"names {error.param}, not {param}")
            require(code is None or error.code == code, f"has the code {error.code}, not {code}")
            require(error.request_id, "has no request id")
        else:
            raise MismatchError("raises nothing")

    return check


def bad_chat(param: str | None = None, *, code: str | None = None, **fields: Any) -> Call:
    """Return a chat call that must be refused as a bad request."""
    return refused(openai.BadRequestError, lambda context: context.chat(**fields), param, code)


def bad_transcript(param: str | None = None, **fields: Any) -> Call:
    """Return a transcription call that must be refused as a bad request."""
    return refused(openai.BadRequestError, lambda context: context.transcribe(**fields), param)


def with_file(act: Callable[[Context, FileObject], object]) -> Call:
    """Return a call about a stored file, which is deleted afterwards."""

    def call(context: Context) -> None:
        stored = context.upload()
        try:
            act(context, stored)
        finally:
            context.client.files.delete(stored.id)

    return call


def _file_equals(context: Context, stored: FileObject) -> None:
    require(context.client.files.retrieve(stored.id) == stored, "differs when read again")
    require(stored.bytes == len(context.clip) and stored.filename == "clip.wav", "has wrong fields")


def _file_content(context: Context, stored: FileObject) -> None:
    require(context.client.files.content(stored.id).content == context.clip, "has other bytes")


def _file_listed(context: Context, stored: FileObject) -> None:
    require(stored.id in [file.id for file in context.client.files.list(limit=1)], "is not in the list")


def _file_asked(context: Context, stored: FileObject) -> None:
    part = {"type": "file", "file": {"file_id": stored.id}}
    found = context.chat(part, {"type": "text", "text": "What is said?"})
    require(found.choices[0].message.content == context.chat().choices[0].message.content, "another answer")


def _file_expires(context: Context) -> None:
    stored = context.upload(expires_after={"anchor": "created_at", "seconds": 3600})
    context.client.files.delete(stored.id)
    require(stored.expires_at == stored.created_at + 3600, "expires at another time")


def _file_deleted(context: Context) -> None:
    stored = context.upload()
    require(context.client.files.delete(stored.id).deleted, "is not deleted")
    refused(openai.NotFoundError, lambda _: context.client.files.retrieve(stored.id))(context)


def _model(context: Context) -> None:
    names = [model.id for model in context.client.models.list()]
    require(MODEL in names, "is not in the list")
    require(all(isinstance(context.client.models.retrieve(name), Model) for name in names), "no model")


def _scores(context: Context) -> None:
    found = context.chat(extra_body={"hyper": {"choices": ["one", "two", "three"]}})
    answer = found.model_extra[TYPED_REPLY]["answer"]
    require(len(answer["scores"]) == 3 and answer["choice"] == found.choices[0].message.content, "scores no choice")


def _logprobs(context: Context) -> None:
    choice = context.chat(logprobs=True).choices[0]
    found = (choice.logprobs.content if choice.logprobs else None) or []
    data = b"".join(bytes(token.bytes or ()) for token in found)
    require(bool(found) and all(token.logprob <= 0 for token in found), "no log-probabilities")
    require(data.decode().strip() == choice.message.content, "the tokens are not the answer")


class _Sound(BaseModel):
    """The type of a parsed answer."""

    answer: Literal["a bell", "a dog", "a tone"]
    confidence: float


def _fits(found: ChatCompletion, response_format: Any) -> None:
    schema = response_format["json_schema"]["schema"]
    jsonschema.validate(json.loads(found.choices[0].message.content or ""), schema)


def _parsed(context: Context) -> None:
    content: Any = [context.audio(), {"type": "text", "text": "What is it?"}]
    found: Any = context.client.chat.completions.parse(
        model=MODEL, messages=[{"role": "user", "content": content}], response_format=_Sound
    )
    answer = found.choices[0].message.parsed
    require(isinstance(answer, _Sound), f"is a {type(answer).__name__}")
    require(answer.answer == found.hyper["answer"]["choice"], "is not the scored choice")


def _late(context: Context) -> None:
    call = refused(
        openai.InternalServerError, lambda c: c.chat(extra_body={"hyper": {"timeout_ms": 1}}), code="deadline_exceeded"
    )
    call(context)


def _raw(context: Context) -> None:
    raw = context.client.chat.completions.with_raw_response.create(
        model=MODEL,
        messages=cast("Any", [{"role": "user", "content": [context.audio(), {"type": "text", "text": "Who?"}]}]),
    )
    require(raw.headers.get("x-request-id") and raw.parse().choices, "has no request id")


def _schema(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


_TOOL = {"type": "function", "function": {"name": "look"}}
_CHOICES = _schema({"type": "object", "properties": {"sound": {"enum": ["a bell", "a dog"]}}, "required": ["sound"]})
_PARTS = _schema(
    {
        "type": "object",
        "properties": {
            "reasoning": {"type": "string"},
            "answer": {"type": "boolean"},
            "confidence": {"type": "number"},
            "environment": {"type": "array", "items": {"type": "string"}},
        },
        "required": ["reasoning", "answer", "confidence", "environment"],
        "additionalProperties": False,
    }
)
_TURNS = ({"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"})

CALLS: Mapping[str, Call] = {
    "chat": completion(),
    "chat: system message": completion(before=({"role": "system", "content": "Be brief."},)),
    "chat: developer message": completion(before=({"role": "developer", "content": "Be brief."},)),
    "chat: earlier turns": completion(before=_TURNS),
    "chat: n=1": completion(n=1),
    "chat: user": completion(user="somebody"),
    "chat: metadata": completion(metadata={"a": "b"}),
    "chat: store=false": completion(store=False),
    "chat: reasoning_effort": completion(reasoning_effort="low"),
    "chat: modalities": completion(modalities=["text"]),
    "chat: max_completion_tokens": completion(max_completion_tokens=200),
    "chat: max_tokens": completion(max_tokens=200),
    "chat: response_format text": completion(response_format={"type": "text"}),
    "chat: json_schema of choices": lambda c: _fits(c.chat(response_format=_CHOICES), _CHOICES),
    "chat: json_schema of parts": lambda c: _fits(c.chat(response_format=_PARTS), _PARTS),
    "chat: parsed answer": _parsed,
    "chat: top_p=1": completion(top_p=1),
    "chat: temperature and seed": completion(temperature=0.7, seed=5),
    "chat: neutral penalties": completion(frequency_penalty=0, presence_penalty=0),
    "chat: logprobs=false": completion(logprobs=False),
    "chat: logprobs=true": _logprobs,
    "chat: service_tier": completion(service_tier="auto"),
    "chat: prompt_cache_key": completion(prompt_cache_key="a"),
    "chat: safety_identifier": completion(safety_identifier="a"),
    "chat: verbosity": completion(verbosity="low"),
    "chat: pause off": completion(extra_body={"hyper": {"pause": "off"}}),
    "chat: data URL": lambda c: require(c.chat(c.url_part(), _text("Who?")).choices, "no choice"),
    "chat: two texts": lambda c: require(c.chat(c.audio(), _text("Who"), _text("speaks?")).choices, "no choice"),
    "chat: scored choices": _scores,
    "chat: raw response": _raw,
    "chat stream": stream(),
    "chat stream: usage": stream(usage=True),
    "chat stream: pause off": stream(extra_body={"hyper": {"pause": "off"}}),
    "chat stream: choices": stream(extra_body={"hyper": {"choices": ["one", "two"]}}),
    "chat stream: system message": stream(before=({"role": "system", "content": "Be brief."},)),
    "chat refused: n=2": bad_chat("n", n=2),
    "chat refused: tools": bad_chat("tools", tools=[_TOOL]),
    "chat refused: audio output": bad_chat("modalities", modalities=["text", "audio"]),
    "chat refused: top_logprobs": bad_chat("top_logprobs", logprobs=True, top_logprobs=2),
    "chat refused: json_object": bad_chat("response_format", response_format={"type": "json_object"}),
    "chat refused: json_schema": bad_chat("response_format", response_format=_schema({"type": "object"})),
    "chat refused: penalty": bad_chat("frequency_penalty", frequency_penalty=1.5),
    "chat refused: stop": bad_chat("stop", stop=["."]),
    "chat refused: logit_bias": bad_chat("logit_bias", logit_bias={"5": 10}),
    "chat refused: temperature": bad_chat("temperature", temperature=3),
    "chat refused: max_tokens": bad_chat("max_tokens", max_tokens=10**6),
    "chat refused: unknown field": bad_chat(code="unknown_parameter", extra_body={"quality": "best"}),
    "chat refused: no clip": refused(openai.BadRequestError, lambda c: c.chat(_text("Who?")), "messages"),
    "chat refused: two clips": refused(
        openai.BadRequestError, lambda c: c.chat(c.audio(), c.audio(), _text("Who?")), "messages"
    ),
    "chat refused: no question": refused(openai.BadRequestError, lambda c: c.chat(c.audio()), "messages"),
    "chat refused: remote URL": refused(
        openai.BadRequestError,
        lambda c: c.chat({"type": "audio_url", "audio_url": {"url": "https://example.org/a.wav"}}, _text("Who?")),
        "messages.content.audio_url.url",
    ),
    "chat refused: unknown model": refused(
        openai.NotFoundError, lambda c: c.chat(model="gpt-4o"), code="model_not_found"
    ),
    "chat refused: not audio": refused(
        openai.APIStatusError,
        lambda c: c.chat(
            {"type": "input_audio", "input_audio": {"data": "bm8gc291bmQ=", "format": "wav"}}, _text("Who?")
        ),
    ),
    "chat refused: deadline": _late,
    "transcription": transcript(Transcription),
    "transcription: json": transcript(Transcription, response_format="json"),
    "transcription: text": transcript(None, response_format="text"),
    "transcription: srt": transcript(None, response_format="srt"),
    "transcription: vtt": transcript(None, response_format="vtt"),
    "transcription: verbose_json": transcript(TranscriptionVerbose, response_format="verbose_json"),
    "transcription: diarized_json": transcript(TranscriptionDiarized, response_format="diarized_json"),
    "transcription: segments": transcript(
        TranscriptionVerbose, response_format="verbose_json", timestamp_granularities=["segment"]
    ),
    "transcription: language": transcript(Transcription, language="en"),
    "transcription: temperature": transcript(Transcription, temperature=0.2),
    "transcription stream": transcript_stream,
    "transcription refused: words": bad_transcript(timestamp_granularities=["word"], response_format="verbose_json"),
    "transcription refused: prompt": bad_transcript(prompt="names"),
    "transcription refused: language": bad_transcript("language", language="de"),
    "transcription refused: format": bad_transcript("response_format", response_format="xml"),
    "transcription refused: streamed subtitles": bad_transcript("response_format", response_format="srt", stream=True),
    "transcription refused: unknown model": refused(openai.NotFoundError, lambda c: c.transcribe(model="whisper-9")),
    "transcription refused: not audio": refused(
        openai.APIStatusError, lambda c: c.transcribe(file=("a.txt", b"no sound at all"))
    ),
    "models": _model,
    "models refused: unknown": refused(openai.NotFoundError, lambda c: c.client.models.retrieve("gpt-4o")),
    "files: create and retrieve": with_file(_file_equals),
    "files: content": with_file(_file_content),
    "files: list": with_file(_file_listed),
    "files: ask by id": with_file(_file_asked),
    "files: expiry": _file_expires,
    "files: delete": _file_deleted,
    "files refused: purpose": refused(openai.BadRequestError, lambda c: c.upload(purpose="fine-tune"), "purpose"),
    "files refused: unknown id": refused(openai.NotFoundError, lambda c: c.client.files.retrieve("file-1")),
    "files refused: deleted id": refused(openai.NotFoundError, lambda c: c.client.files.delete("file-1")),
    "files refused: chat about an unknown id": refused(
        openai.NotFoundError, lambda c: c.chat({"type": "file", "file": {"file_id": "file-1"}}, _text("Who?"))
    ),
}
"""Every call by its name. The client's types and docs/openai.md decide the results."""


def check(
    url: str,
    key: str | None,
    *,
    num: int,
    seed: int,
    clip: bytes | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Conformance:
    """Run all calls and the generated requests.

    Args:
        num: Number of generated requests.
        clip: A WAV file; a second of tone by default.
        say: Called with progress.
    """
    result = Conformance()
    checker = ReplyChecker(describe(url, bearer(key)), result)
    hooks = {"response": [checker.check]}
    with (
        httpx.Client(timeout=TIMEOUT_S, event_hooks=hooks) as http,
        # The client is annotated for httpx2 and takes httpx's too.
        OpenAI(base_url=f"{url}/v1", api_key=key or "none", max_retries=0, http_client=http) as client,  # pyright: ignore[reportArgumentType]
    ):
        context = Context(client, clip or tone())
        for number, (name, call) in enumerate(CALLS.items(), 1):
            try:
                call(context)
            except (MismatchError, openai.OpenAIError, AttributeError, TypeError, LookupError) as fault:
                result.failed[name] = f"{type(fault).__name__}: {fault}"[:300]
            else:
                result.passed.append(name)
            if number % 10 == 0 or number == len(CALLS):
                say(f"{number} of {len(CALLS)} calls of the openai client")
    if num:
        findings = generate(
            url, key, num, seed, lambda done: say(f"{done} of {num} generated requests"), draws_every_endpoint=True
        )
        result.num_generated = findings.num
        result.num_5xx += findings.num_ours
        result.num_violations += findings.num_wrong - findings.num_ours
        result.violations += findings.wrong
    return result


class ReplyChecker:
    """Checks the status and the body of each reply against an OpenAPI document."""

    def __init__(self, document: dict[str, Any], result: Conformance) -> None:
        self.document = document
        self.result = result
        self.routes = [
            (re.compile(re.sub(r"\{[^}]+\}", "[^/]+", path)), methods) for path, methods in document["paths"].items()
        ]

    def check(self, response: httpx.Response) -> None:
        """Check one reply; streams by their status and type alone."""
        for fault in self.faults(response):
            self.result.num_violations += 1
            path = response.request.url.path
            self.result.violations.append(f"{response.request.method} {path}: {response.status_code}: {fault}")

    def faults(self, response: httpx.Response) -> Iterator[str]:
        """Yield the differences between a reply and the document."""
        path, method = response.request.url.path, response.request.method.lower()
        found = [methods for pattern, methods in self.routes if pattern.fullmatch(path) and method in methods]
        if not found:
            yield "no such endpoint in the document"
            return
        described = found[0][method]["responses"].get(str(response.status_code))
        if described is None:
            yield "an undescribed status"
            return
        media_type = response.headers.get("content-type", "").partition(";")[0]
        content: Mapping[str, Any] = described.get("content", {})
        if content and media_type not in content:
            yield f"an undescribed content type: {media_type}"
        elif media_type == "application/json":
            schema = content[media_type].get("schema", {}) | {"components": self.document.get("components", {})}
            body = json.loads(response.read())
            for error in jsonschema.Draft202012Validator(schema).iter_errors(body):
                yield f"{error.json_path}: {error.message:.200}"
