"""Limits of one clip's cost, and the errors above them.

Both ways of decoding (libsndfile and FFmpeg's libraries) share them, so their error messages are the same.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray

from hyper_model.errors import AudioTooLargeError, InvalidAudioError

SAMPLE_RATE_HZ = 16_000

# Real recorders stay inside these; a header with 1 Hz or 655,350 Hz could occupy the resampler for hours.
MIN_SOURCE_RATE_HZ = 2_000
MAX_SOURCE_RATE_HZ = 384_000
MAX_SOURCE_CHANNELS = 32
# Slightly more than ten minutes of 48 kHz stereo. A megabyte of constant FLAC frames holds a hundred times as much.
MAX_SOURCE_SAMPLES = 2**26
# Delay and padding of lossy codecs: up to 0.1 s beyond the recording.
MAX_CODEC_PADDING_S = 0.1
# Error of a sum of many blocks' durations; a sample at the highest rate is longer.
_ROUNDING_S = 1e-6


@dataclass(frozen=True, kw_only=True)
class AudioLimits:
    """Limits of one clip's cost.

    Attributes:
        max_bytes: Maximum size of the uploaded file.
        min_duration_s: Minimum length; a shorter clip gives no encoder frame.
        max_duration_s: Maximum length, counted in decoded samples.
        decode_timeout_s: Maximum wall-clock time for decoding.
        max_source_samples: Maximum samples before resampling, all channels together.
    """

    max_bytes: int = 25 * 2**20
    min_duration_s: float = 0.1
    max_duration_s: float = 600.0
    decode_timeout_s: float = 10.0
    max_source_samples: int = MAX_SOURCE_SAMPLES


def _require_sane_source(rate_hz: int, channels: int) -> None:
    if not MIN_SOURCE_RATE_HZ <= rate_hz <= MAX_SOURCE_RATE_HZ:
        above = rate_hz > MAX_SOURCE_RATE_HZ
        raise InvalidAudioError(
            f"The clip's sample rate is {rate_hz} Hz; the range is {MIN_SOURCE_RATE_HZ} to {MAX_SOURCE_RATE_HZ} Hz.",
            code="bad_sample_rate",
            limit=MAX_SOURCE_RATE_HZ if above else MIN_SOURCE_RATE_HZ,
            actual=rate_hz,
        )
    if not 1 <= channels <= MAX_SOURCE_CHANNELS:
        raise InvalidAudioError(
            f"The clip has {channels} channels; the range is 1 to {MAX_SOURCE_CHANNELS}.",
            code="bad_channel_count",
            limit=MAX_SOURCE_CHANNELS if channels else 1,
            actual=channels,
        )


class Sink(Protocol):
    """Receiver of a recording's samples, block by block, so that nobody holds all of them."""

    def begin(self) -> None:
        """Drop all blocks so far: the recording begins again, from another track or with another mix."""
        ...

    def write(self, samples_S: NDArray[np.float32]) -> None:
        """Take the next block, float32 [S], mono, 16 kHz, in [-1, 1]."""
        ...


class Allowance:
    """Budget of one decode: its deadline and its decoded seconds.

    Args:
        limits: The limits.
        sink: Receiver of the samples; None collects them in memory.

    Attributes:
        gatherer: The newest collector of samples; its samples are those of the sink.
    """

    def __init__(self, limits: AudioLimits, sink: Sink | None = None) -> None:
        self.limits = limits
        self.sink = sink
        self.gatherer: object = None
        self._deadline_s = time.monotonic() + limits.decode_timeout_s
        self._max_duration_s = limits.max_duration_s
        self._padding_s = 0.0

    @property
    def is_half_spent(self) -> bool:
        """Return whether half of the time has passed."""
        return time.monotonic() > self._deadline_s - self.limits.decode_timeout_s / 2

    def allow_padding(self, is_allowed: bool) -> None:
        """Set whether to tolerate a codec's delay and padding beyond the recording."""
        self._padding_s = MAX_CODEC_PADDING_S if is_allowed else 0.0

    def is_too_long(self, duration_s: float) -> bool:
        """Return whether a duration is above the limit."""
        return duration_s > self._max_duration_s + self._padding_s + _ROUNDING_S

    def check(self) -> None:
        """Refuse the clip after the deadline.

        Raises:
            InvalidAudioError: If the time is over.
        """
        if time.monotonic() > self._deadline_s:
            refuse_late(self.limits.decode_timeout_s)

    def set_source(self, rate_hz: int, channels: int) -> None:
        """Refuse rates and channel counts outside all recorders, and limit the duration by the number of samples."""
        _require_sane_source(rate_hz, channels)
        self._max_duration_s = min(self.limits.max_duration_s, self.limits.max_source_samples / (rate_hz * channels))

    def require_duration(self, duration_s: float) -> None:
        """Refuse a duration above the limit.

        Raises:
            AudioTooLargeError: If the duration is above the limit.
        """
        if self.is_too_long(duration_s):
            is_wide = self._max_duration_s < self.limits.max_duration_s
            raise AudioTooLargeError(
                f"The clip exceeds the limit of {self._max_duration_s:.4g} s"
                + (" at its sample rate and number of channels." if is_wide else "."),
                code="audio_duration_too_large",
                limit=round(self._max_duration_s, 3),
                hint="Send one channel at 16000 Hz." if is_wide else "Send a shorter clip.",
            )


def refuse_late(limit_s: float) -> NoReturn:
    """Raise the error for decoding beyond the deadline."""
    raise InvalidAudioError(
        f"Decoding the clip took longer than {limit_s:g} s.",
        code="decode_timeout",
        limit=limit_s,
        hint="Send a shorter clip, or convert it to wav.",
    )


def refuse_damaged(message: str = "The clip is damaged: decoding failed before its end.") -> NoReturn:
    # Without the decoder's exception as a cause, because its text contains memory addresses.
    """Raise the error for a damaged clip."""
    raise InvalidAudioError(message, code="damaged_audio", hint="Send the file again, or export it again.") from None


def refuse_broken_off() -> NoReturn:
    """Raise the error for a truncated clip."""
    raise InvalidAudioError(
        "The clip is truncated: its end is missing.",
        code="truncated_audio",
        hint="Send the whole file, or export it again.",
    )


def refuse_track(track: int, num_tracks: int) -> NoReturn:
    """Raise the error for a missing audio track."""
    raise InvalidAudioError(
        f"The file has no audio track {track}; it has {num_tracks}, counted from 1.",
        code="no_such_track",
        limit=num_tracks,
        actual=track,
        hint="Leave `track` out, or send one that the file has.",
    )
