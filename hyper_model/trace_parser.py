"""Reads traces: token ids in, one at a time, typed section events out, and at the end a `ParsedTrace`.

Where tags are tokens, only their ids open and close sections: a model that writes `<FINAL_ANSWER>` letter by letter
(because a clip spoke it) has written words, and `ParsedTrace.raw` shows them escaped. Where a checkpoint's tags are
plain text, the text is scanned as it is decoded. `trace.render` is the inverse of both.

Any sequence of ids is a trace of some kind: nothing here raises for what a model wrote. What does not fit is mended in
place (a tag closes what stands open inside its own place, a section's second occurrence is shown in `raw` only) and
counted as a fault, which makes the trace malformed. Work and memory are linear in the number of tokens.

This module knows no torch, no engine and no HTTP, and neither confidences nor when a pause should happen.
"""

from __future__ import annotations

import codecs
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import NamedTuple

from hyper_model.trace import (
    MARKUP,
    PARENTS,
    PAUSE,
    PAUSE_CLOSE,
    REQUIRED_SECTIONS,
    TAG_MEANINGS,
    PauseMode,
    Section,
    Speaker,
    TagStyle,
    Termination,
    Trace,
    TraceTokenizer,
)


class TraceFormat(StrEnum):
    """Grades a trace's form.

    STRICT: every required section, nested and ordered as `Section` and `PARENTS` say, and nothing but white space
    outside. WEAK: one THINK, then a RESPONSE or a FINAL_ANSWER or both, each tag matched and no section twice, whatever
    THINK holds. MALFORMED: anything else.
    """

    STRICT = "strict"
    WEAK = "weak"
    MALFORMED = "malformed"


@dataclass(frozen=True)
class SectionStart:
    """Says that a section opens."""

    section: Section


@dataclass(frozen=True)
class SectionDelta:
    """Adds words to an open section; a section's deltas joined are its text, without white space at either end."""

    section: Section
    text: str


@dataclass(frozen=True)
class SectionEnd:
    """Says that a section closes, by its tag, by a tag that leaves no place for it, or by the end of the trace."""

    section: Section


@dataclass(frozen=True)
class PauseSeen:
    """Says that a pause ended: the innermost open section, if any, and the number of latent tokens."""

    section: Section | None
    num_latent: int


Event = SectionStart | SectionDelta | SectionEnd | PauseSeen


@dataclass(frozen=True)
class ParsedTrace:
    """Holds what a completion says.

    Attributes:
        trace: The sections' contents.
        texts: Each section's own words, unread (a SPEAKER section as lines); equal to its joined deltas.
        raw: All visible text with its tags as the checkpoint spells them; no pauses, no turn marks.
        format: How well the form was kept.
        missing_sections: The required sections that never opened.
        section_num_tokens: Tokens directly inside each section; no pauses, and no tags but plain-text ones, which count
            where they begin.
        answer_text: FINAL_ANSWER, else RESPONSE, else None; an empty section does not answer.
        pauses: Every pause, in order.
        trailing_text: What stands in `raw` after the first closed FINAL_ANSWER, stripped.
        termination: As hinted to `finish`, but MALFORMED where a complete trace is so.
    """

    trace: Trace
    texts: Mapping[Section, str]
    raw: str
    format: TraceFormat
    missing_sections: tuple[Section, ...]
    section_num_tokens: Mapping[Section, int]
    answer_text: str | None
    pauses: tuple[PauseSeen, ...]
    trailing_text: str
    termination: Termination


def parse(
    token_ids: Iterable[int],
    tokenizer: TraceTokenizer,
    *,
    termination_hint: Termination = Termination.COMPLETE,
    pause_mode: PauseMode = PauseMode.PARALLEL,
    latent_tokens: int | None = None,
) -> ParsedTrace:
    """Reads a whole completion; see `TraceParser`."""
    parser = TraceParser(tokenizer, pause_mode=pause_mode, latent_tokens=latent_tokens)
    for token_id in token_ids:
        parser.feed(token_id)
    parser.finish(termination_hint)
    return parser.result


def parse_text(text: str) -> ParsedTrace:
    """Reads a trace from trusted text, such as a data set's, in our spelling or an older one.

    Tokens are not counted; a pause is everything between its tags.
    """
    grammar = _Grammar()
    scanner = _Scanner(reads_tags=True)
    for piece in (*scanner.feed(text), *scanner.finish()):
        grammar.add(piece)
    grammar.finish()
    return grammar.result(Termination.COMPLETE)


class TraceParser:
    """Reads a completion as its tokens arrive.

    Args:
        tokenizer: The checkpoint's.
        pause_mode: The manifest's. Pauses whose tags are plain text are spans in either mode.
        latent_tokens: The length of a parallel pause, where known: then two in a row are told apart.
    """

    def __init__(
        self,
        tokenizer: TraceTokenizer,
        *,
        pause_mode: PauseMode = PauseMode.PARALLEL,
        latent_tokens: int | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._pause_mode = pause_mode
        self._grammar = _Grammar(latent_tokens)
        self._scanner = _Scanner(reads_tags=tokenizer.tag_style is TagStyle.TEXT)
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._marks: dict[int, _Mark] = {}
        for section, ids in tokenizer.tag_ids.items():
            for token_id, meaning, spelling in zip(ids, section.tags, tokenizer.tags[section], strict=True):
                self._marks[token_id] = _Mark(meaning, spelling)
        self._termination: Termination | None = None

    def feed(self, token_id: int) -> list[Event]:
        """Takes the next token and returns what it completes; a character split over tokens is held back.

        Raises:
            RuntimeError: If the trace is finished.
        """
        if self._termination is not None:
            raise RuntimeError("this trace is finished")
        grammar, tokenizer = self._grammar, self._tokenizer
        if token_id == tokenizer.pause_close_id:
            grammar.end_pause()
        elif token_id in tokenizer.latent_ids and self._pause_mode is PauseMode.PARALLEL:
            grammar.extend_run()
        elif token_id == tokenizer.pause_id:
            grammar.open_span(_Pausing.TOKEN_SPAN)
        elif grammar.pausing is _Pausing.TOKEN_SPAN:
            grammar.count_token()
        else:
            grammar.end_run()
            self._feed_visible(token_id)
        return grammar.take_events()

    def _feed_visible(self, token_id: int) -> None:
        grammar = self._grammar
        if token_id in self._marks:
            self._flush()
            grammar.add(self._marks[token_id])
        elif token_id not in self._tokenizer.control_ids:
            # Counted before the words are added: a token that completes a plain-text tag belongs to where it began.
            grammar.count_token()
            self._add_words(self._utf8.decode(self._tokenizer.token_bytes(token_id)))

    def finish(self, termination_hint: Termination = Termination.COMPLETE) -> list[Event]:
        """Ends the trace: returns what was held back, and the end of every section still open."""
        if self._termination is None:
            self._termination = termination_hint
            self._flush()
            self._grammar.finish()
        return self._grammar.take_events()

    @property
    def open_sections(self) -> tuple[Section, ...]:
        """Names the sections that stand open, the outermost first."""
        return self._grammar.open_sections

    @property
    def result(self) -> ParsedTrace:
        """Returns what was read; before `finish`, what was read so far as if the trace had ended there."""
        return self._grammar.result(self._termination or Termination.TRUNCATED)

    def ids_to_final_answer(self) -> list[int]:
        """Returns the ids that close what stands open and open FINAL_ANSWER; none once FINAL_ANSWER has opened."""
        if self._grammar.has_seen(Section.FINAL_ANSWER):
            return []
        is_in_span = self._grammar.pausing in (_Pausing.TOKEN_SPAN, _Pausing.TEXT_SPAN)
        ids = self._tokenizer.close_pause_ids() if is_in_span else []
        for section in reversed(self.open_sections):
            ids += self._tokenizer.close_ids(section)
        return ids + self._tokenizer.open_ids(Section.FINAL_ANSWER)

    def _add_words(self, text: str) -> None:
        for piece in self._scanner.feed(text):
            self._grammar.add(piece)

    def _flush(self) -> None:
        self._add_words(self._utf8.decode(b"", final=True))
        for piece in self._scanner.finish():
            self._grammar.add(piece)


class _Words(NamedTuple):
    """Words of a section, and how `raw` shows them: with what looks like markup escaped."""

    text: str
    raw: str


class _Mark(NamedTuple):
    """A tag or the edge of a pause, in our spelling and as written."""

    meaning: str
    raw: str


_BODIES = {markup[1:]: markup for markup in MARKUP}
_BODY_PREFIXES = frozenset(body[:length] for body in _BODIES for length in range(1, len(body)))


class _Scanner:
    """Finds markup and its escapes in text that arrives in pieces, holding back what may yet become either.

    No markup has a `<` but its first character, so a candidate that fails cannot hide the start of another and every
    character is looked at once.
    """

    def __init__(self, *, reads_tags: bool) -> None:
        self._reads_tags = reads_tags
        self._is_holding = False
        self._num_slashes = 0
        self._body = ""

    def feed(self, text: str) -> Iterator[_Words | _Mark]:
        at = 0
        while at < len(text):
            if not self._is_holding:
                found = text.find("<", at)
                words = text[at:] if found < 0 else text[at:found]
                if words:
                    yield _Words(words, words)
                if found < 0:
                    return
                self._is_holding = True
                at = found + 1
                continue
            char = text[at]
            body = self._body + char
            if char == "\\" and not self._body:
                self._num_slashes += 1
            elif body in _BODIES:
                yield self._take_markup(body)
            elif body in _BODY_PREFIXES:
                self._body = body
            else:
                yield from self.finish()
                continue
            at += 1

    def finish(self) -> Iterator[_Words]:
        """Gives up the candidate: it was words."""
        if self._is_holding:
            held = "<" + "\\" * self._num_slashes + self._body
            self._is_holding, self._num_slashes, self._body = False, 0, ""
            yield _Words(held, held)

    def _take_markup(self, body: str) -> _Words | _Mark:
        num_slashes = self._num_slashes
        self._is_holding, self._num_slashes, self._body = False, 0, ""
        markup = _BODIES[body]
        if num_slashes:
            return _Words("<" + "\\" * (num_slashes - 1) + body, "<" + "\\" * num_slashes + body)
        if self._reads_tags and markup in TAG_MEANINGS:
            return _Mark(TAG_MEANINGS[markup], markup)
        return _Words(markup, "<\\" + body)


_TAGS = {tag: (section, tag == section.tags[1]) for section in Section for tag in section.tags}
_ORDER = {section: place for place, section in enumerate(Section)}


def _ancestors(section: Section) -> Iterator[Section]:
    parent = PARENTS[section]
    while parent is not None:
        yield parent
        parent = PARENTS[parent]


_ANCESTORS = {section: frozenset(_ancestors(section)) for section in Section}


class _Pausing(Enum):
    """Says what hides tokens: a run of latent ids ends by itself, a span by its closing id or its closing text."""

    NO = 0
    RUN = 1
    TOKEN_SPAN = 2
    TEXT_SPAN = 3


@dataclass
class _SectionText:
    """Collects a section's words, holding white space back until words follow it."""

    parts: list[str] = field(default_factory=list[str])
    spaces: list[str] = field(default_factory=list[str])

    def add(self, text: str) -> str:
        """Returns what can be shown now."""
        if not self.parts:
            text = text.lstrip()
        words = text.rstrip()
        if words:
            words = "".join(self.spaces) + words
            self.spaces.clear()
            self.parts.append(words)
            text = text[len(text.rstrip()) :]
        if text and self.parts:
            self.spaces.append(text)
        return words


class _Grammar:
    """Keeps the stack of open sections and turns words and marks into events and, at the end, a ParsedTrace."""

    def __init__(self, latent_tokens: int | None = None) -> None:
        self._latent_tokens = latent_tokens
        self._num_latent = 0
        self.pausing = _Pausing.NO
        self._pauses: list[PauseSeen] = []
        # (section, whether it is shown): a second occurrence is not.
        self._stack: list[tuple[Section, bool]] = []
        self._opened: list[Section] = []
        self._texts: dict[Section, _SectionText] = {}
        self._num_tokens: dict[Section, int] = {}
        self._raw: list[str] = []
        self._answer_end: int | None = None
        self._is_faulty = False
        self._is_exact = True
        self._events: list[Event] = []

    @property
    def open_sections(self) -> tuple[Section, ...]:
        return tuple(section for section, _ in self._stack)

    def has_seen(self, section: Section) -> bool:
        return section in self._texts

    def take_events(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def count_token(self) -> None:
        if self.pausing is not _Pausing.NO:
            self._num_latent += 1
        elif self._stack:
            section, _ = self._stack[-1]
            self._num_tokens[section] = self._num_tokens.get(section, 0) + 1

    def add(self, piece: _Words | _Mark) -> None:
        if isinstance(piece, _Mark) and piece.meaning == PAUSE:
            self.open_span(_Pausing.TEXT_SPAN)
        elif isinstance(piece, _Mark) and piece.meaning == PAUSE_CLOSE:
            self.end_pause()
        elif self.pausing is _Pausing.TEXT_SPAN:
            return
        elif isinstance(piece, _Mark):
            section, is_close = _TAGS[piece.meaning]
            self._raw.append(piece.raw)
            if is_close:
                self._close(section)
            else:
                self._open(section)
        else:
            self._raw.append(piece.raw)
            self._words(piece.text)

    def finish(self) -> None:
        self.end_pause()
        self._is_faulty |= bool(self._stack)
        while self._stack:
            self._pop()

    def open_span(self, kind: _Pausing) -> None:
        if self.pausing is _Pausing.NO:
            self.pausing = kind
        else:
            self._num_latent += 1

    def extend_run(self) -> None:
        if self.pausing is _Pausing.NO:
            self.pausing = _Pausing.RUN
        self._num_latent += 1
        if self._num_latent == self._latent_tokens and self.pausing is _Pausing.RUN:
            self.end_pause()

    def end_run(self) -> None:
        if self.pausing is _Pausing.RUN:
            self.end_pause()

    def end_pause(self) -> None:
        if self.pausing is not _Pausing.NO:
            pause = PauseSeen(self._stack[-1][0] if self._stack else None, self._num_latent)
            self.pausing, self._num_latent = _Pausing.NO, 0
            self._pauses.append(pause)
            self._events.append(pause)

    def _words(self, text: str) -> None:
        if not self._stack:
            self._is_faulty |= not text.isspace()
            return
        section, is_shown = self._stack[-1]
        if not is_shown:
            return
        words = self._texts[section].add(text)
        if words:
            self._is_exact &= section not in (Section.THINK, Section.CAPTION)
            self._events.append(SectionDelta(section, words))

    def _open(self, section: Section) -> None:
        while self._stack and self._stack[-1][0] not in _ANCESTORS[section]:
            self._pop()
            self._is_faulty = True
        parent = self._stack[-1][0] if self._stack else None
        self._is_exact &= parent is PARENTS[section]
        self._is_faulty |= parent is None and PARENTS[section] is not None
        is_new = section not in self._texts
        self._stack.append((section, is_new))
        if is_new:
            self._opened.append(section)
            self._texts[section] = _SectionText()
            self._events.append(SectionStart(section))
        else:
            self._is_faulty = True

    def _close(self, section: Section) -> None:
        if section not in self.open_sections:
            self._is_faulty = True
            return
        while self._stack[-1][0] is not section:
            self._pop()
            self._is_faulty = True
        self._pop()
        if section is Section.FINAL_ANSWER and self._answer_end is None:
            self._answer_end = len(self._raw)

    def _pop(self) -> None:
        section, is_shown = self._stack.pop()
        if is_shown:
            self._events.append(SectionEnd(section))

    def _format(self) -> TraceFormat:
        outer = [section for section in self._opened if PARENTS[section] is None]
        is_weak = (
            not (self._is_faulty or self._stack)
            and outer[:1] == [Section.THINK]
            and any(section in outer for section in (Section.RESPONSE, Section.FINAL_ANSWER))
            and outer == sorted(outer, key=_ORDER.__getitem__)
        )
        if not is_weak:
            return TraceFormat.MALFORMED
        is_ordered = self._opened == sorted(self._opened, key=_ORDER.__getitem__)
        is_whole = all(map(self.has_seen, REQUIRED_SECTIONS))
        return TraceFormat.STRICT if self._is_exact and is_ordered and is_whole else TraceFormat.WEAK

    def result(self, termination: Termination) -> ParsedTrace:
        texts = {section: "".join(self._texts[section].parts) for section in self._opened}
        form = self._format()
        if termination is Termination.COMPLETE and form is TraceFormat.MALFORMED:
            termination = Termination.MALFORMED
        response, final_answer = texts.get(Section.RESPONSE), texts.get(Section.FINAL_ANSWER)
        trace = Trace(
            planning=texts.get(Section.PLANNING),
            environment=texts.get(Section.ENV),
            speakers=parse_speakers(texts.get(Section.SPEAKER, "")),
            transcript=texts.get(Section.ASR),
            description=texts.get(Section.DESCRIPTION),
            reasoning=texts.get(Section.REASONING, texts.get(Section.THINK) or None),
            summary=texts.get(Section.SUMMARY),
            response=response,
            reflection=texts.get(Section.REFLECT),
            final_answer=final_answer,
        )
        return ParsedTrace(
            trace=trace,
            texts=texts,
            raw="".join(self._raw),
            format=form,
            missing_sections=tuple(section for section in REQUIRED_SECTIONS if section not in texts),
            section_num_tokens=dict(self._num_tokens),
            answer_text=final_answer or response or None,
            pauses=tuple(self._pauses),
            trailing_text="" if self._answer_end is None else "".join(self._raw[self._answer_end :]).strip(),
            termination=termination,
        )


_ESCAPED = re.compile(r"\\(.)")
_SPEAKER_LINE = re.compile(r'(S[0-9]+)(?: ((?:[^\\:"]|\\.)+))?:((?: "(?:[^\\"]|\\.)*")*)')
_QUOTE = re.compile(r'"((?:[^\\"]|\\.)*)"')
_LOOSE_ID = re.compile(r"(?:[-*•]\s*)?(?:S|(?:Speaker|Person|Voice)\s*)([0-9]+)\b", re.IGNORECASE)
_LOOSE_QUOTE = re.compile(r'"([^"]*)"|“([^”]*)”')


def parse_speakers(text: str) -> tuple[Speaker, ...]:
    """Reads the lines of a SPEAKER section; the inverse of `render_speakers`, and never raises.

    A line that `render_speakers` cannot have written is read for what it holds: what is in quotes (else what follows
    the colon) was said, what stands before describes the voice, and a speaker without a number gets the line's.
    """
    lines = [line for line in text.split("\n") if line.strip()]
    return tuple(_parse_speaker(line, place) for place, line in enumerate(lines, start=1))


def _parse_speaker(line: str, place: int) -> Speaker:
    exact = _SPEAKER_LINE.fullmatch(line)
    if exact:
        quotes = tuple(_unescape(quote) for quote in _QUOTE.findall(exact[3]))
        return Speaker(exact[1], _unescape(exact[2] or ""), quotes)
    line = line.strip()
    numbered = _LOOSE_ID.match(line)
    rest = line[numbered.end() :] if numbered else line
    head, _, tail = rest.partition(":")
    quotes = tuple(straight or curly for straight, curly in _LOOSE_QUOTE.findall(rest)) or (tail.strip(),)
    description = re.split(r'["“]', head, maxsplit=1)[0].strip(" \t()[],.-")
    speaker_id = f"S{numbered[1] if numbered else place}"
    return Speaker(speaker_id, description, tuple(quote for quote in quotes if quote))


def _unescape(text: str) -> str:
    def character(match: re.Match[str]) -> str:
        # An accent that stood behind a line break has joined the escape's letter.
        letter, *accents = unicodedata.normalize("NFD", match[1])
        return "".join(("\n", *accents)) if letter == "n" else match[1]

    return _ESCAPED.sub(character, text)
