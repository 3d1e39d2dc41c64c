"""Temperatures of the confidence: the fit, its measures, and their place in the manifest."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hyper_model.answering import softmax
from hyper_model.checkpoint import open_checkpoint, update_manifest
from hyper_model.errors import CheckpointError
from hyper_model.manifest import ConfidenceFields, make_manifest
from server.engines.scripted import scripted_checkpoint
from tests.builders import answer_result, build_random_checkpoint
from training.evaluation.confidence import (
    MIN_ANSWERS,
    Rated,
    draw_reliability,
    fit_confidence,
    fit_kind,
    fit_temperature,
    measure,
    own_confidence,
    rated,
)
from training.evaluation.statistics import NUM_BINS, expected_calibration_error, reliability, reliability_row

CHECKPOINT = scripted_checkpoint()


def overconfident(temperature: float, number: int = 4000, num_choices: int = 3) -> list[Rated]:
    """Return answers that are right as often as their probability at a temperature says."""
    random, made = np.random.default_rng(0), list[Rated]()
    for _ in range(number):
        logprobs = temperature * random.normal(0, 1.5, num_choices)
        truth = int(random.choice(num_choices, p=softmax(logprobs.tolist(), temperature)))
        chosen = int(np.argmax(logprobs))
        made.append(Rated(tuple(softmax(logprobs.tolist())), chosen, chosen == truth))
    return made


def texts(temperature: float, number: int = 4000) -> list[Rated]:
    random = np.random.default_rng(1)
    odds = random.normal(1.0, 1.5, number)
    return [
        Rated((1 / (1 + math.exp(-temperature * each)),), 0, bool(random.random() < 1 / (1 + math.exp(-each))))
        for each in odds
    ]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_fitted_temperature_is_the_true_one(temperature: float) -> None:
    for answers in (overconfident(temperature), texts(temperature)):
        assert fit_temperature(answers) == pytest.approx(temperature, rel=0.1)
        kind = fit_kind(answers)
        assert kind is not None and kind.ece_after < 0.03 and kind.num_answers == len(answers)
        assert temperature == 1.0 or kind.ece_before > 2 * kind.ece_after
        assert sum(each.count for each in kind.curve) == sum(each.count for each in kind.curve_before) == len(answers)
        assert [each.confidence for each in kind.curve] == sorted(each.confidence for each in kind.curve)


def test_the_error_after_the_fit_is_of_answers_left_out() -> None:
    answers = overconfident(4.0, number=60)
    kind = fit_kind(answers)
    assert kind is not None
    inside, _ = measure([answer.confidence(kind.temperature) for answer in answers], answers)
    assert kind.ece_after != inside


def test_a_kind_with_too_few_right_or_wrong_answers_has_no_temperature() -> None:
    answers = overconfident(2.0, number=200)
    assert fit_kind(answers[: MIN_ANSWERS - 1]) is None
    for is_right in (True, False):
        assert fit_kind([replace(answer, is_right=is_right) for answer in answers]) is None
    fields = fit_confidence(answers, source="made up")
    assert fields.open is None and fields.choices is not None
    assert fields.temperature(has_choices=True) == fields.choices.temperature
    assert fields.temperature(has_choices=False) is None


def test_a_perfect_confidence_has_no_error_and_a_certain_wrong_one_the_largest() -> None:
    rows = np.sum([reliability_row(1.0, True), reliability_row(0.0, False)], axis=0)
    assert expected_calibration_error(rows) == 0
    assert expected_calibration_error(reliability_row(1.0, False)) == 1
    # Two answers of the same tenth: mean confidence 0.75, one of two right.
    rows = np.sum([reliability_row(0.71, True), reliability_row(0.79, False)], axis=0)
    assert expected_calibration_error(rows) == pytest.approx(0.25)
    (only,) = reliability(rows)
    assert (only.confidence, only.accuracy, only.count) == (0.75, 0.5, 2) and len(rows) == 3 * NUM_BINS


def test_an_answer_without_truth_or_probability_is_not_rated() -> None:
    result = answer_result(CHECKPOINT, CHECKPOINT.tokenizer.encode_trace("<FINAL_ANSWER>a</FINAL_ANSWER>"))
    assert rated(result, True) is None
    assert rated(replace(result, text_confidence=0.5), None) is None
    assert rated(replace(result, text_confidence=0.5), True) == Rated((0.5,), 0, True)
    chosen = replace(result, choice_index=1, scores=(0.2, 0.8))
    assert rated(chosen, False) == Rated((0.2, 0.8), 1, False)
    assert Rated((0.2, 0.8), 1, False).confidence(own_confidence().temperature(has_choices=True) or 0) == 0.8


def test_a_manifest_keeps_the_calibration_and_one_without_it_is_written_as_before(tmp_path: Path) -> None:
    checkpoint = build_random_checkpoint(tmp_path / "made")
    before = (checkpoint.path / "hyper.json").read_bytes()
    assert b"confidence" not in before.split(b'"calibration"')[-1] and checkpoint.manifest.confidence is None
    fields = fit_confidence(overconfident(4.0, number=300), source="made up")
    written = update_manifest(checkpoint.path, {"confidence": fields.model_dump(mode="json")})
    assert written.manifest.confidence == fields == open_checkpoint(checkpoint.path).manifest.confidence
    update_manifest(checkpoint.path, {"confidence": None})
    assert (checkpoint.path / "hyper.json").read_bytes() == before


def test_a_temperature_of_0_is_refused() -> None:
    document = CHECKPOINT.manifest.model_dump(mode="json")
    kind = own_confidence().model_dump(mode="json")["open"] | {"temperature": 0}
    with pytest.raises(CheckpointError, match=r"confidence\.open\.temperature"):
        make_manifest(document | {"confidence": {"source": "", "open": kind}})
    assert make_manifest(document | {"confidence": {"source": ""}}).confidence == ConfidenceFields(source="")


def test_the_curves_are_drawn(tmp_path: Path) -> None:
    kind = fit_kind(overconfident(4.0, number=300))
    assert kind is not None
    curve = [(each.confidence, each.accuracy, each.count) for each in kind.curve]
    draw_reliability([("made up", curve), ("nothing", [])], tmp_path / "reliability.png")
    assert (tmp_path / "reliability.png").read_bytes().startswith(b"\x89PNG")
