"""Open text: it can be spoken, draws are reproducible, and held-out lines are never training text."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from tests.training_data import write_wordnet
from training.data.sources.downloads import MissingDataError
from training.data.sources.open_text import (
    MAX_WORDS,
    MIN_WORDS,
    clean,
    content_words,
    draw_text,
    iter_texts,
    spell_number,
    spell_ordinal,
    spell_year,
    split_of,
)
from training.data.sources.sentences import SLOTS, line_from_text
from training.data.sources.voices import Split

SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@pytest.fixture(scope="module")
def wordnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wordnet(tmp_path_factory.mktemp("texts") / "wordnet")


def test_every_drawn_line_can_be_spoken_and_belongs_to_its_split(wordnet: Path) -> None:
    for split in SPLITS:
        rng = random.Random(split)
        for _ in range(400):
            text = draw_text(rng, split, wordnet)
            assert split_of(text) == split_of(text.upper()) == split
            assert re.fullmatch(r"[A-Za-z' ]+", text)
            assert MIN_WORDS <= len(text.split()) <= MAX_WORDS
            assert "<" not in text and "@" not in text


def test_the_splits_share_no_line_and_hold_out_a_twentieth(wordnet: Path) -> None:
    rng = random.Random(0)
    drawn = {split: {draw_text(rng, split, wordnet).lower() for _ in range(600)} for split in SPLITS}
    assert not drawn["train"] & drawn["test"]
    assert not drawn["train"] & drawn["validation"]
    assert not drawn["test"] & drawn["validation"]
    shares = [split_of(f"line number {spell_number(i)}") for i in range(5_000)]
    assert 0.015 < shares.count("validation") / 5_000 < 0.027
    assert 0.033 < shares.count("test") / 5_000 < 0.049


def test_the_same_seed_draws_the_same_lines(wordnet: Path) -> None:
    first, second = random.Random(7), random.Random(7)
    assert [draw_text(first, "train", wordnet) for _ in range(200)] == [
        draw_text(second, "train", wordnet) for _ in range(200)
    ]


def test_a_tokenizer_hears_of_training_lines_alone(wordnet: Path) -> None:
    texts = list(iter_texts(wordnet, num_generated=500))
    assert len(texts) > 600
    assert {split_of(text) for text in texts} == {"train"}
    assert texts == list(iter_texts(wordnet, num_generated=500))


def test_a_folder_without_wordnet_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingDataError, match=r"data\.noun is missing"):
        next(iter_texts(tmp_path))


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("He paid $5 for it", None),
        ("the train leaves at 3:30", None),
        (
            "after 15 years together, they are headed for splitsville.",
            "after fifteen years together they are headed for splitsville",
        ),
        ("in 1912 the ocean liner sank", "in nineteen twelve the ocean liner sank"),
        ("a song of the 1980s", "a song of the nineteen eighties"),
        ("the bottom of the 9th inning", "the bottom of the ninth inning"),
        ("over 25,000 troops came (or more)", "over twenty five thousand troops came"),
        ("a well-known man", "a well known man"),
        ("two words", None),
        ("the symbol is H here", None),
        ("I don`t know him", "I don't know him"),
        ("the boys' room is small", "the boys' room is small"),
        ("members of NATO met again", None),
    ],
)
def test_sentences_are_brought_to_words_alone_or_left_out(raw: str, cleaned: str | None) -> None:
    assert clean(raw) == cleaned


def test_numbers_are_spelled_as_they_are_read() -> None:
    assert spell_number(0) == "zero"
    assert spell_number(340_017) == "three hundred forty thousand seventeen"
    assert [spell_ordinal(n) for n in (1, 2, 12, 20, 23, 100)] == [
        "first", "second", "twelfth", "twentieth", "twenty third", "one hundredth"
    ]  # fmt: skip
    assert [spell_year(n) for n in (1905, 1900, 2004, 2012, 1666)] == [
        "nineteen oh five", "nineteen hundred", "two thousand four", "twenty twelve", "sixteen sixty six"
    ]  # fmt: skip
    with pytest.raises(ValueError, match="got 1000000"):
        spell_number(1_000_000)


def test_content_words_leave_out_what_carries_no_meaning() -> None:
    assert content_words("the industrial revolution wasn't about those wheels") == (
        "industrial",
        "revolution",
        "wheels",
    )


def test_open_text_has_no_questions_of_a_pattern() -> None:
    line = line_from_text("he stepped into the light")
    assert line.is_open and not line.questions
    assert set(SLOTS) >= {"name", "city", "number"}
