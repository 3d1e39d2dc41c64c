"""Properties of the spoken lines."""

from __future__ import annotations

import random

from training.data.sources.sentences import SLOTS, draw_line, line_from_text, vocabulary


def test_vocabulary_has_at_least_500_words() -> None:
    assert len(vocabulary()) >= 500


def test_every_drawn_line_is_made_of_the_vocabulary_and_found_again_from_its_text() -> None:
    rng, words = random.Random(0), vocabulary()
    for _ in range(2_000):
        line = draw_line(rng)
        assert set(line.text.lower().split()) <= words
        assert line_from_text(line.text) == line


def test_each_answer_is_a_word_of_its_slot_and_stands_in_the_line() -> None:
    rng = random.Random(1)
    for _ in range(500):
        line = draw_line(rng)
        for asked in line.questions:
            assert asked.answer in SLOTS[asked.slot]
            assert asked.answer in line.text.split()
            assert "{" not in asked.question


def test_a_sentence_of_no_template_is_open_text_without_questions() -> None:
    line = line_from_text("colourless green ideas sleep furiously")
    assert line.is_open
    assert not line.questions
    assert not line_from_text("good morning everyone").is_open
