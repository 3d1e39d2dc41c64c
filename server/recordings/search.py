"""Search for the windows of a recording that fit a question: BM25 over what the model wrote about each window.

A recording has at most a few hundred windows, so this is a page of Python. The package bm25s gives the same scores, but
loads numba where that is installed, which takes seconds.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

NUM_WINDOWS = 4
"""Number of windows that are asked again with the user's question."""

_K1, _B = 1.5, 0.75
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?")
_STOP_WORDS = frozenset(
    "a an and are as at be been by can could did do does for from had has have hear heard how i in is it its me of on "
    "or say said says that the their them there these they this those to was were what when where which who whom why "
    "will with would you your recording clip audio sound sounds any some somebody someone anyone speak speaks spoken "
    "mentioned".split()
)
"""Words of questions in general, not of one question."""


def terms(text: str) -> list[str]:
    """Return the words of a text in lower case, without plural endings and general words."""
    return [stem(word) for word in _WORD.findall(text.casefold()) if word not in _STOP_WORDS]


def stem(word: str) -> str:
    """Return a word without a possessive or plural ending."""
    word = word.removesuffix("'s")
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def scores(texts: Sequence[str], question: str, choices: Sequence[str] = ()) -> list[float]:
    """Return the BM25 score of each text for a question with its choices; 0 without a common word."""
    documents = [Counter(terms(text)) for text in texts]
    lengths = [document.total() for document in documents]
    mean_length = sum(lengths) / max(1, len(lengths)) or 1.0
    found = [0.0] * len(documents)
    for term in sorted(set(terms("\n".join((question, *choices))))):
        num_with = sum(term in document for document in documents)
        weight = math.log(1 + (len(documents) - num_with + 0.5) / (num_with + 0.5))
        for index, document in enumerate(documents):
            if count := document[term]:
                found[index] += weight * count / (count + _K1 * (1 - _B + _B * lengths[index] / mean_length))
    return found


def best(found: Sequence[float], number: int = NUM_WINDOWS) -> list[int]:
    """Return the places of the highest scores; earlier windows win ties, so without any hit these are the first."""
    return sorted(range(len(found)), key=lambda index: (-found[index], index))[:number]


def weights(found: Sequence[float]) -> list[float]:
    """Return the scores as weights of sum 1; equal ones without any hit."""
    total = sum(found)
    return [score / total if total else 1 / len(found) for score in found]


def best_quote(text: str, wanted: str) -> str | None:
    """Return the sentence of a text with most words of the question and the answer; None for an empty text."""
    sentences = [part.strip() for part in re.split(r"(?<=[.!?])\s+|\n", text) if part.strip()]
    if not sentences:
        return None
    words = set(terms(wanted))
    return max(sentences, key=lambda sentence: len(words & set(terms(sentence))))
