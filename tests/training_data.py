"""Makes a small bank and stand-ins for the recordings, so that training code runs without synthesizers or downloads."""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from pathlib import Path

import numpy as np
import soundfile

from hyper_model.audio import SAMPLE_RATE_HZ
from training.lines import SLOTS, draw_line
from training.sounds import list_recordings
from training.texts import split_of
from training.voices import TARGET_RMS, Split, Utterance, list_voices


def write_bank(folder: Path, *, lines_per_voice: int = 3) -> Path:
    """Let every voice "speak" with a tone of its own: real files of the bank's format."""
    folder.mkdir(parents=True)
    for number, voice in enumerate(list_voices()):
        rng = random.Random(voice.name)
        utterances, pieces, start = [], [], 0
        for place in range(lines_per_voice):
            num_samples = int(rng.uniform(0.4, 0.8) * SAMPLE_RATE_HZ)
            wave = np.sin(2 * np.pi * (120 + 7 * number) * np.arange(num_samples) / SAMPLE_RATE_HZ) * TARGET_RMS * 1.4
            pieces.append((wave * 32767).astype("<i2"))
            is_open = place % 2 == 1
            text = _open_line(rng, voice.split) if is_open else draw_line(rng).text
            utterances.append(Utterance(voice.name, voice.sex, text, start, num_samples, is_open))
            start += num_samples
        (folder / f"{voice.name}.0.i16").write_bytes(np.concatenate(pieces).tobytes())
        (folder / f"{voice.name}.0.json").write_text(json.dumps([asdict(u) for u in utterances]))
    return folder


def _open_line(rng: random.Random, split: Split) -> str:
    while True:
        words = [rng.choice(SLOTS[slot]) for slot in ("name", "quality", "object", "animal")]
        text = "{} keeps one {} {} and some {}".format(*words)
        if split_of(text) == split:
            return text


def write_sounds(folder: Path) -> Path:
    """Put 0.3 s of noise where each recording belongs; the files are WAV whatever their names say."""
    noise = np.random.default_rng(0).standard_normal(SAMPLE_RATE_HZ * 3 // 10).astype(np.float32) * 0.1
    for recording in list_recordings():
        for name in recording.files:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, noise, SAMPLE_RATE_HZ, format="WAV")
    return folder


def write_wordnet(folder: Path) -> Path:
    """Write files of WordNet's form with sentences of our own, enough of them for every split to have some."""
    folder.mkdir(parents=True)
    rng = random.Random(0)
    for part in ("noun", "verb", "adj", "adv"):
        rows = ["  1 This line stands for the licence.  "]
        for number in range(400):
            things = " ".join(rng.choice(SLOTS["object"]) for _ in range(3))
            quality, city = rng.choice(SLOTS["quality"]), rng.choice(SLOTS["city"])
            gloss = f'a {quality} kind of {things}; "the {things} was sold in {city}"'
            rows.append(f"{number:08d} 03 n 01 thing 0 000 | {gloss}  ")
        (folder / f"data.{part}").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder
