"""What holds of the measures of an alignment: intervals, controls, and a probe that runs on a real small checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hyper_model.compose import untrained
from tests.gguf_file import compose_tiny
from tests.training_data import write_wordnet
from training.data.reading import is_held_out
from training.data.sources.downloads import TEXTS_FOLDER
from training.evaluation.alignment import (
    AlignmentProbe,
    SpokenItem,
    accuracy,
    controlled,
    drawn_items,
    reading_items,
    word_error,
)
from training.export import model_of_checkpoint


def test_word_error_counts_words_and_its_interval_holds_it() -> None:
    items = [SpokenItem(np.zeros(1, np.float32), "one two three four", str(i)) for i in range(20)]
    found = word_error(items, ["one two three" if i % 2 else "one two three four" for i in range(20)])
    assert found.value == pytest.approx(0.125) and found.num_items == 80
    assert found.interval[0] < 0.125 < found.interval[1]


def test_hand_written_questions_have_one_right_choice_and_controls_take_their_scene_away() -> None:
    items = reading_items()
    assert len(items) == 40
    assert all(item.choices.count(item.answer) == 1 and len(set(item.choices)) == 4 for item in items)
    assert accuracy(items, [item.answer for item in items]).value == 1.0
    assert {item.trace.transcript for item in controlled(items, "blank")} == {""}
    for item, other in zip(items, controlled(items, "swapped"), strict=True):
        assert item.question == other.question and item.trace != other.trace


def test_drawn_questions_of_held_out_wordings_are_not_those_of_training(tmp_path: Path) -> None:
    write_wordnet(tmp_path / TEXTS_FOLDER)
    items = drawn_items(tmp_path, held_out=True)
    assert len(items) == 80 and items == drawn_items(tmp_path, held_out=True)
    assert not is_held_out("How many people speak?") or not is_held_out("How many people are talking?")
    assert {item.question for item in items}.isdisjoint(i.question for i in drawn_items(tmp_path, held_out=False))


def test_a_probe_transcribes_and_chooses(tmp_path: Path) -> None:
    compose_tiny(untrained("tiny", 2), tmp_path, width=64)
    model = model_of_checkpoint(tmp_path / "made", dtype=torch.float32)
    model.policy.eval()
    probe = AlignmentProbe(model.core, model.tokenizer)
    samples_S = np.random.default_rng(0).standard_normal(8_000).astype(np.float32) * 0.1
    assert probe.states(samples_S).shape == (6, 128)
    assert isinstance(probe.transcribe(samples_S), str)
    item = reading_items()[0]
    assert probe.choose(item) in item.choices
