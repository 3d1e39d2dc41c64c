"""Choose the mix of a clip's channels, and measure its loss.

The mean of the channels is the down-mix, unless it cancels: two channels of opposite sign sum to silence. Energies and
products of the channels in blocks of 0.1 s detect this, and select weights with a smaller loss.

Axes: S samples, C channels, B blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

_BLOCK_S = 0.1
# The products of many channels take memory; they are measured in longer blocks.
_MAX_CHANNELS_IN_SHORT_BLOCKS = 8
_LONG_BLOCK_S = 1.0
_MIN_SAMPLES_AT_ONCE = 2**15
# Quieter blocks hold no sound to lose: -50 dBFS, the threshold of `Quality.silence_ratio`.
_AUDIBLE_POWER = 10 ** (-50 / 10)
# A mix keeps this share of the power of unrelated channels, or the block counts as cancelled. Two channels with a
# correlation of -0.85 reach it.
_KEPT_SHARE = 0.15
# Shorter cancellations occur in ordinary stereo recordings.
_MIN_LOST_S = 0.3
# Two people on two channels: hardly any common signal, and they speak at different times.
_MAX_SHARED_CORRELATION = 0.3
_MAX_ENVELOPE_CORRELATION = 0.3
# Speech rises and falls by 10 dB and more; steady tones give no information on turns between speakers.
_MIN_LEVEL_DEVIATION = 0.3
_MIN_ACTIVE_S = 0.5
_MIN_ACTIVE_SHARE = 0.1


@dataclass(frozen=True, eq=False)
class Downmix:
    """Weights of the channels, and the cancellation they avoid.

    Attributes:
        weights_C: float32 [C], or None for the mean.
        cancelled_s: Seconds cancelled by the mean.
        lost_s: Seconds still cancelled with these weights.
        channel: Index of the only channel used, from 0; None for several.
    """

    weights_C: NDArray[np.float32] | None  # noqa: N815
    cancelled_s: float = 0.0
    lost_s: float = 0.0
    channel: int | None = None


class ChannelStatistics:
    """Energies and products of channels, measured block by block during decoding."""

    def __init__(self) -> None:
        self._rate_hz = 0
        self._num_channels = 0
        self._num_block_samples = 0
        self._block_s = _BLOCK_S
        self._pending: list[NDArray[np.float32]] = []
        self._num_pending = 0
        self._products: list[NDArray[np.float32]] = []
        self._is_uniform = True

    def add(self, samples_SC: NDArray[np.float32], rate_hz: int) -> None:
        """Add the next block, float32 [S, C]; a clip with a changing layout is not measured."""
        num_channels = samples_SC.shape[1]
        if not self._rate_hz:
            self._rate_hz, self._num_channels = rate_hz, num_channels
            self._block_s = _BLOCK_S if num_channels <= _MAX_CHANNELS_IN_SHORT_BLOCKS else _LONG_BLOCK_S
            self._num_block_samples = max(1, round(self._block_s * rate_hz))
        if (rate_hz, num_channels) != (self._rate_hz, self._num_channels):
            self._is_uniform = False
            self._pending = []
        if not self._is_uniform or num_channels == 1:
            return
        self._pending.append(samples_SC)
        self._num_pending += len(samples_SC)
        # Frames of a codec are short; products are cheaper for many at once.
        if self._num_pending >= max(_MIN_SAMPLES_AT_ONCE, self._num_block_samples):
            self._measure()

    def _measure(self) -> None:
        samples_SC = np.concatenate(self._pending)
        num_blocks = len(samples_SC) // self._num_block_samples
        whole = num_blocks * self._num_block_samples
        if num_blocks:
            blocks_BSC = samples_SC[:whole].reshape(num_blocks, self._num_block_samples, self._num_channels)
            # One product at a time: numpy hands each to BLAS, but not a stack of transposed ones.
            for block_SC in blocks_BSC:
                self._products.append(_power(block_SC))
        self._pending, self._num_pending = [samples_SC[whole:].copy()], len(samples_SC) - whole

    def _products_BCC(self) -> NDArray[np.float64] | None:  # noqa: N802
        if not self._is_uniform or self._num_channels < 2:
            return None
        if self._num_pending >= self._num_block_samples:
            self._measure()
        products = list(self._products)
        if self._num_pending > self._num_block_samples // 4:
            rest_SC = np.concatenate(self._pending)
            products.append(_power(rest_SC))
        return np.stack(products).astype(np.float64) if products else None

    def choose(self) -> Downmix:
        """Return the mean, or weights with less cancellation if the mean cancels."""
        products_BCC = self._products_BCC()
        if products_BCC is None:
            return Downmix(None)
        num_channels = self._num_channels
        powers_BC = np.diagonal(products_BCC, axis1=1, axis2=2)
        is_audible_B = powers_BC.max(axis=1) > _AUDIBLE_POWER

        def lost_s(weights_C: NDArray[np.float64]) -> float:
            mixed_B = np.einsum("c,bcd,d->b", weights_C, products_BCC, weights_C) / np.sum(weights_C**2)
            return float(np.sum(is_audible_B & (mixed_B < _KEPT_SHARE * powers_BC.mean(axis=1))) * self._block_s)

        mean_C = np.full(num_channels, 1 / num_channels)
        cancelled_s = lost_s(mean_C)
        if cancelled_s < min(_MIN_LOST_S, 0.5 * len(products_BCC) * self._block_s):
            return Downmix(None)
        total_CC = products_BCC.sum(axis=0)
        loudest = int(np.argmax(np.diagonal(total_CC)))
        signs_C = np.where(total_CC[loudest] < 0, -1.0, 1.0)
        flipped_C = signs_C / num_channels
        order = sorted(range(num_channels), key=lambda channel: (-total_CC[channel, channel], channel))
        # Ties go to the earlier candidate; for two channels one alone is cleaner than a difference.
        candidates: list[tuple[float, NDArray[np.float64], int | None]] = [(cancelled_s, mean_C, None)]
        singles = [(lost_s(np.eye(num_channels)[channel]), np.eye(num_channels)[channel], channel) for channel in order]
        flipped = [(lost_s(flipped_C), flipped_C, None)]
        candidates += [*singles, *flipped] if num_channels == 2 else [*flipped, *singles]
        best = min(candidates, key=lambda candidate: candidate[0])
        if best[1] is mean_C:
            return Downmix(None, cancelled_s, cancelled_s)
        return Downmix(best[1].astype(np.float32), round(cancelled_s, 2), round(best[0], 2), best[2])

    def differing_s(self) -> float:
        """Return the seconds with separate sound in each channel of a stereo clip; 0 for ordinary stereo.

        Both channels are active, share hardly any signal, and their levels do not rise and fall together.
        """
        products_BCC = self._products_BCC()
        if products_BCC is None or self._num_channels != 2:
            return 0.0
        powers_BC = np.diagonal(products_BCC, axis1=1, axis2=2)
        is_active_BC = powers_BC > np.maximum(_AUDIBLE_POWER, 0.01 * powers_BC.max(axis=0))
        active_C = is_active_BC.sum(axis=0) * self._block_s
        if active_C.min() < max(_MIN_ACTIVE_S, _MIN_ACTIVE_SHARE * active_C.max()):
            return 0.0
        total_CC = products_BCC.sum(axis=0)
        shared = abs(float(total_CC[0, 1])) / float(np.sqrt(total_CC[0, 0] * total_CC[1, 1]))
        levels_BC = np.log10(np.maximum(powers_BC, _AUDIBLE_POWER))
        levels_BC = levels_BC[is_active_BC.any(axis=1)]
        deviations_C = levels_BC.std(axis=0)
        if shared > _MAX_SHARED_CORRELATION or deviations_C.min() < _MIN_LEVEL_DEVIATION:
            return 0.0
        envelope = cast(float, np.corrcoef(levels_BC.T)[0, 1])
        return float(is_active_BC.any(axis=1).sum() * self._block_s) if envelope < _MAX_ENVELOPE_CORRELATION else 0.0


def _power(samples_SC: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the mean products of the channels, float32 [C, C]."""
    return cast(NDArray[np.float32], samples_SC.T @ samples_SC / np.float32(len(samples_SC)))
