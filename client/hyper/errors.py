"""Exceptions of the client.

    Error
    ├── ConnectionFailedError        no reply: the service, the network or a proxy is not reachable
    │   └── ReplyTimeoutError        the service sent nothing for `timeout_s`
    ├── UnexpectedReplyError         the reply is not one of a HyPeR service
    ├── WaitTimeoutError             a job did not end in time
    ├── WebhookVerificationError     a delivery is not signed with the secret, or is too old
    └── ServiceError                 the service refused or ended the request
        ├── InvalidRequestError          type invalid_request_error
        │   └── AudioError                   the clip cannot be used
        ├── AuthenticationError          type authentication_error
        ├── PermissionDeniedError        type permission_error
        ├── RateLimitError               type rate_limit_error
        ├── ServiceTimeoutError          type timeout_error
        ├── ServerError                  type server_error
        └── ServiceUnavailableError      type service_unavailable_error

Each error code has its own class below one of these families. Its name is the code in capitals with the suffix
`Error`: `deadline_exceeded` raises `DeadlineExceededError`. Finer codes of a clip (`empty_audio`) raise the class of
their HTTP status, and newer codes raise their family; `error.code` has the code in any case.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from server.api.types import ErrorObject

__all__ = [
    "AudioError",
    "AudioQuotaExceededError",
    "AudioTooLargeError",
    "AudioTooLongError",
    "AuthenticationError",
    "BodyTooLargeError",
    "ClientClosedRequestError",
    "ConnectionFailedError",
    "DeadlineExceededError",
    "DecoderUnavailableError",
    "EngineUnavailableError",
    "Error",
    "FileExpiredError",
    "FileQuotaExceededError",
    "ForbiddenError",
    "HeadTimeoutError",
    "HeadersTooLargeError",
    "IdempotencyInProgressError",
    "IdempotencyMismatchError",
    "InternalError",
    "InvalidApiKeyError",
    "InvalidAudioError",
    "InvalidHttpError",
    "InvalidJsonError",
    "InvalidMultipartError",
    "InvalidParameterError",
    "InvalidPromptError",
    "InvalidRequestError",
    "JobsDisabledError",
    "MethodNotAllowedError",
    "MissingParameterError",
    "ModelNotFoundError",
    "NotFoundError",
    "OverloadedError",
    "PermissionDeniedError",
    "PoisonedClipError",
    "RateLimitError",
    "RateLimitExceededError",
    "ReplyTimeoutError",
    "ServerError",
    "ServiceError",
    "ServiceTimeoutError",
    "ServiceUnavailableError",
    "ShuttingDownError",
    "StartingError",
    "StorageFullError",
    "StorageUnavailableError",
    "TooManyInFlightError",
    "TooManyJobsError",
    "UnexpectedReplyError",
    "UnknownFileError",
    "UnknownParameterError",
    "UnsupportedAudioError",
    "UnsupportedMediaTypeError",
    "UnsupportedParameterError",
    "UploadTimeoutError",
    "WaitTimeoutError",
    "WebhookVerificationError",
]


class Error(Exception):
    """Base of all exceptions of this package."""


class ConnectionFailedError(Error):
    """There is no reply: the service, the network or a proxy is not reachable."""


class ReplyTimeoutError(ConnectionFailedError):
    """The service sent nothing for the client's `timeout_s`."""


class UnexpectedReplyError(Error):
    """The reply is not one of a HyPeR service, or a stream ended before its last event."""


class WaitTimeoutError(Error, TimeoutError):
    """A job did not end within the `timeout_s` of `wait`. The job continues."""


class WebhookVerificationError(Error):
    """A delivery is not signed with the secret, or its time is outside the tolerance."""


class ServiceError(Error):
    """The service refused or ended the request.

    Attributes:
        type: Family of the error.
        code: Code of the error.
        message: Cause, received value and limit for a person.
        param: The field at fault.
        request_id: Identifies the request in the service's log.
        retryable: True if the same request may succeed later.
        limit: The limit that was exceeded.
        actual: The received value.
        hint: Remedy.
        status: HTTP status; None for an error event of a stream.
        retry_after_s: Seconds of the Retry-After header.
        partial: The trace up to a deadline, as JSON.
    """

    def __init__(
        self,
        error: ErrorObject,
        *,
        status: int | None = None,
        retry_after_s: float | None = None,
        partial: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(error.message if error.hint is None else f"{error.message} {error.hint}")
        self.error = error
        self.type = error.type
        self.code = error.code
        self.message = error.message
        self.param = error.param
        self.request_id = error.request_id
        self.retryable = error.retryable
        self.limit = error.limit
        self.actual = error.actual
        self.hint = error.hint
        self.status = status
        self.retry_after_s = retry_after_s
        self.partial = partial


class InvalidRequestError(ServiceError):
    """The request cannot be answered as it is."""


class InvalidJsonError(InvalidRequestError):
    """The body is not JSON."""


class InvalidMultipartError(InvalidRequestError):
    """The multipart body cannot be read."""


class InvalidParameterError(InvalidRequestError):
    """A field has a value outside its limits."""


class UnknownParameterError(InvalidRequestError):
    """The service has no field of this name."""


class UnsupportedParameterError(InvalidRequestError):
    """A field of OpenAI's API has a value without support here."""


class MissingParameterError(InvalidRequestError):
    """A required field is absent."""


class InvalidPromptError(InvalidRequestError):
    """The question or the choices cannot be used."""


class InvalidHttpError(InvalidRequestError):
    """The request is not valid HTTP."""


class NotFoundError(InvalidRequestError):
    """The address does not exist."""


class ModelNotFoundError(InvalidRequestError):
    """The service does not serve a model of this name."""


class UnknownFileError(InvalidRequestError):
    """The caller has no stored file of this id."""


class FileExpiredError(InvalidRequestError):
    """The stored file has expired."""


class JobsDisabledError(InvalidRequestError):
    """The service takes no jobs."""


class IdempotencyInProgressError(InvalidRequestError):
    """An equal request with this Idempotency-Key is in progress."""


class IdempotencyMismatchError(InvalidRequestError):
    """The Idempotency-Key belongs to another request."""


class MethodNotAllowedError(InvalidRequestError):
    """The address does not take this method."""


class BodyTooLargeError(InvalidRequestError):
    """The request has more bytes than the service takes."""


class UnsupportedMediaTypeError(InvalidRequestError):
    """The request has another content type than the service takes."""


class PoisonedClipError(InvalidRequestError):
    """The engine failed twice on this clip, so the service refuses it."""


class HeadersTooLargeError(InvalidRequestError):
    """The request has too many or too long headers."""


class ClientClosedRequestError(InvalidRequestError):
    """The connection of the request was closed."""


class AudioError(InvalidRequestError):
    """The clip cannot be used."""


class InvalidAudioError(AudioError):
    """The clip is empty, damaged, too short, or has no audio inside."""


class UnsupportedAudioError(AudioError):
    """The file is not audio in a format of the service."""


class AudioTooLargeError(AudioError):
    """The clip has more bytes or decoded seconds than the service takes."""


class AudioTooLongError(AudioError):
    """The clip is longer than one window, and `long_audio` is `error`."""


class AuthenticationError(ServiceError):
    """The caller is not identified."""


class InvalidApiKeyError(AuthenticationError):
    """The API key is absent, unknown or expired."""


class PermissionDeniedError(ServiceError):
    """The caller may not do this."""


class ForbiddenError(PermissionDeniedError):
    """The API key lacks the scope, or the host name is not allowed."""


class RateLimitError(ServiceError):
    """The caller exceeded its own quota."""


class RateLimitExceededError(RateLimitError):
    """The caller sent too many requests per minute."""


class TooManyInFlightError(RateLimitError):
    """The caller has too many requests in flight."""


class AudioQuotaExceededError(RateLimitError):
    """The caller sent too much audio per day."""


class FileQuotaExceededError(RateLimitError):
    """The caller has too many stored files or bytes."""


class TooManyJobsError(RateLimitError):
    """The key has too many unfinished jobs."""


class ServiceTimeoutError(ServiceError):
    """The service waited too long for the request or for the answer."""


class UploadTimeoutError(ServiceTimeoutError):
    """The upload was too slow."""


class HeadTimeoutError(ServiceTimeoutError):
    """The head of the request was too slow."""


class DeadlineExceededError(ServiceTimeoutError):
    """The deadline passed; `partial` has the trace up to then."""


class ServerError(ServiceError):
    """The service failed."""


class InternalError(ServerError):
    """The service failed on this request."""


class ServiceUnavailableError(ServiceError):
    """The service cannot answer now."""


class OverloadedError(ServiceUnavailableError):
    """The queue is full."""


class StartingError(ServiceUnavailableError):
    """The engine is not ready yet."""


class ShuttingDownError(ServiceUnavailableError):
    """The service is shutting down."""


class EngineUnavailableError(ServiceUnavailableError):
    """The engine is not running."""


class DecoderUnavailableError(ServiceUnavailableError):
    """The audio decoder is not running."""


class StorageFullError(ServiceUnavailableError):
    """The service has no room for the clip."""


class StorageUnavailableError(ServiceUnavailableError):
    """The service cannot store or read files now."""


FAMILIES: Mapping[str, type[ServiceError]] = {
    "invalid_request_error": InvalidRequestError,
    "authentication_error": AuthenticationError,
    "permission_error": PermissionDeniedError,
    "rate_limit_error": RateLimitError,
    "timeout_error": ServiceTimeoutError,
    "server_error": ServerError,
    "service_unavailable_error": ServiceUnavailableError,
}
AUDIO_BY_STATUS: Mapping[int, type[AudioError]] = {
    400: InvalidAudioError,
    413: AudioTooLargeError,
    415: UnsupportedAudioError,
    422: AudioTooLongError,
}


def _code_of(kind: type[ServiceError]) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", kind.__name__).lower()


def _below(kind: type[ServiceError]) -> list[type[ServiceError]]:
    return [kind, *(each for child in kind.__subclasses__() for each in _below(child))]


_BY_CODE = {_code_of(kind): kind for kind in _below(ServiceError)}


def class_of(error: ErrorObject, status: int | None) -> type[ServiceError]:
    """Return the exception class of an error object."""
    code = error.code
    found = _BY_CODE.get(code) or _BY_CODE.get(f"{code}_error")
    if found is not None:
        return found
    if error.param == "file" and status is not None and status in AUDIO_BY_STATUS:
        return AUDIO_BY_STATUS[status]
    return FAMILIES.get(error.type, ServiceError)
