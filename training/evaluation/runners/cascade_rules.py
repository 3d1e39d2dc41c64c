"""Answer a question from the cascade's perception with rules on the question's words.

The rules cover the kinds of question of `training.data.questions`, in any wording with the same key words. Every other
question counts as one about the transcript. Among choices, the most similar one to the rule's result wins. Similarity
is by words and characters, so that a misrecognised word costs no answer. This module depends on no audio and no model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from training.data.sources.spelled_numbers import spell_number
from training.text_metrics import similarity, words

BACKGROUND_DB = 9.0
"""Level difference to the loudest turn for a background voice."""

_SHORT_FORMS = {"mr": "mister", "mrs": "missus", "dr": "doctor", "st": "saint", "ok": "okay", "grey": "gray"}
_COUNT_WORDS = ("nobody", "one", "two", "three", "four", "five", "six")
_WEEKDAYS = set("monday tuesday wednesday thursday friday saturday sunday".split())
_MONTHS = set("january february march april may june july august september october november december".split())
_HOURS = {*map(spell_number, range(1, 13)), "noon", "midnight"}
_NUMBER_WORDS = {word for number in range(100) for word in spell_number(number).split()}
_STOP_WORDS = set(
    "a an the is are was were be been am do does did to of in on at for with and or it its that this these those there "
    "who what which where when why how many much will would shall should can could has have had not no speaker speak "
    "say says said person people i you he she we they me him her us them my your his our their very".split()
)


def plain_words(word: str) -> tuple[str, ...]:
    """Return a recognised word in spoken form: numbers and short forms spelled out, without marks."""
    spelled: list[str] = []
    for match in re.finditer(r"\d+|[^\W\d_]+(?:'[^\W\d_]+)?", word.replace(",", "")):
        piece = match[0]
        if piece.isdigit():
            spelled += _spelled(int(piece))
            if "$" in word:
                spelled.append("dollars")
            elif "€" in word:
                spelled.append("euros")
        else:
            spelled.append(_SHORT_FORMS.get(piece.lower(), piece))
    return tuple(spelled)


def _spelled(number: int) -> list[str]:
    """Return the words of a number below a million; larger numbers digit by digit."""
    if number < 1_000_000:
        return spell_number(number).split()
    return [spell_number(int(digit)) for digit in str(number)]


@dataclass(frozen=True)
class HeardTurn:
    """An uninterrupted turn of one person.

    Attributes:
        words: With the recogniser's capitals.
        level_db: Level of the audio around it.
        is_ended: True if the recogniser put a full stop behind it.
    """

    speaker: int
    words: tuple[str, ...]
    level_db: float
    is_ended: bool = False

    @property
    def text(self) -> str:
        """Return the words as one line."""
        return " ".join(self.words)

    def with_words(self, more: Sequence[str], *, is_ended: bool) -> HeardTurn:
        """Return the turn with words appended."""
        return replace(self, words=(*self.words, *more), is_ended=is_ended)


@dataclass(frozen=True)
class Heard:
    """The cascade's perception of a clip.

    Attributes:
        sexes: "woman" or "man" of each person, by number.
        environment_scores: Score of the tagger by class.
    """

    turns: tuple[HeardTurn, ...]
    sexes: tuple[str, ...]
    environment_scores: Mapping[str, float]

    @cached_property
    def environment(self) -> str:
        """Return the class with the highest score."""
        return max(self.environment_scores, key=lambda label: self.environment_scores[label])

    @cached_property
    def foreground(self) -> tuple[HeardTurn, ...]:
        """Return the turns above the level of background voices."""
        if not self.turns:
            return ()
        loudest = max(turn.level_db for turn in self.turns)
        border = loudest - (BACKGROUND_DB if self.environment == "background speech" else 2 * BACKGROUND_DB)
        return tuple(turn for turn in self.turns if turn.level_db >= border)

    @cached_property
    def people(self) -> tuple[tuple[int, str], ...]:
        """Return number and sex of each foreground speaker, in order of first speech."""
        numbers = dict.fromkeys(turn.speaker for turn in self.foreground)
        return tuple((number, self.sexes[number]) for number in numbers)

    @cached_property
    def words(self) -> tuple[str, ...]:
        """Return the words of the foreground in lower case."""
        return tuple(word.lower() for turn in self.foreground for word in turn.words)


def reply_to(question: str, choices: Sequence[str], heard: Heard) -> tuple[str, int | None]:
    """Return the answer and the index of the choice, None without choices."""
    lower_question = question.lower()
    for pattern, rule in _RULES:
        match = pattern.search(lower_question)
        if match is not None:
            result = rule(question, match, choices, heard)
            if result is not None:
                return _settle(result, choices)
    return _settle(_content(question, choices, heard), choices)


def _settle(found: str, choices: Sequence[str]) -> tuple[str, int | None]:
    """Return the most similar choice to the result of a rule."""
    if not choices:
        return found, None
    index = max(range(len(choices)), key=lambda place: _likeness(choices[place], found))
    return choices[index], index


def _likeness(one: str, other: str) -> float:
    """Return the similarity of two texts: by characters, plus the share of the first one's words in the second."""
    wanted, had = words(one), set(words(other))
    shared = sum(word in had for word in wanted) / max(1, len(wanted))
    return similarity(one, other) + 0.5 * shared


def _count(_: str, __: re.Match[str], choices: Sequence[str], heard: Heard) -> str:
    number = min(len(heard.people), len(_COUNT_WORDS) - 1)
    numbers = [_number(choice) for choice in choices]
    if any(value is not None for value in numbers):
        # Take the nearest number among the choices.
        return min(
            (choice for choice, value in zip(choices, numbers, strict=True) if value is not None),
            key=lambda choice: abs((_number(choice) or 0) - number),
        )
    return _COUNT_WORDS[number]


def _number(text: str) -> int | None:
    for word in words(text):
        if word in _COUNT_WORDS:
            return _COUNT_WORDS.index(word)
        if word.isdigit():
            return int(word)
    return None


def _first_sex(_: str, __: re.Match[str], ___: Sequence[str], heard: Heard) -> str:
    return f"a {heard.people[0][1] if heard.people else 'woman'}"


def _environment(_: str, __: re.Match[str], choices: Sequence[str], heard: Heard) -> str:
    known = [choice for choice in choices if choice in heard.environment_scores]
    return max(known, key=lambda choice: heard.environment_scores[choice]) if known else heard.environment


def _present(_: str, match: re.Match[str], __: Sequence[str], heard: Heard) -> str | None:
    thing = match["thing"].strip(" ?.\"'")
    if thing not in heard.environment_scores:
        return None
    return "yes" if heard.environment == thing else "no"


def _source(question: str, match: re.Match[str], _: Sequence[str], heard: Heard) -> str:
    line = match["line"]
    best = max(heard.turns, key=lambda turn: _likeness(line, turn.text), default=None)
    if best is None or similarity(line, best.text) < 0.5 or best not in heard.foreground:
        return "the background"
    return "a speaker"


def _says(_: str, match: re.Match[str], __: Sequence[str], heard: Heard) -> str:
    number = int(match["n"]) if match["n"] else _ORDINALS.index(match["nth"]) + 1
    people = [person for person, _ in heard.people]
    if not people:
        return ""
    person = people[min(number, len(people)) - 1]
    return next(turn.text for turn in heard.foreground if turn.speaker == person)


def _end(place: int) -> Callable[[str, re.Match[str], Sequence[str], Heard], str]:
    def rule(_: str, __: re.Match[str], choices: Sequence[str], heard: Heard) -> str:
        if not choices or not heard.words:
            return heard.foreground[place].text if heard.foreground else ""

        def at_the_end(choice: str) -> float:
            num = len(words(choice))
            part = heard.words[:num] if place == 0 else heard.words[-num:]
            return similarity(choice, " ".join(part))

        return max(choices, key=at_the_end)

    return rule


def _word(_: str, __: re.Match[str], choices: Sequence[str], heard: Heard) -> str:
    return max(choices, key=lambda choice: _said(choice, heard.words)) if choices else ""


def _said(text: str, spoken: Sequence[str]) -> float:
    """Return the best similarity of a text to any run of as many spoken words."""
    num = len(words(text))
    return max(
        (similarity(text, " ".join(spoken[at : at + num])) for at in range(max(1, len(spoken) - num + 1))), default=0.0
    )


def _content(question: str, choices: Sequence[str], heard: Heard) -> str:
    """Find the turn about the question, and in it the choice or the words of the wanted kind."""
    question_words = [word for word in words(question) if word not in _STOP_WORDS]
    if not heard.foreground:
        return ""

    def about(turn: HeardTurn) -> float:
        spoken = [word.lower() for word in turn.words]
        return sum(max((similarity(word, other) for other in spoken), default=0.0) ** 2 for word in question_words)

    ranked = sorted(heard.foreground, key=about, reverse=True)
    if choices:
        best = [word.lower() for word in ranked[0].words]
        return max(choices, key=lambda choice: _said(choice, heard.words) + 0.5 * _said(choice, best))
    left = [word for word in ranked[0].words if word.lower() not in {*question_words, *_STOP_WORDS}]
    return _of_kind(question.lower(), ranked[0], left)


def _of_kind(question: str, turn: HeardTurn, left: Sequence[str]) -> str:
    """Return the words of a turn of the question's kind: a number, a day, a name or a thing."""
    lower = [word.lower() for word in left]
    kinds: list[tuple[str, Callable[[str, str], bool]]] = [
        ("how many|how much", lambda low, _: low in _NUMBER_WORDS),
        ("time|hour|when", lambda low, _: low in _WEEKDAYS | _MONTHS | _HOURS),
        ("day", lambda low, _: low in _WEEKDAYS),
        ("^who|whose|whom", lambda low, word: word[:1].isupper() and low not in _WEEKDAYS | _MONTHS),
        ("^where|city|place", lambda _, word: word[:1].isupper() and word != turn.words[0]),
    ]
    for pattern, is_wanted in kinds:
        if re.search(pattern, question):
            matching = [word for word, low in zip(left, lower, strict=True) if is_wanted(low, word)]
            if matching:
                return matching[0]
    # The answer is mostly the end of a sentence.
    return left[-1] if left else turn.text


_ORDINALS = ("first", "second", "third", "fourth")

_Rule = Callable[[str, "re.Match[str]", Sequence[str], Heard], "str | None"]

_RULES: tuple[tuple[re.Pattern[str], _Rule], ...] = (
    (re.compile(r'^(?=.*\bbackground\b)[^"]*"(?P<line>[^"]+)"'), _source),
    (re.compile(r"how many (?:different )?(?:people|speakers|voices|persons)\b(?!.*\b(?:at|in|needed)\b)"), _count),
    (re.compile(r"who speaks first|first speaker a|which voice (?:starts|speaks first)"), _first_sex),
    (re.compile(r"(?:is there|can you hear|contains?|is) (?P<thing>.+?)(?: in the background| audible)?\?"), _present),
    (re.compile(r"in the background|background sound|that noise|environment"), _environment),
    (re.compile(r"speaker (?P<n>\d)\b|(?P<nth>first|second|third|fourth) speaker"), _says),
    (re.compile(r"which (?:of (?:these|the) words|word)"), _word),
    (re.compile(r"said last|comes last|conversation end"), _end(-1)),
    (re.compile(r"said first|comes first|conversation start"), _end(0)),
)
