"""What a completion is worth (method, section 6): pure functions of the trace and of what is known to be true.

Every part is between 0 and 1 and says one thing; `reward` weighs them and keeps them apart in its breakdown. A new
reward is one function, one line of `REWARDS` and one weight in `training.recipes.REWARD_WEIGHTS`. Nothing is
read out of prose by searching: a letter inside a word, a list of all choices, a quote copied from the question or words
behind the answer earn nothing. What cannot be item_scores raises: a reward that fails must stop training, not lower it.

Knows neither tokens' probabilities, nor models, nor groups; imports no torch.
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
"""What a weak trace earns of the strict one's reward."""

COPIED_SIMILARITY = 0.8
"""A quote as near as this to a piece of the question is taken for a copy of it."""

_BACKGROUND = re.compile(r"\b(background|bgm|noises?|music|ambien\w+|sounds? of)\b")
_LINGUISTIC = re.compile(r"\b(says?|said|saying|speaks? of|talks? about|mentions?|tells?|asks?|words?|sentences?)\b")
_CAUSE_FOLLOWS = re.compile(r"\b(because of|because|since|due to|judging by|from)\b")
_CAUSE_PRECEDES = re.compile(r"\b(so|therefore|thus|hence|suggests?|implies|means|indicates?|shows?)\b")


RewardFn = Callable[[ParsedTrace, Truth, LengthRange], float | None]
"""Return the reward of a trace between 0 and 1, or None where the truth does not decide it."""


@dataclass(frozen=True)
class Reward:
    """Hold a weighted reward and its parts.

    Attributes:
        parts: Unweighted reward of every name of `REWARDS`; None where the truth does not decide it.
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
    """Tell whether the answer is the gold one: a choice's words, its letter or both; else exactly the words."""
    text = parsed.answer_text or ""
    if truth.choices:
        return named_choice(text, truth.choices) == truth.choices.index(truth.answer)
    return bool(words(text)) and words(text) == words(truth.answer)


def accuracy(parsed: ParsedTrace, truth: Truth, lengths: LengthRange) -> float:
    """Return 1 for the gold answer."""
    return float(is_right(parsed, truth))


def form(parsed: ParsedTrace, truth: Truth, lengths: LengthRange) -> float:
    """Returns 1 for the strict form, less for the weak one, and nothing where words follow the answer."""
    if parsed.trailing_text or parsed.format is TraceFormat.MALFORMED:
        return 0.0
    return 1.0 if parsed.format is TraceFormat.STRICT else WEAK_FORMAT


def fidelity(parsed: ParsedTrace, truth: Truth, lengths: LengthRange) -> float:
    """Returns how well the quotes of the speakers are backed by the transcript of the same trace, on average.

    A quote's similarity is that of the sentence nearest to it (Levenshtein, by characters). One that is copied from the
    question counts nothing unless the true transcript holds it; nor does a trace that quotes nobody, but for a clip
    that is known to be without speech.
    """
    trace = parsed.trace
    quotes = [quote for speaker in trace.speakers for quote in speaker.quotes]
    if not quotes:
        is_silent = truth.transcript == "" and not trace.speakers and not words(trace.transcript or "")
        return float(is_silent)
    transcribed = sentences(trace.transcript or "")
    asked = [truth.question, *truth.choices]

    def backing(quote: str) -> float:
        if any(_is_copied(quote, text) for text in asked) and not _is_copied(quote, truth.transcript or ""):
            return 0.0
        return max((similarity(quote, sentence) for sentence in transcribed), default=0.0)

    return sum(map(backing, quotes)) / len(quotes)


def alignment(parsed: ParsedTrace, truth: Truth, lengths: LengthRange) -> float:
    """Returns 1 where the conclusion inside THINK names what FINAL_ANSWER says, and no other choice beside it."""
    # Where THINK has no sections (`<think>`), all of it is reasoning.
    conclusion = parsed.texts.get(Section.SUMMARY) or (sentences(parsed.trace.reasoning or "") or [""])[-1]
    answer = parsed.answer_text or ""
    if not truth.choices:
        return float(bool(words(answer)) and holds_words(words(conclusion), words(answer)))
    named = named_choice(answer, truth.choices)
    return float(named is not None and mentioned_choices(conclusion, truth.choices) == {named})


def background_gate(parsed: ParsedTrace) -> float:
    """Returns 0 where the reasoning takes background sound for the cause of what is *said*, else 1.

    A heuristic on clauses: "because of the music he says ..." and "the noise suggests that she said ..." are such, and
    "he says it is loud because of the music" is not, since there the words are the cause's witness.
    """
    text = f"{parsed.trace.reasoning or ''} {parsed.texts.get(Section.SUMMARY, '')}".lower()
    for clause in re.split(r"[.;!?\n]+", text):
        follows, precedes = _CAUSE_FOLLOWS.search(clause), _CAUSE_PRECEDES.search(clause)
        if follows and not clause[: follows.start()].strip():
            # "Because of X, Y": the cause ends at the first comma, or where somebody begins to speak.
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
    """Returns 1 where ENV names the true labels and nothing else, in any order."""
    if truth.environment is None:
        return None
    return float(label_set(parsed.trace.environment or "") == label_set(truth.environment))


def speakers(parsed: ParsedTrace, truth: Truth, lengths: LengthRange) -> float | None:
    """Returns 1 where SPEAKER lists as many people as speak."""
    return None if truth.num_speakers is None else float(len(parsed.trace.speakers) == truth.num_speakers)


def transcript(parsed: ParsedTrace, truth: Truth, lengths: LengthRange) -> float | None:
    """Returns 1 less the word error rate of ASR, at least 0; without speech, 1 for an empty one."""
    if truth.transcript is None:
        return None
    reference, heard = words(truth.transcript), words(parsed.trace.transcript or "")
    if not reference:
        return float(not heard)
    return max(0.0, 1 - edit_distance(reference, heard) / len(reference))


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
"""Rewards of perception sections alone: unknown, and not 0, for a malformed trace."""

GATED = ("fidelity", "alignment")
"""Rewards that `background_gate` multiplies."""
