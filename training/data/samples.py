"""Write a few held-out clips in common file formats, with questions and truth, for the HTTP tests.

Seeds, formats and kinds are fixed constants, chosen before any model run. This module depends on no model.
"""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np

from hyper_model.audio import Waveform
from hyper_model.ffmpeg import find_ffmpeg
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


# Names of ffmpeg: containers under another name than their suffix, and codecs other than the container's usual one.
_MUXERS = {"m4a": "ipod"}
_CODECS = {"ogg": "libvorbis"}


def _draw_askable(builder: SceneBuilder, kind: str, first_seed: int) -> tuple[Scene, np.ndarray]:
    """Draw scenes of every hundredth seed; return the first with this kind of question."""
    drawn = map(builder.draw, itertools.count(first_seed, 100))
    return next((scene, samples_S) for scene, samples_S in drawn if kind in possible_kinds(scene))


def _write_clip(clip: Waveform, path: Path) -> None:
    """Encode a clip in the format of the file's suffix, at 48 kbit/s if the format is lossy."""
    suffix = path.suffix.removeprefix(".")
    if suffix == "wav":
        path.write_bytes(clip.to_wav())
        return
    segment: Any = clip.segment()
    segment.converter = find_ffmpeg()
    bitrate = None if suffix == "flac" else "48k"
    segment.export(path, format=_MUXERS.get(suffix, suffix), codec=_CODECS.get(suffix), bitrate=bitrate).close()


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
        _write_clip(Waveform(samples_S), path)
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
