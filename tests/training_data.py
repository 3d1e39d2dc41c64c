"""Makes a small bank and stand-ins for the recordings, so that training code runs without synthesizers or downloads."""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from pathlib import Path

import numpy as np
import soundfile

from hyper_model.audio import SAMPLE_RATE_HZ
from training.lines import draw_line
from training.sounds import list_recordings
from training.voices import TARGET_RMS, Utterance, list_voices


def write_bank(folder: Path, *, lines_per_voice: int = 3) -> Path:
    """Let every voice "speak" with a tone of its own: real files of the bank's format."""
    folder.mkdir(parents=True)
    for number, voice in enumerate(list_voices()):
        rng = random.Random(voice.name)
        utterances, pieces, start = [], [], 0
        for _ in range(lines_per_voice):
            num_samples = int(rng.uniform(0.4, 0.8) * SAMPLE_RATE_HZ)
            wave = np.sin(2 * np.pi * (120 + 7 * number) * np.arange(num_samples) / SAMPLE_RATE_HZ) * TARGET_RMS * 1.4
            pieces.append((wave * 32767).astype("<i2"))
            utterances.append(Utterance(voice.name, voice.sex, draw_line(rng).text, start, num_samples))
            start += num_samples
        (folder / f"{voice.name}.0.i16").write_bytes(np.concatenate(pieces).tobytes())
        (folder / f"{voice.name}.0.json").write_text(json.dumps([asdict(u) for u in utterances]))
    return folder


def write_sounds(folder: Path) -> Path:
    """Put 0.3 s of noise where each recording belongs; the files are WAV whatever their names say."""
    noise = np.random.default_rng(0).standard_normal(SAMPLE_RATE_HZ * 3 // 10).astype(np.float32) * 0.1
    for recording in list_recordings():
        for name in recording.files:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, noise, SAMPLE_RATE_HZ, format="WAV")
    return folder
