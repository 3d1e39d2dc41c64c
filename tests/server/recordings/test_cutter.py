"""Properties of the cutter: no sample is lost, offsets are counted, and no window exceeds the encoder's input."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hyper_model.audio import SAMPLE_RATE_HZ, Waveform
from server.recordings.cutter import Cutter, Span, every_window
from server.recordings.recording import RecordingBuilder
from server.recordings.words import without_repeated_words

WINDOW = 30 * SAMPLE_RATE_HZ


def noise(duration_s: float, seed: int = 0, level: float = 0.1) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, level, int(duration_s * SAMPLE_RATE_HZ)).astype(np.float32).clip(-1, 1)


def cut(samples_S: np.ndarray, block: int = 40_000, num_samples: int | None = None, **fields: Any) -> Sequence[Span]:
    cutter = Cutter(**fields)
    for start in range(0, len(samples_S), block):
        cutter.add(samples_S[start : start + block])
    return cutter.finish(len(samples_S) if num_samples is None else num_samples)


@settings(max_examples=25)
@given(
    duration_s=st.floats(0.1, 200),
    block=st.integers(1_000, 600_000),
    pauses=st.lists(st.tuples(st.floats(0, 200), st.floats(0.05, 20)), max_size=8),
    seed=st.integers(0, 99),
)
def test_windows_cover_every_sample_once_except_shared_seconds(
    duration_s: float, block: int, pauses: list[tuple[float, float]], seed: int
) -> None:
    samples_S = noise(duration_s, seed)
    for start_s, length_s in pauses:
        samples_S[int(start_s * SAMPLE_RATE_HZ) : int((start_s + length_s) * SAMPLE_RATE_HZ)] = 0
    spans = cut(samples_S, block)
    assert spans[0].start == 0
    assert spans[-1].end == len(samples_S)
    assert [span.index for span in spans] == list(range(len(spans)))
    assert all(0 < span.end - span.start <= WINDOW for span in spans)
    for before, after in itertools.pairwise(spans):
        assert after.start == before.end - after.num_shared
        assert after.num_shared == (SAMPLE_RATE_HZ if before.boundary == "hard" else 0)
        assert 18 * SAMPLE_RATE_HZ <= before.end - before.start - before.num_shared <= 29 * SAMPLE_RATE_HZ
    assert [span.boundary == "end" for span in spans] == [False] * (len(spans) - 1) + [True]


@settings(max_examples=10)
@given(first=st.integers(1_000, 500_000), second=st.integers(1_000, 500_000))
def test_cuts_do_not_depend_on_the_decoders_blocks(first: int, second: int) -> None:
    samples_S = noise(75)
    assert cut(samples_S, first) == cut(samples_S, second)


@pytest.mark.parametrize("pause_s", [18.5, 22.0, 27.3])
def test_a_cut_is_in_the_pause(pause_s: float) -> None:
    samples_S = noise(60)
    start = int(pause_s * SAMPLE_RATE_HZ)
    samples_S[start : start + 8_000] = 0
    first = cut(samples_S)[0]
    assert first.boundary == "silence"
    assert start < first.end < start + 8_000


def test_a_low_passage_is_a_quiet_boundary_and_steady_sound_a_hard_one() -> None:
    samples_S = noise(60)
    samples_S[20 * SAMPLE_RATE_HZ : 21 * SAMPLE_RATE_HZ] *= 0.1
    assert cut(samples_S)[0].boundary == "quiet"
    hard = cut(noise(60))
    assert hard[0].boundary == "hard"
    assert hard[1].start == hard[0].end - SAMPLE_RATE_HZ


def test_a_window_is_silent_only_if_no_20_ms_of_it_sound() -> None:
    samples_S = np.zeros(100 * SAMPLE_RATE_HZ, np.float32)
    samples_S[70 * SAMPLE_RATE_HZ : 70 * SAMPLE_RATE_HZ + 400] = 0.5
    spans = cut(samples_S)
    assert [span.is_silent for span in spans] == [not span.start_s <= 70 < span.end_s for span in spans]
    assert sum(span.is_silent for span in spans) == len(spans) - 1


@pytest.mark.parametrize("duration_s", [25.0, 30.0, 30.05, 59.0])
def test_padding_behind_the_end_belongs_to_no_window(duration_s: float) -> None:
    samples_S = noise(duration_s + 0.1)
    num_samples = round(duration_s * SAMPLE_RATE_HZ)
    spans = cut(samples_S, num_samples=num_samples)
    assert spans[-1].end == num_samples
    assert spans[-1].boundary == "end"
    assert all(span.start < span.end for span in spans)


def test_the_baseline_cuts_each_30_s() -> None:
    assert [(span.start, span.end) for span in cut(noise(70), choose=every_window)] == [
        (0, WINDOW),
        (WINDOW, 2 * WINDOW),
        (2 * WINDOW, 70 * SAMPLE_RATE_HZ),
    ]


def test_a_recording_returns_the_samples_of_each_window_in_16_bits() -> None:
    samples_S = noise(400)
    builder = RecordingBuilder()
    builder.write(noise(10, seed=7))
    builder.begin()
    for start in range(0, len(samples_S), 50_000):
        builder.write(samples_S[start : start + 50_000])
    recording = builder.finish(Waveform(np.zeros(0, np.float32), "mp3"), len(samples_S))
    for span in recording.spans:
        window = recording.waveform(span.start, span.end)
        assert window.codec == "mp3"
        assert np.abs(window.samples_S - samples_S[span.start : span.end]).max() <= 2**-15
    assert recording.duration_s == 400
    assert recording.quality.peak_dbfs == pytest.approx(Waveform(samples_S).quality.peak_dbfs)
    recording.close()


def test_a_recording_of_one_window_has_the_samples_of_a_clip() -> None:
    samples_S = noise(12.3)
    builder = RecordingBuilder()
    builder.write(samples_S)
    recording = builder.finish(Waveform(np.zeros(0, np.float32)), len(samples_S))
    assert recording.waveform(0, len(samples_S)).sha256 == Waveform(samples_S).sha256
    recording.close()


@pytest.mark.parametrize(
    ("previous", "following", "kept"),
    [
        ("I went to the market. It was", "market. It was closed", "closed"),
        ("we saw the big house on", "he big house on the hill", "the hill"),
        ("it was late an", "was late and dark", "and dark"),
        ("one two three", "four five six", "four five six"),
        ("the end of it is the day", "a long night and the end", "a long night and the end"),
        ("", "hello", "hello"),
        ("hello", "", ""),
        ("so Hello there", "hello, there", ""),
    ],
)
def test_words_of_a_shared_second_are_dropped_once(previous: str, following: str, kept: str) -> None:
    assert without_repeated_words(previous, following) == kept
