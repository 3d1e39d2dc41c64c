"""Fit a clip to the model: leave out long silence, and surround a very short clip with quiet.

The models were trained on clips of a second and more in which speech begins at once. Long silence in front of speech
costs its transcript, and a clip of 0.2 s gets invented words (docs/LOG.md). Silence carries no information, so the
model receives the clip without most of it. `FittedClip` keeps the offsets.

A frame is silent by two measures. Its level is far below the loudest sound of the clip and below `SILENT_DBFS`. And it
does not rise above the steady level around it, so quiet speech and quiet music are kept. `pydub.silence` has only the
first measure. Frequencies below 75 Hz do not count: an offset, mains hum or rumble is no sound to keep.

Axes: S samples at 16 kHz, F frames of 20 ms.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hyper_model.audio_limits import SAMPLE_RATE_HZ

SILENT_DBFS = -50.0
"""Louder frames are never silent; the threshold of `Quality.silence_ratio`."""

MIN_SILENCE_S = 1.0
"""Shorter silence is part of speech and is kept."""

KEPT_SILENCE_S = 0.3
"""Silence kept on each side of a sound."""

MIN_LENGTH_S = 1.0
"""A clip with less than this after trimming is surrounded with quiet."""

MIN_SPOKEN_S = 0.35
"""A clip with less sound than this has no words: the model would invent them."""

_PIECE_SHARES = (0.3, 0.9)
"""Shortest and longest piece, as shares of the longest clip of a single pass."""

PADDED_LENGTH_S = 2.0
"""Length of such a clip with the quiet around it."""

FRAME_SAMPLES = SAMPLE_RATE_HZ // 50

# Ten frames: the level of the loudest 0.2 s, which a click does not reach.
_NUM_LOUD_FRAMES = 10
_BELOW_LOUD_DB = 25.0
_SHORT_BELOW_DB = 30.0
# What is further below the loudest sound is inaudible.
_INAUDIBLE_DB = 60.0
# Frames of steady noise differ by less; syllables and notes rise by more.
_RISE_DB = 8.0
_FLOOR_RADIUS_FRAMES = 25
_FLOOR_PERCENTILE = 20
# The first bin of the spectrum of a frame that counts; a bin has 50 Hz.
_FIRST_BIN = 2
_LOWEST_POWER = 1e-12
_PADDING_DBFS = -66.0
_PADDING_BELOW_LOUD_DB = 40.0


@dataclass(frozen=True, eq=False)
class FittedClip:
    """A clip as the model receives it.

    Attributes:
        samples_S: float32 [S].
        parts: Kept parts of the clip in order, as (first, end) in samples of the clip; their sum is the used sound.
        num_before: Samples of quiet added before the first part.
        num_padding: Samples of quiet added in total.
        sound_s: Seconds of frames that are not silent.
    """

    samples_S: NDArray[np.float32]  # noqa: N815
    parts: tuple[tuple[int, int], ...]
    num_before: int = 0
    num_padding: int = 0
    sound_s: float = 0.0

    @property
    def used_s(self) -> float:
        """Return the seconds of the clip that the model receives."""
        return sum(end - start for start, end in self.parts) / SAMPLE_RATE_HZ

    @property
    def padded_s(self) -> float:
        """Return the seconds of added quiet."""
        return self.num_padding / SAMPLE_RATE_HZ

    @property
    def start_s(self) -> float:
        """Return the beginning of the first part, in seconds of the clip."""
        return self.parts[0][0] / SAMPLE_RATE_HZ if self.parts else 0.0

    @property
    def end_s(self) -> float:
        """Return the end of the last part, in seconds of the clip."""
        return self.parts[-1][1] / SAMPLE_RATE_HZ if self.parts else 0.0

    def time_in_clip_s(self, seconds: float) -> float:
        """Convert a time of `samples_S` to a time of the clip; a time of added quiet becomes the nearest one."""
        place = round(seconds * SAMPLE_RATE_HZ) - self.num_before
        for start, end in self.parts:
            if place <= end - start:
                return (start + max(0, place)) / SAMPLE_RATE_HZ
            place -= end - start
        return self.end_s


def fit(samples_S: NDArray[np.float32]) -> FittedClip:
    """Leave out long silence of a clip, and surround a very short clip with quiet.

    A clip of nothing but silence stays as it is: its silence is the answer.

    Args:
        samples_S: float32 [S].
    """
    levels_F = frame_levels_db(samples_S)
    is_sound_F = sound_frames(levels_F)
    sound_s = float(is_sound_F.sum()) * FRAME_SAMPLES / SAMPLE_RATE_HZ
    parts = _kept_parts(is_sound_F, len(samples_S))
    kept_S = np.concatenate([samples_S[start:end] for start, end in parts]) if len(parts) > 1 else None
    if kept_S is None:
        kept_S = samples_S[parts[0][0] : parts[0][1]] if parts else samples_S
    if not len(kept_S) or len(kept_S) >= MIN_LENGTH_S * SAMPLE_RATE_HZ:
        return FittedClip(kept_S, parts, sound_s=sound_s)
    num_padding = round(PADDED_LENGTH_S * SAMPLE_RATE_HZ) - len(kept_S)
    num_before = num_padding // 2
    level_db = min(_PADDING_DBFS, _loud_level_db(levels_F) - _PADDING_BELOW_LOUD_DB)
    # The same quiet every time: one clip gives one answer.
    quiet_S = np.random.default_rng(0).normal(0, 10 ** (level_db / 20), num_padding).astype(np.float32)
    padded_S = np.concatenate([quiet_S[:num_before], kept_S, quiet_S[num_before:]])
    return FittedClip(np.clip(padded_S, -1.0, 1.0), parts, num_before, num_padding, sound_s)


def cut_pieces(samples_S: NDArray[np.float32], single_pass_s: float | None) -> list[tuple[int, int]]:
    """Cut a long clip into pieces at its longest silences, else at its quietest places.

    Args:
        samples_S: float32 [S].
        single_pass_s: Longest clip that needs no pieces (`AudioFields.single_pass_s`); None for no such limit.

    Returns:
        The pieces as (first, end) in samples, each with 0.3 to 0.9 of `single_pass_s`; or the whole clip.
    """
    if single_pass_s is None or len(samples_S) <= single_pass_s * SAMPLE_RATE_HZ:
        return [(0, len(samples_S))]
    levels_F = frame_levels_db(samples_S)
    is_sound_F = sound_frames(levels_F)
    shortest, longest = (round(share * single_pass_s * SAMPLE_RATE_HZ / FRAME_SAMPLES) for share in _PIECE_SHARES)
    cuts = [0]
    while len(levels_F) - cuts[-1] > longest:
        first = cuts[-1] + shortest
        end = min(cuts[-1] + longest, len(levels_F) - shortest)
        cuts.append(first + _quietest_frame(levels_F[first:end], is_sound_F[first:end]))
    places = [cut * FRAME_SAMPLES for cut in cuts] + [len(samples_S)]
    return list(itertools.pairwise(places))


def _quietest_frame(levels_F: NDArray[np.float64], is_sound_F: NDArray[np.bool_]) -> int:
    """Return the middle of the longest silence, or of the quietest 0.2 s."""
    edges = np.flatnonzero(np.diff(np.concatenate([[True], is_sound_F, [True]]).astype(np.int8))).reshape(-1, 2)
    if len(edges):
        first, end = edges[np.argmax(edges[:, 1] - edges[:, 0])]
        if end - first >= _NUM_LOUD_FRAMES:
            return int(first + end) // 2
    power_F = np.convolve(10 ** (levels_F / 10), np.ones(_NUM_LOUD_FRAMES), "valid")
    return int(np.argmin(power_F)) + _NUM_LOUD_FRAMES // 2


def whole(samples_S: NDArray[np.float32]) -> FittedClip:
    """Return a clip unchanged, float32 [S]."""
    return FittedClip(samples_S, ((0, len(samples_S)),) if len(samples_S) else ())


def frame_levels_db(samples_S: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the level of each frame above 75 Hz in dB of full scale, float64 [F]; -120 for digital silence."""
    num_frames = -(-len(samples_S) // FRAME_SAMPLES)
    frames_FS = np.zeros((num_frames, FRAME_SAMPLES), np.float32)
    frames_FS.reshape(-1)[: len(samples_S)] = samples_S
    window_S = np.hanning(FRAME_SAMPLES).astype(np.float32)
    spectrum_FB = np.fft.rfft(frames_FS * window_S, axis=1)[:, _FIRST_BIN:]
    power_F = 2 * np.sum(np.square(np.abs(spectrum_FB)), axis=1) / (FRAME_SAMPLES * float(np.sum(window_S**2)))
    return 10 * np.log10(np.maximum(power_F.astype(np.float64), _LOWEST_POWER))


def sound_frames(levels_F: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return the frames that are not silent, bool [F]; the loudest frames of a clip are always among them."""
    if not len(levels_F):
        return np.zeros(0, np.bool_)
    loud_db = _loud_level_db(levels_F)
    padded_F = np.pad(levels_F, _FLOOR_RADIUS_FRAMES, mode="symmetric")
    around_FW = np.lib.stride_tricks.sliding_window_view(padded_F, 2 * _FLOOR_RADIUS_FRAMES + 1)
    floor_F = np.maximum(np.percentile(around_FW, _FLOOR_PERCENTILE, axis=1), loud_db - _INAUDIBLE_DB)
    return (levels_F > min(SILENT_DBFS, loud_db - _BELOW_LOUD_DB)) | (levels_F > floor_F + _RISE_DB)


def _loud_level_db(levels_F: NDArray[np.float64]) -> float:
    """Return the level of the loudest 0.2 s; a shorter sound in deep silence counts 30 dB less."""
    sorted_F = np.sort(levels_F)
    return max(float(sorted_F[-min(_NUM_LOUD_FRAMES, len(levels_F))]), float(sorted_F[-1]) - _SHORT_BELOW_DB)


def _kept_parts(is_sound_F: NDArray[np.bool_], num_samples: int) -> tuple[tuple[int, int], ...]:
    """Return the parts without long silence, as (first, end) in samples."""
    edges = np.flatnonzero(np.diff(np.concatenate([[True], is_sound_F, [True]]).astype(np.int8)))
    kept = round(KEPT_SILENCE_S * SAMPLE_RATE_HZ)
    parts: list[tuple[int, int]] = []
    start = 0
    for first_frame, end_frame in edges.reshape(-1, 2):
        first, end = int(first_frame) * FRAME_SAMPLES, min(int(end_frame) * FRAME_SAMPLES, num_samples)
        if end - first < MIN_SILENCE_S * SAMPLE_RATE_HZ:
            continue
        if first > 0:
            parts.append((start, first + kept))
        start = end - kept if end < num_samples else end
    if start < num_samples:
        parts.append((start, num_samples))
    return tuple(parts)
