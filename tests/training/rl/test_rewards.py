"""Rewards of completions, and above all the tricks without a reward."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyper_model.trace import Section, Speaker, Trace, render
from hyper_model.trace_parser import ParsedTrace, parse_text
from training.data.truth import Truth
from training.recipes import REWARD_WEIGHTS, LengthRange
from training.rl.rewards import REWARDS, WEAK_FORMAT, Reward, background_gate, reward
from training.text_metrics import edit_distance, named_choice, similarity, words

CHOICES = ("a dog", "a bell", "the sea", "music")
TRUTH = Truth("What is heard?", "a bell", CHOICES, environment="bell", num_speakers=1, transcript="it rings at noon")
TRACE = Trace(
    planning="Listen for the sound.",
    environment="bell",
    speakers=(Speaker("S1", "woman", ("it rings at noon",)),),
    transcript="it rings at noon",
    description=None,
    reasoning="A bell is struck.",
    summary="It is a bell.",
    response="a bell",
    reflection=None,
    final_answer="a bell",
)
# Parsing text counts no tokens, so every length is accepted except in the tests of length.
LENGTHS = LengthRange(min_tokens=0)


def parsed(**fields: object) -> ParsedTrace:
    return parse_text(render(replace(TRACE, **fields)))  # pyright: ignore


def worth(trace: ParsedTrace, truth: Truth = TRUTH) -> Reward:
    return reward(trace, truth, REWARD_WEIGHTS, LENGTHS)


def test_a_right_and_faithful_trace_earns_every_part() -> None:
    found = worth(parsed())
    assert found == Reward(found.total, dict.fromkeys(REWARDS, 1.0), background_gate=1.0)
    assert found.total == pytest.approx(1.0 + 0.2 + 0.2 + 0.5 + 0.5 + 0.2 + 0.2 + 0.2)


def test_the_total_is_its_parts_and_never_above_their_weights() -> None:
    unknown = Truth("What is heard?", "a bell", CHOICES)
    assert worth(parsed(), unknown).parts["environment"] is None
    assert worth(parsed(), unknown).total == pytest.approx(1.0 + 0.2 + 0.2 + 0.5 + 0.5)


@pytest.mark.parametrize("text", ["a bell", "A bell.", "B", "b", "(B)", "B.", "B. a bell", "B: a bell", "  A  BELL "])
def test_a_choice_is_named_by_its_words_its_letter_or_both(text: str) -> None:
    assert named_choice(text, CHOICES) == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "i heard a bird",  # a letter inside a word
        "banana",
        "a",  # a word and the letter of another choice
        "a bell or a dog",
        "A. a dog B. a bell C. the sea D. music",
        "A B C D",
        "not a bell",
        "A. a bell",  # the letter of one and the words of another
        "bell",
        "E",
    ],
)
def test_what_is_not_exactly_one_choice_is_none(text: str) -> None:
    if text == "a":
        assert named_choice(text, ("b", "a")) is None
        return
    assert named_choice(text, CHOICES) is None


@pytest.mark.parametrize("answer", ["i heard a bird", "a dog, a bell, the sea or music", "It is a bell, I think"])
def test_an_answer_that_is_not_the_choice_earns_no_accuracy_no_alignment_and_no_length(answer: str) -> None:
    found = worth(parsed(final_answer=answer, response=answer))
    assert (found.parts["accuracy"], found.parts["alignment"], found.parts["length"]) == (0.0, 0.0, 0.0)


def test_an_open_answer_is_the_words_and_nothing_more() -> None:
    truth = replace(TRUTH, choices=(), answer="Felix")
    assert worth(parsed(final_answer="felix.", summary="It was Felix."), truth).parts["accuracy"] == 1.0
    for answer in ("Felix or Henry", "not Felix", "", "Fel", "Felixa"):
        assert worth(parsed(final_answer=answer, response=answer), truth).parts["accuracy"] == 0.0


def test_an_answer_among_the_choices_is_required() -> None:
    with pytest.raises(ValueError, match="none of the choices"):
        Truth("What?", "a cat", CHOICES)


def test_tags_twice_earn_nothing() -> None:
    text = render(TRACE)
    for twice in (
        text + "<FINAL_ANSWER>a dog</FINAL_ANSWER>",
        text.replace("<ASR>", "<ASR>a</ASR><ASR>"),
        text + text,
    ):
        assert worth(parse_text(twice)).total == 0.0


def test_words_behind_the_answer_cost_form_and_length() -> None:
    found = worth(parse_text(render(TRACE) + " Or was it a dog?"))
    assert (found.parts["format"], found.parts["length"]) == (0.0, 0.0)


def test_a_weak_trace_earns_a_part_of_the_form() -> None:
    found = worth(parse_text("<THINK>It is a bell</THINK><FINAL_ANSWER>a bell</FINAL_ANSWER>"))
    assert (found.parts["format"], found.parts["accuracy"]) == (WEAK_FORMAT, 1.0)


def test_quotes_need_a_transcript_that_backs_them() -> None:
    assert worth(parsed(transcript="")).parts["fidelity"] == 0.0
    assert (worth(parsed(transcript="a dog barks")).parts["fidelity"] or 0.0) < 0.5
    near = worth(parsed(transcript="it rang at noon")).parts["fidelity"]
    assert near is not None and 0.8 < near < 1.0
    # The nearest sentence counts, not the whole text.
    assert worth(parsed(transcript="good morning. it rings at noon. good night")).parts["fidelity"] == 1.0


def test_quotes_copied_from_the_question_earn_nothing_unless_they_were_said() -> None:
    truth = replace(TRUTH, question="Who says the train leaves at noon?")
    quote = "the train leaves at noon"
    copied = parsed(speakers=(Speaker("S1", "woman", (quote,)),), transcript=quote)
    assert worth(copied, truth).parts["fidelity"] == 0.0
    assert worth(copied, replace(truth, transcript=None)).parts["fidelity"] == 0.0
    assert worth(copied, replace(truth, transcript=f"{quote} and so do I")).parts["fidelity"] == 1.0


def test_a_trace_that_quotes_nobody_earns_fidelity_only_where_nobody_speaks() -> None:
    silent = parsed(speakers=(), transcript="")
    assert worth(silent).parts["fidelity"] == 0.0
    assert worth(silent, replace(TRUTH, transcript=None)).parts["fidelity"] == 0.0
    assert worth(silent, replace(TRUTH, transcript="", num_speakers=0)).parts["fidelity"] == 1.0
    assert worth(parsed(), replace(TRUTH, transcript="", num_speakers=0)).parts["transcript"] == 0.0


def test_a_conclusion_names_the_answer_alone() -> None:
    assert worth(parsed(summary="It is a dog.")).parts["alignment"] == 0.0
    assert worth(parsed(summary="a dog, a bell, the sea, music")).parts["alignment"] == 0.0
    assert worth(parsed(summary="")).parts["alignment"] == 1.0  # the reasoning's last sentence
    assert worth(parsed(summary="B")).parts["alignment"] == 1.0


def test_choices_that_differ_in_a_mark_alone_are_told_apart() -> None:
    assert named_choice("C# major", ("C major", "C# major")) == 1
    assert named_choice(" c major ", ("C major", "C# major")) == 0
    assert named_choice("-5", ("5", "-5")) == 1
    # Its words fit either choice.
    assert named_choice("C major!", ("C major", "C# major")) is None


def test_a_thought_without_sections_is_reasoning() -> None:
    thought = "<think>{}</think><answer>a bell</answer>"
    right = parse_text(thought.format("Something is struck. It is a bell."))
    assert worth(right).parts["alignment"] == 1.0 and worth(right).background_gate == 1.0
    assert worth(parse_text(thought.format("It is a dog."))).parts["alignment"] == 0.0
    assert worth(parse_text(thought.format("Because of the music he says it is a bell."))).background_gate == 0.0


def test_of_choices_inside_one_another_the_longer_is_meant() -> None:
    truth = Truth("What falls?", "heavy rain", ("rain", "heavy rain", "snow"))
    trace = parsed(summary="Heavy rain falls.", response="heavy rain", final_answer="heavy rain")
    assert worth(trace, truth).parts["alignment"] == 1.0


def test_the_perception_is_held_against_the_truth() -> None:
    assert worth(parsed(environment="bell, dog, sea, music")).parts["environment"] == 0.0
    assert worth(parsed(speakers=(*TRACE.speakers, Speaker("S2", "man", ())))).parts["speakers"] == 0.0
    assert worth(parsed(transcript="it rings at")).parts["transcript"] == pytest.approx(0.75)
    assert worth(parsed(transcript="it rings at noon " * 9)).parts["transcript"] == 0.0
    several = replace(TRUTH, environment="rain and birds")
    assert worth(parsed(environment="birds, rain"), several).parts["environment"] == 1.0
    assert worth(parsed(environment="rain"), several).parts["environment"] == 0.0


@pytest.mark.parametrize(
    ("reasoning", "gate"),
    [
        ("Because of the music, he says that he is happy.", 0.0),
        ("Because of the background noise she said no.", 0.0),
        ("The noise suggests that she said Friday.", 0.0),
        ("There is music in the background, so S1 says it is a party.", 0.0),
        ("S1 says it is a party, so there is music in the background.", 1.0),
        ("Because S1 says so, the background is a party.", 1.0),
        ("The background noise is a bell.", 1.0),
        ("The sea is loud because of the wind.", 1.0),
        ("", 1.0),
    ],
)
def test_background_sound_is_no_cause_of_what_is_said(reasoning: str, gate: float) -> None:
    trace = parsed(reasoning=reasoning)
    assert background_gate(trace) == gate
    found = worth(trace)
    assert found.background_gate == gate
    whole = worth(parsed())
    assert found.total == pytest.approx(whole.total - (1 - gate) * (0.2 + 0.5))


def test_length_falls_smoothly_on_both_sides() -> None:
    text = parse_text(render(TRACE))

    def earned(num_tokens: int) -> float:
        counted = replace(
            text, section_num_tokens={Section.ASR: num_tokens // 2, Section.REASONING: -(-num_tokens // 2)}
        )
        return reward(counted, TRUTH, REWARD_WEIGHTS, LengthRange()).parts["length"] or 0.0

    values = [earned(num_tokens) for num_tokens in range(0, 600)]
    assert values[60] == values[400] == 1.0 and values[0] == values[460] == values[599] == 0.0
    assert max(abs(after - before) for before, after in itertools.pairwise(values)) < 0.03


@pytest.mark.parametrize(
    ("reference", "hypothesis", "errors"),
    [
        ("a b c", "a b c", 0),
        ("a b c", "a x c", 1),
        ("a b c", "b c", 1),
        ("", "a b", 2),
        ("a b", "", 2),
        ("a b", "b a", 2),
    ],
)
def test_word_errors_count_substitutions_deletions_and_insertions(reference: str, hypothesis: str, errors: int) -> None:
    assert edit_distance(reference.split(), hypothesis.split()) == errors


def test_normalised_words_have_no_case_or_punctuation() -> None:
    assert words("Anna, cannot come. On FRIDAY") == ["anna", "cannot", "come", "on", "friday"]


@given(st.text(max_size=12), st.text(max_size=12))
def test_a_similarity_is_symmetric_and_one_for_the_same_words(one: str, other: str) -> None:
    assert 0 <= similarity(one, other) == similarity(other, one) <= 1
    assert similarity(one, one) == float(bool(words(one)))
    assert edit_distance(one, other) >= abs(len(one) - len(other))
