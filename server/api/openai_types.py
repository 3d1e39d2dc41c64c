"""The shapes of OpenAI's API that this service accepts and returns.

Bodies accept every field of OpenAI's own. A field without effect here (`user`, `metadata`, ...) is read and dropped; a
field that would change the meaning of a reply must have its neutral value (`NEUTRAL_VALUES`), or it is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Discriminator, FailFast, Field, Tag

from server.api.types import MAX_SEED, QaReply, Wire
from server.errors import RequestError

NEUTRAL_VALUES: Mapping[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "audio": (None,),
    "modalities": (None, ["text"]),
    "top_logprobs": (None, 0),
    "logit_bias": (None, {}),
    "stop": (None, []),
    "top_p": (None, 1, 1.0),
    "frequency_penalty": (None, 0, 0.0),
    "presence_penalty": (None, 0, 0.0),
    "prediction": (None,),
    "web_search_options": (None,),
    "moderation": (None,),
    "response_format": (None, {"type": "text"}),  # json_schema is read, see `drop_neutral`
}
"""Fields of a chat request that change its meaning, with the values that leave it as it is."""

WITHOUT_EFFECT = frozenset(
    "user metadata store service_tier reasoning_effort verbosity parallel_tool_calls prompt_cache_key "
    "prompt_cache_retention prompt_cache_options safety_identifier".split()
)
"""Fields of a chat request that say nothing about the answer."""


class OpenAiBody(BaseModel):
    """Settings of the bodies below. An unknown field is refused by name."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TextPart(OpenAiBody):
    """Text of a message."""

    type: Literal["text"]
    text: str


class InputAudio(OpenAiBody):
    """A clip as base64; `format` is not needed, because the decoder detects it."""

    data: str
    format: str | None = None


class InputAudioPart(OpenAiBody):
    """A clip in a message."""

    type: Literal["input_audio"]
    input_audio: InputAudio


class AudioUrl(OpenAiBody):
    """A clip as a `data:` URL."""

    url: str


class AudioUrlPart(OpenAiBody):
    """A clip in a message, in the form of vLLM's server."""

    type: Literal["audio_url"]
    audio_url: AudioUrl


class FileReference(OpenAiBody):
    """A stored file by its id, or a file as base64; `filename` is not needed."""

    file_id: str | None = None
    file_data: str | None = None
    filename: str | None = None


class FilePart(OpenAiBody):
    """A clip in a message, uploaded before or inside the message."""

    type: Literal["file"]
    file: FileReference


def _part_type(part: Any) -> str:
    kind: Any = getattr(part, "type", None)
    if isinstance(part, Mapping):
        kind = cast("Mapping[str, Any]", part).get("type")
    return kind if isinstance(kind, str) else ""


Part = Annotated[
    Annotated[TextPart, Tag("text")]
    | Annotated[InputAudioPart, Tag("input_audio")]
    | Annotated[AudioUrlPart, Tag("audio_url")]
    | Annotated[FilePart, Tag("file")],
    Discriminator(_part_type),
]


class Message(OpenAiBody):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(max_length=64)] | None = None
    name: str | None = None
    refusal: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class StreamOptions(OpenAiBody):
    """Options of a stream."""

    include_usage: bool = False
    include_obfuscation: bool = False


class JsonSchemaFormat(OpenAiBody):
    """Name and JSON schema of an answer; `strict` has no effect, because the answer always fits the schema."""

    name: str = Field(pattern="^[A-Za-z0-9_-]{1,64}$")
    description: str | None = None
    answer_schema: dict[str, Any] = Field(alias="schema", description="A supported schema; see docs/openai.md.")
    strict: bool | None = None


class JsonSchemaResponse(OpenAiBody):
    """An answer as JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchemaFormat


class HyperOptions(OpenAiBody):
    """What this service adds to a chat request."""

    choices: Annotated[list[str], FailFast()] = Field(default=[], description="None, or 2 to 26 different choices.")
    pause: Literal["auto", "off"] | Annotated[int, Field(ge=0)] = "auto"
    long_audio: Literal["error", "window", "chunk"] = Field(
        default="error",
        description="Handling of clips over one window: refuse them, use the window at `start_s`, or use all windows.",
    )
    start_s: float | None = Field(
        default=None, ge=0, description="Start of the window in seconds; only with `long_audio=window`."
    )
    timeout_ms: int | None = Field(default=None, ge=1)


class ChatBody(OpenAiBody):
    """A chat completion about one clip."""

    model: str = Field(description="Name of the checkpoint (see /v1/models), or `hyper`.")
    messages: Annotated[list[Message], FailFast()] = Field(min_length=1, max_length=64)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED)
    logprobs: bool | None = Field(default=None, description="Return the log-probability of each token of the answer.")
    response_format: JsonSchemaResponse | None = Field(
        default=None, description='JSON schema of the answer; `{"type": "text"}` is the same as none.'
    )
    hyper: HyperOptions = HyperOptions()


class TranscriptionForm(OpenAiBody):
    """The form of a transcription, beside `file`.

    `prompt` is not accepted: this model reads no hints. Word times are not accepted either, because a trace has none.
    """

    model: str = Field(description="Name of the checkpoint (see /v1/models), or `hyper`.")
    response_format: Literal["json", "text", "verbose_json", "srt", "vtt", "diarized_json"] = "json"
    stream: bool = False
    language: str | None = Field(default=None, description="`en`; the embedded checkpoint transcribes English.")
    temperature: float = Field(default=0.0, ge=0, le=1)
    timestamp_granularities: list[Literal["segment"]] = Field(default=[])
    chunking_strategy: Literal["auto", ""] = Field(
        default="auto", description="Recordings over one window are cut at quiet places, whatever this says."
    )
    long_audio: Literal["error", "chunk"] = Field(
        default="chunk", description="Handling of clips over one window: use all windows, or refuse them."
    )
    timeout_ms: int | None = Field(default=None, ge=1)


class DurationUsage(Wire):
    """Seconds of audio in a transcription."""

    type: Literal["duration"] = "duration"
    seconds: float


class Timing(Wire):
    """How exact segment times are: `window` means that a segment spans the window in which it was recognised."""

    timing: Literal["window"] = "window"
    termination: str
    failed_windows: list[int] = Field(default=[], description="Windows of a recording without a transcript.")


class Transcription(Wire):
    """The transcript of a clip."""

    text: str
    usage: DurationUsage
    hyper: Timing


class TranscriptSegment(Wire):
    """The transcript of one window; `start` and `end` are the window's, in seconds."""

    id: int
    seek: int = 0
    start: float
    end: float
    text: str
    tokens: tuple[int, ...] = ()
    temperature: float
    avg_logprob: None = None
    compression_ratio: float
    no_speech_prob: None = None


class VerboseTranscription(Transcription):
    """The transcript with its segments."""

    task: Literal["transcribe"] = "transcribe"
    language: str
    duration: float
    segments: list[TranscriptSegment]


class SpeakerSegment(Wire):
    """Words of one speaker; `start` and `end` are those of the window in which they were recognised."""

    type: Literal["transcript.text.segment"] = "transcript.text.segment"
    id: str
    start: float
    end: float
    speaker: str
    text: str


class DiarizedTranscription(Transcription):
    """The transcript by speakers."""

    task: Literal["transcribe"] = "transcribe"
    duration: float
    segments: list[SpeakerSegment]


class PromptTokensDetails(Wire):
    """Parts of the prompt's tokens."""

    audio_tokens: int
    cached_tokens: int


class CompletionTokensDetails(Wire):
    """Parts of the completion's tokens; `reasoning_tokens` are those of the trace, pauses included."""

    reasoning_tokens: int
    pause_tokens: int


class ChatUsage(Wire):
    """Tokens of a chat completion."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class ChatMessage(Wire):
    """The answer, and the trace that led to it under both names that clients read."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None
    reasoning: str
    reasoning_content: str


class TokenLogprob(Wire):
    """One token of the answer; of `choices`, the whole chosen option."""

    token: str = Field(description="Text of the token; U+FFFD stands for a part of a character.")
    logprob: float = Field(
        description="Natural logarithm of its probability before temperature and bans; of a choice, of its score."
    )
    bytes: list[int]
    top_logprobs: list[Any] = Field(default=[], max_length=0, description="Always empty.")


class ChoiceLogprobs(Wire):
    """The tokens of the answer."""

    content: list[TokenLogprob]
    refusal: None = None


class ChatChoice(Wire):
    """The one choice of a completion; `length` where the trace reached its token limit."""

    index: Literal[0] = 0
    finish_reason: Literal["stop", "length"]
    logprobs: ChoiceLogprobs | None = None
    message: ChatMessage


class ChatCompletion(Wire):
    """A chat completion; `hyper` is the reply of /v1/audio/qa."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: ChatUsage
    hyper: QaReply


class Model(Wire):
    """A model that requests may name."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str


class ModelList(Wire):
    """The models that requests may name."""

    object: Literal["list"] = "list"
    data: list[Model]


def drop_neutral(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return a chat request without the fields that have no effect here.

    Raises:
        RequestError: A field has a value that would change the meaning of the reply.
    """
    kept: dict[str, Any] = {}
    for name, value in fields.items():
        if name in WITHOUT_EFFECT:
            continue
        if name not in NEUTRAL_VALUES or (name == "response_format" and _is_json_schema(value)):
            kept[name] = value
        elif not _is_one_of(value, NEUTRAL_VALUES[name]):
            raise refused(name, value)
    return kept


def refused(name: str, value: Any) -> RequestError:
    """Return the error of a parameter that this service does not support."""
    neutral = next(each for each in NEUTRAL_VALUES[name][::-1])
    accepted = "leave it out" if neutral is None else f"leave it out, or send {_spelled(neutral)}"
    actual = value if isinstance(value, int | float) and not isinstance(value, bool) else None
    return RequestError(
        "unsupported_parameter",
        f"`{name}` with this value is not supported: {accepted}.",
        param=name,
        limit=1 if name == "n" else None,
        actual=actual,
        hint="docs/openai.md lists the differences from OpenAI's API.",
    )


def _is_json_schema(value: Any) -> bool:
    return isinstance(value, Mapping) and cast("Mapping[str, Any]", value).get("type") == "json_schema"


def _spelled(value: Any) -> str:
    spellings = {"True": "true", "False": "false"}
    return spellings.get(str(value), str(value).replace("'", '"'))


def _is_one_of(value: Any, values: Sequence[Any]) -> bool:
    # 1 == True in Python, and a client that sends `n: true` is wrong.
    return any(type(value) is type(each) and value == each for each in values)
