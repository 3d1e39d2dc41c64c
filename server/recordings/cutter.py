"""Cutting of a recording into windows at its quietest places, while its samples arrive.

From the end of a window, the cutter looks 18 to 29 s ahead and cuts in the middle of the quietest 200 ms. If no place
is quiet, the next window begins 1 s earlier, and `server.recordings.words` drops the words recognised twice. The
offsets of a window are counted samples, never an index times a length.

The module is independent of requests, engines and files.

Axes: S samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hyper_model.audio import SAMPLE_RATE_HZ, WINDOW_S

Boundary = Literal["silence", "quiet", "hard", "fixed", "end"]
"""End of a window: in silence, at a quiet place, in the middle of sound, after 30 s, or the end of the recording."""

EARLIEST_CUT_S = 18.0
LATEST_CUT_S = 29.0
GAP_S = 0.2
OVERLAP_S = 1.0

_WINDOW_SAMPLES = round(WINDOW_S * SAMPLE_RATE_HZ)
_GAP_SAMPLES = round(GAP_S * SAMPLE_RATE_HZ)
_HOP_SAMPLES = SAMPLE_RATE_HZ // 100
_FRAME_SAMPLES = SAMPLE_RATE_HZ // 50
# Silence as `Quality.silence_ratio` counts it.
_SILENT_POWER = 10 ** (-50 / 10)
# A quiet place has a tenth of the mean power around it: between words, not within one.
_QUIET_SHARE = 0.1


@dataclass(frozen=True)
class Span:
    """Place of one window in its recording.

    Attributes:
        index: Number of the window, from 0.
        start, end: Offsets in samples; the end is exclusive.
        boundary: What is at its end.
        num_shared: Samples at its start that also belong to the previous window.
        is_silent: Whether all its 20 ms frames are below -50 dBFS.
    """

    index: int
    start: int
    end: int
    boundary: Boundary
    num_shared: int = 0
    is_silent: bool = False

    @property
    def start_s(self) -> float:
        """Return the start in seconds."""
        return self.start / SAMPLE_RATE_HZ

    @property
    def end_s(self) -> float:
        """Return the end in seconds."""
        return self.end / SAMPLE_RATE_HZ


Choose = Callable[[NDArray[np.float32], int], tuple[int, Boundary]]
"""Function from a window's samples and the number shared with the previous window to the cut and its boundary."""


class Cutter:
    """Cutter of one recording.

    Args:
        choose: Chooser of each cut.

    Attributes:
        spans: Windows so far.
    """

    def __init__(self, choose: Choose | None = None) -> None:
        self.choose = choose or quietest_cut
        self.spans: list[Span] = []
        self._waiting: list[NDArray[np.float32]] = []
        self._num_waiting = 0
        self._start = 0
        self._num_shared = 0

    def add(self, samples_S: NDArray[np.float32]) -> None:
        """Add the next samples, float32 [S], and cut each complete window."""
        self._waiting.append(samples_S)
        self._num_waiting += len(samples_S)
        while self._num_waiting > _WINDOW_SAMPLES:
            ahead_S = np.concatenate(self._waiting)
            num_taken, boundary = self.choose(ahead_S[:_WINDOW_SAMPLES], self._num_shared)
            self._cut(ahead_S, num_taken, boundary)

    def finish(self, num_samples: int) -> list[Span]:
        """Cut the last window, and return all of them.

        Args:
            num_samples: Length of the recording; later samples were padding.
        """
        if self.spans and self._start + self._num_shared >= num_samples:
            # Only padding was behind the last cut.
            self.spans[-1] = replace(self.spans[-1], end=num_samples, boundary="end")
            return self.spans
        ahead_S = np.concatenate(self._waiting or [np.zeros(0, np.float32)])[: num_samples - self._start]
        if len(ahead_S):
            self._cut(ahead_S, len(ahead_S), "end")
        return self.spans

    def _cut(self, ahead_S: NDArray[np.float32], num_taken: int, boundary: Boundary) -> None:
        end = self._start + num_taken
        is_silent = bool(frame_powers(ahead_S[:num_taken]).max() < _SILENT_POWER)
        self.spans.append(Span(len(self.spans), self._start, end, boundary, self._num_shared, is_silent))
        self._num_shared = min(round(OVERLAP_S * SAMPLE_RATE_HZ), num_taken - 1) if boundary == "hard" else 0
        self._start = end - self._num_shared
        rest_S = ahead_S[num_taken - self._num_shared :]
        self._waiting, self._num_waiting = [rest_S.copy()], len(rest_S)


def quietest_cut(ahead_S: NDArray[np.float32], num_shared: int) -> tuple[int, Boundary]:
    """Return the samples before the middle of the quietest 200 ms, and how quiet it is there.

    Args:
        ahead_S: A full window of samples, from the start of the window.
        num_shared: Samples at the start that belong to the previous window; the search counts from their end.
    """
    first = num_shared + round(EARLIEST_CUT_S * SAMPLE_RATE_HZ)
    last = min(num_shared + round(LATEST_CUT_S * SAMPLE_RATE_HZ), len(ahead_S))
    sums = np.concatenate([[0.0], np.cumsum(np.square(ahead_S[first:last], dtype=np.float64))])
    starts = np.arange(0, len(sums) - _GAP_SAMPLES, _HOP_SAMPLES)
    powers = (sums[starts + _GAP_SAMPLES] - sums[starts]) / _GAP_SAMPLES
    quietest = int(np.argmin(powers))
    boundary: Boundary = "hard"
    if powers[quietest] < _SILENT_POWER:
        # In digital silence all places are equal; the middle of the first run leaves the most room around words.
        quietest = _middle_of_run(powers < _SILENT_POWER)
        boundary = "silence"
    elif powers[quietest] < _QUIET_SHARE * sums[-1] / (len(sums) - 1):
        boundary = "quiet"
    return first + int(starts[quietest]) + _GAP_SAMPLES // 2, boundary


def every_window(ahead_S: NDArray[np.float32], num_shared: int) -> tuple[int, Boundary]:
    """Cut after each 30 s, wherever that is: the baseline of evaluations."""
    return len(ahead_S), "fixed"


def frame_powers(samples_S: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the mean square of each 20 ms; the last frame may be shorter."""
    starts = np.arange(0, len(samples_S), _FRAME_SAMPLES)
    lengths = np.diff(starts, append=len(samples_S))
    return np.add.reduceat(np.square(samples_S, dtype=np.float64), starts) / lengths


def _middle_of_run(is_silent: NDArray[np.bool_]) -> int:
    """Return the middle of the longest run of true values."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], is_silent.astype(np.int8), [0]])))
    starts, ends = edges[::2], edges[1::2]
    longest = int(np.argmax(ends - starts))
    return int((starts[longest] + ends[longest] - 1) // 2)
