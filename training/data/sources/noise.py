"""Read background noise from unpacked MUSAN or FSD50K folders, with labels, splits and licences.

Axes: S samples at 16 kHz. Each draw reads only the needed part of a file; nothing is cached.

MUSAN (Snyder, Chen and Povey, arXiv 1510.08484) is `noise/`, `music/` and `speech/`, each with folders of WAV files and
a LICENSE. FSD50K (Fonseca et al., arXiv 2010.00475) lists files, labels and split in `FSD50K.ground_truth/dev.csv` and
`eval.csv`. The licence of each clip is in `FSD50K.metadata/*_clips_info_FSD50K.json`.
"""

from __future__ import annotations

import csv
import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr

from hyper_model.audio import SAMPLE_RATE_HZ, decode
from hyper_model.errors import HyperError
from training.data.sources.downloads import MissingDataError
from training.data.sources.open_text import Split
from training.data.sources.recordings import BACKGROUND_SPEECH

_MUSAN_LABELS = {"noise": "noise", "music": "music", "speech": BACKGROUND_SPEECH}
_FSD50K_PARTS = {"dev.csv": "FSD50K.dev_audio", "eval.csv": "FSD50K.eval_audio"}
# FSD50K labels of human speech; a clip with one of them counts as background speech, whatever its other labels.
_SPEECH_LABELS = frozenset(
    {"Speech", "Conversation", "Male_speech_and_man_speaking", "Female_speech_and_woman_speaking", "Human_voice"}
    | {"Child_speech_and_kid_speaking", "Speech_synthesizer", "Whispering", "Chatter", "Crowd"}
)
_MAX_TRIES = 50


@dataclass(frozen=True)
class NoiseFile:
    """One recording of a noise folder."""

    path: Path
    label: str
    split: Split
    source: str
    """`musan` or `fsd50k`."""
    licence: str
    """The data set's licence for this file: a text, an address, or the path of the licence file."""
    credit: str


class NoiseFolder:
    """The recordings of one split in MUSAN or FSD50K folders, a source of backgrounds.

    Raises:
        MissingDataError: a folder is neither data set, or holds no recording of the split.
    """

    def __init__(self, folders: Sequence[Path], split: Split) -> None:
        self.files = tuple(file for folder in folders for file in read_noise(folder) if file.split == split)
        if not self.files:
            raise MissingDataError(f"no {split} recordings in {', '.join(map(str, folders))}")
        self._by_label: dict[str, list[NoiseFile]] = {}
        for file in self.files:
            self._by_label.setdefault(file.label, []).append(file)
        self.labels = tuple(sorted(self._by_label))

    def draw(self, rng: random.Random, num_samples: int) -> tuple[np.ndarray, str, str]:
        """Draw a background, uniform over labels, then over the files of a label.

        Returns:
            float32 [S], label and file.

        Raises:
            MissingDataError: too many files in a row are unreadable or contain only digital silence.
        """
        fault = "holds digital silence"
        for _ in range(_MAX_TRIES):
            label = rng.choice(self.labels)
            file = rng.choice(self._by_label[label])
            try:
                background_S = _read_part(file.path, rng, num_samples)
            except (OSError, soundfile.SoundFileError, HyperError) as error:
                fault = str(error)
                continue
            if background_S.any():
                return background_S, file.label, str(file.path)
        raise MissingDataError(f"{_MAX_TRIES} recordings in a row cannot be used; the last, {file.path}: {fault}")

    def licences(self) -> dict[str, dict[str, str]]:
        """Return label, source, licence and credit of every file, by path."""
        return {
            str(f.path): {"label": f.label, "source": f.source, "licence": f.licence, "credit": f.credit}
            for f in self.files
        }


def read_noise(folder: Path) -> Iterator[NoiseFile]:
    """Yield the recordings of a MUSAN or FSD50K folder; its contents identify the data set.

    Raises:
        MissingDataError: the folder is neither.
    """
    if (folder / "FSD50K.ground_truth").is_dir():
        yield from _read_fsd50k(folder)
    elif any((folder / part).is_dir() for part in _MUSAN_LABELS):
        yield from _read_musan(folder)
    else:
        raise MissingDataError(
            f"{folder} is no noise folder: it holds neither MUSAN's noise/, music/ and speech/ nor FSD50K.ground_truth/"
        )


def _read_musan(folder: Path) -> Iterator[NoiseFile]:
    for part, label in _MUSAN_LABELS.items():
        for source in sorted(path for path in (folder / part).glob("*") if path.is_dir()):
            licence_file = source / "LICENSE"
            text = licence_file.read_text(encoding="utf-8", errors="replace") if licence_file.exists() else ""
            for path in sorted(source.glob("*.wav")):
                # MUSAN has no splits. The file name decides, so that added files move no other file.
                place = int(hashlib.sha256(path.name.encode()).hexdigest()[:8], 16) % 10
                split: Split = "test" if place == 0 else "validation" if place == 1 else "train"
                own = _paragraph(text, path.stem)
                licence = own or (f"see {licence_file.relative_to(folder)}" if text else "no LICENSE beside it")
                yield NoiseFile(path, label, split, "musan", licence, f"{part}/{source.name}/{path.name}")


def _paragraph(text: str, name: str) -> str:
    """Return the lines about one file, from the line with its name to the next blank line."""
    lines = text.splitlines()
    for index, line in enumerate(lines):
        if name in line:
            paragraph = [line.strip()]
            for following in lines[index + 1 :]:
                if not following.strip():
                    break
                paragraph.append(following.strip())
            return " ".join(paragraph)
    return ""


def _read_fsd50k(folder: Path) -> Iterator[NoiseFile]:
    for table, audio in _FSD50K_PARTS.items():
        path = folder / "FSD50K.ground_truth" / table
        if not path.exists():
            continue
        info_file = folder / "FSD50K.metadata" / f"{table.removesuffix('.csv')}_clips_info_FSD50K.json"
        clips: dict[str, dict[str, Any]] = (
            json.loads(info_file.read_text(encoding="utf-8")) if info_file.exists() else {}
        )
        with path.open(encoding="utf-8", newline="") as rows:
            for row in csv.DictReader(rows):
                if not row.get("fname") or not row.get("labels"):
                    raise MissingDataError(f"{path}: every row needs fname and labels, got {row}")
                labels = row["labels"].split(",")
                # The first label is the most specific one; its parents follow.
                is_speech = not _SPEECH_LABELS.isdisjoint(labels)
                label = BACKGROUND_SPEECH if is_speech else labels[0].replace("_", " ").lower()
                split: Split = "test" if table == "eval.csv" else "validation" if row.get("split") == "val" else "train"
                about = clips.get(row["fname"], {})
                licence = str(about.get("license") or "no FSD50K.metadata beside it")
                credit = f"{about.get('title', row['fname'])} by {about.get('uploader', 'unknown')} on freesound.org"
                yield NoiseFile(folder / audio / f"{row['fname']}.wav", label, split, "fsd50k", licence, credit)


def _read_part(path: Path, rng: random.Random, num_samples: int) -> np.ndarray:
    """Read a random part of a file as float32 [S]; a short file is repeated."""
    try:
        with soundfile.SoundFile(path) as file:
            wanted = int(np.ceil(num_samples * file.samplerate / SAMPLE_RATE_HZ))
            if file.frames > wanted:
                file.seek(rng.randrange(file.frames - wanted))
            samples = file.read(wanted, dtype="float32", always_2d=True).mean(axis=1)
            samples_S = soxr.resample(samples, file.samplerate, SAMPLE_RATE_HZ, quality="HQ").astype(np.float32)
    except soundfile.SoundFileError:
        samples_S = decode(path.read_bytes()).samples_S
        if len(samples_S) > num_samples:
            start = rng.randrange(len(samples_S) - num_samples)
            samples_S = samples_S[start : start + num_samples]
    if not len(samples_S):
        return np.zeros(num_samples, np.float32)
    return np.resize(samples_S, num_samples)
