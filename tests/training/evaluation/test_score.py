"""Scoring of replies, and the figures."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hyper_model.trace import Trace, render
from hyper_model.trace_parser import parse_text
from tests.training_data import write_bank, write_sounds
from training.data.hard_sets import SNR_LEVELS_DB
from training.data.questions import draw_example
from training.data.scenes import SceneBuilder
from training.data.sources.voices import Bank, trained_lines
from training.evaluation.report import markdown, write
from training.evaluation.score import (
    FIGURES,
    MAP,
    ItemScores,
    Reply,
    count_from_turns_accuracy,
    differences,
    judge,
    latency,
    summarize,
)
from training.evaluation.suites.item import Item
from training.evaluation.suites.scenes import draw_items, item_of, scene_items, swapped


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    write_bank(folder / "bank")
    write_sounds(folder / "sounds")
    return folder


@pytest.fixture(scope="module")
def builder(folder: Path) -> SceneBuilder:
    return SceneBuilder(Bank(folder / "bank"), folder / "sounds", "test")


@pytest.fixture(scope="module")
def suite(folder: Path) -> list[Item]:
    return scene_items("held-out", Bank(folder / "bank"), folder / "sounds", num_items=60)


def gold(item: Item) -> Reply:
    """Return the true reply."""
    truth = item.truth
    trace = Trace(
        planning="listen",
        environment=truth.environment,
        transcript=truth.transcript,
        reasoning=truth.answer,
        summary=truth.answer,
        response=truth.answer,
        final_answer=truth.answer,
    )
    choice = truth.choices.index(truth.answer) if truth.choices else None
    return Reply(parse_text(render(trace)), choice, truth.answer)


def result_of(items: list[Item], replies: list[Reply], system: str = "a") -> dict[str, Any]:
    item_scores = [judge(item, reply) for item, reply in zip(items, replies, strict=True)]
    return {**summarize(items, item_scores), "system": system, "suite": "held-out"}


def test_the_gold_trace_is_judged_right_in_every_figure(builder: SceneBuilder) -> None:
    for seed in range(60):
        scene, samples_S = builder.draw(seed)
        example = draw_example(scene, random.Random(seed))
        item = item_of(example, samples_S)
        parsed = parse_text(render(example.trace))
        verdict = judge(
            item, Reply(parsed, example.choices.index(example.answer) if example.choices else None, example.answer)
        )
        assert verdict.is_right in (True, None) and verdict.matches_words in (True, None)
        assert verdict.free_is_right in (True, None)
        assert verdict.environment_is_right
        assert verdict.count_is_right in (True, None)
        assert verdict.word_errors == verdict.char_errors == 0
        assert verdict.is_strict
        assert verdict.is_consistent
        assert verdict.fidelity in (1.0, None)
        assert verdict.invents_speech in (False, None)


def test_an_empty_completion_is_judged_wrong_and_not_dropped(builder: SceneBuilder) -> None:
    scene, samples_S = next((s, x) for seed in range(50) for s, x in [builder.draw(seed)] if s.speakers)
    example = draw_example(scene, random.Random(0), kind="count", with_choices=False)
    verdict = judge(item_of(example, samples_S), Reply(parse_text("")))
    assert verdict.free_is_right is False
    assert verdict.environment_is_right is False
    assert not verdict.is_strict
    assert not verdict.is_consistent and not verdict.fidelity
    assert verdict.word_errors == verdict.num_words and verdict.char_errors == verdict.num_chars


def test_a_reply_that_did_not_come_is_wrong_and_counted(suite: list[Item]) -> None:
    result = result_of(suite, [Reply.failed("timeout") for _ in suite])
    assert (result["choice_accuracy"], result["failed_rate"], result["wer"]) == (0.0, 1.0, 1.0)
    assert (result["speech_free_is_silent_rate"], result["invented_speech_rate"]) == (0.0, 1.0)


def test_of_a_model_that_answers_in_prose_only_the_answer_is_judged(suite: list[Item]) -> None:
    item = next(item for item in suite if item.truth.choices)
    verdict = judge(item, Reply(parse_text("It is so."), None, "It is so."), reads="answer")
    assert verdict.is_right is False and verdict.names_choice is False
    assert verdict.environment_is_right is verdict.is_strict is verdict.word_errors is None


def test_a_suite_has_its_parts_and_every_item_an_id_of_its_own(suite: list[Item], folder: Path) -> None:
    parts = {part: [item for item in suite if item.part == part] for part in {item.part for item in suite}}
    assert set(parts) == {"main", "one_voice", "speech_free", "swapped", *(f"snr_{db}" for db in SNR_LEVELS_DB)}
    assert len({item.id for item in suite}) == len(suite)
    assert all(item.truth.num_speakers == 0 for item in parts["speech_free"])
    # The same scenes and questions at each level, with other sound.
    levels = [parts[f"snr_{db}"] for db in SNR_LEVELS_DB]
    for same in zip(*levels, strict=True):
        assert len({item.truth for item in same}) == 1
        assert len({item.digest() for item in same}) == len(same)
    assert all(item.is_recorded for item in levels[0])
    again = scene_items("held-out", Bank(folder / "bank"), folder / "sounds", num_items=60)
    assert [item.digest() for item in again] == [item.digest() for item in suite]
    with_choices = [item for item in parts["main"] if item.truth.choices]
    assert len(parts["swapped"]) == len(with_choices)
    for item, other in zip(with_choices, swapped(with_choices), strict=True):
        assert item.truth.question == other.truth.question and item.clip is not other.clip


def test_other_suites_of_scenes_are_what_they_say(folder: Path) -> None:
    def draw(name: str) -> list[Item]:
        return scene_items(name, Bank(folder / "bank"), folder / "sounds", num_items=12)

    hard = draw("hard-multi-speaker")
    assert all(item.part == "main" and (item.truth.num_speakers or 0) > 3 for item in hard)
    assert [i.truth for i in draw("snr-0")] == [i.truth for i in draw("snr-20")]


def test_items_ask_every_kind_about_equally_often(builder: SceneBuilder) -> None:
    items = draw_items(builder, num_items=200, first_seed=0)
    kinds = [item.groups["kind"] for item in items]
    counts = {kind: kinds.count(kind) for kind in set(kinds)}
    assert min(counts[kind] for kind in counts if kind != "source") >= 10
    assert len({item.id for item in items}) == 200


def test_the_truth_earns_every_figure(suite: list[Item]) -> None:
    result = result_of(suite, [gold(item) for item in suite])
    names = {each.name for each in FIGURES} | {MAP}
    # No reward without token counts, no pauses without a gate, and no figures of other suites.
    parts = {item.part for item in suite}
    others = {each.name for each in FIGURES if each.part not in parts} | {"contained_answer_accuracy"}
    assert names - set(result) == {"reward", "pauses_per_sample", "gave_up_rate"} | others
    perfect = {"choice_accuracy", "environment_accuracy", "free_answer_accuracy", "accuracy_snr_5", MAP}
    assert {name: result[name] for name in perfect} == dict.fromkeys(perfect, 1.0)
    assert result["wer"] == result["cer"] == result["invented_speech_rate"] == result["wer_snr_0"] == 0.0
    assert set(result["interval_95"]) <= set(result)
    assert result["items"][suite[0].id]["digest"] == suite[0].digest()
    assert result["num_items"] == 60


def test_the_confidence_of_answers_is_compared_with_their_accuracy(suite: list[Item], tmp_path: Path) -> None:
    main = [item for item in suite if item.part == "main"]
    rates = {True: 0.0, False: 0.0}
    for has_choices in rates:
        of_kind = [item for item in main if bool(item.truth.choices) == has_choices]
        rates[has_choices] = len(of_kind) / len(main)
    replies = [replace(gold(item), confidence=0.95 if item.truth.choices else 0.75) for item in suite]
    result = result_of(suite, replies)
    assert result["ece_choices"] == pytest.approx(0.05) and result["ece_open"] == pytest.approx(0.25)
    assert result["ece"] == pytest.approx(0.05 * rates[True] + 0.25 * rates[False], abs=1e-4)
    low, high = result["interval_95"]["ece"]
    assert 0.05 <= low <= result["ece"] <= high <= 0.25
    assert [(each["confidence"], each["accuracy"]) for each in result["reliability"]] == [(0.75, 1.0), (0.95, 1.0)]
    assert sum(each["count"] for each in result["reliability"]) == len(main)
    write([result], tmp_path)
    assert (tmp_path / "reliability.png").read_bytes().startswith(b"\x89PNG")
    assert "| `ece` |" in (tmp_path / "report.md").read_text()


def test_naming_one_class_always_earns_no_average_precision(suite: list[Item]) -> None:
    replies = [
        replace(gold(item), parsed=parse_text("<THINK><CAPTION><ENV>water</ENV></CAPTION></THINK>")) for item in suite
    ]
    result = result_of(suite, replies)
    assert result[MAP] < 2.5 / result["num_environment_classes"]


def test_two_results_are_compared_item_by_item(suite: list[Item], tmp_path: Path) -> None:
    right = [gold(item) for item in suite]
    worse = [
        replace(reply, choice=None) if reply.choice is not None and place % 3 == 0 else reply
        for place, reply in enumerate(right)
    ]
    one, other = result_of(suite, right), result_of(suite, worse, "b")
    # As in a later run: through the file.
    other = json.loads(json.dumps(other))
    found = differences(suite, one, other)
    accuracy = found["figures"]["choice_accuracy"]
    assert found["num_shared"] == len(suite) and found["num_left_out"] == 0
    assert accuracy["value"] == pytest.approx(1 - other["choice_accuracy"], abs=1e-4)
    assert accuracy["only_first"] > 0 and accuracy["only_other"] == 0 and accuracy["p_mcnemar"] < 0.01
    assert found["figures"]["environment_accuracy"]["value"] == found["figures"][MAP]["value"] == 0.0
    assert "p_mcnemar" not in found["figures"]["wer"]

    other["items"] = {name: {**row, "digest": "another clip"} for name, row in other["items"].items()}
    with pytest.raises(ValueError, match="no item in common"):
        differences(suite, one, other)

    one["compared"] = [{"system": "b", **found}]
    write([one, other], tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"result.json", "report.md", "accuracy.png", "snr.png"}
    assert json.loads((tmp_path / "result.json").read_text())["choice_accuracy"] == 1.0
    page = (tmp_path / "report.md").read_text()
    assert page.startswith(markdown([one, other])) and "## a minus b" in page and "![snr](snr.png)" in page


def test_outcomes_outlive_the_file(suite: list[Item]) -> None:
    from training.evaluation.score import item_scores_of

    for item in suite[:20]:
        verdict = judge(item, gold(item))
        row = json.loads(json.dumps(result_of([item], [gold(item)])["items"][item.id]))
        assert item_scores_of(row) == verdict
    assert item_scores_of({"digest": "x", "voice": "v"}) == ItemScores()


def test_latency_is_left_out_where_it_was_not_measured() -> None:
    assert latency("ttft", []) == {}
    assert latency("e2e", [1.0, 2.0, 3.0]) == {"e2e_p50_s": 2.0, "e2e_p95_s": 2.9}


def test_counting_turns_alone_is_measured(builder: SceneBuilder) -> None:
    items = draw_items(builder, num_items=200, first_seed=0)
    assert 0.3 < count_from_turns_accuracy(items) < 0.8


def test_lines_that_training_speaks_can_be_left_out(tmp_path: Path) -> None:
    folder = write_bank(tmp_path / "bank")
    texts = {u.text for utterances in Bank(folder).utterances.values() for u, _ in utterances}
    kept = frozenset(sorted(texts)[: len(texts) // 2])
    left = Bank(folder, without=kept)
    assert not kept & {u.text for utterances in left.utterances.values() for u, _ in utterances}
    assert trained_lines(seed=0) == trained_lines(seed=0)
