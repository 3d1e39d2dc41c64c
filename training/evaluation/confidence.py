"""Fit the temperatures that make the confidence of answers a probability of being right.

One temperature divides the log-odds of the alternatives of every answer of a kind: the choices, or the written text and
any other text (Guo et al. 2017). It is fitted by maximum likelihood. It keeps the order of the choices, so the answers
stay the same. This module runs no model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar

from hyper_model.answering import AnswerResult, softmax, tempered
from hyper_model.manifest import AnswerKind, ConfidenceFields, ReliabilityBin
from training.evaluation.statistics import NUM_BINS, expected_calibration_error, reliability, reliability_row

MIN_ANSWERS = 50
"""Least number of answers of a kind, and the least number of right and of wrong ones is a tenth of it."""

NUM_FOLDS = 5

TEMPERATURES = (0.05, 50.0)
"""Range of the search."""

_NO_CERTAINTY = 1e-6
"""Distance of a probability from 0 and 1 in the likelihood; a wrong answer at certainty would outweigh all others."""


@dataclass(frozen=True)
class Rated:
    """The answer to a question of the calibration set.

    Attributes:
        shares: The model's own probability of each choice, or of the written text alone.
        chosen: Index of the answer in `shares`.
        is_right: Whether the answer is right.
    """

    shares: tuple[float, ...]
    chosen: int
    is_right: bool

    def confidence(self, temperature: float) -> float:
        """Return the probability of the answer at a temperature, as the answering procedure does."""
        if len(self.shares) == 1:
            return tempered(self.shares[0], temperature)
        with np.errstate(divide="ignore"):
            logprobs = np.log(np.asarray(self.shares))
        return softmax(logprobs.tolist(), temperature)[self.chosen]


def rated(result: AnswerResult, is_right: bool | None) -> Rated | None:
    """Return the answer of a completion at temperature 1; None if its truth or its probability is unknown."""
    if is_right is None or result.confidence is None:
        return None
    if result.choice_index is None:
        return Rated((result.confidence,), 0, is_right)
    return Rated(result.scores, result.choice_index, is_right)


def own_confidence() -> ConfidenceFields:
    """Return fields with temperature 1 for both kinds: the model's own probabilities."""
    kind = AnswerKind(temperature=1.0, num_answers=1, ece_before=0.0, ece_after=0.0, curve_before=(), curve=())
    return ConfidenceFields(source="none", choices=kind, open=kind)


def fit_confidence(answers: Sequence[Rated], *, source: str) -> ConfidenceFields:
    """Fit a temperature per kind of question; a kind with too few answers stays without one."""
    choices = [answer for answer in answers if len(answer.shares) > 1]
    texts = [answer for answer in answers if len(answer.shares) == 1]
    return ConfidenceFields(source=source, choices=fit_kind(choices), open=fit_kind(texts))


def fit_kind(answers: Sequence[Rated]) -> AnswerKind | None:
    """Fit the temperature of one kind of question; None with too few answers.

    Each confidence of `ece_after` and `curve` has the temperature of the other folds, so it is of an answer left out.
    """
    num_right = sum(answer.is_right for answer in answers)
    if len(answers) < MIN_ANSWERS or min(num_right, len(answers) - num_right) < MIN_ANSWERS // 10:
        return None
    left_out = [0.0] * len(answers)
    for fold in range(NUM_FOLDS):
        temperature = fit_temperature([answer for place, answer in enumerate(answers) if place % NUM_FOLDS != fold])
        for place in range(fold, len(answers), NUM_FOLDS):
            left_out[place] = answers[place].confidence(temperature)
    ece_before, curve_before = measure([answer.confidence(1.0) for answer in answers], answers)
    ece_after, curve = measure(left_out, answers)
    return AnswerKind(
        temperature=round(fit_temperature(answers), 4),
        num_answers=len(answers),
        ece_before=ece_before,
        ece_after=ece_after,
        curve_before=curve_before,
        curve=curve,
    )


def fit_temperature(answers: Sequence[Rated]) -> float:
    """Return the temperature with the highest likelihood of right and wrong answers."""

    def loss(log_temperature: float) -> float:
        temperature = math.exp(log_temperature)
        confidences = np.clip([answer.confidence(temperature) for answer in answers], _NO_CERTAINTY, 1 - _NO_CERTAINTY)
        is_right = np.asarray([answer.is_right for answer in answers])
        return -float(np.where(is_right, np.log(confidences), np.log1p(-confidences)).mean())

    low, high = map(math.log, TEMPERATURES)
    found: Any = minimize_scalar(loss, bounds=(low, high), method="bounded")
    return math.exp(float(found.x))


def measure(confidences: Sequence[float], answers: Sequence[Rated]) -> tuple[float, tuple[ReliabilityBin, ...]]:
    """Return the expected calibration error and the reliability curve of confidences."""
    sums = np.sum(
        [reliability_row(each, answer.is_right) for each, answer in zip(confidences, answers, strict=True)], axis=0
    )
    curve = tuple(ReliabilityBin(**vars(each)) for each in reliability(sums))
    return round(float(expected_calibration_error(sums)), 4), curve


def draw_reliability(curves: Sequence[tuple[str, Sequence[tuple[float, float, int]]]], path: Path) -> None:
    """Plot reliability curves as a PNG.

    Args:
        curves: A label, and (mean confidence, accuracy, number of answers) of each tenth.
        path: The file.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(4.8, 4.4), layout="constrained")
    axes.plot([0, 1], [0, 1], linestyle="--", color="grey", label="equal")
    for label, curve in curves:
        line = axes.plot([x for x, _, _ in curve], [y for _, y, _ in curve], label=label)[0]
        sizes = [8 + 240 * count / max(1, sum(each for _, _, each in curve)) for _, _, count in curve]
        axes.scatter([x for x, _, _ in curve], [y for _, y, _ in curve], s=sizes, color=line.get_color(), alpha=0.6)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_xlabel(f"mean confidence (in {NUM_BINS} equal ranges)")
    axes.set_ylabel("share of right answers")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
