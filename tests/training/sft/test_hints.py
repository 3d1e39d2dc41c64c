"""Contexts of training: of every kind, and without text for a clip without speech."""

from __future__ import annotations

import random

from training.sft.hints import draw_hint
from training.text_metrics import edit_distance, words

OWN = "Emma cannot come on Friday because her train is late and the office is closed"
OTHER = "The tall captain found forty coins under a broken floor in the old house"


def test_hints_are_right_nearly_right_wrong_foreign_and_lists_of_words() -> None:
    rng = random.Random(0)
    hints = [draw_hint(OWN, OTHER, rng) for _ in range(400)]
    assert OWN in hints and OTHER in hints
    errors = [edit_distance(words(OWN), words(hint)) / len(words(OWN)) for hint in hints]
    assert min(errors) == 0 and any(0 < error < 0.15 for error in errors) and any(0.2 < error < 0.7 for error in errors)
    lists = [hint for hint in hints if "," in hint]
    assert lists and all(set(words(hint)) <= {*words(OWN), *words(OTHER)} for hint in lists)


def test_a_clip_without_speech_gets_nothing_or_words_of_another_one() -> None:
    rng = random.Random(0)
    assert {*words(" ".join(draw_hint("", OTHER, rng) for _ in range(50)))} <= {*words(OTHER)}
    assert all(draw_hint("", "", rng) == "" for _ in range(20))
