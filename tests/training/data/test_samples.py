"""Sample clips have the stated kinds and formats, for any lines in the bank."""

from __future__ import annotations

from pathlib import Path

import pytest

from hyper_model.audio import decode
from tests.training_data import write_bank, write_sounds
from training.data.samples import write_samples
from training.data.scenes import SceneBuilder
from training.data.sources.voices import Bank


def test_ten_clips_decode_and_have_the_stated_number_of_people(tmp_path: Path) -> None:
    bank, recordings = Bank(write_bank(tmp_path / "bank", lines_per_voice=6)), write_sounds(tmp_path / "sounds")
    builders = {n: SceneBuilder(bank, recordings, "test", num_speakers=n, snr_db=(10.0, 20.0)) for n in range(5)}
    rows = write_samples(builders, tmp_path / "samples")
    assert [row["num_speakers"] for row in rows] == [0, 1, 1, 1, 2, 2, 2, 3, 4, 1]
    for row in rows:
        assert row["answer"] in row["choices"]
        clip = decode((tmp_path / "samples" / row["file"]).read_bytes())
        assert clip.duration_s == pytest.approx(row["duration_s"], abs=0.2)
