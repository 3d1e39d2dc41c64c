"""Suites on wordings, agreement of transcripts and open questions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hyper_model.errors import HyperError
from hyper_model.trace import Trace, render
from hyper_model.trace_parser import parse_text
from tests.training_data import write_bank, write_sounds
from training.data.reading import is_held_out, wordings
from training.data.sources.voices import Bank
from training.evaluation.score import DISAGREEMENT, Reply, judge, summarize
from training.evaluation.suites import SUITES, open_questions
from training.evaluation.suites.item import Item, SuiteRequest
from training.evaluation.suites.wordings import agreement_items, wordings_items
from training.text_metrics import holds_words, words


@pytest.fixture(scope="module")
def request_of(tmp_path_factory: pytest.TempPathFactory) -> SuiteRequest:
    folder = tmp_path_factory.mktemp("suites")
    bank = Bank(write_bank(folder / "bank"))
    return SuiteRequest(40, lambda split: bank, write_sounds(folder / "sounds"))


def _reply(item: Item, transcript: str, response: str | None = None) -> Reply:
    truth = item.truth
    answer = truth.answer if response is None else response
    trace = Trace(transcript=transcript, response=answer, final_answer=truth.answer)
    choice = truth.choices.index(truth.answer) if truth.choices else None
    return Reply(parse_text(render(trace)), choice, answer)


def test_wordings_are_excluded_from_training_and_have_a_trained_counterpart(request_of: SuiteRequest) -> None:
    items = wordings_items(request_of)
    main = [item for item in items if item.part == "main"]
    trained = [item for item in items if item.part == "trained"]
    assert len(main) == len(trained) == 40
    assert [item.groups["kind"] for item in main] == [item.groups["kind"] for item in trained]
    assert all(item.truth.choices for item in items)
    counts = wordings(held_out=True)["count"]
    assert all(is_held_out(text) for text in counts)
    asked = [item.truth.question.lower() for item in main if item.groups["kind"] == "count"]
    assert asked and all(any(text.lower().rstrip(".?") in question for text in counts) for question in asked)
    result = summarize(items, [judge(item, _reply(item, item.truth.transcript or "")) for item in items])
    assert result["choice_accuracy"] == result["choice_accuracy_trained_wordings"] == 1.0
    assert result["answer_matches_response"] == 1.0


def test_a_response_of_another_choice_does_not_match_the_answer(request_of: SuiteRequest) -> None:
    items = [item for item in wordings_items(request_of) if item.part == "main"]
    scores = [judge(item, _reply(item, "", "nothing of the sort")) for item in items]
    assert summarize(items, scores)["answer_matches_response"] == 0.0


def test_disagreement_counts_words_that_change_with_the_question(request_of: SuiteRequest) -> None:
    items = agreement_items(request_of)
    assert len(items) == 40
    assert len({item.groups["clip"] for item in items}) == 8
    assert len({item.id for item in items}) == 40
    same = [judge(item, _reply(item, "one two three four")) for item in items]
    assert summarize(items, same)[DISAGREEMENT] == 0.0
    # One word in four differs in one of five transcripts: in 4 of 10 pairs.
    other = ["one two three five" if place % 5 == 0 else "one two three four" for place in range(len(items))]
    result = summarize(items, [judge(item, _reply(item, text)) for item, text in zip(items, other, strict=True)])
    assert result[DISAGREEMENT] == pytest.approx(0.1)


def test_open_questions_are_answered_by_words_of_their_transcripts() -> None:
    rows = json.loads(Path(open_questions.__file__).with_name("open_questions.json").read_text())["scenes"]
    assert sum(len(row["questions"]) for row in rows) >= 40
    assert len({row["scene"] for row in rows}) == len(rows)
    numbers = {"86 cents", "robert and nora", "apples and milk", "sixteen telephones", "grey"}
    for row in rows:
        for question, accepted in row["questions"]:
            assert question.endswith("?")
            said = words(row["transcript"])
            assert any(holds_words(said, words(answer)) for answer in accepted), (question, accepted)
            assert all(holds_words(said, words(answer)) or answer in numbers for answer in accepted), accepted


def test_other_voices_are_refused_by_the_open_suite(request_of: SuiteRequest) -> None:
    with pytest.raises(HyperError, match="has transcript"):
        SUITES["open"].items(request_of)


def test_containment_accepts_any_listed_answer_and_no_other(request_of: SuiteRequest) -> None:
    item = wordings_items(request_of)[0]
    truth = replace(item.truth, answer="apples", choices=(), accepted=("apples with milk", "milk"))
    item = replace(item, truth=truth)
    assert judge(item, _reply(item, "", "Thomas ordered milk.")).contains_answer is True
    assert judge(item, _reply(item, "", "apples with pasta")).contains_answer is False
