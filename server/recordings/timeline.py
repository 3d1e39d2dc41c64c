"""Answers from the timeline of a recording, by code: how often, in what order, how long.

A window shows at most 30 s, so no window alone can answer these questions. The code answers only if it finds the sound
or the words of the question in the perception; else the model answers from single windows. Times are those of windows.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from hyper_model.audio import SAMPLE_RATE_HZ
from server.recordings.perceptions import WindowPerception
from server.recordings.search import stem, terms

Kind = Literal["count", "order", "duration"]

_COUNT = re.compile(r"\bhow (often|many times)\b", re.I)
_DURATION = re.compile(r"\bhow (long|many (seconds|minutes))\b", re.I)
_SEQUENCE = re.compile(r"\b(in )?(what|which) order\b", re.I)
_FIRST = re.compile(r"\b(which|what)\b(?=.*\bfirst\b).*\b(said|heard?|comes?|appears?|mentioned|occurs?)\b", re.I)
_LAST = re.compile(r"\b(which|what)\b(?=.*\blast\b).*\b(said|heard?|comes?|appears?|mentioned|occurs?)\b", re.I)
_RELATION = re.compile(r"\b(before|after)\b", re.I)
_WHOLE = re.compile(r"\bhow long is (the|this) (recording|audio|clip|file)\b", re.I)
_QUOTED = re.compile(r"[\"“”„«»]([^\"“”„«»]+)[\"“”„«»]")
_THEN = re.compile(r"\s*(?:,\s*(?:and\s+)?(?:then\s+)?|\bthen\b|->|→|>|;)\s*", re.I)
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_NUMBER_WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()
_NEGATION = {"no": False, "yes": True}
_MIN_SHARE = 0.8
"""Share of a sentence's words in a transcript that counts as the sentence; recognisers err in the others."""

_MIN_LOOSE_WORDS = 4


@dataclass(frozen=True)
class Hit:
    """One place of a sound or of words: the window's place in the list, and the word's in its transcript."""

    window: int
    word: int = 0


@dataclass(frozen=True)
class Counted:
    """An answer from the timeline.

    Attributes:
        kind: Kind of the question.
        text: The answer.
        choice_index: The choice that states it; None for an open question.
        windows: Places of the windows that the answer rests on.
        explanation: One sentence about what was counted.
    """

    kind: Kind
    text: str
    choice_index: int | None
    windows: tuple[int, ...]
    explanation: str


def answer_from(question: str, choices: Sequence[str], windows: Sequence[WindowPerception]) -> Counted | None:
    """Return the answer to a question about count, order or duration; None if the timeline does not decide it."""
    if _COUNT.search(question):
        return _count(question, choices, windows)
    if _DURATION.search(question):
        return _duration(question, choices, windows)
    if _SEQUENCE.search(question):
        return _sequence(question, choices, windows)
    if len(choices) > 1 and _RELATION.search(question) and {choice.casefold() for choice in choices} == {"yes", "no"}:
        return _relation(question, choices, windows)
    if len(choices) > 1 and (_FIRST.search(question) or _LAST.search(question)):
        return _extreme(choices, windows, last=not _FIRST.search(question))
    return None


def find(term: str, windows: Sequence[WindowPerception]) -> list[Hit]:
    """Return the places of a sound's label or of words, in order.

    A label counts once per run of windows with it, because a sound may last over a cut. Words count each time.
    """
    wanted = [stem(word) for word in re.findall(r"[\w']+", term.casefold())]
    if not wanted:
        return []
    hits: list[Hit] = []
    was_there = False
    for place, window in enumerate(windows):
        is_there = any(_is_label(wanted, label) for label in window.environment)
        if is_there and not was_there:
            hits.append(Hit(place))
        was_there = is_there
    if hits:
        return hits
    for place, window in enumerate(windows):
        words = [stem(word) for word in re.findall(r"[\w']+", window.transcript.casefold())]
        exact = [start for start in range(len(words) - len(wanted) + 1) if words[start : start + len(wanted)] == wanted]
        if not exact and len(wanted) >= _MIN_LOOSE_WORDS:
            exact = _loose(wanted, words)
        hits += [Hit(place, start) for start in exact]
    return hits


def subjects(question: str, windows: Sequence[WindowPerception]) -> list[str]:
    """Return the sounds and words that a question names: quoted ones, else labels of the timeline."""
    if quoted := _QUOTED.findall(question):
        return quoted
    asked = set(terms(question))
    labels = dict.fromkeys(label for window in windows for label in window.environment)
    named = [label for label in labels if terms(label) and set(terms(label)) <= asked]
    text = question.casefold()
    return sorted(named, key=lambda label: text.find(label.casefold()))


def _is_label(wanted: Sequence[str], label: str) -> bool:
    return [stem(word) for word in re.findall(r"[\w']+", label.casefold())] == list(wanted)


def _loose(wanted: Sequence[str], words: Sequence[str]) -> list[int]:
    """Return the start of the best stretch of words with enough of the wanted ones."""
    size = len(wanted)
    best_start, best_share = 0, 0.0
    for start in range(max(1, len(words) - size + 1)):
        stretch = set(words[start : start + size])
        share = sum(word in stretch for word in wanted) / size
        if share > best_share:
            best_start, best_share = start, share
    return [best_start] if best_share >= _MIN_SHARE else []


def _count(question: str, choices: Sequence[str], windows: Sequence[WindowPerception]) -> Counted | None:
    named = subjects(question, windows)
    if len(named) != 1:
        return None
    hits = find(named[0], windows)
    if not hits and not _QUOTED.search(question):
        return None
    index = None
    if choices:
        index = _choice_of(len(hits), choices, _exact_number)
        if index is None:
            return None
    text = choices[index] if index is not None else str(len(hits))
    places = tuple(dict.fromkeys(hit.window for hit in hits))
    return Counted("count", text, index, places, f"Counted in the timeline: {len(hits)}.")


def _duration(question: str, choices: Sequence[str], windows: Sequence[WindowPerception]) -> Counted | None:
    if not windows:
        return None
    places = tuple(range(len(windows)))
    if _WHOLE.search(question):
        seconds = windows[-1].span.end_s
        explanation = "The length of the recording, in counted samples."
    else:
        named = subjects(question, windows)
        if len(named) != 1:
            return None
        wanted = [stem(word) for word in re.findall(r"[\w']+", named[0].casefold())]
        places = tuple(
            place for place, window in enumerate(windows) if any(_is_label(wanted, each) for each in window.environment)
        )
        if not places:
            return None
        spans = [windows[place].span for place in places]
        seconds = sum(span.end_s - span.start_s - span.num_shared / SAMPLE_RATE_HZ for span in spans)
        explanation = f"The sum of {len(places)} windows with this label; a window is counted whole."
    index = None
    if choices:
        index = _choice_of(seconds, choices, _nearest_seconds)
        if index is None:
            return None
    text = choices[index] if index is not None else f"{seconds:.0f} s"
    return Counted("duration", text, index, places, explanation)


def _sequence(question: str, choices: Sequence[str], windows: Sequence[WindowPerception]) -> Counted | None:
    if not choices:
        named = subjects(question, windows)
        firsts = {name: hits[0] for name in named if (hits := find(name, windows))}
        if len(firsts) < 2:
            return None
        ordered = sorted(firsts, key=lambda name: _key(firsts[name]))
        places = tuple(dict.fromkeys(firsts[name].window for name in ordered))
        return Counted("order", ", ".join(ordered), None, places, "Ordered by the first window of each.")
    fitting: list[tuple[int, tuple[int, ...]]] = []
    for index, choice in enumerate(choices):
        items = [part for part in _THEN.split(choice) if part]
        found = [find(item, windows) for item in items]
        if len(items) < 2 or not all(found):
            continue
        keys = [_key(hits[0]) for hits in found]
        if all(before < after for before, after in itertools.pairwise(keys)):
            fitting.append((index, tuple(hits[0].window for hits in found)))
    if len(fitting) != 1:
        return None
    index, places = fitting[0]
    return Counted("order", choices[index], index, places, "Ordered by the first window of each.")


def _relation(question: str, choices: Sequence[str], windows: Sequence[WindowPerception]) -> Counted | None:
    named = subjects(question, windows)
    if len(named) != 2:
        return None
    first, second = (find(name, windows) for name in named)
    if not first or not second or _key(first[0]) == _key(second[0]):
        return None
    is_before = _key(first[0]) < _key(second[0])
    asks_before = (_RELATION.search(question) or [""])[0].casefold() == "before"
    is_true = is_before == asks_before
    index = next(place for place, choice in enumerate(choices) if _NEGATION.get(choice.casefold()) is is_true)
    places = tuple(dict.fromkeys((first[0].window, second[0].window)))
    return Counted("order", choices[index], index, places, "Compared by the first window of each.")


def _extreme(choices: Sequence[str], windows: Sequence[WindowPerception], *, last: bool) -> Counted | None:
    """Return the choice found first, or last, in the timeline."""
    found = {index: hits for index, choice in enumerate(choices) if (hits := find(choice, windows))}
    if not found:
        return None
    keys = {index: _key(hits[-1 if last else 0]) for index, hits in found.items()}
    index = (max if last else min)(keys, key=lambda each: keys[each])
    if list(keys.values()).count(keys[index]) > 1:
        return None
    which = "last" if last else "first"
    return Counted("order", choices[index], index, (keys[index][0],), f"The {which} of these in the timeline.")


def _key(hit: Hit) -> tuple[int, int]:
    return hit.window, hit.word


def _choice_of(value: float, choices: Sequence[str], distance: Callable[[float, str], float | None]) -> int | None:
    """Return the choice nearest to a number; None if none states one, or two are equally near."""
    found = {index: gap for index, choice in enumerate(choices) if (gap := distance(value, choice)) is not None}
    if not found:
        return None
    nearest = min(found.values())
    fitting = [index for index, gap in found.items() if gap == nearest]
    return fitting[0] if len(fitting) == 1 else None


def _exact_number(value: float, choice: str) -> float | None:
    text = choice.casefold()
    if match := _NUMBER.search(text):
        number = float(match[0])
    elif (word := next((word for word in re.findall(r"[a-z]+", text) if word in _SPELLED), None)) is not None:
        number = _SPELLED[word]
    else:
        return None
    return 0.0 if number == value else None


_SPELLED = {word: float(number) for number, word in enumerate(_NUMBER_WORDS)} | {
    "never": 0.0,
    "once": 1.0,
    "twice": 2.0,
}


def _nearest_seconds(value: float, choice: str) -> float | None:
    match = _NUMBER.search(choice)
    if match is None:
        return None
    is_minutes = re.search(r"\bmin", choice, re.I) is not None
    return abs(float(match[0]) * (60 if is_minutes else 1) - value)
