"""Wire types: the fields of requests and replies over HTTP.

Unknown fields are refused, so a misspelt option is an error. `NaN` and infinity are refused too.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, FailFast, Field, field_validator

MAX_SEED = 2**32 - 1
MAX_TRACK = 10_000


class Wire(BaseModel):
    """Common settings of all wire types."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class QuestionItem(Wire):
    """One of several questions."""

    question: str
    choices: Annotated[list[str], FailFast()] = []


class QaOptions(Wire):
    """One question about one clip, or several as `questions`."""

    question: str = Field(default="", description="Question about the clip; at most 2000 characters.")
    # Stop at the first wrong item: a million of them would each produce an error.
    choices: Annotated[list[str], FailFast()] = Field(default=[], description="None, or 2 to 26 different choices.")
    questions: Annotated[list[QuestionItem], FailFast()] = Field(
        default=[], description="Several questions in place of `question`: texts, or objects with their own choices."
    )
    stream: bool = Field(default=False, description="Send the reply as server-sent events.")
    pause: Literal["auto", "off"] | Annotated[int, Field(ge=0)] = Field(
        default="auto",
        description="Pause budget: by checkpoint, deadline and load (`auto`), none (`off`), or a number.",
    )
    reasoning: Literal["full", "answer"] = Field(
        default="full", description="Parts of the trace in the reply; the model always writes it."
    )
    long_audio: Literal["error", "window", "chunk"] = Field(
        default="error",
        description="Handling of clips over one window: refuse them, use the window at `start_s`, or use all windows.",
    )
    start_s: float | None = Field(
        default=None, ge=0, description="Start of the window in seconds; only with `long_audio=window`."
    )
    track: int | None = Field(
        default=None,
        ge=1,
        le=MAX_TRACK,
        description="Audio track of the file, from 1; by default the file's default track, or one with sound.",
    )
    channel: Literal["mix", "left", "right", "each"] = Field(
        default="mix",
        description="Channel of a stereo clip; `mix` is the mean of all; `each` asks left and right apart.",
    )
    max_tokens: int | None = Field(default=None, ge=1, description="Maximum number of visible trace tokens.")
    temperature: float = Field(default=0.0, ge=0, le=2)
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED)
    timeout_ms: int | None = Field(default=None, ge=1, description="Deadline, counted from the request's first byte.")

    # Pydantic calls the validators of a subclass first, so a form has parsed its JSON objects by then.
    @field_validator("questions", mode="before")
    @classmethod
    def name_texts(cls, values: Any) -> Any:
        """Take a text as a question without choices."""
        if not isinstance(values, list):
            return values
        return [{"question": value} if isinstance(value, str) else value for value in cast("list[Any]", values)]


class QaForm(QaOptions):
    """Form of a question: the options, and the clip as `file` or as the id of a stored one."""

    file_id: str | None = Field(default=None, description="Id of a stored file (/v1/files), instead of `file`.")

    @field_validator("questions", mode="before")
    @classmethod
    def parse_objects(cls, values: list[str]) -> list[Any]:
        """Parse the questions that are JSON objects; the others are plain text."""
        return [_parsed_object(value) if value.lstrip().startswith("{") else value for value in values]


def _parsed_object(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("a question that begins with { must be a JSON object") from None


class AudioData(Wire):
    """A clip inside a JSON body: exactly one of the fields."""

    data: str = Field(default="", description="Bytes of the audio file as base64.")
    file_id: str = Field(default="", description="Id of a stored file (/v1/files).")
    audio_id: str = Field(default="", description="The same as `file_id`.")


class QaBody(QaOptions):
    """JSON body of a question: the options and the clip."""

    audio: AudioData


class EvidenceReply(Wire):
    """A window that an answer about a recording rests on; `quote` is from its transcript or background."""

    window: int
    start_s: float
    end_s: float
    quote: str | None


class RunnerUp(Wire):
    """The answer of another window of a recording."""

    window: int
    text: str
    confidence: float | None


class Answer(Wire):
    """The answer; `scores` has one probability per choice and sums to 1.

    `confidence` is the probability that the answer is right, if the checkpoint is calibrated (`confidence` of
    `/v1/info`). Otherwise it is the model's own share of the chosen option, and null for an open question.

    For a recording of several windows, `answered_by` is `windows` (the model, from the windows in `evidence`) or
    `timeline` (code, from the timeline).
    """

    text: str
    choice_index: int | None = None
    choice: str | None = None
    confidence: float | None = None
    scores: list[float] | None = None
    answered_by: Literal["windows", "timeline"] | None = None
    evidence: list[EvidenceReply] = []
    runners_up: list[RunnerUp] = []


class SpeakerReply(Wire):
    """One speaker of the clip with quotes."""

    id: str
    description: str
    quotes: list[str]


class Perception(Wire):
    """The perceived content of the clip."""

    environment: list[str]
    environment_text: str | None
    speakers: list[SpeakerReply]
    transcript: str | None
    description: str | None


class Reflection(Wire):
    """The model's reflection, and whether it changed the answer."""

    text: str
    changed_answer: bool


class Reasoning(Wire):
    """The reasoning sections of the trace."""

    planning: str | None
    reasoning: str | None
    summary: str | None
    reflection: Reflection | None


class TraceReply(Wire):
    """The trace with tags and without pauses; `raw` is null with `reasoning=answer`."""

    raw: str | None
    format: Literal["strict", "weak", "malformed"]
    missing_sections: list[str]


class PauseAt(Wire):
    """Section and window confidence of a pause; null for a pause chosen by the model before the first full window."""

    section: str | None
    confidence: float | None = None


class PauseReply(Wire):
    """The pauses of a trace; `lowered_by` is the reason for a reduced `auto` budget."""

    mode: str
    budget: int
    lowered_by: Literal["deadline", "load"] | None
    count: int
    latent_tokens: int
    at: list[PauseAt]
    lowest_group_confidence: float | None = None


class QualityReply(Wire):
    """Signal measurements of a clip."""

    silence_ratio: float
    clipping_ratio: float
    peak_dbfs: float


class ClipWarning(Wire):
    """One odd thing about a clip; `seconds` is the length of the sound that it concerns."""

    code: str
    message: str
    seconds: float | None = None


class UsedPart(Wire):
    """Part of a clip that the model received, in seconds of the clip."""

    start_s: float
    end_s: float


class AudioReply(Wire):
    """Duration, format and quality of a clip; `truncated` is true if sound that the file announces is missing.

    `parts` are the parts of the clip that the model received, and `used_s` is their sum. Only silence is left out.
    """

    duration_s: float
    used_s: float
    parts: list[UsedPart] = []
    padded_s: float = 0.0
    truncated: bool
    missing_s: float = 0.0
    num_tracks: int = 1
    track: int = 1
    channel: Literal["mix", "left", "right"] = "mix"
    warnings: list[ClipWarning] = []
    windows: int
    start_s: float = Field(default=0.0, description="Start of the used window, with `long_audio=window`.")
    sample_rate_hz: int
    channels: int
    codec: str
    quality: QualityReply


class Usage(Wire):
    """Tokens of a request; `prompt_tokens` includes audio and cached tokens, and `pause_tokens` are hidden."""

    prompt_tokens: int
    audio_tokens: int
    cached_tokens: int
    completion_tokens: int
    pause_tokens: int
    total_tokens: int


class TimelineWindow(Wire):
    """One window of a recording: its place, and what the model perceived in it.

    `boundary` is the end of the window: in silence, at a quiet place, hard (the next window begins 1 s earlier), or the
    end of the recording. `score` is the rank of the search for the question, and `relistened` a second question about
    the window. `error` is the code of a failed window.
    """

    index: int
    start_s: float
    end_s: float
    boundary: Literal["silence", "quiet", "hard", "fixed", "end"]
    status: Literal["done", "silent", "failed"]
    error: str | None = None
    environment: list[str] = []
    speakers: list[SpeakerReply] = []
    transcript: str | None = None
    score: float | None = None
    relistened: bool = False
    usage: Usage | None = None


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
    """A warning about a completed answer."""

    code: str
    message: str


class QaReply(Wire):
    """The answer to one question, with perception, reasoning and trace."""

    id: str
    object: Literal["audio.qa"] = "audio.qa"
    created: int
    model: str
    answer: Answer
    perception: Perception | None
    reasoning: Reasoning | None
    trace: TraceReply | None = Field(description="Null for an answer that code read from a timeline.")
    termination: Literal["complete", "truncated", "aborted", "malformed"]
    pause: PauseReply
    audio: list[AudioReply]
    recording: str | None = Field(
        default=None, description="Id of the recording, whose perception is kept for later questions of this caller."
    )
    timeline: list[TimelineWindow] = Field(default=[], description="The windows of a recording, in order.")
    usage: Usage
    timings_ms: Timings
    warnings: list[WarningReply]


class FileForm(Wire):
    """The form of an upload, beside `file`."""

    purpose: Literal["user_data", "assistants", "batch"] = Field(
        description="`user_data` or `assistants` for a clip; `batch` for JSON Lines."
    )
    expiry_anchor: Literal["created_at"] | None = Field(default=None, alias="expires_after[anchor]")
    expiry_s: int | None = Field(
        default=None, ge=1, alias="expires_after[seconds]", description="Lifetime of the file."
    )


class FileObject(Wire):
    """A stored file; the times are seconds since 1970."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: Literal["user_data", "assistants", "batch", "batch_output"]
    status: Literal["processed"] = "processed"
    status_details: None = None


class FileList(Wire):
    """A page of stored files; `last_id` is the `after` of the next page."""

    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(Wire):
    """The reply to a deletion."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class FileQuery(Wire):
    """The query parameters of a listing."""

    after: str | None = Field(default=None, max_length=64, description="List the files behind this id.")
    limit: int = Field(default=10_000, ge=1, le=10_000, description="Maximum number of files in a page.")
    order: Literal["asc", "desc"] = Field(default="desc", description="By time of creation.")
    purpose: str | None = Field(default=None, max_length=64, description="List files of this purpose alone.")


class NoQuery(Wire):
    """The query parameters of an endpoint without any."""


class QaListReply(Wire):
    """The answers to several questions about one clip, in their order; `usage` is their sum."""

    id: str
    object: Literal["audio.qa.list"] = "audio.qa.list"
    created: int
    model: str
    data: list[QaReply]
    usage: Usage


class ErrorObject(Wire):
    """The error of a failed request: `code` for programs, `message` and `hint` for people."""

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
    """The reply to a failed request."""

    error: ErrorObject


class PartialReply(Wire):
    """The partial answer at the deadline; perception and reasoning only with `reasoning=full`.

    For a recording, it is the timeline of the finished windows.
    """

    trace: TraceReply | None = None
    timeline: list[TimelineWindow] = []
    perception: Perception | None = None
    reasoning: Reasoning | None = None
    answers: list[QaReply] | None = Field(default=None, description="Complete answers, for several questions.")


class LateReply(ErrorReply):
    """The reply to a request after its deadline, with the partial answer if there is one."""

    partial: PartialReply | None = None


class Readiness(Wire):
    """Readiness of the service, with reasons if it is not ready."""

    ready: bool
    reasons: list[str]


class CheckpointInfo(Wire):
    """The served checkpoint."""

    name: str
    manifest_sha256: str
    base_model: str
    max_model_len: int = Field(description="Maximum tokens of prompt, clip, trace and pauses together.")


class ComputeInfo(Wire):
    """Computation in the engine; a value is `none` while the engine starts, and with an engine without a model."""

    dtype: str = Field(description="Type of float weights and of results between layers.")
    weights: Literal["float", "w8a8"] = Field(
        description="w8a8: weights and inputs of the decoder's products are int8."
    )
    compiled: Literal["yes", "no", "none"] = Field(description="Whether the model runs as compiled code.")


class DecodingInfo(Wire):
    """The decoder sandbox."""

    sandbox: list[str] = Field(description="Active sandbox layers, strongest first; empty without a sandbox.")
    memory_mib: int = Field(description="Memory limit of one decoding process.")


class PauseInfo(Wire):
    """Pause settings of the checkpoint."""

    mode: Literal["parallel", "sampled", "off"]
    latent_tokens: int = Field(description="Latent tokens per pause.")
    has_position_tokens: bool = Field(description="Whether each position of a pause has its own token.")
    max_pauses: int = Field(description="Maximum pauses per request.")
    tau_pause: float = Field(description="Mean confidence below which the gate pauses.")
    tau_abort: float = Field(description="Mean confidence below which the gate aborts the answer.")
    window_tokens: int = Field(description="Tokens of the confidence window.")
    sections: list[str] = Field(description="Sections with pauses.")
    is_calibrated: bool = Field(description="Whether the thresholds were measured on this checkpoint.")


class ReliabilityInfo(Wire):
    """Answers of the calibration set with a confidence in one tenth of 0 to 1."""

    confidence: float = Field(description="Their mean confidence.")
    accuracy: float = Field(description="Share of right ones.")
    count: int


class AnswerKindInfo(Wire):
    """Calibration of the confidence of questions with choices, or of open ones."""

    temperature: float = Field(description="Divisor of the log-odds of the alternatives.")
    num_answers: int = Field(description="Answers that the temperature was fitted to.")
    ece_before: float = Field(description="Expected calibration error of the model's own probabilities.")
    ece_after: float = Field(description="The same of calibrated probabilities, on answers left out of the fit.")
    curve: list[ReliabilityInfo] = Field(description="Reliability of the calibrated probabilities.")


class ConfidenceInfo(Wire):
    """Calibration of `answer.confidence`; null for a kind of question with uncalibrated confidence."""

    source: str | None = Field(description="The calibration set.")
    choices: AnswerKindInfo | None = None
    open: AnswerKindInfo | None = None


class LimitsInfo(Wire):
    """Limits of a request."""

    window_s: float = Field(description="Seconds of audio per window, the encoder's input length.")
    sync_windows: int = Field(description="Windows of a recording outside a job.")
    max_recording_s: float = Field(description="Seconds of a recording, with `long_audio` window or chunk.")
    min_audio_s: float
    max_audio_s: float
    max_audio_bytes: int
    max_body_bytes: int
    max_file_bytes: int = Field(description="Maximum bytes of one stored file.")
    max_file_lifetime_s: int
    max_question_chars: int
    max_questions: int = Field(description="Maximum number of questions about one clip in a request.")
    max_choices: int
    max_choice_chars: int
    max_tokens: int
    max_timeout_ms: int
    max_in_flight: int
    max_queue_wait_s: float


DraftMode = Literal["auto", "on", "off"]


class InfoReply(Wire):
    """Description of the running service."""

    version: str
    engine: str
    drafts: DraftMode = Field(
        default="off", description="Drafts in the engine: in small batches (auto), in any (on), or off or impossible."
    )
    checkpoint: CheckpointInfo
    compute: ComputeInfo
    formats: list[str] = Field(description="Supported audio formats.")
    decoding: DecodingInfo
    sections: list[str] = Field(description="Sections of a trace, in order.")
    environment_labels: list[str] = Field(
        description="Background labels of the checkpoint; empty for an open vocabulary."
    )
    pause: PauseInfo
    confidence: ConfidenceInfo
    long_audio: list[str] = Field(description="Supported values of `long_audio`.")
    limits: LimitsInfo
