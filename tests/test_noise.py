"""Folders of noise of one's own are read as MUSAN and FSD50K unpack, with their labels, splits and licences."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.training_data import write_bank, write_sounds
from training.assets import MissingDataError
from training.noise import NoiseFolder, read_noise
from training.questions import draw_example
from training.scenes import SceneBuilder
from training.sounds import BACKGROUND_SPEECH
from training.voices import Bank


def _write(path: Path, seconds: float, rate_hz: int, *, value: float | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = np.random.default_rng(len(path.name)).standard_normal(int(seconds * rate_hz)) * 0.1
    soundfile.write(path, samples if value is None else np.full_like(samples, value), rate_hz)


def write_musan(folder: Path) -> Path:
    for part, source in (("noise", "free-sound"), ("music", "fma"), ("speech", "librivox")):
        names = [f"{part}-{source}-{number:04d}" for number in range(30)]
        for name in names:
            _write(folder / part / source / f"{name}.wav", 0.7, 16_000)
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
        _write(folder / f"FSD50K.dev_audio/{name}.wav", 9.0, 44_100)
    _write(folder / "FSD50K.eval_audio/37199.wav", 0.4, 44_100)
    return folder


def test_musan_has_three_labels_a_split_by_name_and_a_licence_each(tmp_path: Path) -> None:
    files = list(read_noise(write_musan(tmp_path / "musan")))
    assert {file.label for file in files} == {"noise", "music", BACKGROUND_SPEECH}
    assert {file.split for file in files} == {"train", "validation", "test"}
    assert sum(file.split == "train" for file in files) > 60
    by_name = {file.path.stem: file for file in files}
    assert by_name["noise-free-sound-0003"].licence.endswith("License: Public Domain (noise-free-sound-0003)")
    assert by_name["music-fma-0029"].licence == "see music/fma/LICENSE"


def test_fsd50k_is_read_by_its_own_tables(tmp_path: Path) -> None:
    files = {file.path.stem: file for file in read_noise(write_fsd50k(tmp_path / "fsd"))}
    assert {name: (f.label, f.split) for name, f in files.items()} == {
        "64760": ("electric guitar", "train"),
        "16399": ("rain", "validation"),
        "99": (BACKGROUND_SPEECH, "train"),
        "37199": ("rain", "test"),
    }
    assert "by/3.0" in files["64760"].licence
    assert files["64760"].credit == "guitar.wav by somebody on freesound.org"
    assert files["37199"].licence == "no FSD50K.metadata beside it"


def test_a_background_has_the_asked_length_whatever_the_file_holds(tmp_path: Path) -> None:
    folder = write_fsd50k(tmp_path / "fsd")
    for split in ("train", "test"):
        noise = NoiseFolder([folder], split)
        for seed in range(8):
            background_S, label, name = noise.draw(random.Random(seed), 48_000)
            again_S, *_ = noise.draw(random.Random(seed), 48_000)
            assert (background_S.dtype, background_S.shape) == (np.float32, (48_000,))
            np.testing.assert_array_equal(background_S, again_S)
            assert noise.licences()[name]["label"] == label


def test_scenes_over_own_noise_keep_the_ratio_and_name_the_file(tmp_path: Path) -> None:
    bank, recordings = Bank(write_bank(tmp_path / "bank")), write_sounds(tmp_path / "sounds")
    noise = NoiseFolder([write_musan(tmp_path / "musan"), write_fsd50k(tmp_path / "fsd")], "train")
    builder = SceneBuilder(bank, recordings, "train", noise=noise)
    seen: set[str] = set()
    for seed in range(40):
        rendered = builder.draw_parts(seed)
        scene = rendered.scene
        draw_example(scene, random.Random(seed))
        if scene.recording is None:
            continue
        seen.add(scene.environment)
        assert noise.licences()[scene.recording]["label"] == scene.environment
        if scene.snr_db is not None:
            powers = [
                float(np.mean(part.astype(np.float64) ** 2)) for part in (rendered.speech_S, rendered.background_S)
            ]
            assert 10 * np.log10(powers[0] / powers[1]) == pytest.approx(scene.snr_db, abs=0.01)
    assert seen == {"noise", "music", "electric guitar", BACKGROUND_SPEECH}


def test_damaged_and_silent_files_are_passed_over_and_a_folder_of_nothing_else_is_named(tmp_path: Path) -> None:
    folder = write_musan(tmp_path / "musan")
    train = [file.path for file in read_noise(folder) if file.split == "train"]
    for path in train[::2]:
        path.write_bytes(b"RIFF no sound")
    background_S, _, name = NoiseFolder([folder], "train").draw(random.Random(0), 8_000)
    assert background_S.any() and Path(name) in train[1::2]
    for path in train:
        _write(path, 0.5, 16_000, value=0.0)
    with pytest.raises(MissingDataError, match=r"cannot be used; the last, .*digital silence"):
        NoiseFolder([folder], "train").draw(random.Random(0), 8_000)


def test_another_folder_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(MissingDataError, match="is no noise folder: it holds neither MUSAN"):
        NoiseFolder([tmp_path], "train")
