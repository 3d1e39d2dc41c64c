"""Write a few held-out clips in common file formats, with questions and truth, for the HTTP tests.

Seeds, formats and kinds are fixed constants, chosen before any model run. This module depends on no model.
"""

from __future__ import annotations

import itertools
import json
import random
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from hyper_model.audio import SAMPLE_RATE_HZ, find_ffmpeg
from training.data.clips import SEED_STRIDE
from training.data.questions import draw_example, possible_kinds
from training.data.scenes import Scene, SceneBuilder

FIRST_SEED = SEED_STRIDE["test"] + 8_000_000

# (name, kind, people, file format): different numbers of people and all documented file formats.
_SAMPLES = (
    ("environment-only", "environment", 0, "wav"),
    ("one-voice", "free", 1, "mp3"),
    ("one-voice-word", "word", 1, "flac"),
    ("one-voice-count", "count", 1, "ogg"),
    ("two-voices", "count", 2, "m4a"),
    ("two-voices-first", "first", 2, "mp3"),
    ("two-voices-last", "last", 2, "webm"),
    ("three-voices", "says", 3, "flac"),
    ("four-voices", "count", 4, "mp3"),
    ("background-present", "present", 1, "wav"),
)


def _draw_askable(builder: SceneBuilder, kind: str, first_seed: int) -> tuple[Scene, np.ndarray]:
    """Draw scenes of every hundredth seed; return the first with this kind of question."""
    drawn = map(builder.draw, itertools.count(first_seed, 100))
    return next((scene, samples_S) for scene, samples_S in drawn if kind in possible_kinds(scene))


def write_samples(builder_for: dict[int, SceneBuilder], folder: Path) -> list[dict[str, Any]]:
    """Write the clips and `truth.json` into `folder`; return the truth, one row per clip.

    Args:
        builder_for: number of people -> builder of test scenes with this number, at an SNR of 10 to 20 dB.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for index, (name, kind, num_people, suffix) in enumerate(_SAMPLES):
        scene, samples_S = _draw_askable(builder_for[num_people], kind, FIRST_SEED + index)
        example = draw_example(scene, random.Random(index), kind=kind, with_choices=True)
        path = folder / f"{name}.{suffix}"
        if suffix in ("wav", "flac"):
            soundfile.write(path, samples_S, SAMPLE_RATE_HZ, subtype="PCM_16")
        else:
            wav = path.with_suffix(".partial.wav")
            soundfile.write(wav, samples_S, SAMPLE_RATE_HZ)
            command = [find_ffmpeg(), "-nostdin", "-loglevel", "error", "-y", "-i", wav, "-b:a", "48k", path]
            subprocess.run(command, check=True)
            wav.unlink()
        rows.append(
            {
                "file": path.name,
                "question": example.question,
                "choices": list(example.choices),
                "answer": example.answer,
                "environment": scene.environment,
                "num_speakers": num_people,
                "transcript": scene.transcript,
                "duration_s": round(scene.duration_s, 3),
            }
        )
    (folder / "truth.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return rows
