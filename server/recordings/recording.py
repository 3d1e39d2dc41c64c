"""A decoded recording: properties, windows, and samples as 16-bit integers outside of memory.

The decoder's blocks go through the cutter to a spool file. So an hour of audio takes the memory of one window.

The module is independent of requests and engines.

Axes: S samples.
"""

from __future__ import annotations

import hashlib
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import IO, cast

import numpy as np
from numpy.typing import NDArray

from hyper_model.audio import SAMPLE_RATE_HZ, WINDOW_S, Quality, Waveform
from server.errors import RequestError
from server.recordings.cutter import Choose, Cutter, Span

_MAX_WINDOW_SAMPLES = round(WINDOW_S * SAMPLE_RATE_HZ)
# About four minutes stay in memory; the rest of a longer recording is in an unnamed temporary file.
_MAX_BYTES_IN_MEMORY = 8 * 2**20
_FULL_SCALE = 32768.0


@dataclass(frozen=True, eq=False)
class Recording:
    """A recording with its windows; `close` removes its spool file.

    Attributes:
        about: Codec, rate, channels, track and warnings, as a Waveform without samples.
        num_samples: Length in samples.
        spans: The windows, in order.
        quality: Measures of the whole recording.
        sha256: Digest of the samples as 16-bit integers.
    """

    about: Waveform
    num_samples: int
    spans: Sequence[Span]
    quality: Quality
    sha256: str
    file: IO[bytes]
    only_window: Waveform | None = None

    @property
    def duration_s(self) -> float:
        """Return the length in seconds."""
        return self.num_samples / SAMPLE_RATE_HZ

    def waveform(self, start: int, end: int) -> Waveform:
        """Return the samples [start, end) with the properties of the recording."""
        if self.only_window is not None:
            return replace(self.only_window, samples_S=self.only_window.samples_S[start:end])
        self.file.seek(2 * start)
        integers_S = np.frombuffer(self.file.read(2 * (end - start)), "<i2")
        return replace(self.about, samples_S=integers_S.astype(np.float32) / np.float32(_FULL_SCALE))

    def close(self) -> None:
        """Remove the spool file."""
        self.file.close()


class RecordingBuilder:
    """Sink of a decoder that cuts a recording into windows; `finish` returns it.

    Args:
        choose: Chooser of each cut.
    """

    def __init__(self, choose: Choose | None = None) -> None:
        self.choose = choose
        self.file = cast("IO[bytes]", tempfile.SpooledTemporaryFile(_MAX_BYTES_IN_MEMORY))  # noqa: SIM115
        self.begin()

    def begin(self) -> None:
        """Drop all blocks so far."""
        self.file.seek(0)
        self.file.truncate()
        self.cutter = Cutter(self.choose)
        self.digest = hashlib.sha256()
        self.num_samples = 0
        self.first: list[NDArray[np.float32]] = []
        self.measured: list[tuple[int, Quality]] = []

    def write(self, samples_S: NDArray[np.float32]) -> None:
        """Take the next block, float32 [S].

        Raises:
            RequestError: 503, if the disk is full.
        """
        written = np.clip(np.rint(samples_S * _FULL_SCALE), -32768, 32767).astype("<i2").tobytes()
        self.digest.update(written)
        try:
            self.file.write(written)
        except OSError:
            raise RequestError(
                "storage_full",
                "The service has no disk space for the recording.",
                hint="Retry after the Retry-After time.",
            ) from None
        if self.num_samples <= _MAX_WINDOW_SAMPLES:
            # A recording of one window is asked with the samples of a clip, bit for bit.
            self.first.append(samples_S)
        else:
            self.first = []
        self.measured.append((len(samples_S), Waveform(samples_S).quality))
        self.num_samples += len(samples_S)
        self.cutter.add(samples_S)

    def finish(self, about: Waveform, num_samples: int) -> Recording:
        """Return the recording.

        Args:
            about: Properties reported by the decoder.
            num_samples: Length without the container's padding.
        """
        spans = self.cutter.finish(num_samples)
        only = None
        if num_samples <= _MAX_WINDOW_SAMPLES and self.first:
            only = replace(about, samples_S=np.concatenate(self.first)[:num_samples])
        recording = Recording(
            about, num_samples, tuple(spans), combined(self.measured), self.digest.hexdigest(), self.file, only
        )
        # A request that is cancelled between two steps has no place to close it.
        weakref.finalize(recording, self.file.close)
        return recording

    def close(self) -> None:
        """Remove the spool file of a recording that was never finished."""
        self.file.close()


def combined(measured: Sequence[tuple[int, Quality]]) -> Quality:
    """Return the quality of a recording from the lengths and qualities of its blocks."""
    total = sum(length for length, _ in measured) or 1

    def mean(name: str) -> float:
        return sum(length * getattr(quality, name) for length, quality in measured) / total

    peak_dbfs = max((quality.peak_dbfs for _, quality in measured), default=-120.0)
    return Quality(mean("silence_ratio") if measured else 1.0, mean("clipping_ratio"), peak_dbfs)
