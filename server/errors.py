"""The table of client-visible errors, and the translation of exceptions to it.

Every error is `{"error": {...}}` with a `code` from `ERRORS`. Status codes are defined only here. An error names the
invalid field and never repeats its value, because inputs may be 30 MB long, hostile or private. An unknown field is
named if its name is a short plain word. This is the lowest layer of the service and imports no other module of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from hyper_model.errors import (
    AudioError,
    AudioTooLargeError,
    AudioTooLongError,
    HyperError,
    InvalidAudioError,
    PromptError,
    UnsupportedAudioError,
)

INVALID_REQUEST = "invalid_request_error"
UNAVAILABLE = "service_unavailable_error"
RATE_LIMIT = "rate_limit_error"


@dataclass(frozen=True)
class ErrorKind:
    """Properties shared by all errors with one code."""

    status: int
    type: str
    retryable: bool = False
    retry_after_s: int | None = None
    is_costly: bool = False
    """Whether a retry would spend the engine's time again, probably with the same end."""


ERRORS: Mapping[str, ErrorKind] = {
    "invalid_request": ErrorKind(400, INVALID_REQUEST),
    "invalid_json": ErrorKind(400, INVALID_REQUEST),
    "invalid_multipart": ErrorKind(400, INVALID_REQUEST),
    "invalid_parameter": ErrorKind(400, INVALID_REQUEST),
    "unknown_parameter": ErrorKind(400, INVALID_REQUEST),
    "unsupported_parameter": ErrorKind(400, INVALID_REQUEST),
    "missing_parameter": ErrorKind(400, INVALID_REQUEST),
    "invalid_prompt": ErrorKind(400, INVALID_REQUEST),
    "invalid_audio": ErrorKind(400, INVALID_REQUEST),
    "invalid_http": ErrorKind(400, INVALID_REQUEST),
    "invalid_api_key": ErrorKind(401, "authentication_error"),
    "forbidden": ErrorKind(403, "permission_error"),
    "not_found": ErrorKind(404, INVALID_REQUEST),
    "model_not_found": ErrorKind(404, INVALID_REQUEST),
    "unknown_file": ErrorKind(404, INVALID_REQUEST),
    "file_expired": ErrorKind(404, INVALID_REQUEST),
    "jobs_disabled": ErrorKind(404, INVALID_REQUEST),
    "method_not_allowed": ErrorKind(405, INVALID_REQUEST),
    "upload_timeout": ErrorKind(408, "timeout_error", retryable=True),
    "head_timeout": ErrorKind(408, "timeout_error", retryable=True),
    "idempotency_in_progress": ErrorKind(409, INVALID_REQUEST, retryable=True, retry_after_s=1),
    "body_too_large": ErrorKind(413, INVALID_REQUEST),
    "audio_too_large": ErrorKind(413, INVALID_REQUEST),
    "unsupported_media_type": ErrorKind(415, INVALID_REQUEST),
    "unsupported_audio": ErrorKind(415, INVALID_REQUEST),
    "audio_too_long": ErrorKind(422, INVALID_REQUEST),
    "idempotency_mismatch": ErrorKind(422, INVALID_REQUEST),
    "poisoned_clip": ErrorKind(422, INVALID_REQUEST, is_costly=True),
    "rate_limit_exceeded": ErrorKind(429, RATE_LIMIT, retryable=True, retry_after_s=1),
    "too_many_in_flight": ErrorKind(429, RATE_LIMIT, retryable=True, retry_after_s=1),
    "audio_quota_exceeded": ErrorKind(429, RATE_LIMIT, retryable=True, retry_after_s=60),
    "file_quota_exceeded": ErrorKind(429, RATE_LIMIT, retry_after_s=3600),
    "too_many_jobs": ErrorKind(429, RATE_LIMIT, retryable=True, retry_after_s=60),
    "headers_too_large": ErrorKind(431, INVALID_REQUEST),
    "client_closed_request": ErrorKind(499, INVALID_REQUEST),
    "internal_error": ErrorKind(500, "server_error", retryable=True),
    "overloaded": ErrorKind(503, UNAVAILABLE, retryable=True, retry_after_s=1),
    "starting": ErrorKind(503, UNAVAILABLE, retryable=True, retry_after_s=5),
    "shutting_down": ErrorKind(503, UNAVAILABLE, retryable=True, retry_after_s=5),
    "engine_unavailable": ErrorKind(503, UNAVAILABLE, retryable=True, retry_after_s=10),
    "decoder_unavailable": ErrorKind(503, UNAVAILABLE, retryable=True, retry_after_s=5),
    "storage_full": ErrorKind(503, UNAVAILABLE, retryable=True, retry_after_s=10),
    "storage_unavailable": ErrorKind(503, UNAVAILABLE, retryable=True, retry_after_s=10),
    "deadline_exceeded": ErrorKind(504, "timeout_error", retryable=True, is_costly=True),
}
"""Every code in replies. An `AudioError` keeps its own finer code, with the status of its class."""

AUDIO_ERRORS: Mapping[type[AudioError], str] = {
    UnsupportedAudioError: "unsupported_audio",
    InvalidAudioError: "invalid_audio",
    AudioTooLargeError: "audio_too_large",
    AudioTooLongError: "audio_too_long",
}

HTTP_ERRORS: Mapping[int, tuple[str, str]] = {
    404: ("not_found", "This address does not exist; /docs lists all endpoints."),
    405: ("method_not_allowed", "This endpoint does not accept the method; /docs lists the methods."),
}

MAX_NAME_CHARS = 80

MAX_EXACT = 2**53
"""Largest number reported in errors: above it JSON readers disagree, and clients may send hundreds of digits."""


class EngineUnavailableError(HyperError):
    """Error if the engine is not running, or dies during the request."""


class PoisonedClipError(HyperError):
    """Error for a clip banned after two engine failures, the second with no other request in flight."""


class DecoderUnavailableError(HyperError):
    """Error if the decoder process is gone and cannot be restarted."""


class RequestError(HyperError):
    """Error reply to a request, with a code of the table.

    Attributes:
        code: A key of `ERRORS`, or a finer code if `kind` names its row.
        param: The invalid request field.
        partial: The output so far, for a 504.
        retry_after_s: Seconds until a retry; defaults to the table's value.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        kind: str | None = None,
        param: str | None = None,
        limit: float | None = None,
        actual: float | str | None = None,
        hint: str | None = None,
        partial: dict[str, Any] | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.kind = ERRORS[kind or code]
        self.param = param
        self.limit = limit
        is_number = isinstance(actual, (int, float))
        self.actual = None if is_number and abs(actual) > MAX_EXACT else actual
        self.hint = hint
        self.partial = partial
        self.retry_after_s = retry_after_s or self.kind.retry_after_s

    @property
    def status(self) -> int:
        """Return the HTTP status of this error."""
        return self.kind.status

    def body(self, request_id: str) -> dict[str, Any]:
        """Return the error object, the same in a reply and in a stream's `error` event."""
        error = {
            "type": self.kind.type,
            "code": self.code,
            "message": self.message,
            "param": self.param,
            "request_id": request_id,
            "retryable": self.kind.retryable,
            "limit": self.limit,
            "actual": self.actual,
            "hint": self.hint,
        }
        return {"error": error} if self.partial is None else {"error": error, "partial": self.partial}


def to_request_error(error: BaseException) -> RequestError:
    """Translate any exception to a client-visible error; unknown ones become `internal_error`."""
    match error:
        case RequestError():
            return error
        case AudioError():
            kind = next((name for type_, name in AUDIO_ERRORS.items() if isinstance(error, type_)), "invalid_audio")
            limit, actual, hint = error.limit, error.actual, error.hint
            return RequestError(
                error.code, error.message, kind=kind, param="file", limit=limit, actual=actual, hint=hint
            )
        case PromptError():
            hint = "Repeat the form field `choices` once per option, or send a list in JSON."
            is_single = error.param == "choices" and error.message.startswith("1 ")
            return RequestError("invalid_prompt", error.message, param=error.param, hint=hint if is_single else None)
        case EngineUnavailableError():
            return RequestError("engine_unavailable", error.message, hint="Retry after the Retry-After time.")
        case PoisonedClipError():
            return RequestError("poisoned_clip", error.message, param="file", hint="Send another clip.")
        case DecoderUnavailableError():
            return RequestError("decoder_unavailable", error.message, hint="Retry after the Retry-After time.")
        case ClientDisconnect():
            return RequestError("client_closed_request", "The client closed the connection.")
        case HTTPException() if error.status_code in HTTP_ERRORS:
            return RequestError(*HTTP_ERRORS[error.status_code])
        case HTTPException() if error.status_code < 500:
            return RequestError("invalid_request", "The request cannot be parsed.")
        case ValidationError() | RequestValidationError():
            return validation_error(error)
        case _:
            return RequestError(
                "internal_error",
                "The service failed on this request.",
                hint="Retry; if it fails again, report the request id to the operator, who finds it in the log.",
            )


def validation_error(error: ValidationError | RequestValidationError) -> RequestError:
    """Return the error for the first invalid field, with pydantic's reason and without the value."""
    if isinstance(error, ValidationError):
        details = error.errors(include_url=False, include_context=False, include_input=False)
    else:
        # FastAPI puts the kind of parameter in front: query, path.
        details = [{**each, "loc": each["loc"][1:]} for each in error.errors()]
    first = details[0]
    param = param_of(first["loc"])
    match first["type"]:
        case "missing":
            return RequestError("missing_parameter", f"`{param}` is required.", param=param)
        case "extra_forbidden":
            return unknown_field([str(part) for part in first["loc"]], ())
        case _ if param is None:
            # No field can have this name.
            return RequestError("invalid_parameter", "The request has an invalid field name; /docs lists all fields.")
        case "model_type" | "dict_type" | "model_attributes_type":
            return RequestError("invalid_parameter", f"`{param}` must be a JSON object.", param=param)
        case "string_unicode":
            return RequestError("invalid_parameter", f"`{param}` is not valid Unicode text.", param=param)
        case _:
            # A union has one reason per member, and the field accepts any of them.
            reasons = [detail["msg"] for detail in details if param_of(detail["loc"]) == param]
            others = [f", or {reason.removeprefix('Input should be ')}" for reason in reasons[1:]]
            return RequestError("invalid_parameter", f"`{param}`: {reasons[0]}{''.join(others)}.", param=param)


PLAIN_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.\[\]-]{0,39}")
"""Names of unknown fields that an error repeats."""

NESTED_NAMES = frozenset({"expires_after[anchor]", "expires_after[seconds]"})
"""Form fields that are parts of an object."""

SYNONYMS: Mapping[str, str] = {
    **dict.fromkeys(("prompt", "query", "text", "message", "input"), "question"),
    **dict.fromkeys(("options", "answers", "candidates", "labels"), "choices"),
    **dict.fromkeys(("audio", "clip", "upload", "audio_file", "files", "media", "document", "attachment"), "file"),
    **dict.fromkeys(("input_audio", "audio_data", "recording", "sound", "wav"), "file"),
    **dict.fromkeys(("max_new_tokens", "max_completion_tokens", "max_length"), "max_tokens"),
    **dict.fromkeys(("timeout", "timeout_s", "deadline"), "timeout_ms"),
    **dict.fromkeys(("audio_track", "stream_index", "track_index"), "track"),
    **dict.fromkeys(("audio_file_id", "fileid", "clip_id", "upload_id"), "file_id"),
    **dict.fromkeys(("base64", "content", "bytes", "blob"), "data"),
}
"""Other programs' names for our fields."""


def unknown_field(location: Sequence[str], known: Sequence[str]) -> RequestError:
    """Return the error for a field that no request has: its name, and the nearest known one.

    Args:
        location: The name, and before it those of the objects that contain it.
        known: The names that would be right.
    """
    name, nearest = location[-1], ""
    listed = f"The fields are {', '.join(known)}." if known else "/docs lists all fields."
    if not PLAIN_NAME.fullmatch(name):
        message = f"The request has a field with an invalid name of {len(name)} characters."
        return RequestError("unknown_parameter", message, hint=listed)
    bare = name.lower().replace("-", "_").split("[")[0].split(".")[-1]
    by_name = {each.rpartition(".")[2]: each for each in known}
    synonym = SYNONYMS.get(bare, bare)
    if synonym == "file" and "file" not in by_name:
        # In JSON, the clip is an object.
        synonym = "audio"
    if bare in by_name:
        nearest = by_name[bare]
    elif synonym in by_name:
        nearest = by_name[synonym]
    elif similar := get_close_matches(bare, list(by_name), n=1):
        nearest = by_name[similar[0]]
    path = ".".join([*location[:-1], name])
    hint = f"Did you mean `{nearest}`?" if nearest else listed
    path = path if len(path) <= MAX_NAME_CHARS else name
    return RequestError("unknown_parameter", f"`{path}` is an unknown field.", param=path, hint=hint)


def param_of(location: Sequence[int | str]) -> str | None:
    """Return the field's dotted name, or None; the names of union members are left out."""
    # Forms spell lists as `names[]`.
    names = (part for part in location if isinstance(part, str))
    found = (name for name in names if name.removesuffix("[]").isidentifier() or name in NESTED_NAMES)
    return ".".join(found) or None
