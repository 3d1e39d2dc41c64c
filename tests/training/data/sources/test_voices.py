"""The bank's plan: the lines of each voice, and no held-out line or voice in training."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training_data import write_bank, write_wordnet
from training.data.sources.open_text import split_of
from training.data.sources.sentences import line_from_text
from training.data.sources.voices import Bank, held_out_lines, list_voices, missing_rounds, plan_round, trained_lines


@pytest.fixture(scope="module")
def wordnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wordnet(tmp_path_factory.mktemp("voices") / "wordnet")


def test_names_are_unique_and_fast_training_voices_speak_most_of_the_open_text() -> None:
    voices = list_voices()
    assert len({voice.name for voice in voices}) == len(voices)
    open_lines = dict.fromkeys(("kokoro", "hibari", "flite", "espeak"), 0)
    for voice in voices:
        if voice.split == "train":
            open_lines[voice.engine] += voice.num_rounds * voice.num_open
    total = sum(open_lines.values())
    assert total > 40_000
    assert 0.25 < open_lines["hibari"] / total < 0.35
    assert 0.25 < open_lines["flite"] / total < 0.35
    assert 0.33 < open_lines["espeak"] / total < 0.45


def test_a_round_is_planned_the_same_again_and_holds_both_kinds_of_line(wordnet: Path) -> None:
    for voice in list_voices()[::9]:
        plan = plan_round(voice, 0, seed=0, texts=wordnet)
        assert plan == plan_round(voice, 0, seed=0, texts=wordnet)
        assert plan != plan_round(voice, 1, seed=0, texts=wordnet)
        lines = [line_from_text(text) for text, _ in plan]
        assert not any(line.is_open for line in lines[: voice.num_patterned])
        assert len(lines) == voice.num_patterned + voice.num_open
        assert min(voice.num_patterned, voice.num_open) >= 6


def test_no_training_text_is_among_the_lines_of_held_out_voices(wordnet: Path) -> None:
    trained, held_out = trained_lines(seed=0), held_out_lines(seed=0)
    assert held_out and trained.isdisjoint(held_out)
    for voice in list_voices():
        for round_index in range(min(2, voice.num_rounds)):
            plan = plan_round(voice, round_index, seed=0, texts=wordnet)
            patterned = {text for text, _ in plan[: voice.num_patterned]}
            opened = {text for text, _ in plan[voice.num_patterned :]}
            assert {split_of(text) for text in opened} == {voice.split}
            assert patterned <= trained | held_out if voice.split != "train" else patterned <= trained


def test_the_bank_of_held_out_voices_leaves_out_patterned_lines_that_training_heard(tmp_path: Path) -> None:
    folder = write_bank(tmp_path / "bank", lines_per_voice=8)
    trained = trained_lines(seed=0)
    bank = Bank(folder, without=trained)
    kept = [u for voice in bank.voices("test") for u, _ in bank.utterances[voice.name]]
    assert kept
    assert not {u.text for u in kept} & trained
    assert any(u.is_open for u in kept) and not all(u.is_open for u in kept)


def test_an_unfinished_round_is_missing_and_the_rest_of_the_bank_is_usable(tmp_path: Path) -> None:
    folder = write_bank(tmp_path / "bank")
    voice = next(voice for voice in list_voices() if voice.name == "af_bella")
    assert [index for _, index in missing_rounds(folder, [voice])] == [1, 2]
    (folder / "af_bella.0.json").rename(folder / "af_bella.0.json.partial")
    assert [index for _, index in missing_rounds(folder, [voice])] == [0, 1, 2]
    assert "af_bella" not in {v.name for v in Bank(folder).voices("train")}
