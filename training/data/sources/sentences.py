"""Draw the spoken lines of scenes, each with questions about its content.

A line is one short English sentence from a template with typed slots. Each question of a template has one of the slots
as its answer, so a scene's lines also give its questions. This module depends on no audio.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from functools import lru_cache

from training.data.sources.tables import read_table

_TABLE = read_table("sentences")

SLOTS: dict[str, tuple[str, ...]] = {slot: tuple(words.split()) for slot, words in _TABLE["slots"].items()}
"""Slot name -> the words for it. Every word is one that a person would type in a question."""

TEMPLATES: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = tuple(
    (template["sentence"], tuple((question, slot) for question, slot in template.get("questions", ())))
    for template in _TABLE["templates"]
)
"""(sentence, ((question, slot of its answer), ...)). `{name2}` draws a second, different word of the slot `name`."""

_SLOT = re.compile(r"\{([a-z]+)(2?)\}")


def plural(noun: str) -> str:
    """Return the plural of a word of the slot `object`."""
    irregular = {"knife": "knives", "diary": "diaries", "scissors": "scissors"}
    if noun in irregular:
        return irregular[noun]
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")


SLOTS["objects"] = tuple(plural(noun) for noun in SLOTS["object"])


@dataclass(frozen=True)
class LineQuestion:
    """A question about one line, with its answer and its slot, the source of wrong choices."""

    question: str
    answer: str
    slot: str


@dataclass(frozen=True)
class Line:
    """One spoken sentence with its content questions: lower-case words except names, no final stop."""

    text: str
    questions: tuple[LineQuestion, ...]
    is_open: bool = False
    """True for open text (`training/data/sources/open_text.py`), False for a template's sentence."""


def vocabulary() -> frozenset[str]:
    """Return every distinct lower-case word of possible lines."""
    words: set[str] = set()
    for sentence, _ in TEMPLATES:
        words.update(_SLOT.sub("", sentence).lower().split())
    for fillers in SLOTS.values():
        words.update(word.lower() for word in fillers)
    return frozenset(words)


def draw_line(rng: random.Random) -> Line:
    """Draw one line; templates with more slots have more weight, so that content outweighs small talk."""
    weights = [1 + 2 * len(_SLOT.findall(sentence)) for sentence, _ in TEMPLATES]
    sentence, _ = rng.choices(TEMPLATES, weights=weights)[0]
    filled: dict[str, str] = {}
    for slot, second in _SLOT.findall(sentence):
        options = [word for word in SLOTS[slot] if word not in filled.values()]
        filled[slot + second] = rng.choice(options)

    def fill(text: str) -> str:
        return _SLOT.sub(lambda match: filled[match[1] + match[2]], text)

    return line_from_text(fill(sentence))


def _pattern(sentence: str) -> re.Pattern[str]:
    parts: list[str] = []
    position = 0
    for match in _SLOT.finditer(sentence):
        parts.append(re.escape(sentence[position : match.start()]))
        parts.append(f"(?P<{match[1]}{match[2]}>{'|'.join(SLOTS[match[1]])})")
        position = match.end()
    return re.compile("".join(parts) + re.escape(sentence[position:]))


_PATTERNS = tuple((_pattern(sentence), questions) for sentence, questions in TEMPLATES)


@lru_cache(maxsize=65_536)
def line_from_text(text: str) -> Line:
    """Return the line of a text with the questions of its template; open text has none."""
    for pattern, questions in _PATTERNS:
        match = pattern.fullmatch(text)
        if match is not None:
            filled = match.groupdict()

            def fill(template: str, filled: dict[str, str] = filled) -> str:
                return _SLOT.sub(lambda slot: filled[slot[1] + slot[2]], template)

            return Line(
                text=text,
                questions=tuple(LineQuestion(fill(q), filled[answer], answer.rstrip("2")) for q, answer in questions),
            )
    return Line(text, (), is_open=True)
