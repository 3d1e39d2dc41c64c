"""Degraded channels: length and level are preserved, the sound is not, and a seed is reproducible."""

from __future__ import annotations

import random

import numpy as np

from hyper_model.audio import SAMPLE_RATE_HZ
from training.data.channels import degrade, telephone


def _noise(seconds: float) -> np.ndarray:
    noise = np.random.default_rng(0).standard_normal(int(seconds * SAMPLE_RATE_HZ))
    return (0.05 * noise).astype(np.float32)


def test_every_channel_keeps_length_and_level_and_is_drawn_the_same_again() -> None:
    samples_S = _noise(1.3)
    seen: set[str] = set()
    for seed in range(80):
        worse_S, name = degrade(samples_S, random.Random(seed))
        again_S, again = degrade(samples_S, random.Random(seed))
        seen.add(name)
        assert (worse_S.dtype, worse_S.shape, name) == (np.float32, samples_S.shape, again)
        np.testing.assert_array_equal(worse_S, again_S)
        assert np.isfinite(worse_S).all()
        assert abs(10 * np.log10(np.mean(worse_S**2) / np.mean(samples_S**2))) < 0.01
        assert not np.allclose(worse_S, samples_S, atol=1e-3)
    assert seen == {"room", "telephone", "narrow band", "codec", "microphone", "overdriven"}


def test_a_telephone_passes_little_above_four_kilohertz() -> None:
    spectrum = np.abs(np.fft.rfft(telephone(_noise(2.0), random.Random(0)))) ** 2
    frequencies_hz = np.fft.rfftfreq(2 * SAMPLE_RATE_HZ, 1 / SAMPLE_RATE_HZ)
    assert spectrum[frequencies_hz > 4_200].sum() < 1e-3 * spectrum.sum()


def test_digital_silence_stays_finite() -> None:
    for seed in range(30):
        worse_S, _ = degrade(np.zeros(8_000, np.float32), random.Random(seed))
        assert np.isfinite(worse_S).all()
