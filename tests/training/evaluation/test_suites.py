"""Data sets and recorded clips as suites; test_score.py has the tests for scenes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hyper_model.errors import HyperError
from tests.serving import tone
from training.data.examples import ExampleError
from training.evaluation.suites.data_file import data_items
from training.evaluation.suites.human import HUMAN_FOLDER, human_items

MMAU = {
    "id": "a",
    "audio_id": "./test-mini-audios/a.wav",
    "question": "What is heard?",
    "choices": ["a dog", "a cat"],
    "answer": "a dog",
    "task": "sound",
    "sub-category": "Acoustic Source",
    "difficulty": "hard",
}


def test_a_benchmark_is_asked_as_it_is_and_grouped_as_it_groups(tmp_path: Path) -> None:
    rows = [MMAU, {**MMAU, "id": "b", "task": "speech", "difficulty": "easy"}, {**MMAU, "choices": ["a dog", "a dog"]}]
    (tmp_path / "mmau-test-mini.json").write_text(json.dumps([*rows, MMAU]))
    items, faults = data_items(tmp_path / "mmau-test-mini.json", format="mmau", audio_root=tmp_path)
    assert [item.id for item in items] == ["main/a", "main/b", "main/a#2"] and len(faults) == 1
    assert dict(items[0].groups) == {"task": "sound", "category": "sound/Acoustic Source", "difficulty": "hard"}
    assert items[0].truth.answer == "a dog" and items[0].truth.environment is None
    assert items[0].digest() != items[1].digest() or items[0].truth == items[1].truth
    with pytest.raises(HyperError, match=r"a\.wav"):
        items[0].load()
    assert len(data_items(tmp_path / "mmau-test-mini.json", num_items=2)[0]) == 2


def test_a_clip_is_read_when_it_is_asked_about_and_never_cut_unasked(tmp_path: Path) -> None:
    (tmp_path / "short.wav").write_bytes(tone(1.0))
    (tmp_path / "long.wav").write_bytes(tone(31.0))
    table = "audio,question,answer,num_speakers\nshort.wav,What?,a tone,0\nlong.wav,What?,a tone,0\n"
    (tmp_path / "own.csv").write_text(table)
    (short, long), _ = data_items(tmp_path / "own.csv")
    assert short.load().shape == (16_000,)
    with pytest.raises(HyperError, match="30"):
        long.load()
    assert long.load(cuts_long=True).shape == (30 * 16_000,)


def test_a_data_set_without_a_row_that_can_be_asked_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "mmau.json").write_text(json.dumps([{**MMAU, "answer": "a bird"}]))
    with pytest.raises(ExampleError, match="no row"):
        data_items(tmp_path / "mmau.json")


def test_choices_of_which_nobody_knows_the_right_one_are_not_asked(tmp_path: Path) -> None:
    rows = [{"file": "a.wav", "question": "What?", "choices": ["a dog", "a bell"]}]
    rows.append({**rows[0], "answer": "a bell"})
    (tmp_path / "own.json").write_text(json.dumps(rows))
    items, faults = data_items(tmp_path / "own.json")
    assert [item.truth.answer for item in items] == ["a bell"]
    assert "item 1, field 'answer'" in str(faults[0])


def test_recorded_clips_are_read_with_their_transcripts(tmp_path: Path) -> None:
    with pytest.raises(HyperError, match="apt-get install pocketsphinx-testdata"):
        human_items(tmp_path)
    for name, lines in (
        ("librivox/transcription", "<s> he was a man </s> (book-1)\n"),
        ("cards/cards.transcription", "<s> ten of clubs  </s> (001)\n<s> five five  </s> (004)\n"),
    ):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(lines)
    (tmp_path / "cards/001.wav").write_bytes(tone(1.0))
    items = human_items(tmp_path)
    assert [item.truth.transcript for item in items] == ["he was a man", "ten of clubs", "five five"]
    assert items[1].load().shape == (16_000,) and items[1].groups["source"] == "cards"


@pytest.mark.skipif(not HUMAN_FOLDER.exists(), reason="pocketsphinx-testdata is not installed")
def test_the_package_holds_ten_clips() -> None:
    items = human_items()
    assert len(items) == 10 and all(len(item.load()) > 16_000 for item in items)
