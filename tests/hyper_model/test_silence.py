"""Which silence of a clip is left out, which sound is kept, and where it was."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from hyper_model.audio import SAMPLE_RATE_HZ, Waveform
from hyper_model.silence import FittedClip, fit

Samples = NDArray[np.float32]
RNG = np.random.default_rng(7)


def noise(seconds: float, dbfs: float) -> Samples:
    return RNG.normal(0, 10 ** (dbfs / 20), int(seconds * SAMPLE_RATE_HZ)).astype(np.float32)


def zeros(seconds: float) -> Samples:
    return np.zeros(int(seconds * SAMPLE_RATE_HZ), np.float32)


def times(seconds: float) -> NDArray[np.float64]:
    return np.arange(int(seconds * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ


def syllables(seconds: float, dbfs: float = -20.0) -> Samples:
    """Return a harmonic sound with four syllables per second and short gaps, as speech has."""
    times_S = times(seconds)
    voice_S = sum(np.sin(2 * np.pi * 140 * k * times_S) / k for k in range(1, 12))
    envelope_S = np.clip(np.sin(2 * np.pi * 4 * times_S), 0, 1)
    return (10 ** (dbfs / 20) * voice_S * envelope_S).astype(np.float32)


def parts_s(fitted: FittedClip) -> list[tuple[float, float]]:
    return [(start / SAMPLE_RATE_HZ, end / SAMPLE_RATE_HZ) for start, end in fitted.parts]


def room(kind: str, seconds: float) -> Samples:
    """Make silence as files have it."""
    times_S = times(seconds)
    match kind:
        case "zeros":
            return zeros(seconds)
        case "noise":
            return noise(seconds, -60)
        case "hum":
            return (0.01 * np.sin(2 * np.pi * 50 * times_S)).astype(np.float32)
        case "an offset":
            return np.full(len(times_S), 0.05, np.float32)
        case "rumble":
            walk_S = np.cumsum(noise(seconds, -60).astype(np.float64))
            return (0.01 * (walk_S - walk_S.mean()) / np.abs(walk_S).max()).astype(np.float32)
        case _:
            return np.concatenate([zeros(seconds / 2), noise(seconds / 2, -62)])


ROOMS = ("zeros", "noise", "hum", "an offset", "rumble", "zeros, then noise")


@pytest.mark.parametrize("kind", ROOMS)
@pytest.mark.parametrize("gain_db", [0, -30])
def test_long_silence_is_left_out_before_between_and_behind(kind: str, gain_db: float) -> None:
    voice_S, gain = syllables(2.0), 10 ** (gain_db / 20)
    is_steady = kind not in ("rumble", "zeros, then noise")
    clip_S = np.concatenate([room(kind, 5), voice_S, room(kind, 3), voice_S, room(kind, 4)])
    fitted = fit((gain * clip_S).astype(np.float32))
    # A change of the kind of silence and a strong rumble count as sounds.
    assert fitted.used_s == pytest.approx(5.3, abs=0.4 if is_steady else 2.6)
    if is_steady:
        assert fitted.start_s > 4.0 and fitted.end_s < 13.0
    assert fitted.num_padding == 0 and len(fitted.samples_S) == sum(end - start for start, end in fitted.parts)
    for moment_s in (5.2, 6.9, 10.2, 11.9):
        assert any(start <= moment_s < end for start, end in parts_s(fitted)), moment_s


def test_parts_are_samples_of_the_clip_and_times_lead_back_to_them() -> None:
    clip_S = np.concatenate([zeros(4), syllables(1.5), noise(3, -70), syllables(1.5)])
    fitted = fit(clip_S)
    joined_S = np.concatenate([clip_S[start:end] for start, end in fitted.parts])
    assert np.array_equal(fitted.samples_S, joined_S)
    for place in range(0, len(joined_S) - 1, 997):
        at = round(fitted.time_in_clip_s(place / SAMPLE_RATE_HZ) * SAMPLE_RATE_HZ)
        assert clip_S[at] == joined_S[place] or at in {end for _, end in fitted.parts}
    assert fitted.time_in_clip_s(-1) == fitted.start_s and fitted.time_in_clip_s(99) == fitted.end_s


@pytest.mark.parametrize(
    "samples_S",
    [
        zeros(10),
        noise(10, -60),
        noise(10, -90),
        noise(10, -30),
        (0.001 * np.sin(2 * np.pi * 440 * times(10))).astype(np.float32),
        syllables(10),
        syllables(10, -60),
    ],
    ids=["zeros", "room", "dither", "rain", "tone", "speech", "quiet speech"],
)
def test_a_clip_of_one_kind_is_unchanged(samples_S: Samples) -> None:
    fitted = fit(samples_S)
    assert fitted.parts == ((0, len(samples_S)),) and np.array_equal(fitted.samples_S, samples_S)


def test_what_is_quiet_beside_loud_speech_and_no_silence_is_kept() -> None:
    far_S = syllables(5, -58)
    tones = [np.sin(2 * np.pi * f * times(5)) * np.exp(-4 * (times(5) % 0.5)) for f in (220, 277, 330)]
    music_S = (0.0012 * np.sum(tones, axis=0)).astype(np.float32)
    for name, quiet_S in {
        "a distant speaker": far_S,
        "music": music_S,
        "rain": noise(5, -45),
        "a distant speaker in a room": far_S + noise(5, -75),
    }.items():
        clip_S = np.concatenate([syllables(2, -14), quiet_S, syllables(2, -14)])
        assert fit(clip_S).used_s == pytest.approx(9.0, abs=0.1), name


def test_a_pause_within_speech_is_kept() -> None:
    clip_S = np.concatenate([syllables(2), zeros(0.8), syllables(2)])
    assert fit(clip_S).used_s == pytest.approx(4.8)


def test_a_click_in_silence_is_kept_and_hides_neither_silence_nor_speech() -> None:
    for amplitude in (0.05, 0.9):
        clip_S = np.concatenate([zeros(8), syllables(2, -30)])
        clip_S[4 * SAMPLE_RATE_HZ : 4 * SAMPLE_RATE_HZ + 60] = amplitude
        fitted = fit(clip_S)
        assert any(start <= 4.0 < end for start, end in parts_s(fitted))
        assert fitted.used_s == pytest.approx(3.0, abs=0.2) and fitted.end_s == pytest.approx(10.0, abs=0.1)


@pytest.mark.parametrize("seconds", [0.1, 0.2, 0.3, 0.9])
def test_a_short_clip_stands_in_the_middle_of_quiet(seconds: float) -> None:
    for before_s in (0.0, 6.0):
        clip_S = np.concatenate([zeros(before_s), syllables(seconds)])
        fitted = fit(clip_S)
        if fitted.used_s >= 1.0:
            continue
        assert len(fitted.samples_S) == 2 * SAMPLE_RATE_HZ
        kept_S = fitted.samples_S[fitted.num_before :][: round(fitted.used_s * SAMPLE_RATE_HZ)]
        (start, end) = fitted.parts[0]
        assert np.array_equal(kept_S, clip_S[start:end])
        assert fitted.time_in_clip_s(0) == fitted.start_s and fitted.time_in_clip_s(2) == fitted.end_s
        assert Waveform(fitted.samples_S).quality.peak_dbfs < 0
    assert np.array_equal(fit(syllables(seconds)).samples_S, fit(syllables(seconds)).samples_S)


def test_an_empty_clip_is_no_fault() -> None:
    fitted = fit(zeros(0))
    assert (fitted.parts, fitted.used_s, fitted.sound_s, fitted.time_in_clip_s(1)) == ((), 0.0, 0.0, 0.0)
