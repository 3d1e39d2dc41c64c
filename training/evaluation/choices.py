"""Reads which choice a reply means, and scores it by the rules that MMAU and MMAR publish.

A HyPeR trace answers in FINAL_ANSWER; other models answer in prose. `chosen` says how prose is read: by rules that
find what a text states, in a fixed order, each of which must point at exactly one choice. Where none does, the reply
names no choice and is wrong; nothing is guessed, and the share of such replies is reported.

Knows nothing of models or of HTTP.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from training.rl.rewards import mentioned_choices, named_choice

_STATEMENT = re.compile(r"(?i)\b(?:final\s+)?(?:answer|choice|option)\b\s*(?:is|would be|:|=)\s*(?:option\s+)?[:\s]*")
"""Opens a statement of the answer: "The answer is", "Final answer:", "The correct option is option"."""

_LETTER_AHEAD = re.compile(r"\(?([A-Za-z])(?:\)|[.:](?=\s|\Z)|(?=\s*\Z)|(?=\s*[,;]))")
"""A letter that stands for itself: "(b) ...", "B. ...", "B: ...", "B" and nothing more."""


def chosen(text: str, choices: Sequence[str]) -> int | None:
    """Returns the index of the choice that a text means, None where it means none or more than one.

    The first of these that finds exactly one choice decides:
      1. the whole text is a choice: its words, its letter ("B", "(b)", "B."), or both;
      2. what the last statement of an answer says ("The answer is ...", "Final answer: ...", to the end of its line):
         a choice as in 1, else the letter that it begins with, else the one choice whose words stand in it;
      3. the last line that is not empty, read as in 1;
      4. the text begins with a letter and a mark behind it ("(b) because ...", "B. because ...");
      5. the one choice whose words stand in the text (of one inside a longer one, the longer).
    Marks of emphasis (`*`, `_`, backquotes) are left out first.
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
    """Tells whether a prediction is right by the string match of MMAU and MMAR.

    Texts are sets of words (runs of letters, digits and underscores, in lower case). Right is a prediction that holds
    every word of the answer, and no word that stands in another choice and not in the answer. So "not a dog" is right
    where "a dog" is; the rule is the benchmarks', and ours (`chosen`) is reported beside it.

    From the `string_match` of `evaluation.py` in github.com/Sakshi113/MMAU (Sakshi et al. 2024) and of
    `code/evaluation.py` in github.com/ddlBoJack/MMAR (Ma et al. 2025), which are the same.
    """
    said, wanted = _word_set(prediction), _word_set(answer)
    exclusive = {word for choice in choices for word in _word_set(choice) - wanted}
    return bool(said) and wanted <= said and not said & exclusive


def _word_set(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def _letter(text: str, choices: Sequence[str]) -> int | None:
    match = _LETTER_AHEAD.match(text)
    # "A dog barks" begins with no letter, and a choice beyond the last one is none.
    index = ord(match[1].upper()) - ord("A") if match else len(choices)
    return index if index < len(choices) else None


def _only_mentioned(text: str, choices: Sequence[str]) -> int | None:
    found = mentioned_choices(text, choices)
    return found.pop() if len(found) == 1 else None
