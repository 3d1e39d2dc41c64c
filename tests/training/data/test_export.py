"""An export is read back unchanged, resumes after an interruption, and states its sources' terms."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner

from hyper_model.audio import decode
from hyper_model.trace_parser import TraceFormat, parse_text
from tests.noise_data import write_fsd50k
from tests.training_data import write_bank, write_sounds
from training.cli.data import data
from training.data.examples import check_examples, read_examples
from training.data.export import ExportPlan, export_scenes
from training.data.sources.downloads import SOUNDS_FOLDER, MissingDataError


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    write_bank(folder / "bank", lines_per_voice=6)
    write_sounds(folder / "assets" / SOUNDS_FOLDER)
    return folder


def _plan(work: Path, **fields: object) -> ExportPlan:
    return ExportPlan(work / "bank", work / "assets" / SOUNDS_FOLDER, "train", 12, **fields)  # pyright: ignore[reportArgumentType]


def test_rows_come_back_with_question_choices_answer_and_a_clip_that_decodes(work: Path, tmp_path: Path) -> None:
    rows_file = export_scenes(_plan(work), tmp_path / "out", num_workers=2)
    rows = [json.loads(line) for line in rows_file.read_text(encoding="utf-8").splitlines()]
    examples = list(read_examples(rows_file))
    assert len(rows) == len(examples) == 12
    for row, example in zip(rows, examples, strict=True):
        parsed = parse_text(row["output"])
        assert parsed.format is TraceFormat.STRICT
        assert example.answer == parsed.trace.final_answer
        assert not example.choices or example.answer in example.choices
        clip = decode(example.audio.read_bytes())
        assert clip.duration_s == pytest.approx(row["duration_s"], abs=0.001)
        assert parsed.trace.environment == row["environment"] == example.environment
        assert (example.transcript, example.num_speakers) == (row["transcript"], row["num_speakers"])
    assert check_examples(rows_file).bad_audio == ()
    licences = json.loads((tmp_path / "out/LICENCES.json").read_text(encoding="utf-8"))
    assert set(licences["recordings"]) == {row["recording"] for row in rows} - {None}
    assert all("CC" in entry["licence"] for entry in licences["recordings"].values())
    assert "WordNet" in licences["texts"] and licences["voices"]


def test_written_parts_have_the_stated_ratio(work: Path, tmp_path: Path) -> None:
    rows_file = export_scenes(_plan(work, suite="snr-5", with_parts=True, audio="wav"), tmp_path / "out", num_workers=1)
    for line in rows_file.read_text(encoding="utf-8").splitlines():
        stem = tmp_path / "out" / json.loads(line)["audios"][0].removesuffix(".wav")
        powers = [np.mean(soundfile.read(f"{stem}.{part}.wav")[0] ** 2) for part in ("speech", "background")]
        assert 10 * np.log10(powers[0] / powers[1]) == pytest.approx(5.0, abs=0.01)


def test_a_broken_export_goes_on_and_ends_as_an_unbroken_one(work: Path, tmp_path: Path) -> None:
    whole = export_scenes(_plan(work), tmp_path / "whole", num_workers=1)
    folder = tmp_path / "broken"
    export_scenes(_plan(work), folder, num_workers=1)
    # After a killed build: a chunk without its rows, a clip half written, and no list.
    (folder / "chunks/000000.jsonl").rename(folder / "chunks/000000.partial")
    (folder / "audio/000003.flac").write_bytes(b"fLaC")
    (folder / "train.jsonl").unlink()
    rows = export_scenes(_plan(work), folder, num_workers=1)
    assert rows.read_bytes() == whole.read_bytes()
    assert (folder / "audio/000003.flac").read_bytes() == (tmp_path / "whole/audio/000003.flac").read_bytes()
    times = {path: path.stat().st_mtime_ns for path in (folder / "audio").iterdir()}
    export_scenes(_plan(work), folder, num_workers=1)
    assert times == {path: path.stat().st_mtime_ns for path in (folder / "audio").iterdir()}


def test_another_plan_does_not_write_into_the_same_folder(work: Path, tmp_path: Path) -> None:
    export_scenes(_plan(work), tmp_path / "out", num_workers=1)
    with pytest.raises(MissingDataError, match="holds another export"):
        export_scenes(_plan(work, suite="overlap"), tmp_path / "out", num_workers=1)


def test_the_command_exports_over_noise_of_ones_own(work: Path, tmp_path: Path) -> None:
    noise = write_fsd50k(tmp_path / "fsd")
    arguments = ["export", str(tmp_path / "out"), "--work", str(work), "--items", "8", "--noise", str(noise)]
    done = CliRunner().invoke(data, [*arguments, "--workers", "1"], catch_exceptions=False)
    assert done.exit_code == 0 and "8 items in" in done.output
    licences = json.loads((tmp_path / "out/LICENCES.json").read_text(encoding="utf-8"))["recordings"]
    assert set(licences) <= {str(path) for path in (noise / "FSD50K.dev_audio").iterdir()}
    assert any("by/3.0" in entry["licence"] for entry in licences.values())


def test_the_command_names_what_it_does_not_know(work: Path, tmp_path: Path) -> None:
    arguments = ["export", str(tmp_path / "out"), "--work", str(work)]
    unknown = CliRunner().invoke(data, [*arguments, "--suite", "loud"])
    assert unknown.exit_code == 2 and "'loud' is not one of 'hard-multi-speaker'" in unknown.output
    both = CliRunner().invoke(data, [*arguments, "--suite", "snr-5", "--noise", str(tmp_path)])
    assert both.exit_code == 2 and "omit --noise" in both.output
