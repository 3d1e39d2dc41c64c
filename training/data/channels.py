"""Degrade clips by a channel (room, telephone, codec, microphone), as in uploaded recordings.

Axes: S samples at 16 kHz. Every change is drawn from the given generator. The codecs are those of libsndfile.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable

import numpy as np
import soundfile
import soxr

from hyper_model.audio import SAMPLE_RATE_HZ

_PHONE_HZ = 8_000


def _convolve(samples_S: np.ndarray, response: np.ndarray) -> np.ndarray:
    size = 1 << (len(samples_S) + len(response) - 1).bit_length()
    spectrum = np.fft.rfft(samples_S, size) * np.fft.rfft(response, size)
    return np.fft.irfft(spectrum, size)[: len(samples_S)].astype(np.float32)


def _band(samples_S: np.ndarray, low_hz: float, high_hz: float) -> np.ndarray:
    """Apply a band-pass filter with edges about a sixth of an octave wide."""
    spectrum = np.fft.rfft(samples_S)
    frequencies_hz = np.fft.rfftfreq(len(samples_S), 1 / SAMPLE_RATE_HZ)
    with np.errstate(divide="ignore"):
        gain = 1 / np.sqrt(1 + (frequencies_hz / high_hz) ** 12)
        if low_hz:
            gain = gain / np.sqrt(1 + (low_hz / np.maximum(frequencies_hz, 1e-3)) ** 8)
    return np.fft.irfft(spectrum * gain, len(samples_S)).astype(np.float32)


def reverberate(samples_S: np.ndarray, rng: random.Random) -> np.ndarray:
    """Add a room: a few early reflections and a decaying diffuse tail, 3 to 15 dB below the direct sound."""
    noise = np.random.default_rng(rng.randrange(2**32))
    decay_s = rng.uniform(0.15, 0.7)
    num_samples = int(decay_s * SAMPLE_RATE_HZ)
    times_s = np.arange(num_samples) / SAMPLE_RATE_HZ
    response = noise.standard_normal(num_samples) * 10 ** (-3 * times_s / decay_s)
    response[: int(rng.uniform(0.002, 0.012) * SAMPLE_RATE_HZ)] = 0.0
    response *= 10 ** (-rng.uniform(3.0, 15.0) / 20) / max(1e-9, float(np.sqrt(np.sum(response**2))))
    for _ in range(rng.randint(1, 5)):
        response[rng.randrange(1, min(num_samples, 480))] += rng.uniform(-0.4, 0.4)
    response[0] = 1.0
    return _convolve(samples_S, response)


def telephone(samples_S: np.ndarray, rng: random.Random) -> np.ndarray:
    """Pass 300 to 3,400 Hz at 8 kHz through a telephone codec: GSM full rate, mu-law, A-law or 32 kbit/s ADPCM."""
    banded_S = _band(samples_S, rng.uniform(150, 350), rng.uniform(3_000, 3_600))
    narrow = soxr.resample(banded_S, SAMPLE_RATE_HZ, _PHONE_HZ)
    coded = _through_file(narrow, _PHONE_HZ, "WAV", rng.choice(("GSM610", "ULAW", "ALAW", "IMA_ADPCM")))
    return soxr.resample(coded, _PHONE_HZ, SAMPLE_RATE_HZ)


def narrow_band(samples_S: np.ndarray, rng: random.Random) -> np.ndarray:
    """Resample to 8 to 12 kHz and back, as in old recorders and many corpora."""
    rate_hz = rng.choice((8_000, 8_000, 11_025, 12_000))
    return soxr.resample(soxr.resample(samples_S, SAMPLE_RATE_HZ, rate_hz), rate_hz, SAMPLE_RATE_HZ)


def compress(samples_S: np.ndarray, rng: random.Random) -> np.ndarray:
    """Encode as a small MP3, Vorbis or Opus file and decode it."""
    container, subtype = rng.choice((("MP3", "MPEG_LAYER_III"), ("OGG", "VORBIS"), ("OGG", "OPUS")))
    return _through_file(samples_S, SAMPLE_RATE_HZ, container, subtype, compression=rng.uniform(0.4, 1.0))


def far_microphone(samples_S: np.ndarray, rng: random.Random) -> np.ndarray:
    """Remove treble or bass, as a covered or cheap microphone does."""
    if rng.random() < 0.5:
        return _band(samples_S, 0.0, rng.uniform(2_200, 6_000))
    return _band(samples_S, rng.uniform(150, 500), 7_800)


def overdrive(samples_S: np.ndarray, rng: random.Random) -> np.ndarray:
    """Clip the loudest peaks, as a recording level set too high does."""
    limit = float(np.quantile(np.abs(samples_S), rng.uniform(0.975, 0.998)))
    return np.clip(samples_S, -limit, limit)


def _through_file(
    samples_S: np.ndarray, rate_hz: int, container: str, subtype: str, *, compression: float | None = None
) -> np.ndarray:
    """Encode and decode in memory; the result has the length of the input."""
    peak = max(1e-6, float(np.abs(samples_S).max()))
    file = io.BytesIO()
    loud_S = samples_S * (0.8 / peak)
    soundfile.write(file, loud_S, rate_hz, format=container, subtype=subtype, compression_level=compression)
    file.seek(0)
    decoded, _ = soundfile.read(file, dtype="float32")
    decoded = decoded[: len(samples_S)] * np.float32(peak / 0.8)
    return np.pad(decoded, (0, len(samples_S) - len(decoded)))


_CHANNELS: dict[str, tuple[Callable[[np.ndarray, random.Random], np.ndarray], int]] = {
    "room": (reverberate, 30),
    "telephone": (telephone, 22),
    "narrow band": (narrow_band, 14),
    "codec": (compress, 16),
    "microphone": (far_microphone, 12),
    "overdriven": (overdrive, 6),
}


def degrade(samples_S: np.ndarray, rng: random.Random) -> tuple[np.ndarray, str]:
    """Draw a channel and apply it to the clip.

    Returns:
        float32 [S] of unchanged length and level, and the name of the channel.
    """
    name = rng.choices(list(_CHANNELS), [weight for _, weight in _CHANNELS.values()])[0]
    channel, _ = _CHANNELS[name]
    worse_S = channel(samples_S, rng)[: len(samples_S)].astype(np.float32)
    worse_S = np.pad(worse_S, (0, len(samples_S) - len(worse_S)))
    power, worse_power = float(np.mean(samples_S**2)), float(np.mean(worse_S**2))
    return worse_S * np.float32(np.sqrt(power / max(worse_power, 1e-12))), name
