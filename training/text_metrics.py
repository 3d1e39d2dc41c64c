"""Compare texts by words, and match texts to choices.

The matchers of choices, strictest first:

- `named_choice`: the whole text is a choice.
- `mentioned_choices`: words of choices inside a text.
- `chosen`: prose of other models, by rules in a fixed order.
- `matches_words`: the string match of MMAU and MMAR.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence

from rapidfuzz.distance import Levenshtein

from hyper_model.trace import choice_label, environment_labels, render_choice

_STATEMENT = re.compile(r"(?i)\b(?:final\s+)?(?:answer|choice|option)\b\s*(?:is|would be|:|=)\s*(?:option\s+)?[:\s]*")
"""Start of an answer statement: "The answer is", "Final answer:", "The correct option is option"."""

_LETTER_AHEAD = re.compile(r"\(?([A-Za-z])(?:\)|[.:](?=\s|\Z)|(?=\s*\Z)|(?=\s*[,;]))")
"""A separate letter: "(b) ...", "B. ...", "B: ...", or "B" alone."""


def words(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation."""
    return "".join(c if c.isalnum() or c.isspace() else " " for c in text.lower()).split()


def edit_distance(reference: Sequence[Hashable], hypothesis: Sequence[Hashable]) -> int:
    """Return the Levenshtein distance, of characters for texts and of words for lists of words."""
    return Levenshtein.distance(reference, hypothesis)


def similarity(one: str, other: str) -> float:
    """Return 1 minus the edit distance over the longer length, by characters of the words."""
    one, other = " ".join(words(one)), " ".join(words(other))
    longest = max(len(one), len(other))
    return 1 - edit_distance(one, other) / longest if one and other else 0.0


def label_set(environment: str) -> set[str]:
    """Return the labels in an environment text, in plain words."""
    return {" ".join(words(label)) for label in environment_labels(environment)}


def sentences(text: str) -> list[str]:
    return [part for part in re.split(r"[.!?]+\s*", text) if part.strip()]


def holds_words(text: Sequence[str], part: Sequence[str]) -> bool:
    """Return True if a text contains words consecutively."""
    return any(list(text[at : at + len(part)]) == list(part) for at in range(len(text) - len(part) + 1))


def named_choice(text: str, choices: Sequence[str]) -> int | None:
    """Return the only choice equal to a text: its words, its letter (`B`, `(b)`, `B.`), or both; else None.

    A text equal to one choice by words and to another by letter names none. An exact match, punctuation included, has
    precedence over choices with equal words ("C major" and "C# major", "5" and "-5").
    """
    exact = [index for index, choice in enumerate(choices) if text.strip().casefold() == choice.strip().casefold()]
    if len(exact) == 1 and not _is_letter(text):
        return exact[0]
    said = words(text)
    found = {index for index, choice in enumerate(choices) if said == words(choice)}
    found |= {index for index, _ in enumerate(choices) if said == words(render_choice(index, choices))}
    if _is_letter(text):
        found |= {index for index, _ in enumerate(choices) if said == words(choice_label(index))}
    return found.pop() if len(found) == 1 else None


def _is_letter(text: str) -> bool:
    return re.fullmatch(r"\s*\(?[A-Za-z]\)?[.:]?\s*", text) is not None


def mentioned_choices(text: str, choices: Sequence[str]) -> set[int]:
    """Return the choices with their words inside a text; a choice inside a longer mentioned one does not count."""
    whole = named_choice(text, choices)
    if whole is not None:
        return {whole}
    said = words(text)
    found = {index for index, choice in enumerate(choices) if words(choice) and holds_words(said, words(choice))}
    return {
        index
        for index in found
        if not any(other != index and holds_words(words(choices[other]), words(choices[index])) for other in found)
    }


def chosen(text: str, choices: Sequence[str]) -> int | None:
    """Return the index of the choice chosen by a text, or None for no choice or several.

    The first rule with exactly one choice decides:
      1. The whole text is a choice: its words, its letter ("B", "(b)", "B."), or both.
      2. The last statement of an answer ("The answer is ...", "Final answer: ...", to the end of its line): a choice as
          in 1, else its leading letter, else the only choice with its words in the statement.
      3. The last non-empty line is a choice as in 1.
      4. The text begins with a letter and a mark ("(b) because ...", "B. because ...").
      5. Only one choice has its words in the text (of one inside a longer one, the longer).
    Marks of emphasis (`*`, `_`, backquotes) are removed first.
    """
    plain = re.sub(r"[*`]|(?<!\w)_+|_+(?!\w)", "", text).strip()
    whole = named_choice(plain, choices)
    if whole is not None:
        return whole
    stated = list(_STATEMENT.finditer(plain))
    if stated:
        statement = plain[stated[-1].end() :].strip().partition("\n")[0].strip(" \"'")
        for read in (named_choice, _letter, _only_mentioned):
            found = read(statement, choices)
            if found is not None:
                return found
    lines = [line.strip(" \"'") for line in plain.splitlines() if line.strip()]
    last = named_choice(lines[-1], choices) if lines else None
    if last is not None:
        return last
    return _letter(plain, choices) if _letter(plain, choices) is not None else _only_mentioned(plain, choices)


def matches_words(prediction: str, answer: str, choices: Sequence[str]) -> bool:
    """Return True if a prediction is right by the string match of MMAU and MMAR.

    Texts are sets of words: runs of letters, digits and underscores, in lower case. A right prediction has every word
    of the answer, and no word exclusive to another choice. So "not a dog" counts as right for "a dog". This is the
    benchmarks' rule; our own (`chosen`) is reported beside it.

    Source: `string_match` of `evaluation.py` in github.com/Sakshi113/MMAU (Sakshi et al. 2024), identical to
    `code/evaluation.py` in github.com/ddlBoJack/MMAR (Ma et al. 2025).
    """
    said, wanted = _word_set(prediction), _word_set(answer)
    exclusive = {word for choice in choices for word in _word_set(choice) - wanted}
    return bool(said) and wanted <= said and not said & exclusive


def _word_set(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def _letter(text: str, choices: Sequence[str]) -> int | None:
    match = _LETTER_AHEAD.match(text)
    # "A dog barks" has no leading letter, and a letter beyond the last choice is none.
    index = ord(match[1].upper()) - ord("A") if match else len(choices)
    return index if index < len(choices) else None


def _only_mentioned(text: str, choices: Sequence[str]) -> int | None:
    found = mentioned_choices(text, choices)
    return found.pop() if len(found) == 1 else None
