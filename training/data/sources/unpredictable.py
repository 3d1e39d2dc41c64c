"""Draw lines unpredictable for a language model: shuffled words, names, numbers and spelled letters.

A pretrained decoder trusts its English more than the audio; these lines remove this help. Words and names come from
WordNet. The split of a line follows from its words, as in `draw_text`. This module depends on no audio or voice.
"""

from __future__ import annotations

import random
import re
from functools import lru_cache
from pathlib import Path

from training.data.sources.downloads import MissingDataError
from training.data.sources.open_text import Split, draw_text, split_of
from training.data.sources.spelled_numbers import spell_number, spell_year

_KINDS, _WEIGHTS = ("shuffled", "words", "names", "numbers", "letters"), (40, 20, 20, 14, 6)
_PERSON, _PLACE = "18", "15"
"""WordNet's lexicographer files of persons and of places."""
_WORD = re.compile(r"[a-z]{3,12}")
_NAME = re.compile(r"[A-Z][a-z]+(_[A-Z][a-z]+){0,2}")
_DIGITS = "zero one two three four five six seven eight nine".split()
_SPELLED = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@lru_cache(maxsize=2)
def _lexicon(folder: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return WordNet's plain words from tagged texts, and its names of persons and places."""
    counts = folder / "cntlist.rev"
    nouns = folder / "data.noun"
    for path in (counts, nouns):
        if not path.exists():
            raise MissingDataError(f"{path} is missing: fetch the assets first (make bank)")
    words = {row.split("%", 1)[0] for row in counts.read_text(encoding="utf-8").splitlines()}
    names: set[str] = set()
    for row in nouns.read_text(encoding="utf-8", errors="replace").splitlines():
        if row.startswith("  "):
            continue  # The licence.
        fields = row.split(" ")
        if fields[1] in (_PERSON, _PLACE):
            size = int(fields[3], 16)
            names |= {word.replace("_", " ") for word in fields[4 : 4 + 2 * size : 2] if _NAME.fullmatch(word)}
    return tuple(sorted(word for word in words if _WORD.fullmatch(word))), tuple(sorted(names))


def _numbers(rng: random.Random) -> str:
    match rng.randrange(4):
        case 0:
            return " ".join(rng.choice(_DIGITS) for _ in range(rng.randint(3, 10)))
        case 1:
            return " ".join(spell_number(rng.randrange(100)) for _ in range(rng.randint(2, 5)))
        case 2:
            return f"{spell_number(rng.randrange(100_000))} and {spell_number(rng.randrange(1_000))}"
        case _:
            return f"{spell_year(rng.randrange(1100, 2100))} {rng.choice(('to', 'and', 'until'))} " + spell_year(
                rng.randrange(1100, 2100)
            )


def _draw(rng: random.Random, kind: str, split: Split, folder: Path) -> str:
    words, names = _lexicon(folder)
    match kind:
        case "shuffled":
            drawn = f"{draw_text(rng, split, folder)} {draw_text(rng, split, folder)}".split()
            return " ".join(rng.sample(drawn, min(len(drawn), rng.randint(3, 12))))
        case "words":
            return " ".join(rng.choice(words) for _ in range(rng.randint(2, 8)))
        case "names":
            drawn = [rng.choice(names) for _ in range(rng.randint(1, 3))]
            return f" {rng.choice(('and', 'or', 'with', 'of', 'from'))} ".join(drawn)
        case "numbers":
            return _numbers(rng)
        case _:
            return " ".join(rng.choice(_SPELLED) for _ in range(rng.randint(3, 7)))


def draw_unpredictable(rng: random.Random, split: Split, folder: Path) -> str:
    """Draw one line of a split.

    Args:
        folder: Folder of WordNet's files.

    Raises:
        MissingDataError: The files are missing.
    """
    kind = rng.choices(_KINDS, _WEIGHTS)[0]
    while True:
        line = _draw(rng, kind, split, folder)
        if split_of(line) == split:
            return line
