"""The baseline's rules for every kind of question, with given perception results."""

from __future__ import annotations

import random

import pytest

from tests.training_data import write_bank, write_sounds
from training.data.questions import KINDS, draw_example, possible_kinds
from training.data.scenes import Scene, SceneBuilder
from training.data.sources.recordings import BACKGROUND_SPEECH, QUIET, labels
from training.data.sources.voices import Bank
from training.evaluation.runners.cascade_rules import Heard, HeardTurn, plain_words, reply_to


def heard_of(scene: Scene) -> Heard:
    """Return the perfect perception of a scene, with the voice in the background."""
    numbers = {speaker.id: number for number, speaker in enumerate(scene.speakers)}
    turns = [HeardTurn(numbers[t.speaker], tuple(t.line.text.split()), -24.0, True) for t in scene.turns]
    sexes = [speaker.sex for speaker in scene.speakers]
    if scene.background_line:
        turns.append(HeardTurn(len(sexes), tuple(scene.background_line.split()), -40.0, True))
        sexes.append("man")
    scores = {label: float(label == scene.environment) for label in (*labels(), QUIET, BACKGROUND_SPEECH)}
    return Heard(tuple(turns), tuple(sexes), scores)


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> SceneBuilder:
    folder = tmp_path_factory.mktemp("cascade")
    return SceneBuilder(Bank(write_bank(folder / "bank")), write_sounds(folder / "sounds"), "validation")


def test_who_hears_everything_answers_nearly_everything(builder: SceneBuilder) -> None:
    right: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    for seed in range(300):
        scene, _ = builder.draw(seed)
        for kind in possible_kinds(scene):
            example = draw_example(scene, random.Random(seed), kind=kind, with_choices=True)
            answer, index = reply_to(example.question, example.choices, heard_of(scene))
            assert (index is None) == (not example.choices)
            right[kind].append(answer == example.answer)
    rates = {kind: sum(each) / len(each) for kind, each in right.items()}
    assert min(rates.values()) >= 0.9, rates


def test_questions_without_choices_get_words_of_the_kind_that_is_asked_for(builder: SceneBuilder) -> None:
    right: list[bool] = []
    for seed in range(300):
        scene, _ = builder.draw(seed)
        if "free" in possible_kinds(scene):
            example = draw_example(scene, random.Random(seed), kind="free", with_choices=False)
            right.append(reply_to(example.question, (), heard_of(scene))[0].lower() == example.answer.lower())
    assert sum(right) / len(right) >= 0.5


@pytest.mark.parametrize("question", ["How many people speak?", "What is said first?", "Who speaks first?", "Why?"])
def test_a_silent_clip_is_no_fault(question: str) -> None:
    nothing = Heard((), (), {"quiet": 1.0})
    answer, index = reply_to(question, ("nobody", "two"), nothing)
    assert (answer, index) in (("nobody", 0), ("two", 1))
    assert isinstance(reply_to(question, (), nothing)[0], str)
    assert not nothing.people and nothing.environment == "quiet"


def test_what_the_recogniser_writes_is_read_as_it_is_said() -> None:
    said = [
        word
        for written in ("Mr.", "$17", "7", "o'clock,", "21", "St.", "1,250", "grey")
        for word in plain_words(written)
    ]
    assert said[:4] == ["mister", "seventeen", "dollars", "seven"]
    assert said[4:] == ["o'clock", "twenty", "one", "saint", *"one thousand two hundred fifty gray".split()]
    assert plain_words("0") == ("zero",) and plain_words("40") == ("forty",)
    assert plain_words("2,000,000") == ("two", *["zero"] * 6)


def test_a_quiet_voice_behind_the_others_is_no_speaker() -> None:
    turns = (HeardTurn(0, ("hello",), -20.0), HeardTurn(1, ("far", "away"), -33.0))
    behind = Heard(turns, ("woman", "man"), {"background speech": 1.0, "quiet": 0.0})
    assert behind.people == ((0, "woman"),)
    assert Heard(turns, ("woman", "man"), {"quiet": 1.0}).people == ((0, "woman"), (1, "man"))
    assert reply_to('Does a speaker or the background say "far away"?', (), behind)[0] == "the background"
    assert reply_to('Does a speaker or the background say "hello"?', (), behind)[0] == "a speaker"
