"""Rewards of completions (method, section 6): pure functions of the trace and of the truth.

Every part is between 0 and 1 and measures one property; `reward` computes their weighted sum and keeps the parts. A new
reward is one function, one line of `REWARDS` and one weight in `training.recipes.REWARD_WEIGHTS`.

Answers are matched exactly, never searched in prose. A letter inside a word, a list of all choices, a quote copied from
the question and words after the answer earn nothing. A failing reward raises: it must stop training, not lower the
reward.

This module depends on no token probability, model or group, and imports no torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hyper_model.trace import Section
from hyper_model.trace_parser import ParsedTrace, TraceFormat
from training.data.truth import Truth
from training.recipes import LengthRange
from training.text_metrics import (
    edit_distance,
    holds_words,
    label_set,
    mentioned_choices,
    named_choice,
    sentences,
    similarity,
    words,
)

WEAK_FORMAT = 0.5
"""Format reward of a weak trace; a strict one earns 1."""

COPIED_SIMILARITY = 0.8
"""Similarity of a quote to a piece of the question from which it counts as copied."""

_BACKGROUND = re.compile(r"\b(background|bgm|noises?|music|ambien\w+|sounds? of)\b")
_LINGUISTIC = re.compile(r"\b(says?|said|saying|speaks? of|talks? about|mentions?|tells?|asks?|words?|sentences?)\b")
_CAUSE_FOLLOWS = re.compile(r"\b(because of|because|since|due to|judging by|from)\b")
_CAUSE_PRECEDES = re.compile(r"\b(so|therefore|thus|hence|suggests?|implies|means|indicates?|shows?)\b")


RewardFn = Callable[[ParsedTrace, Truth, LengthRange], float | None]
"""Return the reward of a trace between 0 and 1, or None for an undecided truth."""


@dataclass(frozen=True)
class Reward:
    """A weighted reward and its parts.

    Attributes:
        parts: Unweighted reward of every name of `REWARDS`; None for an undecided truth.
        background_gate: Factor of the rewards in `GATED`.
    """

    total: float
    parts: Mapping[str, float | None]
    background_gate: float


def reward(parsed: ParsedTrace, truth: Truth, weights: Mapping[str, float], lengths: LengthRange) -> Reward:
    """Return the reward of a finished completion.

    A malformed trace earns nothing: it could state two answers, and be right with one of them.

    Args:
        weights: Weight of every reward by its name (`GrpoRecipe.weights`).
        lengths: The trace lengths of the full length reward.
    """
    if parsed.format is TraceFormat.MALFORMED:
        return Reward(0.0, {name: None if name in PERCEPTION else 0.0 for name in REWARDS}, 0.0)
    parts = {name: function(parsed, truth, lengths) for name, function in REWARDS.items()}
    gate = background_gate(parsed)
    total = sum(weights[name] * value for name, value in parts.items() if value is not None)
    total -= (1 - gate) * sum(weights[name] * (parts[name] or 0.0) for name in GATED)
    return Reward(total, parts, gate)


def is_right(parsed: ParsedTrace, truth: Truth) -> bool:
    """Return True for the gold answer: a choice's words, its letter or both; without choices, exactly the words."""
    text = parsed.answer_text or ""
    if truth.choices:
        return named_choice(text, truth.choices) == truth.choices.index(truth.answer)
    return bool(words(text)) and words(text) == words(truth.answer)


def accuracy(parsed: ParsedTrace, truth: Truth, lengths: LengthRange) -> float:
    """Return 1 for the gold answer."""
    return float(is_right(parsed, truth))


def form(parsed: ParsedTrace, truth: Truth, lengths: LengthRange) -> float:
    """Return 1 for the strict form, less for the weak one, and 0 if words follow the answer."""
    if parsed.trailing_text or parsed.format is TraceFormat.MALFORMED:
        return 0.0
    return 1.0 if parsed.format is TraceFormat.STRICT else WEAK_FORMAT


def fidelity(parsed: ParsedTrace, truth: Truth, lengths: LengthRange) -> float:
    """Return the mean support of the speakers' quotes in the transcript of the same trace.

    The support of a quote is its similarity to the nearest sentence (Levenshtein, by characters). A quote copied from
    the question counts 0, unless the true transcript contains it. A trace without quotes counts 0, except for a clip
    known to have no speech.
    """
    trace = parsed.trace
    quotes = [quote for speaker in trace.speakers for quote in speaker.quotes]
    if not quotes:
        is_silent = truth.transcript == "" and not trace.speakers and not words(trace.transcript or "")
        return float(is_silent)
    transcribed = sentences(trace.transcript or "")
    prompt_texts = [truth.question, *truth.choices]

    def backing(quote: str) -> float:
        if any(_is_copied(quote, text) for text in prompt_texts) and not _is_copied(quote, truth.transcript or ""):
            return 0.0
        return max((similarity(quote, sentence) for sentence in transcribed), default=0.0)

    return sum(map(backing, quotes)) / len(quotes)


def alignment(parsed: ParsedTrace, truth: Truth, lengths: LengthRange) -> float:
    """Return 1 if the conclusion inside THINK names the answer of FINAL_ANSWER and no other choice."""
    # If THINK has no sections (`<think>`), all of it is reasoning.
    conclusion = parsed.texts.get(Section.SUMMARY) or (sentences(parsed.trace.reasoning or "") or [""])[-1]
    answer = parsed.answer_text or ""
    if not truth.choices:
        return float(bool(words(answer)) and holds_words(words(conclusion), words(answer)))
    named = named_choice(answer, truth.choices)
    return float(named is not None and mentioned_choices(conclusion, truth.choices) == {named})


def background_gate(parsed: ParsedTrace) -> float:
    """Return 0 if the reasoning names background sound as the cause of spoken words, else 1.

    This heuristic works on clauses. It matches "because of the music he says ..." and "the noise suggests she said
    ...". It does not match "he says it is loud because of the music", since there the words report the cause.
    """
    text = f"{parsed.trace.reasoning or ''} {parsed.texts.get(Section.SUMMARY, '')}".lower()
    for clause in re.split(r"[.;!?\n]+", text):
        follows, precedes = _CAUSE_FOLLOWS.search(clause), _CAUSE_PRECEDES.search(clause)
        if follows and not clause[: follows.start()].strip():
            # "Because of X, Y": the cause ends at the first comma, or at the first word about speech.
            cause, _, effect = clause[follows.end() :].partition(",")
            if not effect and (said := _LINGUISTIC.search(cause)):
                cause, effect = cause[: said.start()], cause[said.start() :]
        elif precedes:
            cause, effect = clause[: precedes.start()], clause[precedes.end() :]
        else:
            continue
        if _BACKGROUND.search(cause) and not _LINGUISTIC.search(cause) and _LINGUISTIC.search(effect):
            return 0.0
    return 1.0


def length(parsed: ParsedTrace, truth: Truth, lengths: LengthRange) -> float:
    """Return 1 for a right answer in a trace of the wanted length.

    The reward falls along a cosine outside the range. It is 0 for a wrong answer and for words after the answer.
    """
    if parsed.trailing_text:
        return 0.0
    num_tokens = sum(parsed.section_num_tokens.values())
    outside = max(lengths.min_tokens - num_tokens, num_tokens - lengths.max_tokens, 0)
    return float(is_right(parsed, truth)) * (0.5 + 0.5 * math.cos(math.pi * min(1.0, outside / lengths.ramp_tokens)))


def environment(parsed: ParsedTrace, truth: Truth, lengths: LengthRange) -> float | None:
    """Return 1 if ENV names exactly the true labels, in any order."""
    if truth.environment is None:
        return None
    return float(label_set(parsed.trace.environment or "") == label_set(truth.environment))


def speakers(parsed: ParsedTrace, truth: Truth, lengths: LengthRange) -> float | None:
    """Return 1 if SPEAKER lists the true number of people."""
    return None if truth.num_speakers is None else float(len(parsed.trace.speakers) == truth.num_speakers)


def transcript(parsed: ParsedTrace, truth: Truth, lengths: LengthRange) -> float | None:
    """Return 1 minus the word error rate of ASR, at least 0; without speech, 1 for an empty transcript."""
    if truth.transcript is None:
        return None
    reference, hypothesis = words(truth.transcript), words(parsed.trace.transcript or "")
    if not reference:
        return float(not hypothesis)
    return max(0.0, 1 - edit_distance(reference, hypothesis) / len(reference))


def _is_copied(quote: str, text: str) -> bool:
    quoted = words(quote)
    return bool(quoted) and (holds_words(words(text), quoted) or similarity(quote, text) >= COPIED_SIMILARITY)


REWARDS: Mapping[str, RewardFn] = {
    "accuracy": accuracy,
    "format": form,
    "fidelity": fidelity,
    "alignment": alignment,
    "length": length,
    "environment": environment,
    "speakers": speakers,
    "transcript": transcript,
}
"""Every reward by its name; `training.recipes.REWARD_WEIGHTS` has their default weights.

Logs, reports and the ablation take their names from here. The order is that of the sum.
"""

PERCEPTION = ("environment", "speakers", "transcript")
"""Rewards of perception sections; a malformed trace has None for them, not 0."""

GATED = ("fidelity", "alignment")
"""Rewards multiplied by `background_gate`."""
