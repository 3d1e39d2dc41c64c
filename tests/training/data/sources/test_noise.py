"""A user's folders of noise are read in the layouts of MUSAN and FSD50K, with labels, splits and licences."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from tests.noise_data import write_fsd50k, write_musan, write_noise
from tests.training_data import write_bank, write_sounds
from training.data.questions import draw_example
from training.data.scenes import SceneBuilder
from training.data.sources.downloads import MissingDataError
from training.data.sources.noise import NoiseFolder, read_noise
from training.data.sources.recordings import BACKGROUND_SPEECH
from training.data.sources.voices import Bank


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
        write_noise(path, 0.5, 16_000, value=0.0)
    with pytest.raises(MissingDataError, match=r"cannot be used; the last, .*digital silence"):
        NoiseFolder([folder], "train").draw(random.Random(0), 8_000)


def test_another_folder_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(MissingDataError, match="is no noise folder: it holds neither MUSAN"):
        NoiseFolder([tmp_path], "train")
