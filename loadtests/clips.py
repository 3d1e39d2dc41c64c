"""Cut clips unknown to any cache from real recordings, with faint noise, from a fixed seed.

This module depends on no service; soundfile reads and writes the files.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import soundfile

SAMPLE_RATE_HZ = 16_000
NOISE_AMPLITUDE = 1e-3
# Formats of libsndfile; other files of a folder are skipped.
SUFFIXES = (".wav", ".flac", ".mp3", ".ogg")


class FreshClips:
    """Clips of one length, cut from the recordings of a folder.

    Raises:
        FileNotFoundError: The folder has no recording at 16 kHz of sufficient length.
    """

    def __init__(self, folder: Path, duration_s: float = 5.0) -> None:
        self.num_samples = round(duration_s * SAMPLE_RATE_HZ)
        self.sources: list[np.ndarray] = []
        for path in sorted(folder.iterdir()):
            if path.suffix in SUFFIXES:
                try:
                    samples, rate_hz = soundfile.read(path, dtype="float32", always_2d=True)
                except soundfile.LibsndfileError:
                    continue
                if rate_hz == SAMPLE_RATE_HZ and len(samples) > self.num_samples:
                    self.sources.append(samples.mean(axis=1))
        if not self.sources:
            raise FileNotFoundError(f"no recording of more than {duration_s:g} s at {SAMPLE_RATE_HZ} Hz in {folder}")

    def make(self, seed: int) -> np.ndarray:
        """Return clip number `seed`, float32 [S]; another number gives another clip."""
        random = np.random.default_rng(seed)
        source = self.sources[seed % len(self.sources)]
        start = int(random.integers(0, len(source) - self.num_samples))
        noise_S = random.uniform(-NOISE_AMPLITUDE, NOISE_AMPLITUDE, self.num_samples)
        clip_S = source[start : start + self.num_samples] + noise_S
        return np.clip(clip_S, -1.0, 1.0).astype(np.float32)


def wav(samples_S: np.ndarray) -> bytes:
    """Encode a clip as a WAV file."""
    file = io.BytesIO()
    soundfile.write(file, samples_S, SAMPLE_RATE_HZ, format="WAV", subtype="PCM_16")
    return file.getvalue()
