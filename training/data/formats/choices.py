"""Read the choices in a question's text, and the choice of a gold answer."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

_LABELLED_ANSWER = re.compile(r"\(?([A-Za-z])(?:(?:\)[.:]?|[.:])\s*|\s+|\Z)(.*)", re.DOTALL)
# Bare letters only in upper case: "the answer is a dog" names no letter.
_STATED_LETTER = re.compile(
    r"(?i:\banswer\s*(?:is|:)?\s*(?:option\s+)?)\**(?:\(([A-Za-z])\)|([A-Z])(?=\s*(?:[.,;:()*]|\Z)))"
    r"|<LETTER>\s*([A-Za-z])\s*</LETTER>"
)


def gold_choice(text: str, choices: Sequence[str]) -> str | None:
    """Return the choice of a gold answer: its words, its letter ("B", "(b)", "B."), or both ("B. two").

    Exact words have precedence. Otherwise letter and case-insensitive words must not give two different choices.
    """
    wanted = _canonical(text)
    for choice in choices:
        if _canonical(choice) == wanted:
            return choice
    found = {choice for choice in choices if _folded(choice) == _folded(text)}
    labelled = _LABELLED_ANSWER.fullmatch(wanted)
    index = _letter_index(labelled[1]) if labelled else len(choices)
    if labelled and index < len(choices) and (not labelled[2] or _folded(labelled[2]) == _folded(choices[index])):
        found.add(choices[index])
    return found.pop() if len(found) == 1 else None


def stated_choice(text: str, choices: Sequence[str]) -> str | None:
    """Return the only choice with a stated letter ("The answer is B."), else the choice at the end ("is B.").

    PAQA's responses have these forms: of 1,500 published ones, the first rule reads 1,490, the second 3.
    """
    text = _canonical(text)
    letters = {(match[1] or match[2] or match[3]).upper() for match in _STATED_LETTER.finditer(text)}
    if not letters:
        return gold_choice(text.rpartition(" is ")[2], choices)
    index = _letter_index(letters.pop()) if len(letters) == 1 else len(choices)
    return choices[index] if index < len(choices) else None


def _letter_index(letter: str) -> int:
    return ord(letter.upper()) - ord("A")


def _canonical(text: str) -> str:
    return unicodedata.normalize("NFC", " ".join(text.split()))


def _folded(text: str) -> str:
    return _canonical(text).casefold().rstrip(" .")


# At the start of a line or sentence: "what are his options: tea, or coffee?" lists no choices.
_CHOICES_HEADER = re.compile(
    r"(?im)(?:^|(?<=[.?!])\s)[ \t]*(?:please choose the answer from the following options|choices|options)\s*:\s*"
)
_QUOTED = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
_QUOTED_LIST = re.compile(rf"\[\s*({_QUOTED}(?:\s*,\s*{_QUOTED})+)\s*\]")
_PARENTHESISED = re.compile(r"(?<!\w)\(([A-Za-z])\)\s*")
_PARENTHESISED_ANYWHERE = re.compile(r"\(([A-Za-z])\)\s*")
_LINE_LABEL = re.compile(r"(?m)^[ \t]*\(?([A-Za-z])[.):][ \t]+")
_INLINE_LABEL = re.compile(r"(?<!\S)\(?([A-Z])[.):]\s+")


def split_question(text: str) -> tuple[str, tuple[str, ...]]:
    """Split an instruction into the question and its choices.

    Choices have consecutive letters from A: "(a) x (b) y" anywhere, or "A. x" and the like at the start of lines. They
    can also follow "Choices:" or "Options:" as letters, a quoted list, lines, or texts separated by `|`, `;` or commas.
    """
    text = text.replace("<audio>", " ").strip()
    header = _CHOICES_HEADER.search(text)
    if header is not None:
        rest = text[header.end() :]
        choices, after = _listed(rest)
        if choices:
            return f"{text[: header.start()].strip()}\n{after}".strip(), choices
    # Marks inside words ("speaker(s)", but also "one(b) two") count only if there are no others.
    for label in (_PARENTHESISED, _LINE_LABEL, _PARENTHESISED_ANYWHERE):
        before, choices, after = _labelled(text, label)
        if choices:
            return f"{before}\n{after}".strip(), choices
    return text, ()


def _listed(text: str) -> tuple[tuple[str, ...], str]:
    """Return the choices after "Choices:", and the text after them."""
    quoted = _QUOTED_LIST.match(text)
    if quoted is not None:
        items = [re.sub(r"\\(.)", r"\1", item[1:-1]) for item in re.findall(_QUOTED, quoted[1])]
        return tuple(items), text[quoted.end() :].removeprefix(".").strip()
    for label in (_PARENTHESISED, _LINE_LABEL, _INLINE_LABEL):
        before, choices, after = _labelled(text, label)
        if choices and not before:
            return choices, after
    lines = [line.strip().lstrip("-*•").strip() for line in text.splitlines() if line.strip()]
    if len(lines) == 1:
        separator = next((mark for mark in "|;," if mark in lines[0]), None)
        lines = [] if separator is None else [part.strip() for part in lines[0].rstrip(". ").split(separator)]
    return (tuple(lines) if len(lines) > 1 else ()), ""


def _labelled(text: str, label: re.Pattern[str]) -> tuple[str, tuple[str, ...], str]:
    """Return the text before, in and after the last run of texts labelled A, B, C and so on."""
    marks = list(label.finditer(text))
    starts = [place for place, mark in enumerate(marks) if mark[1] in "Aa"]
    run = marks[starts[-1] :] if starts else []
    if len(run) < 2 or any(_letter_index(mark[1]) != place for place, mark in enumerate(run)):
        return text, (), ""
    ends = [*(mark.start() for mark in run[1:]), len(text)]
    parts = [text[mark.end() : end] for mark, end in zip(run, ends, strict=True)]
    # If choices are lines, further lines (such as "Answer with the letter.") are not part of the last choice.
    parts[-1], _, after = parts[-1].partition("\n") if label is _LINE_LABEL else (parts[-1], "", "")
    choices = tuple(part.strip().rstrip(",;") for part in parts)
    before = re.sub(rf"{_CHOICES_HEADER.pattern}\Z", "", text[: run[0].start()]).strip()
    return (before, choices, after.strip()) if all(choices) else (text, (), "")
