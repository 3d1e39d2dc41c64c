"""Conversion of decoded blocks of any rate and channel count to mono at 16 kHz, without storing the source's samples.

Both ways of decoding use it, so the samples do not depend on the file's format.

Axes: S samples, C channels.
"""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from hyper_model.audio_limits import SAMPLE_RATE_HZ, Allowance, refuse_damaged
from hyper_model.downmix import ChannelStatistics

# A codec's frame has about a thousand samples; the resampler is faster with more at once.
_BLOCK_SAMPLES = 2**15
# Possible excess of the longest clip through rounding and the resampler's tail.
_SPARE_S = 2.0
_LEVEL_FRAME_SAMPLES = SAMPLE_RATE_HZ // 50


def resample(mono_S: NDArray[np.float32], from_hz: int) -> NDArray[np.float32]:
    """Resample mono samples to 16 kHz."""
    if from_hz == SAMPLE_RATE_HZ or not mono_S.size:
        return mono_S
    import soxr  # pyright: ignore[reportMissingTypeStubs]

    return cast(NDArray[np.float32], soxr.resample(mono_S, from_hz, SAMPLE_RATE_HZ, quality="HQ"))


class Gatherer:
    """Collector of decoded blocks as mono 16 kHz, counted against the allowance.

    The samples equal those of `resample` for the whole clip, with memory for the 16 kHz samples only. With a sink in
    the allowance there is memory for one block only: the sink receives the samples.

    Attributes:
        num_source_samples: Source samples so far, per channel.
        num_samples: Samples at 16 kHz so far.
        loudest_power: Largest mean square of 20 ms so far.
        channels: Energies and products of the channels so far.
    """

    def __init__(self, allowance: Allowance, weights_C: NDArray[np.float32] | None = None) -> None:
        """Prepare for one clip.

        Args:
            allowance: Budget of the decode.
            weights_C: Weights of the channels, float32 [C]. Without weights, and for blocks of another width, their
                mean is used.
        """
        self._allowance = allowance
        self._weights_C = weights_C
        self.channels = ChannelStatistics()
        self._duration_s = 0.0
        self._rate_hz = 0
        self._stream: Any = None
        self._waiting: list[NDArray[np.float32]] = []
        self._num_waiting = 0
        self._sink = allowance.sink
        allowance.gatherer = self
        if self._sink is not None:
            self._sink.begin()
        # The system allocates its pages only as samples are written.
        max_samples = math.ceil((allowance.limits.max_duration_s + _SPARE_S) * SAMPLE_RATE_HZ)
        self._samples_S = np.empty(0 if self._sink else max_samples, np.float32)
        self.num_samples = 0
        self.loudest_power = 0.0
        self.num_source_samples = 0

    def add(self, samples_SC: NDArray[np.float32], rate_hz: int) -> None:
        """Add the next block, float32 [S, C].

        Raises:
            InvalidAudioError: If a sample is not a finite number.
            AudioTooLargeError: If the clip has more seconds than the limits allow.
        """
        self._allowance.check()
        self.num_source_samples += len(samples_SC)
        self._duration_s += len(samples_SC) / rate_hz
        self._allowance.require_duration(self._duration_s)
        if not np.isfinite(samples_SC).all():
            refuse_damaged("The clip holds samples that are not numbers.")
        if rate_hz != self._rate_hz:
            self._flush(is_last=True)
            self._open(rate_hz)
        clipped_SC = np.clip(samples_SC, -1.0, 1.0)
        self.channels.add(clipped_SC, rate_hz)
        if self._weights_C is not None and len(self._weights_C) == clipped_SC.shape[1]:
            self._waiting.append(clipped_SC @ self._weights_C)
        else:
            self._waiting.append(clipped_SC.mean(axis=1, dtype=np.float32))
        self._num_waiting += len(samples_SC)
        if self._num_waiting >= _BLOCK_SAMPLES:
            self._flush()

    def finish(self) -> NDArray[np.float32]:
        """Return all added samples, float32 [S] in [-1, 1]; none if a sink has received them."""
        self._flush(is_last=True)
        return self._samples_S[: self.num_samples]

    def _open(self, rate_hz: int) -> None:
        self._rate_hz, self._stream = rate_hz, None
        if rate_hz != SAMPLE_RATE_HZ:
            import soxr  # pyright: ignore[reportMissingTypeStubs]

            self._stream = soxr.ResampleStream(rate_hz, SAMPLE_RATE_HZ, 1, dtype="float32", quality="HQ")

    def _flush(self, *, is_last: bool = False) -> None:
        if not self._rate_hz:
            return
        block_S = np.concatenate(self._waiting) if self._waiting else np.zeros(0, np.float32)
        self._waiting, self._num_waiting = [], 0
        if self._stream is not None:
            block_S = cast(NDArray[np.float32], self._stream.resample_chunk(block_S, last=is_last))
        end = self.num_samples + len(block_S)
        self._allowance.require_duration(end / SAMPLE_RATE_HZ - _SPARE_S)
        if self._sink is None:
            clipped_S = self._samples_S[self.num_samples : end]
            np.clip(block_S, -1.0, 1.0, out=clipped_S)
        else:
            clipped_S = np.clip(block_S, -1.0, 1.0)
            self._sink.write(clipped_S)
        if len(clipped_S):
            starts = np.arange(0, len(clipped_S), _LEVEL_FRAME_SAMPLES)
            sums = np.add.reduceat(np.square(clipped_S, dtype=np.float64), starts)
            self.loudest_power = max(self.loudest_power, float(np.max(sums)) / _LEVEL_FRAME_SAMPLES)
        self.num_samples = end
