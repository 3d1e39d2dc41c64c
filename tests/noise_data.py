"""Folders of noise in the layouts of MUSAN and FSD50K."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import soundfile


def write_noise(path: Path, seconds: float, rate_hz: int, *, value: float | None = None) -> None:
    """Write noise of `seconds` at `rate_hz`, or a constant `value`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = np.random.default_rng(len(path.name)).standard_normal(int(seconds * rate_hz)) * 0.1
    soundfile.write(path, samples if value is None else np.full_like(samples, value), rate_hz)


def write_musan(folder: Path) -> Path:
    for part, source in (("noise", "free-sound"), ("music", "fma"), ("speech", "librivox")):
        names = [f"{part}-{source}-{number:04d}" for number in range(30)]
        for name in names:
            write_noise(folder / part / source / f"{name}.wav", 0.7, 16_000)
        about = "\n\n".join(f"{name}.wav\nLicense: Public Domain ({name})" for name in names[:-1])
        (folder / part / source / "LICENSE").write_text(about, encoding="utf-8")
    return folder


def write_fsd50k(folder: Path) -> Path:
    (folder / "FSD50K.ground_truth").mkdir(parents=True)
    (folder / "FSD50K.metadata").mkdir()
    (folder / "FSD50K.ground_truth/dev.csv").write_text(
        'fname,labels,mids,split\n64760,"Electric_guitar,Guitar,Music","/m/1,/m/2,/m/3",train\n'
        '16399,"Rain,Water","/m/4,/m/5",val\n'
        '99,"Male_speech_and_man_speaking,Speech,Human_voice","/m/6",train\n',
        encoding="utf-8",
    )
    (folder / "FSD50K.ground_truth/eval.csv").write_text('fname,labels,mids\n37199,"Rain,Water","/m/4"\n')
    about = {
        "64760": {
            "title": "guitar.wav",
            "uploader": "somebody",
            "license": "http://creativecommons.org/licenses/by/3.0/",
        }
    }
    (folder / "FSD50K.metadata/dev_clips_info_FSD50K.json").write_text(json.dumps(about), encoding="utf-8")
    for name in ("64760", "16399", "99"):
        write_noise(folder / f"FSD50K.dev_audio/{name}.wav", 9.0, 44_100)
    write_noise(folder / "FSD50K.eval_audio/37199.wav", 0.4, 44_100)
    return folder
