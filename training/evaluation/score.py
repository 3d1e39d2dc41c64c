"""Score replies and compute figures for any system: a checkpoint, a service, another model or the baseline.

Every figure covers all items in its definition, with a 95 % bootstrap interval of fixed seed. Items are not
independent, since a few voices and recordings make them all. The bootstrap therefore resamples whole voices or
recordings, not items. An item without a reply (an endpoint error, a refused clip) counts as wrong, and is also counted
separately.

This module depends on no scene audio, HTTP or training.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np

from hyper_model.trace_parser import ParsedTrace, TraceFormat, parse_text
from training.data.hard_sets import SNR_LEVELS_DB
from training.data.truth import Truth
from training.evaluation.statistics import (
    NUM_BINS,
    Difference,
    Statistic,
    Sums,
    compare,
    expected_calibration_error,
    figure,
    mean_average_precision,
    ratio,
    reliability,
    reliability_row,
)
from training.evaluation.suites.around_speech import PARTS, SHORT_MS
from training.evaluation.suites.item import Item
from training.recipes import REWARD_WEIGHTS, LengthRange
from training.rl.rewards import is_right, reward
from training.text_metrics import edit_distance, holds_words, label_set, matches_words, named_choice, words

RESULT_VERSION = 1

Reads = Literal["trace", "perception", "answer"]

_OF_THE_TRACE = frozenset({"is_strict", "is_consistent", "fidelity", "reward"})
"""Outcomes for the form of a trace, not for perception."""


@dataclass(frozen=True)
class Reply:
    """The reply of a system to an item.

    Attributes:
        parsed: The trace; for a reply in prose, its words without any section.
        choice: Index of the chosen choice; None for no choice, or a question without choices.
        prediction: The answer in words, for rules on words.
        confidence: Probability that the answer is right, by the system itself; None without one.
        has_tokens: True if the trace's tokens are counted; its reward needs them.
        ttft_s, e2e_s: Seconds to the first token and to the end; None if not measured.
        error: Reason for a missing reply, else None.
    """

    parsed: ParsedTrace
    choice: int | None = None
    prediction: str = ""
    confidence: float | None = None
    has_tokens: bool = False
    num_pauses: int | None = None
    is_aborted: bool | None = None
    ttft_s: float | None = None
    e2e_s: float | None = None
    error: str | None = None

    @classmethod
    def failed(cls, error: str) -> Reply:
        """Return a placeholder for a missing reply."""
        return cls(parse_text(""), error=error)


@dataclass(frozen=True)
class ItemScores:
    """One item's outcomes; None for figures without meaning for this item."""

    is_right: bool | None = None
    matches_words: bool | None = None
    """By the string match of MMAU and MMAR."""

    names_choice: bool | None = None
    free_is_right: bool | None = None
    contains_answer: bool | None = None
    """In a question without choices: True if the reply contains the words of an accepted answer."""

    confidence: float | None = None
    """Probability that the answer is right, by the system itself."""

    response_agrees: bool | None = None
    """True if RESPONSE names the chosen choice."""

    heard: str | None = None
    """Words of ASR, in a suite that compares transcripts of one clip."""

    environment_is_right: bool | None = None
    environment_named: tuple[str, ...] | None = None
    count_is_right: bool | None = None
    word_errors: int | None = None
    num_words: int | None = None
    char_errors: int | None = None
    num_chars: int | None = None
    is_strict: bool | None = None
    is_silent: bool | None = None
    """In a clip without speech: True if the trace has no word and no speaker."""

    invents_speech: bool | None = None
    """In a clip without speech: True if the trace has a transcribed word."""

    is_consistent: bool | None = None
    """True if the trace's conclusion names its answer and quotes no background sound as words."""

    fidelity: float | None = None
    """Degree of support for the speakers' quotes in the trace's own transcript."""

    reward: float | None = None
    """Reward of Stage II with its default weights."""

    num_pauses: int | None = None
    is_aborted: bool | None = None
    ttft_s: float | None = None
    e2e_s: float | None = None
    error: str | None = None


def judge(item: Item, reply: Reply, *, reads: Reads = "trace") -> ItemScores:
    """Compare one reply with the truth.

    Args:
        reads: The expected form of the reply. `trace` scores everything, and a missing section counts as wrong.
            `perception` (a cascade) skips the form of the trace. `answer` (a model in prose) scores only the answer.
    """
    truth = item.truth
    item_scores = ItemScores(
        is_right=reply.choice == truth.choices.index(truth.answer) if truth.choices else None,
        matches_words=matches_words(reply.prediction, truth.answer, truth.choices) if truth.choices else None,
        names_choice=reply.choice is not None if truth.choices else None,
        free_is_right=_free_is_right(reply, truth),
        contains_answer=_contains_answer(reply, truth),
        confidence=reply.confidence,
        num_pauses=reply.num_pauses,
        is_aborted=reply.is_aborted,
        ttft_s=reply.ttft_s,
        e2e_s=reply.e2e_s,
        error=reply.error,
    )
    if reads == "answer":
        return item_scores
    outcomes = _judge_trace(truth, reply)
    if _CLIP in item.groups:
        outcomes["heard"] = " ".join(words(reply.parsed.trace.transcript or ""))
    if reads == "perception":
        outcomes = {name: value for name, value in outcomes.items() if name not in _OF_THE_TRACE}
    return ItemScores(**{**vars(item_scores), **outcomes})


def _free_is_right(reply: Reply, truth: Truth) -> bool | None:
    if truth.choices or not truth.answer:
        return None
    if reply.parsed.answer_text is not None:
        return is_right(reply.parsed, truth)
    return bool(words(reply.prediction)) and words(reply.prediction) == words(truth.answer)


def _contains_answer(reply: Reply, truth: Truth) -> bool | None:
    if not truth.accepted:
        return None
    said = words(reply.prediction or reply.parsed.trace.response or "")
    return any(holds_words(said, words(answer)) for answer in truth.accepted)


def _judge_trace(truth: Truth, reply: Reply) -> dict[str, Any]:
    parsed, trace = reply.parsed, reply.parsed.trace
    worth = reward(parsed, truth, REWARD_WEIGHTS, LengthRange())
    outcomes: dict[str, Any] = {
        "is_strict": parsed.format is TraceFormat.STRICT,
        "is_consistent": worth.parts["alignment"] == worth.background_gate == 1,
        "reward": worth.total if reply.has_tokens else None,
    }
    if reply.choice is not None and trace.response is not None:
        outcomes["response_agrees"] = named_choice(trace.response, truth.choices) == reply.choice
    if truth.environment is not None:
        named = label_set(trace.environment or "")
        outcomes["environment_named"] = tuple(sorted(named))
        outcomes["environment_is_right"] = named == label_set(truth.environment)
    if truth.num_speakers:
        outcomes["count_is_right"] = len(trace.speakers) == truth.num_speakers
        outcomes["fidelity"] = worth.parts["fidelity"]
    if truth.transcript is not None:
        reference, hypothesis = words(truth.transcript), words(trace.transcript or "")
        outcomes |= {
            "word_errors": edit_distance(reference, hypothesis),
            "num_words": len(reference),
            "char_errors": edit_distance(" ".join(reference), " ".join(hypothesis)),
            "num_chars": len(" ".join(reference)),
        }
        if not reference:
            # A missing reply does not count as silence.
            outcomes["invents_speech"] = bool(hypothesis) or reply.error is not None
            outcomes["is_silent"] = not trace.speakers and not outcomes["invents_speech"]
    return outcomes


@dataclass(frozen=True)
class Figure:
    """The definition of a figure: part of the suite, outcome and resampling cluster.

    Attributes:
        value: An item's contribution: a number, or a pair (part, total); None excludes the item.
    """

    name: str
    value: Callable[[Item, ItemScores], float | tuple[float, float] | None]
    cluster: Literal["voice", "background"] = "voice"
    part: str = "main"
    meaning: str = ""


def _errors(kind: Literal["word", "char"]) -> Callable[[Item, ItemScores], tuple[float, float] | None]:
    def value(_: Item, item_scores: ItemScores) -> tuple[float, float] | None:
        errors, num = (
            (item_scores.word_errors, item_scores.num_words)
            if kind == "word"
            else (item_scores.char_errors, item_scores.num_chars)
        )
        return None if not num or errors is None else (errors, num)

    return value


FIGURES: tuple[Figure, ...] = (
    Figure("choice_accuracy", lambda _, j: j.is_right, meaning="correct choice"),
    Figure(
        "string_match_accuracy", lambda _, j: j.matches_words, meaning="correct by the string match of MMAU and MMAR"
    ),
    Figure(
        "environment_accuracy", lambda _, j: j.environment_is_right, "background", meaning="ENV names the true labels"
    ),
    Figure(
        "environment_accuracy_recorded",
        lambda i, j: j.environment_is_right if i.is_recorded else None,
        "background",
        meaning="environment accuracy on recorded backgrounds",
    ),
    Figure("speaker_count_accuracy", lambda _, j: j.count_is_right, meaning="SPEAKER has the true number of people"),
    Figure(
        "one_voice_counted_as_one",
        lambda _, j: j.count_is_right,
        part="one_voice",
        meaning="clips of one voice with four turns, counted as one person",
    ),
    Figure("wer", _errors("word"), meaning="word error rate of ASR"),
    Figure("cer", _errors("char"), meaning="character error rate of ASR"),
    Figure(
        "speech_free_is_silent_rate",
        lambda _, j: j.is_silent,
        "background",
        meaning="clips without speech: no word and no speaker in the trace",
    ),
    Figure(
        "invented_speech_rate",
        lambda _, j: j.invents_speech,
        "background",
        part="speech_free",
        meaning="clips without speech: any transcribed word",
    ),
    Figure("strict_format_rate", lambda _, j: j.is_strict, meaning="traces with every required section in order"),
    Figure("free_answer_accuracy", lambda _, j: j.free_is_right, meaning="questions without choices: the exact words"),
    Figure(
        "contained_answer_accuracy",
        lambda _, j: j.contains_answer,
        meaning="questions without choices: the words of an accepted answer are in the reply",
    ),
    Figure("answer_matches_response", lambda _, j: j.response_agrees, meaning="RESPONSE names the chosen choice"),
    Figure(
        "choice_accuracy_trained_wordings",
        lambda _, j: j.is_right,
        part="trained",
        meaning="correct choice on the same scenes in trained wordings",
    ),
    Figure("consistency", lambda _, j: j.is_consistent, meaning="the trace's conclusion names the final answer"),
    Figure("quote_fidelity", lambda _, j: j.fidelity, meaning="agreement of quotes with the trace's transcript"),
    Figure("reward", lambda _, j: j.reward, meaning="Stage II reward"),
    Figure("pauses_per_sample", lambda _, j: j.num_pauses, meaning="pauses per completion"),
    Figure("gave_up_rate", lambda _, j: j.is_aborted, meaning="completions aborted by the gate"),
    Figure("unread_answer_rate", lambda _, j: _no(j.names_choice), meaning="replies without a readable choice"),
    Figure("failed_rate", lambda _, j: j.error is not None, meaning="items without a reply"),
    Figure(
        "swapped_clip_accuracy",
        lambda _, j: j.is_right,
        part="swapped",
        meaning="correct choice with another item's clip",
    ),
    *(
        figure
        for level in SNR_LEVELS_DB
        for figure in (
            Figure(
                f"accuracy_snr_{level}",
                lambda _, j: j.is_right,
                part=f"snr_{level}",
                meaning=f"choice accuracy at {level} dB",
            ),
            Figure(
                f"environment_accuracy_snr_{level}",
                lambda _, j: j.environment_is_right,
                "background",
                f"snr_{level}",
                f"at {level} dB",
            ),
            Figure(
                f"wer_snr_{level}", _errors("word"), part=f"snr_{level}", meaning=f"environment accuracy at {level} dB"
            ),
        )
    ),
    *(
        figure
        for part in PARTS
        for figure in (
            Figure(f"wer_{part}", _errors("word"), part=part, meaning="word error rate of the same words"),
            Figure(f"accuracy_{part}", lambda _, j: j.is_right, part=part, meaning="choice accuracy"),
            Figure(f"speaker_count_accuracy_{part}", lambda _, j: j.count_is_right, part=part, meaning="speaker count"),
        )
    ),
    *(
        Figure(
            f"invented_speech_rate_short_{milliseconds}",
            lambda _, j: j.invents_speech,
            part=f"short_{milliseconds}",
            meaning=f"clips of {milliseconds} ms: any transcribed word",
        )
        for milliseconds in SHORT_MS
    ),
)
"""All figures except the mean average precision, in display order; each is a ratio of sums."""

MAP = "environment_map"
ECE = "ece"
"""Expected calibration error of the answers with a confidence; `ece_choices` and `ece_open` are of one kind each."""

DISAGREEMENT = "transcript_disagreement"
"""Word error rate between the transcripts of one clip under different questions."""

_CLIP = "clip"
"""Group of the items about one clip."""

BREAKDOWNS: tuple[tuple[str, str, Callable[[ItemScores], bool | None]], ...] = (
    ("choice_accuracy_by_kind", "kind", lambda j: j.is_right),
    ("choice_accuracy_by_task", "task", lambda j: j.is_right),
    ("choice_accuracy_by_category", "category", lambda j: j.is_right),
    ("choice_accuracy_by_difficulty", "difficulty", lambda j: j.is_right),
    ("string_match_accuracy_by_task", "task", lambda j: j.matches_words),
    ("environment_accuracy_by_class", "class", lambda j: j.environment_is_right),
    ("speaker_count_accuracy_by_count", "people", lambda j: j.count_is_right),
)
"""(name, group, outcome) of every breakdown of the part `main`."""


def _no(outcome: bool | None) -> bool | None:
    return None if outcome is None else not outcome


def summarize(items: Sequence[Item], item_scores: Sequence[ItemScores]) -> dict[str, Any]:
    """Return the figures, their intervals and breakdowns, and each item's outcomes, as plain data.

    Figures without an item in the suite are left out.
    """
    result: dict[str, Any] = {}
    intervals: dict[str, list[float]] = {}
    pairs = list(zip(items, item_scores, strict=True))

    def add(name: str, sums: Sums, statistic: Statistic = ratio) -> None:
        value, interval = figure(sums, statistic)
        result[name] = round(value, 4)
        intervals[name] = [round(each, 4) for each in interval]

    for each in FIGURES:
        sums = _sums(each, pairs)
        if sums.clusters:
            add(each.name, sums)
    if (sums := _disagreement_sums(pairs)).clusters:
        add(DISAGREEMENT, sums)
    for name, has_choices in ((ECE, None), (f"{ECE}_choices", True), (f"{ECE}_open", False)):
        if (sums := _confidence_sums(pairs, has_choices=has_choices)).clusters:
            add(name, sums, expected_calibration_error)
            if name == ECE:
                result["reliability"] = [asdict(each) for each in reliability(sums.values_NK.sum(0))]
    labels = sorted({label for item in items for label in label_set(item.truth.environment or "")})
    sums = _label_sums(pairs, labels)
    if sums.clusters:
        add(MAP, sums, mean_average_precision)
    main = [(item, scores) for item, scores in pairs if item.part == "main"]
    for name in ("ttft", "e2e"):
        result |= latency(name, [value for _, j in main if (value := getattr(j, f"{name}_s")) is not None])
    counts = Counter(j.num_pauses for _, j in main if j.num_pauses is not None)
    if counts:
        result["pause_shares"] = {str(k): round(counts[k] / counts.total(), 4) for k in sorted(counts)}
    for name, group, outcome in BREAKDOWNS:
        if broken := _by(main, group, outcome):
            result[name] = broken
    with_choices = [item for item, _ in main if item.truth.choices]
    if with_choices:
        result["chance_accuracy"] = round(chance_accuracy([item.truth.choices for item in with_choices]), 4)
    if any(item.num_turns is not None for item, _ in main):
        result["count_from_turns_accuracy"] = round(count_from_turns_accuracy([item for item, _ in main]), 4)
    result["interval_95"] = intervals
    result["num_items"] = len(main)
    result["num_choice_items"] = len(with_choices)
    result["num_environment_classes"] = len(labels)
    result["items"] = {item.id: _row(item, scores) for item, scores in pairs}
    result["version"] = RESULT_VERSION
    return result


def latency(name: str, seconds: Sequence[float]) -> dict[str, float]:
    """Return the median and the 95th percentile of a latency; empty without measurements."""
    if not seconds:
        return {}
    return {f"{name}_p{percent}_s": round(float(np.percentile(seconds, percent)), 4) for percent in (50, 95)}


def _sums(each: Figure, pairs: Sequence[tuple[Item, ItemScores]]) -> Sums:
    rows: list[tuple[float, float]] = []
    clusters: list[str] = []
    for item, scores in pairs:
        if item.part != each.part:
            continue
        value = each.value(item, scores)
        if value is not None:
            rows.append(value if isinstance(value, tuple) else (float(value), 1.0))
            clusters.append(getattr(item, each.cluster))
    return Sums(np.asarray(rows, np.float64).reshape(-1, 2), tuple(clusters))


def _confidence_sums(pairs: Sequence[tuple[Item, ItemScores]], *, has_choices: bool | None) -> Sums:
    """Return the addends of `reliability` of the answers with a confidence: of one kind, or of both for None."""
    rows: list[np.ndarray] = []
    clusters: list[str] = []
    for item, scores in pairs:
        if item.part != "main" or scores.confidence is None or has_choices not in (None, bool(item.truth.choices)):
            continue
        is_right = scores.is_right if item.truth.choices else scores.free_is_right
        if is_right is not None:
            rows.append(reliability_row(scores.confidence, is_right))
            clusters.append(item.voice)
    return Sums(np.asarray(rows, np.float64).reshape(-1, 3 * NUM_BINS), tuple(clusters))


def _disagreement_sums(pairs: Sequence[tuple[Item, ItemScores]]) -> Sums:
    """Return (word edits, words) of each clip, over all pairs of its transcripts."""
    heard: defaultdict[str, list[list[str]]] = defaultdict(list)
    voice_of: dict[str, str] = {}
    for item, scores in pairs:
        if scores.heard is not None:
            heard[item.groups[_CLIP]].append(scores.heard.split())
            voice_of[item.groups[_CLIP]] = item.voice
    rows = [
        [
            sum(edit_distance(*pair) for pair in combinations(texts, 2)),
            sum(max(map(len, pair)) for pair in combinations(texts, 2)),
        ]
        for texts in heard.values()
    ]
    return Sums(np.asarray(rows, np.float64).reshape(-1, 2), tuple(voice_of[clip] for clip in heard))


def _label_sums(pairs: Sequence[tuple[Item, ItemScores]], labels: Sequence[str]) -> Sums:
    rows: list[list[float]] = []
    clusters: list[str] = []
    for item, scores in pairs:
        if item.part == "main" and scores.environment_named is not None:
            named, true = set(scores.environment_named), label_set(item.truth.environment or "")
            rows.append([1.0, *(float(x) for label in labels for x in _membership(label, named, true))])
            clusters.append(item.background)
    return Sums(np.asarray(rows, np.float64).reshape(-1, 1 + 3 * len(labels)), tuple(clusters))


def _membership(label: str, named: set[str], true: set[str]) -> tuple[bool, bool, bool]:
    return label in named and label in true, label in named, label in true


def _by(
    pairs: Sequence[tuple[Item, ItemScores]], group: str, outcome: Callable[[ItemScores], bool | None]
) -> dict[str, float]:
    values_of: defaultdict[str, list[bool]] = defaultdict(list)
    for item, scores in pairs:
        value = outcome(scores)
        if value is not None and group in item.groups:
            values_of[item.groups[group]].append(value)
    return {name: round(_mean(values), 3) for name, values in sorted(values_of.items())}


def chance_accuracy(choices: Sequence[Sequence[str]]) -> float:
    """Return the accuracy of a uniform guess among each item's choices."""
    return _mean([1 / len(options) for options in choices])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))


def count_from_turns_accuracy(items: Sequence[Item]) -> float:
    """Return the accuracy of the best fixed guess of the speaker count for each number of turns."""
    counts: defaultdict[int, Counter[int]] = defaultdict(Counter)
    for item in items:
        if item.truth.num_speakers and item.num_turns is not None:
            counts[item.num_turns][item.truth.num_speakers] += 1
    total = sum(counter.total() for counter in counts.values())
    return sum(max(counter.values()) for counter in counts.values()) / max(1, total)


def _row(item: Item, scores: ItemScores) -> dict[str, Any]:
    """Return an item's data for later comparisons: its digest, its clusters and every outcome."""
    outcomes = {name: value for name, value in asdict(scores).items() if value is not None}
    return {"digest": item.digest(), "voice": item.voice, "background": item.background, **outcomes}


def differences(items: Sequence[Item], result: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Compare two results figure by figure on their common items: the first minus the other.

    Raises:
        ValueError: The other result has no item with an equal question and clip.
    """
    rows, other_rows = result["items"], other.get("items") or {}
    shared = [
        item for item in items if item.id in other_rows and other_rows[item.id]["digest"] == rows[item.id]["digest"]
    ]
    if not shared:
        raise ValueError("the two results have no item in common: not the same suite, voices or number of items")
    ours = [(item, item_scores_of(rows[item.id])) for item in shared]
    theirs = [(item, item_scores_of(other_rows[item.id])) for item in shared]
    figures: dict[str, Any] = {}
    for each in FIGURES:
        both = [
            (one, two)
            for one, two in zip(ours, theirs, strict=True)
            if each.value(*one) is not None and each.value(*two) is not None
        ]
        sums = _sums(each, [one for one, _ in both]), _sums(each, [two for _, two in both])
        if sums[0].clusters:
            figures[each.name] = _plain(compare(*sums))
    labels = sorted({label for item in shared for label in label_set(item.truth.environment or "")})
    sums = _label_sums(ours, labels), _label_sums(theirs, labels)
    if sums[0].clusters and sums[0].clusters == sums[1].clusters:
        figures[MAP] = _plain(compare(*sums, mean_average_precision))
    return {"num_shared": len(shared), "num_left_out": len(items) - len(shared), "figures": figures}


def item_scores_of(row: Mapping[str, Any]) -> ItemScores:
    """Read an item's outcomes back from a result."""
    fields = {name: value for name, value in row.items() if name in ItemScores.__dataclass_fields__}
    if "environment_named" in fields:
        fields["environment_named"] = tuple(fields["environment_named"])
    return ItemScores(**fields)


def _plain(difference: Difference) -> dict[str, Any]:
    def rounded(item: Any) -> Any:
        if isinstance(item, tuple):
            return [rounded(element) for element in item]
        return round(item, 6) if isinstance(item, float) else item

    return {name: rounded(item) for name, item in asdict(difference).items() if item is not None}
