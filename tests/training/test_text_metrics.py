"""Reading of replies in prose, and the benchmarks' own rule."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.text_metrics import chosen, matches_words

DRINKS = ("tea", "coffee", "iced coffee", "water")


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("coffee", 1),
        ("B", 1),
        ("(c)", 2),
        ("D. water", 3),
        ("**B**", 1),
        ("The answer is tea.", 0),
        ("The man orders tea first, but then he asks for coffee.\nFinal answer: (B) coffee", 1),
        ("At first the answer is tea, no: the correct answer is D.", 3),
        ("Answer: C, since ice is heard", 2),
        ("The correct option is option B", 1),
        ("I hear ice cubes.\niced coffee", 2),
        ("(b) because he says so", 1),
        ("He asks for an iced coffee.", 2),
        ("They drink `water`, as the last speaker says", 3),
        # No guess.
        ("He orders tea and water.", None),
        ("", None),
        ("A man speaks.", None),
        ("E", None),
        ("I cannot tell.", None),
        ("teapot", None),
        ("The answer is not clear.", None),
        ("A B C D", None),
    ],
)
def test_prose_is_read_by_fixed_rules(text: str, wanted: int | None) -> None:
    assert chosen(text, DRINKS) == wanted


@given(st.integers(0, 3), st.sampled_from(["{}", "The answer is {}.", "**{}**", "Let me think.\n{}", "Answer: {}"]))
def test_every_way_of_naming_a_choice_is_read(index: int, frame: str) -> None:
    for name in (DRINKS[index], "ABCD"[index], f"({'abcd'[index]})", f"{'ABCD'[index]}. {DRINKS[index]}"):
        assert chosen(frame.format(name), DRINKS) == index, name


@pytest.mark.parametrize(
    "prediction, right",
    [
        ("coffee", True),
        ("Coffee!", True),
        ("a cup of coffee", True),
        ("iced coffee", False),
        ("coffee or tea", False),
        ("tea", False),
        ("", False),
        ("B", False),
        # The published rule is generous here, and we follow it.
        ("not coffee", True),
    ],
)
def test_the_string_match_of_the_benchmarks(prediction: str, right: bool) -> None:
    assert matches_words(prediction, "coffee", DRINKS) == right


def test_the_string_match_takes_words_of_the_answer_out_of_the_other_choices() -> None:
    choices = ("two men and a woman", "two women and a man")
    assert matches_words("two men and a woman", choices[0], choices)
    assert not matches_words(choices[1], choices[0], choices)
