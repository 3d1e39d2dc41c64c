"""Split Markdown and other texts for people into sentences with their line numbers; standard library only."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

HISTORY = ROOT / "docs/LOG.md"
"""Dated entries of past experiments. They keep their wording, so the prose rules exclude them."""

MIN_WORDS = 4
MIN_CELL_WORDS = 8
"""Shorter fragments (bare terms; in a table cell, names and figures) are not sentences and would dilute a share."""

CODE_SPAN = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)", re.DOTALL)
LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)")
LIST_ITEM = re.compile(r"^\s*(?:[-*+]|\d+\.)\s+")
TABLE_RULE = re.compile(r"^\s*\|?[\s:|-]+\|?\s*$")
SENTENCE_END = re.compile(r"(?<=[.!?])(?<!\.\.)[\"')\]*]*\s+(?=\S)")
ABBREVIATION = re.compile(r"\b(?:e\.g|i\.e|al|vs|cf|approx|no)\.$", re.IGNORECASE)


@dataclass(frozen=True)
class Sentence:
    """One sentence with its line in the source, counted from 1. Code spans are reduced to the word CODE."""

    line: int
    text: str

    @property
    def num_words(self) -> int:
        """Number of whitespace-separated tokens with a letter or digit."""
        return sum(any(c.isalnum() for c in token) for token in self.text.split())


def documents() -> list[Path]:
    """List the Markdown files of the repository that people read, docs/LOG.md included."""
    patterns = "*.md", "docs/**/*.md", "loadtests/*.md", "checkpoints/*/README.md"
    return [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]


def markdown_sentences(text: str) -> Iterator[Sentence]:
    """Yield the sentences of paragraphs, list items and table cells; skip headings, code blocks and front matter."""
    for line, block, min_words in _blocks(text):
        yield from split_sentences(_plain(block), first_line=line, min_words=min_words)


def markdown_lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield each line without code, headings and short table cells included."""
    yield from ((number, _plain(line).strip()) for number, line in _without_code(text) if line.strip())


def split_sentences(text: str, *, first_line: int = 1, min_words: int = MIN_WORDS) -> Iterator[Sentence]:
    """Split running text into sentences of at least `min_words` words."""
    begin = 0
    for end in [*(match.start() for match in SENTENCE_END.finditer(text)), len(text)]:
        if end < len(text) and ABBREVIATION.search(text[begin:end]):
            continue
        words = text[begin:end].split()
        num_leading_lines = text[begin:end].count("\n", 0, len(text[begin:end]) - len(text[begin:end].lstrip()))
        sentence = Sentence(first_line + text.count("\n", 0, begin) + num_leading_lines, " ".join(words))
        begin = end
        if sentence.num_words >= min_words:
            yield sentence


def _blocks(text: str) -> Iterator[tuple[int, str, int]]:
    """Yield (line, text, fewest words of a sentence) for each paragraph, list item and table cell."""
    first_line, paragraph = 0, list[str]()
    for number, line in [*_without_code(text), (0, "")]:
        is_table = line.lstrip().startswith("|")
        if not line.strip() or line.startswith("#") or is_table or LIST_ITEM.match(line):
            if paragraph:
                yield first_line, "\n".join(paragraph), MIN_WORDS
            paragraph = []
        if is_table:
            cells = [] if TABLE_RULE.match(line) else line.strip().strip("|").split("|")
            yield from ((number, cell, MIN_CELL_WORDS) for cell in cells)
        elif line.strip() and not line.startswith("#"):
            first_line = first_line if paragraph else number
            paragraph.append(LIST_ITEM.sub("", line))


def _without_code(text: str) -> Iterator[tuple[int, str]]:
    """Yield numbered lines, each code line replaced by an empty one, so that it ends the paragraph before it."""
    fence, after_blank, is_indented_code = "", True, False
    lines = text.splitlines()
    front_matter_end = lines.index("---", 1) if lines[:1] == ["---"] else -1
    for index, line in enumerate(lines):
        mark = re.match(r"\s*(```+|~~~+)", line)
        if mark and (not fence or line.strip().startswith(fence)):
            fence = "" if fence else mark[1]
            yield index + 1, ""
            continue
        is_indented_code = line.startswith("    ") and (after_blank or is_indented_code) and not LIST_ITEM.match(line)
        after_blank = not line.strip()
        yield index + 1, "" if fence or is_indented_code or index <= front_matter_end else line


def _plain(block: str) -> str:
    """Replace code spans by CODE and links by their text; keep the line breaks inside them."""
    without_code = CODE_SPAN.sub(lambda match: "CODE" + "\n" * match[0].count("\n"), block)
    return LINK.sub(r"\1", without_code)


def share_of_long_sentences(files: Sequence[Path], *, max_words: int = 30) -> float:
    """Return the share of sentences with more than `max_words` words in Markdown files, 0.0 without any sentence."""
    lengths = [
        sentence.num_words for file in files for sentence in markdown_sentences(file.read_text(encoding="utf-8"))
    ]
    return sum(length > max_words for length in lengths) / len(lengths) if lengths else 0.0


def worst_files(files: Sequence[Path], *, max_words: int = 30) -> list[tuple[float, str]]:
    """Return (share of long sentences, path below the repository) for each file, the worst first."""
    shares = [(share_of_long_sentences([file], max_words=max_words), str(file.relative_to(ROOT))) for file in files]
    return sorted(shares, reverse=True)
