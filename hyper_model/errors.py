"""All errors raised on purpose by the project, in one tree.

    HyperError
    ├── AudioError               the clip cannot be used; carries figures for the sender
    │   ├── UnsupportedAudioError    not a supported container
    │   ├── InvalidAudioError        empty, damaged, too short, or no audio stream
    │   ├── AudioTooLargeError       more bytes, or more decoded seconds, than allowed
    │   └── AudioTooLongError        longer than one window, without a policy to cut it
    ├── PromptError              the question or the choices cannot be used
    └── CheckpointError          the checkpoint cannot be used; the process exits

Outcomes (a truncated or malformed trace) are values, not errors. Messages address the sender of the clip or the
operator. They never quote a decoder, an internal path, or bytes of the clip.

The module is independent of HTTP: the server's error table maps classes to status codes.
"""

from __future__ import annotations

from typing import Any, Literal

AudioCode = Literal[
    "unsupported_audio",
    "invalid_audio",
    "audio_too_large",
    "audio_too_long",
    "audio_duration_too_large",
    "audio_too_short",
    "bad_channel_count",
    "bad_sample_rate",
    "damaged_audio",
    "decode_timeout",
    "empty_audio",
    "no_audio_stream",
    "no_such_track",
    "truncated_audio",
    "unsupported_codec",
]
"""All reasons to refuse a clip: one per error class, then finer ones.

Programs branch on them and metrics use them as labels, so the list is closed.
"""


class HyperError(Exception):
    """Base error of the project, with a message of one line for users.

    All fields are in `__dict__` and the message is in `args[0]`, so errors survive pickling on the way back from a
    worker process.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __reduce__(self) -> tuple[Any, ...]:
        # Exception's own __reduce__ passes only `args` to the class, and so would lose (or require) the other fields.
        return _rebuild, (type(self), self.args, self.__dict__.copy())

    def __str__(self) -> str:
        return self.message


def _rebuild(kind: type[HyperError], args: tuple[Any, ...], fields: dict[str, Any]) -> HyperError:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(fields)
    return error


class AudioError(HyperError):
    """Error for an unusable clip.

    Attributes:
        code: Stable identifier for programs.
        message: One sentence for a person.
        limit: The exceeded bound, in the unit of the message.
        actual: The clip's own value in the same unit; a string for non-numeric values (a container's name).
        hint: A remedy for the sender.
    """

    default_code: AudioCode = "invalid_audio"

    def __init__(
        self,
        message: str,
        *,
        code: AudioCode | None = None,
        limit: float | None = None,
        actual: float | str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message)
        self.code: AudioCode = code or self.default_code
        self.limit = limit
        self.actual = actual
        self.hint = hint


class UnsupportedAudioError(AudioError):
    """Error for bytes outside the supported containers."""

    default_code: AudioCode = "unsupported_audio"


class InvalidAudioError(AudioError):
    """Error for a clip that is empty, damaged, too short, too slow to decode, or without an audio stream."""

    default_code: AudioCode = "invalid_audio"


class AudioTooLargeError(AudioError):
    """Error for a clip above the limit of bytes or decoded seconds."""

    default_code: AudioCode = "audio_too_large"


class AudioTooLongError(AudioError):
    """Error for a clip longer than one window, without a policy to cut it."""

    default_code: AudioCode = "audio_too_long"


class PromptError(HyperError):
    """Error for an unusable question or unusable choices.

    Attributes:
        param: The name of the invalid argument, such as "question" or "choices".
    """

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class CheckpointError(HyperError):
    """Error for a checkpoint that is missing, altered, unsafe, or not supported by this version."""
