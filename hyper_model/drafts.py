"""Drafts: the likely next tokens of a trace, derived from the trace itself.

Half of a trace repeats its earlier part. The grammar fixes most tags, ASR joins the quotes of SPEAKER, and SUMMARY,
RESPONSE and FINAL_ANSWER repeat one answer. An engine checks several drafted tokens in one step and keeps the prefix
that the model itself would write. So a wrong draft costs time and never changes an answer.

`draft_tokens` is a pure function of token ids and a `DraftTable`. It tries these sources in order:
  - the tags that must follow a tag;
  - the fixed beginning of a line of SPEAKER;
  - in a section of repeated words, their text, encoded again. The first word of a quote has other tokens after a
    quotation mark than after a space, so a search for equal tokens would miss it;
  - the tokens after an earlier occurrence of the last tokens (n-gram lookup).

The module is independent of engines, torch and HTTP.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache
from itertools import pairwise

from hyper_model.trace import OPTIONAL_SECTIONS, PARENTS, PauseMode, Section, TraceTokenizer
from hyper_model.trace_parser import parse_speakers

NGRAM_TOKENS = (4, 3)
"""Lengths of the searched n-grams; a longer one comes first. Of drafts after two equal tokens, most are rejected."""

MAX_NGRAM_DRAFT = 4
"""Maximum tokens of a draft by n-gram lookup, which is rejected more often than the others."""

_CACHED_TEXTS = 256
_SENTENCE_JOIN = ". "
_SAYS = re.compile(r"^(.*\b(S[0-9]+) says)(?: .*)?$", re.DOTALL)
_HEAD = re.compile(r"S[0-9]+ \w+")
_CHOICE = re.compile(r"^[A-Z]\. (.+)$", re.MULTILINE)


@cache
def _tag_order() -> list[tuple[Section, bool]]:
    """Return the tags of a trace without optional sections, in order: (section, whether it is the closing tag)."""
    order: list[tuple[Section, bool]] = []
    opened: list[Section] = []
    for section in Section:
        if section in OPTIONAL_SECTIONS:
            continue
        while opened and opened[-1] is not PARENTS[section]:
            order.append((opened.pop(), True))
        opened.append(section)
        order.append((section, False))
    while opened:
        order.append((opened.pop(), True))
    return order


@dataclass(frozen=True, eq=False)
class DraftTable:
    """Tags, hidden tokens and text codec of a checkpoint.

    Attributes:
        tokenizer: The checkpoint's tokenizer, with tags as tokens.
        pause_mode: Form of the checkpoint's pauses.
    """

    tokenizer: TraceTokenizer
    pause_mode: PauseMode

    @cached_property
    def tags(self) -> dict[int, tuple[Section, bool]]:
        """Return the meaning of each tag token: its section, and whether it closes."""
        ids = self.tokenizer.tag_ids
        return {ids[section][is_close]: (section, bool(is_close)) for section in ids for is_close in (0, 1)}

    @cached_property
    def next_tags(self) -> dict[int, int]:
        """Return the tag after each tag that is followed by a tag in every strict trace without optional sections."""
        ids, order = self.tokenizer.tag_ids, _tag_order()
        containers = set(PARENTS.values())
        follows = {
            ids[section][is_close]: ids[after][closes_after]
            for (section, is_close), (after, closes_after) in pairwise(order)
            if is_close or section in containers
        }
        follows[ids[Section.DESCRIPTION][1]] = ids[Section.CAPTION][1]
        follows[ids[Section.REFLECT][1]] = ids[Section.FINAL_ANSWER][0]
        return follows

    @cached_property
    def undraftable_ids(self) -> frozenset[int]:
        """Return the tokens that no draft may contain: pauses, turns and audio."""
        return self.tokenizer.pause_ids | self.tokenizer.control_ids

    @cached_property
    def encode(self) -> Callable[[str], tuple[int, ...]]:
        """Return the function to encode words; repeated calls for one text are cheap."""
        return lru_cache(_CACHED_TEXTS)(self._encode)

    @cached_property
    def choices(self) -> Callable[[tuple[int, ...]], tuple[str, ...]]:
        """Return the function to read the options listed in a prompt; repeated calls for one prompt are cheap."""
        return lru_cache(_CACHED_TEXTS)(self._choices_of)

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode_text(text))

    def _choices_of(self, prompt_ids: tuple[int, ...]) -> tuple[str, ...]:
        after_audio = len(prompt_ids)
        while after_audio and prompt_ids[after_audio - 1] != self.tokenizer.audio_eos_id:
            after_audio -= 1
        return tuple(_CHOICE.findall(self.tokenizer.decode(prompt_ids[after_audio:])))

    def trace_start(self, token_ids: Sequence[int]) -> int:
        """Return the place of the first tag, which only a completion contains; the length if there is none."""
        return next((place for place, token_id in enumerate(token_ids) if token_id in self.tags), len(token_ids))


@dataclass
class _Reading:
    """A trace read so far.

    Attributes:
        visible: All tokens without those of pauses.
        ids: Words of each section by their tokens.
        current: The innermost open section.
        is_hidden: Whether the next token belongs to a sampled pause.
    """

    table: DraftTable
    visible: list[int] = field(default_factory=list[int])
    ids: dict[Section, list[int]] = field(default_factory=dict[Section, list[int]])
    current: Section | None = None
    is_hidden: bool = False

    def read(self, token_ids: Sequence[int]) -> None:
        """Read the next tokens."""
        table, tokenizer = self.table, self.table.tokenizer
        for token_id in token_ids:
            if self.is_hidden:
                self.is_hidden = token_id != tokenizer.pause_close_id
                continue
            if token_id in tokenizer.pause_ids:
                self.is_hidden = table.pause_mode is PauseMode.SAMPLED and token_id == tokenizer.pause_id
                continue
            self.visible.append(token_id)
            tag = table.tags.get(token_id)
            if tag is None:
                if self.current is not None:
                    self.ids[self.current].append(token_id)
                continue
            section, is_close = tag
            if is_close:
                self.current = PARENTS[section]
                # A faulty trace may close a section that it never opened.
                if self.current is not None:
                    self.ids.setdefault(self.current, [])
            else:
                self.current = section
                self.ids[section] = []

    def text(self, section: Section) -> str:
        """Return the words of a section, empty if it is missing."""
        return self.table.tokenizer.decode(self.ids.get(section, ())).strip()


def draft_tokens(prompt_ids: Sequence[int], trace_ids: Sequence[int], table: DraftTable, max_tokens: int) -> list[int]:
    """Return likely next tokens of a trace, at most `max_tokens`; empty without a guess.

    Args:
        prompt_ids: The prompt, with the placeholders of its clips.
        trace_ids: The trace so far, with its pauses.
        table: The checkpoint's tags and codec.
        max_tokens: Maximum length of the draft.
    """
    reading = _Reading(table)
    reading.read(trace_ids)
    if reading.is_hidden or max_tokens < 1:
        return []
    draft: list[int] = []
    while len(draft) < max_tokens and (following := _follow(reading, prompt_ids)):
        draft += following
        reading.read(following)
    if not draft:
        draft = _look_up([*prompt_ids, *reading.visible], min(max_tokens, MAX_NGRAM_DRAFT))
    del draft[max_tokens:]
    refused = next((place for place, token_id in enumerate(draft) if token_id in table.undraftable_ids), len(draft))
    return draft[:refused]


def _follow(reading: _Reading, prompt_ids: Sequence[int]) -> list[int]:
    """Return the tokens up to the next tag, this included, or none without a guess."""
    table, section = reading.table, reading.current
    if reading.visible and (next_tag := table.next_tags.get(reading.visible[-1])) is not None:
        return [next_tag]
    if section is None:
        return []
    written = reading.ids[section]
    if section is Section.SPEAKER:
        ids = table.encode(_begin_line(table.tokenizer.decode(written)))
        return list(ids[len(written) :]) if ids[: len(written)] == tuple(written) else []
    for text in _expected_texts(reading, section, prompt_ids):
        ids = table.encode(text)
        if ids[: len(written)] == tuple(written):
            return [*ids[len(written) :], table.tokenizer.tag_ids[section][1]]
    return []


def _begin_line(written: str) -> str:
    """Return the words of SPEAKER continued up to the next unknown one: the name of a speaker, or the first quote."""
    line = written.rpartition("\n")[2]
    if not line:
        number = written.count("\n") + 1
        return f"{written}S{number}"
    return f'{written}: "' if _HEAD.fullmatch(line) else written


def _expected_texts(reading: _Reading, section: Section, prompt_ids: Sequence[int]) -> Iterator[str]:
    """Yield possible texts of the open section that begin with its words so far, the likeliest first."""
    # Not `text`: white space at its end counts here.
    written = reading.table.tokenizer.decode(reading.ids[section])
    match section:
        case Section.ASR:
            quotes = [speaker.quotes for speaker in parse_speakers(reading.text(Section.SPEAKER))]
            yield from _join_quotes(quotes, written)
        case Section.REASONING:
            said = _SAYS.match(written)
            if said is not None:
                speakers = parse_speakers(reading.text(Section.SPEAKER))
                quotes = [quote for speaker in speakers if speaker.id == said[2] for quote in speaker.quotes]
                yield from _beginning_with(written, [f"{said[1]} {quote}" for quote in quotes])
        case Section.SUMMARY:
            yield from _answers(reading, written, prompt_ids)
        case Section.RESPONSE:
            yield from _beginning_with(written, [reading.text(Section.SUMMARY)])
        case Section.FINAL_ANSWER:
            yield from _beginning_with(written, [reading.text(Section.RESPONSE)])
        case _:
            return


def _answers(reading: _Reading, written: str, prompt_ids: Sequence[int]) -> Iterator[str]:
    reasoning = reading.text(Section.REASONING)
    # The words after the verb of the reasoning are its conclusion: "S1 says stop", "the background is rain".
    conclusions = [reasoning.partition(verb)[2] for verb in (" says ", " is ")]
    yield from _beginning_with(written, conclusions)
    if not written:
        return
    quotes = [quote for speaker in parse_speakers(reading.text(Section.SPEAKER)) for quote in speaker.quotes]
    yield from _beginning_with(written, [*reading.table.choices(tuple(prompt_ids)), *quotes])


def _beginning_with(written: str, texts: Sequence[str]) -> Iterator[str]:
    return (text for text in texts if text and text.startswith(written))


def _join_quotes(quotes: Sequence[Sequence[str]], written: str) -> Iterator[str]:
    """Yield the transcripts of these quotes that begin with the written words.

    Args:
        quotes: The quotes of each speaker, in order.
        written: The transcript so far.
    """
    waiting = [list(each) for each in quotes]
    parts: list[str] = []
    last, rest = -1, written
    while any(waiting):
        # Speakers take turns, so the next one comes first and the same one last.
        turns = [(last + 1 + place) % len(waiting) for place in range(len(waiting))]
        turns = [place for place in turns if waiting[place]]
        matching = [place for place in turns if _agrees(waiting[place][0], rest)]
        if not matching:
            return
        last = matching[0]
        quote = waiting[last].pop(0)
        parts.append(quote)
        rest = rest[len(quote) :]
        if not rest.startswith(_SENTENCE_JOIN[: len(rest)]):
            return
        rest = rest[len(_SENTENCE_JOIN) :]
    if parts and not rest:
        yield _SENTENCE_JOIN.join(parts)


def _agrees(quote: str, written: str) -> bool:
    """Return whether one text begins with the other."""
    return quote.startswith(written) or written.startswith(quote)


def _look_up(token_ids: Sequence[int], max_tokens: int) -> list[int]:
    """Return the tokens after the latest earlier occurrence of the last tokens."""
    data = array("q", token_ids)
    size, haystack = data.itemsize, data.tobytes()
    for length in NGRAM_TOKENS:
        if len(token_ids) <= length:
            continue
        needle = haystack[-length * size :]
        end = len(haystack) - size
        while (place := haystack.rfind(needle, 0, end)) >= 0:
            if place % size == 0:
                start = place // size + length
                return list(data[start : start + max_tokens])
            end = place + len(needle) - 1
    return []
