"""What holds of questions about written scenes: wordings keep to their part, choices to one dress."""

from __future__ import annotations

import random

import pytest

from hyper_model.trace import render
from hyper_model.trace_parser import TraceFormat, parse_text
from training.data.reading import Reader, dress, is_held_out, wordings
from training.data.text_scenes import SceneWriter

OPEN_TEXTS = [f"the {color} {animal} sleeps behind the {thing}" for color in ("gray", "tiny") for animal in ("otter",
              "heron", "badger") for thing in ("cupboard", "engine", "curtain")]  # fmt: skip


@pytest.fixture(scope="module")
def examples() -> list:
    reader = Reader(SceneWriter(OPEN_TEXTS, frozenset()))
    return [reader.draw(random.Random(seed)) for seed in range(300)]


def test_a_fifth_of_the_wordings_is_never_trained(examples: list) -> None:
    trained, held_out = wordings(), wordings(held_out=True)
    for kind, found in trained.items():
        if kind != "frames" and len(found) > 1:
            assert not any(is_held_out(wording) for wording in found)
            assert set(found).isdisjoint(held_out[kind]) or len(held_out[kind]) == 1
    share = sum(map(len, held_out.values())) / sum(len(set(trained[k]) | set(held_out[k])) for k in trained)
    assert 0.1 < share < 0.35
    starts = [w.split("{")[0].lower() for kind in ("count", "absent", "word") for w in trained[kind] if is_held_out(w)]
    assert not any(example.question.lower() == start for start in starts for example in examples)


def test_the_answer_is_among_the_choices_and_stands_in_the_trace(examples: list) -> None:
    for example in examples:
        assert not example.choices or example.choices.count(example.answer) == 1
        assert len(set(example.choices)) == len(example.choices) != 1
        parsed = parse_text(render(example.trace))
        assert parsed.format is not TraceFormat.MALFORMED
        assert parsed.trace.final_answer == example.answer.strip()


def test_every_kind_is_asked_with_choices_and_most_without(examples: list) -> None:
    asked = {example.kind for example in examples if example.choices}
    assert asked >= {"free", "count", "first", "who", "sex", "mentioned", "absent", "last", "after", "environment"}
    assert 0.15 < sum(not example.choices for example in examples) / len(examples) < 0.45


@pytest.mark.parametrize("kind", ["count", "first", "who", "mentioned", "free"])
def test_a_dress_keeps_texts_apart(kind: str) -> None:
    texts = {
        "count": ["one", "two", "nobody"],
        "first": ["a man", "a woman"],
        "who": ["speaker 1", "speaker 2"],
        "mentioned": ["yes", "no"],
        "free": ["the lamp", "a river"],
    }[kind]
    for seed in range(60):
        assert len(set(dress(texts, kind, random.Random(seed)))) == len(texts)


def test_the_same_seed_draws_the_same_question(examples: list) -> None:
    reader = Reader(SceneWriter(OPEN_TEXTS, frozenset()))
    assert [reader.draw(random.Random(seed)) for seed in range(40)] == examples[:40]
