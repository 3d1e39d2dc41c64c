"""Every fault that the project raises on purpose, in one tree.

    HyperError
    ├── AudioError               the clip cannot be used; carries figures a caller may show
    │   ├── UnsupportedAudioError    not a container that we decode
    │   ├── InvalidAudioError        empty, damaged, too short, or no audio inside
    │   ├── AudioTooLargeError       more bytes, or more decoded seconds, than a clip may have
    │   └── AudioTooLongError        longer than one window, and nothing says how to cut it
    ├── PromptError              the question or the choices cannot be used
    └── CheckpointError          the checkpoint cannot be used; a process that needs it stops

Outcomes (a truncated or malformed trace) are values, not members of this tree. Messages are written for the person who
sent the clip or started the process: they never quote a decoder, a path of ours, or bytes of the clip.

This module knows no HTTP: the status of each class stands in the server's fault table.
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
    "truncated_audio",
    "unsupported_codec",
]
"""Every reason for which a clip cannot be used: the four classes' own, then finer ones. Programs branch on them, and
metrics have them as labels, so there are no others."""


class HyperError(Exception):
    """Says why something cannot be done, in one line fit for a user's eyes.

    Every field is kept in `__dict__` and the message in `args[0]`, so that the whole tree survives pickling on
    its way back from a worker process.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __reduce__(self) -> tuple[Any, ...]:
        # Exception's own __reduce__ calls the class with `args` only and so would lose (or demand) the other fields.
        return _rebuild, (type(self), self.args, self.__dict__.copy())

    def __str__(self) -> str:
        return self.message


def _rebuild(kind: type[HyperError], args: tuple[Any, ...], fields: dict[str, Any]) -> HyperError:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(fields)
    return error


class AudioError(HyperError):
    """Says why a clip cannot be used.

    Attributes:
        code: A stable word a program may branch on.
        message: One sentence for a person.
        limit: The bound that was crossed, in the unit that the message names.
        actual: What the clip has instead, in the same unit; a string where it is not a number (a container's name).
        hint: What the sender can do about it.
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
    """Refuses bytes that are not one of the containers we decode."""

    default_code: AudioCode = "unsupported_audio"


class InvalidAudioError(AudioError):
    """Refuses a clip that is empty, damaged, too short, too slow to decode, or without an audio stream."""

    default_code: AudioCode = "invalid_audio"


class AudioTooLargeError(AudioError):
    """Refuses a clip with more bytes or more decoded seconds than the limits allow."""

    default_code: AudioCode = "audio_too_large"


class AudioTooLongError(AudioError):
    """Refuses a clip longer than one window where no policy says how to cut it."""

    default_code: AudioCode = "audio_too_long"


class PromptError(HyperError):
    """Refuses a question or choices that cannot become a prompt.

    Attributes:
        param: The name of the offending argument, such as "question" or "choices".
    """

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class CheckpointError(HyperError):
    """Refuses a checkpoint that is missing, altered, unsafe, or not one this version can serve."""
