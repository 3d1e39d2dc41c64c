"""The shapes that travel over HTTP: what a request may hold and what a reply is made of.

Unknown fields are refused, so that a misspelt option is an error and not silence. `NaN` and infinity are refused too.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field

MAX_SEED = 2**32 - 1


class Wire(BaseModel):
    """The settings that all of these share."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class QaOptions(Wire):
    """Asks one question about one clip."""

    question: str = Field(description="What to find out; at most 2000 characters.")
    # One wrong item is enough to know; a million of them would each become an error of its own.
    choices: Annotated[list[str], FailFast()] = Field(
        default=[], description="None, or 2 to 26 different options to choose from."
    )
    stream: bool = Field(default=False, description="Answer with server-sent events as the trace is written.")
    pause: Literal["auto", "off"] | Annotated[int, Field(ge=0)] = Field(
        default="auto",
        description="Pauses the model may take: what checkpoint, deadline and load allow, none, or at most this many.",
    )
    reasoning: Literal["full", "answer"] = Field(default="full", description="What to show; the trace is always made.")
    long_audio: Literal["error", "window", "chunk"] = Field(
        default="error", description="What to do with a clip longer than one window. Only `error` exists so far."
    )
    max_tokens: int | None = Field(default=None, ge=1, description="Most visible tokens of the trace.")
    temperature: float = Field(default=0.0, ge=0, le=2)
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED)
    timeout_ms: int | None = Field(default=None, ge=1, description="Deadline, counted from the request's first byte.")


class AudioData(Wire):
    """A clip inside a JSON body."""

    data: str = Field(description="The file's bytes as base64.")


class QaBody(QaOptions):
    """The JSON form of a question: the options and the clip."""

    audio: AudioData


class Answer(Wire):
    """What the model answers; `scores` has one probability a choice and sums to 1."""

    text: str
    choice_index: int | None = None
    choice: str | None = None
    confidence: float | None = None
    scores: list[float] | None = None


class SpeakerReply(Wire):
    """One voice of the clip and what it says."""

    id: str
    description: str
    quotes: list[str]


class Perception(Wire):
    """What the model heard."""

    environment: list[str]
    environment_text: str | None
    speakers: list[SpeakerReply]
    transcript: str | None
    description: str | None


class Reflection(Wire):
    """The model's second thought and whether its answer changed after it."""

    text: str
    changed_answer: bool


class Reasoning(Wire):
    """How the model came from what it heard to what it answers."""

    planning: str | None
    reasoning: str | None
    summary: str | None
    reflection: Reflection | None


class TraceReply(Wire):
    """The trace as written, tags included and pauses left out; `raw` is null when only the answer is shown."""

    raw: str | None
    format: Literal["strict", "weak", "malformed"]
    missing_sections: list[str]


class PauseAt(Wire):
    """Where the model paused, and the confidence of the window there (null where it chose to by itself, early on)."""

    section: str | None
    confidence: float | None = None


class PauseReply(Wire):
    """The pauses of a trace; `budget` is what they were allowed, and `lowered_by` why `auto` came to less."""

    mode: str
    budget: int
    lowered_by: Literal["deadline", "load"] | None
    count: int
    latent_tokens: int
    at: list[PauseAt]
    lowest_group_confidence: float | None = None


class QualityReply(Wire):
    """Plain measurements of a clip."""

    silence_ratio: float
    clipping_ratio: float
    peak_dbfs: float


class AudioReply(Wire):
    """How much of a clip was used, and what it is."""

    duration_s: float
    used_s: float
    truncated: bool
    windows: int
    sample_rate_hz: int
    channels: int
    codec: str
    quality: QualityReply


class Usage(Wire):
    """Tokens of a request; `prompt_tokens` holds the audio and the cached ones, `pause_tokens` were never shown."""

    prompt_tokens: int
    audio_tokens: int
    cached_tokens: int
    completion_tokens: int
    pause_tokens: int
    total_tokens: int


class Timings(Wire):
    """Milliseconds; `first_token`, `first_answer_token` and `total` count from the request's first byte."""

    receive: float
    decode: float
    queue: float | None
    prefill: float | None
    first_token: float | None
    first_answer_token: float | None
    sections: dict[str, float]
    total: float


class WarningReply(Wire):
    """Something the caller should know about an answer that is there."""

    code: str
    message: str


class QaReply(Wire):
    """The answer to one question, with what the model heard and how it reasoned."""

    id: str
    object: Literal["audio.qa"] = "audio.qa"
    created: int
    model: str
    answer: Answer
    perception: Perception | None
    reasoning: Reasoning | None
    trace: TraceReply
    termination: Literal["complete", "truncated", "aborted", "malformed"]
    pause: PauseReply
    audio: list[AudioReply]
    usage: Usage
    timings_ms: Timings
    warnings: list[WarningReply]


class ErrorObject(Wire):
    """Why a request failed, for a program (`code`) and for a person (`message`)."""

    type: str
    code: str
    message: str
    param: str | None
    request_id: str
    retryable: bool
    limit: float | None
    actual: float | str | None
    hint: str | None


class ErrorReply(Wire):
    """Every reply that is not a success."""

    error: ErrorObject


class PartialReply(Wire):
    """What stood of an answer when its time was over; what it heard and why only where reasoning is shown."""

    trace: TraceReply
    perception: Perception | None = None
    reasoning: Reasoning | None = None


class LateReply(ErrorReply):
    """Says that a deadline passed, with what had been written by then, if anything."""

    partial: PartialReply | None = None


class Readiness(Wire):
    """Whether the service takes requests, and if not, why."""

    ready: bool
    reasons: list[str]


class CheckpointInfo(Wire):
    """Names the checkpoint that answers."""

    name: str
    manifest_sha256: str
    base_model: str
    max_model_len: int = Field(description="Tokens of prompt, clip, trace and pauses together.")


class DecodingInfo(Wire):
    """Says where clips are decoded."""

    sandbox: list[str] = Field(description="What confines a decoder, strongest first; empty: nothing does.")
    memory_mib: int = Field(description="What one decoder may take.")


class PauseInfo(Wire):
    """Says when the checkpoint pauses, and what a pause is made of."""

    mode: Literal["parallel", "sampled", "off"]
    latent_tokens: int = Field(description="Length of a pause.")
    has_position_tokens: bool = Field(description="Whether each position of a pause has a token of its own.")
    max_pauses: int = Field(description="Budget of a request.")
    tau_pause: float = Field(description="A mean confidence below this opens a pause.")
    tau_abort: float = Field(description="One below this ends the answer.")
    window_tokens: int = Field(description="Tokens that the mean is over.")
    sections: list[str] = Field(description="Where it may pause.")
    is_calibrated: bool = Field(description="Whether the thresholds were measured on this checkpoint.")


class LimitsInfo(Wire):
    """Says what a request may ask for."""

    window_s: float = Field(description="Seconds of sound that the model hears at once.")
    min_audio_s: float
    max_audio_s: float
    max_audio_bytes: int
    max_body_bytes: int
    max_question_chars: int
    max_choices: int
    max_choice_chars: int
    max_tokens: int
    max_timeout_ms: int
    max_in_flight: int
    max_queue_wait_s: float


class InfoReply(Wire):
    """Says what this service is and takes."""

    version: str
    engine: str
    checkpoint: CheckpointInfo
    formats: list[str] = Field(description="Kinds of files that are read.")
    decoding: DecodingInfo
    sections: list[str] = Field(description="Sections of a trace, in their order.")
    environment_labels: list[str] = Field(description="What the checkpoint can name as background; empty: anything.")
    pause: PauseInfo
    long_audio: list[str] = Field(description="What `long_audio` may be.")
    limits: LimitsInfo
