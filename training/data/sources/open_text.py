"""Draw open English text, in addition to the sentence patterns of `training/data/sources/sentences.py`.

There are two sources: WordNet's example sentences and glosses, cleaned to speakable lines, and a small grammar. The
grammar covers everyday talk, numbers, dates, times, money and names. A hash of its words gives the split of a line, so
no training clip contains a held-out line. This module depends on no audio, voice or scene.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Literal

from training.data.sources.downloads import MissingDataError
from training.data.sources.sentences import SLOTS
from training.data.sources.spelled_numbers import spell_number, spell_ordinal, spell_year
from training.data.sources.tables import read_table

Split = Literal["train", "validation", "test"]

MIN_WORDS, MAX_WORDS = 3, 14
_VALIDATION_PERCENT, _TEST_PERCENT = 2, 4
_MIN_OCCURRENCES = 2
"""Words with a single occurrence in all of WordNet are excluded as Latin names or misprints."""

# Sources of drawn lines: examples give talk, glosses give words, the grammar gives numbers and names.
_SOURCES, _WEIGHTS = ("examples", "glosses", "grammar"), (48, 17, 35)

# Excluded: synsets marked by WordNet itself, and unwanted words.
_MARKED = re.compile(r"\b(offensive|obscene|slur|vulgar|disparag\w*|derogatory|sexual\w*|genital\w*|taboo)\b")
_UNWANTED = re.compile(
    r"\b(rap(e[ds]?|ing|ists?)|fuck\w*|shit\w*|whor\w*|bitch\w*|sluts?|nigg\w*|naked|penis|vagina\w*|breasts?|sex\w*|nazis?|"
    r"prostitut\w*|genocid\w*|suicid\w*|lynch\w*|tortur\w*|murder\w*|jews?|jewish|negro\w*|masturbat\w*|erotic\w*|porn\w*)\b",
    re.IGNORECASE,
)


def _spell_token(match: re.Match[str]) -> str:
    digits, suffix = match[1], match[2].lower()
    number = int(digits)
    if suffix in ("st", "nd", "rd", "th"):
        return spell_ordinal(number)
    if suffix == "s":  # "in the 1980s"
        words = spell_year(number) if number >= 1100 else spell_number(number)
        return words[:-1] + "ies" if words.endswith("y") else words + "s"
    if suffix or number >= 1_000_000:
        return "#"  # Not speakable in this form; `clean` refuses the sign.
    return spell_year(number) if len(digits) == 4 and 1100 <= number < 2100 else spell_number(number)


def clean(text: str) -> str | None:
    """Convert a sentence to a line of words with letters and apostrophes only, or None if this would lose words."""
    text = re.sub(r"\([^)]*\)", " ", text).replace("`", "'").strip().rstrip(".?!,;: ")
    text = re.sub(r"(?<=\d),(?=\d{3})", "", text)
    if re.search(r"\d[.:/]\d", text):
        return None
    text = re.sub(r"\b(\d{1,7})([A-Za-z]*)\b", _spell_token, re.sub(r"[,\-]", " ", text))
    text = " ".join(text.split())
    if not re.fullmatch(r"[A-Za-z]+('[A-Za-z]+)?(s')?( [A-Za-z]+('[A-Za-z]+)?(s')?)*", text) or _UNWANTED.search(text):
        return None
    words = text.split()
    if not MIN_WORDS <= len(words) <= MAX_WORDS or max(map(len, words)) > 16:
        return None
    # Synthesizers disagree about the pronunciation of initials and symbols ("H", "cm").
    if any(len(word) == 1 and word not in ("a", "A", "I", "O") for word in words):
        return None
    if any(len(word) > 1 and word.isupper() for word in words):
        return None
    return text


def split_of(text: str) -> Split:
    """Return the split of a line by its words alone, ignoring case."""
    digest = hashlib.sha256(" ".join(text.lower().split()).encode()).digest()
    place = int.from_bytes(digest[:4], "little") % 100
    if place < _VALIDATION_PERCENT:
        return "validation"
    return "test" if place < _VALIDATION_PERCENT + _TEST_PERCENT else "train"


def _lower_first(lines: list[str]) -> list[str]:
    """Convert the first word of a line to its form inside lines: "the" instead of "The", but "London"."""
    inside: Counter[str] = Counter(word for line in lines for word in line.split()[1:])
    lowered: list[str] = []
    for line in lines:
        first, rest = line.split(" ", 1)
        if first[0].isupper() and first != "I" and not first.startswith("I'"):
            plain = first[0].lower() + first[1:]
            first = plain if inside[plain] >= inside[first] and inside[plain] else first
        lowered.append(f"{first} {rest}")
    return lowered


@lru_cache(maxsize=2)
def _wordnet(folder: Path) -> dict[tuple[str, Split], tuple[str, ...]]:
    """Read WordNet's data files: (source, split) -> lines, sorted and without duplicates."""
    raw: dict[str, list[str]] = {"examples": [], "glosses": []}
    for part in ("noun", "verb", "adj", "adv"):
        path = folder / f"data.{part}"
        if not path.exists():
            raise MissingDataError(f"{path} is missing: fetch the assets first (make bank)")
        for row in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if row.startswith("  ") or "|" not in row:
                continue  # The licence.
            gloss = row.split("|", 1)[1].strip()
            if _MARKED.search(gloss):
                continue
            raw["examples"] += re.findall(r'"([^"]+)"', gloss)
            raw["glosses"].append(re.sub(r'"[^"]*"?', "", gloss).split(";")[0])
    cleaned = {source: [line for line in map(clean, texts) if line] for source, texts in raw.items()}
    lines = _lower_first(cleaned["examples"] + cleaned["glosses"])
    count = len(cleaned["examples"])
    cleaned = {"examples": lines[:count], "glosses": lines[count:]}
    words: Counter[str] = Counter(word for line in lines for word in line.lower().split())
    found: dict[tuple[str, Split], list[str]] = {}
    seen: set[str] = set()
    for source, texts in cleaned.items():
        for line in sorted(texts):
            key = line.lower()
            if key in seen or any(words[word] < _MIN_OCCURRENCES for word in key.split()):
                continue
            seen.add(key)
            found.setdefault((source, split_of(line)), []).append(line)
    return {key: tuple(texts) for key, texts in found.items()}


_SYMBOL = re.compile(r"<([a-z0-9]+)>|@([a-z]+)")
_ALTERNATIVES: dict[str, tuple[str, ...]] = {
    symbol: tuple(rule.replace("\n", "").split("|")) for symbol, rule in read_table("grammar").items()
}
"""Symbol -> alternatives. `<x>` is another symbol, `@x` a slot of the sentence patterns; the rest is spoken."""


def _clock(rng: random.Random) -> str:
    hour = rng.randrange(1, 13)
    minute = rng.choice((0, 5, 10, 15, 20, 25, 30, 35, 40, 45, 50, 55, rng.randrange(1, 60)))
    kind = rng.randrange(4)
    if kind == 0 or minute == 0:
        return f"{spell_number(hour)} {rng.choice(('sharp', 'in the morning', 'in the evening'))}"
    if kind == 1 and minute % 15 == 0:
        return (
            f"{'half past' if minute == 30 else 'quarter to' if minute == 45 else 'quarter past'} {spell_number(hour)}"
        )
    if kind == 2:
        before = minute > 30
        return f"{spell_number(60 - minute if before else minute)} {'to' if before else 'past'} {spell_number(hour)}"
    return f"{spell_number(hour)} {'oh ' if minute < 10 else ''}{spell_number(minute)}"


def _money(rng: random.Random) -> str:
    whole = rng.choice(
        (rng.randrange(2, 20), rng.randrange(20, 100), rng.randrange(100, 1000), 1000 * rng.randrange(1, 90))
    )
    unit = rng.choice(("dollars", "dollars", "euros", "pounds"))
    cents = {"dollars": "cents", "euros": "cents", "pounds": "pence"}[unit]
    kind = rng.randrange(5)
    if kind == 0:
        return f"{spell_number(rng.randrange(2, 100))} {cents}"
    if kind == 1 and whole < 100:
        return f"{spell_number(whole)} {unit} and {spell_number(rng.randrange(5, 100))} {cents}"
    if kind == 2 and whole < 100:
        return f"{spell_number(whole)} {spell_number(rng.randrange(20, 100))}"
    return f"{spell_number(whole)} {unit}"


def _draw_figure(symbol: str, rng: random.Random) -> str | None:
    """Draw a number in the symbol's form; None if the symbol is a rule of the grammar."""
    match symbol:
        case "digits":
            return " ".join(spell_number(rng.randrange(10)) for _ in range(rng.choice((5, 6, 7))))
        case "digits4":
            return " ".join(spell_number(rng.randrange(10)) for _ in range(rng.choice((3, 4))))
        case "money":
            return _money(rng)
        case "clock":
            return _clock(rng)
        case "date":
            month, day = rng.choice(SLOTS["month"]), spell_ordinal(rng.randrange(1, 32))
            return f"{month} {day}" if rng.random() < 0.5 else f"the {day} of {month}"
        case "year":
            return spell_year(rng.choice((rng.randrange(1900, 2030), rng.randrange(1500, 1900))))
        case "number":
            return spell_number(rng.choice((rng.randrange(2, 20), rng.randrange(20, 100), rng.randrange(100, 1000))))
        case "small":
            return spell_number(rng.randrange(0, 12))
        case "count":
            return rng.choice((spell_number(rng.randrange(2, 13)), "several", "many", "a few", "a dozen"))
        case "percent":
            return spell_number(rng.randrange(1, 100))
        case "bignumber":
            return spell_number(
                rng.choice((rng.randrange(100, 1000), 100 * rng.randrange(10, 1000), rng.randrange(1000, 10_000)))
            )
        case "ordinal":
            return spell_ordinal(rng.randrange(1, 32))
        case _:
            return None


def _expand(symbol: str, rng: random.Random) -> str:
    figure = _draw_figure(symbol, rng)
    if figure is not None:
        return figure
    rule = rng.choice(_ALTERNATIVES[symbol])
    return _SYMBOL.sub(lambda match: _expand(match[1], rng) if match[1] else rng.choice(SLOTS[match[2]]), rule)


_ARTICLE = re.compile(r"\ba (?=[aeiou])")
_AGREEMENT = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\b(You|you|we|We|they|They|he|she|it|everyone|someone|neighbor) am going to\b", r"\1 will"),
        (r"\b(I|you|we|they) has to\b", r"\1 have to"),
        (r"(?<!\bI) am going to\b", " will"),
        (r"\b(deer|sheep|goose|mouse|wolf|fox|calf|ox)s\b", r"\1"),
        (r"\b(butterfl|pupp|donke)ys\b", r"\1ies"),
    )
)


def _draw_grammar_line(rng: random.Random) -> str | None:
    text = _expand("line", rng)
    for pattern, replacement in _AGREEMENT:
        text = pattern.sub(replacement, text)
    return clean(" ".join(_ARTICLE.sub("an ", text).split()))


def draw_text(rng: random.Random, split: Split, folder: Path) -> str:
    """Draw one line of open text of a split.

    Args:
        folder: folder with WordNet's `data.noun`, `data.verb`, `data.adj` and `data.adv`.

    Raises:
        MissingDataError: these files are missing.
    """
    source = rng.choices(_SOURCES, _WEIGHTS)[0]
    if source != "grammar":
        lines = _wordnet(folder)[source, split]
        # Half of the examples are phrases of three to five words, shorter than ordinary speech.
        count = 3 if source == "examples" and rng.random() < 0.7 else 1
        return max((rng.choice(lines) for _ in range(count)), key=len)
    while True:
        line = _draw_grammar_line(rng)
        if line is not None and split_of(line) == split:
            return line


def iter_texts(folder: Path, *, num_generated: int = 20_000, seed: int = 0) -> Iterator[str]:
    """Yield training text for a tokenizer: each training line of WordNet once, and `num_generated` grammar lines."""
    for source in ("examples", "glosses"):
        yield from _wordnet(folder)[source, "train"]
    rng = random.Random(seed)
    count = 0
    while count < num_generated:
        line = _draw_grammar_line(rng)
        if line is not None and split_of(line) == "train":
            count += 1
            yield line


_STOP_WORDS = frozenset(
    "about above after again against almost along already also although always among another anyone anything around "
    "because become been before being below between both came cannot could does doing done down during each either "
    "else even ever every everyone everything from gave give given goes going gone have having here himself herself "
    "into itself just keep kept less like made make many might more most much must myself never next nobody none "
    "nothing often once only other others ought ourselves over perhaps quite rather really said same says seem "
    "seems several shall should since some someone something sometimes soon still such than that their them "
    "themselves then there these they thing things this those though through till together toward under until upon "
    "used very want well went were what whatever when where whether which while whom whose will with within without "
    "would your yours yourself".split()
)


def content_words(text: str) -> tuple[str, ...]:
    """List the content words of a line: four letters or more, and not in the list of function words."""
    return tuple(w for w in text.split() if len(w) >= 4 and "'" not in w and w.lower() not in _STOP_WORDS)
