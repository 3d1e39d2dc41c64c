"""The manifest hyper.json: a checkpoint's description of itself.

It holds every model-dependent fact: trace grammar, calibrated gate settings, audio format, origin of the weights, and
the sha256 of every other file. The module is independent of weights, engines and HTTP.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal, Self, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from hyper_model.errors import CheckpointError
from hyper_model.trace import PAUSE, PAUSE_CLOSE, TRACE_SCHEMA_VERSION, Section, TagStyle

FORMAT_VERSION = 1
MANIFEST_FILE = "hyper.json"
TOKENS_PER_S = 25.0  # 100 mel frames per second, halved by the second convolution and again by the pooling
# Perception and reasoning may pause; the answer and the gaps between sections never do.
GATED_SECTIONS = (
    Section.ENV,
    Section.SPEAKER,
    Section.ASR,
    Section.DESCRIPTION,
    Section.REASONING,
    Section.SUMMARY,
    Section.REFLECT,
)
_LISTABLE_SUFFIXES = (".json", ".safetensors", ".jinja", ".txt", ".md")


def _is_none(value: object) -> bool:
    return value is None


def _is_zero(value: object) -> bool:
    return value == 0


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Tag(_Frozen):
    """The two tags of a section, with their token ids if each tag is one token."""

    open: str = Field(min_length=1)
    close: str = Field(min_length=1)
    open_id: int | None = None
    close_id: int | None = None


class TraceFields(_Frozen):
    """Trace grammar and scoring of choices.

    Attributes:
        tags: Tags by section name. With tag_style "token": all sections, with ids; with "text": only the model's own
            sections.
        answer_style: "letter" if the answer to choices starts with "A", "B", ...; "text" if it is the choice's words.
    """

    schema_version: int = TRACE_SCHEMA_VERSION
    tag_style: TagStyle = TagStyle.TOKEN
    tags: dict[Section, Tag]
    answer_style: Literal["letter", "text"] = "letter"


class CalibrationPoint(_Frozen):
    """Effect of one threshold on the calibration set.

    Attributes:
        tau: Threshold for a window's confidence; the gate acts at or below it.
        pauses: Pauses per completion with `tau` as tau_pause.
        abort_rate: Share of aborted completions with `tau` as tau_abort.
        wrong: Share of wrong answers among these, without a pause; None without a known answer.
    """

    tau: float
    pauses: float
    abort_rate: float
    wrong: float | None = Field(default=None, exclude_if=_is_none)


class Calibration(_Frozen):
    """Origin of a gate's thresholds (`hyper checkpoint calibrate`).

    Attributes:
        source: Description of the calibration set.
        num_completions: Size of the calibration set.
        wanted_pauses: Target range of pauses per completion, as minimum and maximum.
        wanted_abort_rate: Largest accepted share of aborted completions.
        wanted_wrong: Least share of wrong answers, without a pause, among the completions that tau_abort aborts; None
            for thresholds from a rate alone.
        pauses, abort_rate: Values measured in the real engine with the manifest's thresholds.
        curve: Effect of other thresholds, computed from completions without a pause.
    """

    source: str
    num_completions: int = Field(gt=0)
    wanted_pauses: tuple[float, float]
    wanted_abort_rate: float
    wanted_wrong: float | None = Field(default=None, exclude_if=_is_none)
    pauses: float
    abort_rate: float
    curve: tuple[CalibrationPoint, ...]


class ReliabilityBin(_Frozen):
    """Answers of the calibration set whose confidence is in one tenth of 0 to 1.

    Attributes:
        confidence: Their mean confidence.
        accuracy: Share of right ones.
        count: Their number.
    """

    confidence: float = Field(ge=0, le=1)
    accuracy: float = Field(ge=0, le=1)
    count: int = Field(gt=0)


class AnswerKind(_Frozen):
    """Calibrated confidence of the questions with choices, or of the open ones.

    Attributes:
        temperature: Divisor of the log-odds of the alternatives; 1 keeps the model's own probability.
        num_answers: Number of answers that the temperature was fitted to.
        ece_before, ece_after: Expected calibration error at temperature 1, and with the temperatures of other folds.
        curve_before, curve: Reliability of the same confidences, in ascending order; empty tenths are left out.
    """

    temperature: float = Field(gt=0)
    num_answers: int = Field(gt=0)
    ece_before: float = Field(ge=0, le=1)
    ece_after: float = Field(ge=0, le=1)
    curve_before: tuple[ReliabilityBin, ...]
    curve: tuple[ReliabilityBin, ...]


class ConfidenceFields(_Frozen):
    """Calibration of the probability that an answer is right (`hyper checkpoint calibrate`).

    Attributes:
        source: Description of the calibration set.
        choices, open: Calibration of questions with and without choices; None if the set has too few of them.
    """

    source: str
    choices: AnswerKind | None = None
    open: AnswerKind | None = None

    def temperature(self, *, has_choices: bool) -> float | None:
        """Return the temperature of a question, or None if its kind is not calibrated."""
        kind = self.choices if has_choices else self.open
        return None if kind is None else kind.temperature


class PauseFields(_Frozen):
    """Calibrated settings of the gate; max_pauses 0 turns pauses off.

    Attributes:
        latent_tokens: Length of a parallel span, or the most hidden tokens between the tags of a sampled span.
        position_ids: Token ids of a parallel span with one embedding per position; the first is `open_id`. None, and
            not written to hyper.json, if the span repeats `open_id`.
        loop_tokens: A completion is in a loop when its last `loop_tokens` tokens repeat one phrase.
        max_closed_loops: Loops per completion that only end their section, at its closing tag; a further loop aborts
            the completion. Not written to hyper.json if it is 0.
        calibration: Origin of the thresholds; None for default thresholds.
    """

    mode: Literal["parallel", "sampled"] = "parallel"
    open: str = PAUSE
    close: str = PAUSE_CLOSE
    open_id: int
    close_id: int
    latent_tokens: int = Field(default=64, ge=1, le=1024)
    # Omitted if None, so that earlier releases can read every manifest they are able to serve.
    position_ids: tuple[int, ...] | None = Field(default=None, exclude_if=_is_none)
    max_pauses: int = Field(default=3, ge=0, le=16)
    tau_pause: float = Field(default=0.5, ge=0, le=1)
    tau_abort: float = Field(default=0.05, ge=0, le=1)
    window_tokens: int = Field(default=16, ge=1)
    rest_tokens: int = Field(default=16, ge=0)
    sections: tuple[Section, ...] = GATED_SECTIONS
    acoustic_bias: float = Field(default=0.0, ge=0)
    loop_tokens: int = Field(default=64, ge=16)
    max_closed_loops: int = Field(default=0, ge=0, le=16, exclude_if=_is_zero)
    calibration: Calibration | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.tau_abort > self.tau_pause:
            raise ValueError("tau_abort is above tau_pause")
        if Section.FINAL_ANSWER in self.sections:
            raise ValueError("FINAL_ANSWER never pauses")
        if self.position_ids is not None:
            self._check_positions(self.position_ids)
        return self

    def _check_positions(self, ids: tuple[int, ...]) -> None:
        if self.mode != "parallel":
            raise ValueError("position_ids are of parallel pauses alone")
        if len(ids) != self.latent_tokens:
            raise ValueError(f"position_ids are {len(ids)}, but latent_tokens is {self.latent_tokens}")
        if len(set(ids)) < len(ids):
            raise ValueError("position_ids has an id twice")
        if ids[0] != self.open_id or self.close_id in ids:
            raise ValueError("position_ids begin with open_id, and close_id is none of them")


class AudioFields(_Frozen):
    """Audio format required by the model.

    Attributes:
        single_pass_s: Longest clip that the model transcribes well at once; the words of a longer one are recognised in
            pieces. None, and not written to hyper.json, for a model that transcribes a whole window.
    """

    sample_rate_hz: Literal[16_000] = 16_000
    window_s: float = Field(default=30.0, gt=0, le=30)
    min_duration_s: float = Field(default=0.1, ge=0)
    tokens_per_s: float = Field(default=TOKENS_PER_S, gt=0)
    single_pass_s: float | None = Field(default=None, ge=2, le=30, exclude_if=_is_none)


class Manifest(_Frozen):
    """Complete description of a checkpoint, stored as hyper.json.

    Attributes:
        base_model, recipe, data_card: Origin of the weights, in words.
        environment_labels: Sound labels known to the model; empty for an open vocabulary.
        max_model_len: Maximum length of prompt and completion together, in tokens, audio tokens included.
        quantization: Form of the decoder's weights (`hyper_model.int8`); None, and not written to hyper.json, if they
            are floats.
        confidence: Calibration of the answers' confidence; None, and not written to hyper.json, without one.
        files: The sha256 of every other file.
    """

    format_version: Literal[1] = FORMAT_VERSION
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    trace: TraceFields
    pause: PauseFields
    audio: AudioFields = AudioFields()
    base_model: str = ""
    recipe: str = ""
    data_card: str = ""
    environment_labels: tuple[str, ...] = ()
    max_model_len: int = Field(gt=0)
    quantization: Literal["w8a8"] | None = Field(default=None, exclude_if=_is_none)
    confidence: ConfidenceFields | None = Field(default=None, exclude_if=_is_none)
    files: dict[str, str]

    @field_validator("files")
    @classmethod
    def _check_files(cls, files: dict[str, str]) -> dict[str, str]:
        for name, digest in files.items():
            if name != Path(name).name or name.startswith(".") or "\\" in name or name == MANIFEST_FILE:
                raise ValueError(f"{name!r} is not a plain file name")
            if not name.endswith(_LISTABLE_SUFFIXES):
                raise ValueError(
                    f"{name} is of a kind that a checkpoint may not hold (pickles and code can run programs)"
                )
            if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
                raise ValueError(f"the sum of {name} is not a sha256")
        return files


def name_of(directory: Path) -> str:
    """Return the checkpoint name derived from a directory."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", directory.resolve().name).strip("-._")[:100] or "checkpoint"


def read_manifest(raw: bytes) -> Manifest:
    """Parse the bytes of a hyper.json.

    Raises:
        CheckpointError: If it has another version or is invalid. The message names the first invalid field.
    """
    document = parse_json(raw, MANIFEST_FILE)
    # Before pydantic: a newer manifest has unknown fields, and the error must name the version instead.
    if document.get("format_version") != FORMAT_VERSION:
        found = document.get("format_version", "none")
        raise CheckpointError(f"{MANIFEST_FILE} has format_version {found}; this release reads {FORMAT_VERSION}")
    manifest = make_manifest(document)
    if manifest.trace.schema_version != TRACE_SCHEMA_VERSION:
        found = manifest.trace.schema_version
        raise CheckpointError(f"its traces have schema version {found}; this release reads {TRACE_SCHEMA_VERSION}")
    return manifest


def make_manifest(fields: dict[str, Any]) -> Manifest:
    """Build a manifest from plain fields, and report a fault in one line.

    Raises:
        CheckpointError: If a field is invalid.
    """
    try:
        # JSON mode accepts enums and tuples as strings and lists.
        return Manifest.model_validate_json(json.dumps(fields))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(step) for step in first["loc"])
        raise CheckpointError(f"{MANIFEST_FILE} is not valid at {where}: {first['msg']}") from error


def parse_json(raw: bytes, name: str) -> dict[str, Any]:
    """Parse a file with one JSON object.

    Raises:
        CheckpointError: If it is not JSON, or not an object.
    """
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name} is not JSON") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{name} is not a JSON object")
    return cast("dict[str, Any]", document)
