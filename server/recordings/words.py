"""Transcripts of neighbouring windows: the words of a shared second are kept once."""

from __future__ import annotations

import re
from collections.abc import Sequence

MAX_SHARED_WORDS = 6
"""Words that fit into the shared second, and a few more."""

MAX_CUT_WORDS = 2
"""Words at the edge of a window that may be wrong, because their sound was cut."""

_PUNCTUATION = re.compile(r"[^\w']+")


def plain(word: str) -> str:
    """Return a word in lower case, without punctuation."""
    return _PUNCTUATION.sub("", word).casefold()


def without_repeated_words(previous: str, following: str) -> str:
    """Return the second transcript without the words that both windows hold at the hard cut between them.

    The longest common run of words near the cut is dropped once, with up to two words before it: they are the rest of a
    cut sound. Without such a run, nothing is dropped.

    Args:
        previous: Transcript of the window before the cut.
        following: Transcript of the window behind it.
    """
    tail, head = previous.split()[-MAX_SHARED_WORDS:], following.split()
    run = longest_run([plain(word) for word in tail], [plain(word) for word in head[:MAX_SHARED_WORDS]])
    if run is None:
        return following
    end_of_tail, end_of_head, length = run
    is_near = len(tail) - end_of_tail <= MAX_CUT_WORDS and end_of_head - length <= MAX_CUT_WORDS
    return " ".join(head[end_of_head:]) if is_near else following


def longest_run(first: Sequence[str], second: Sequence[str]) -> tuple[int, int, int] | None:
    """Return the ends of the longest common run in both lists and its length; the latest in the first list wins."""
    best: tuple[int, int, int] | None = None
    for start in range(len(first)):
        for place in range(len(second)):
            length = 0
            while (
                start + length < len(first)
                and place + length < len(second)
                and first[start + length]
                and first[start + length] == second[place + length]
            ):
                length += 1
            if length and (best is None or length >= best[2]):
                best = (start + length, place + length, length)
    return best
