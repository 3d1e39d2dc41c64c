"""Streaming parser of traces: token ids in, section events out, and a `ParsedTrace` at the end.

If tags are tokens, only their ids open and close sections. A model may spell `<FINAL_ANSWER>` letter by letter, because
a clip said it. Such letters are words, and `ParsedTrace.raw` shows them escaped. If tags are plain text, the decoded
text is scanned for them. `trace.render` is the inverse of both.

Every sequence of ids is a trace of some kind: model output never raises an error. Faults are mended in place and make
the trace malformed. A tag closes all open sections but its ancestors. The second occurrence of a section appears in
`raw` only. Time and memory are linear in the number of tokens.

The module is independent of torch, engines, HTTP, confidences and the decision to pause.
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
    """Grade of a trace's form.

    STRICT: every required section, in the order of `Section` and the nesting of `PARENTS`, with only white space
    outside. WEAK: one THINK, then RESPONSE, FINAL_ANSWER or both, with matched tags and no repeated section; the
    content of THINK is free. MALFORMED: all others.
    """

    STRICT = "strict"
    WEAK = "weak"
    MALFORMED = "malformed"


@dataclass(frozen=True)
class SectionStart:
    """Start of a section."""

    section: Section


@dataclass(frozen=True)
class SectionDelta:
    """New words of an open section; joined, they are its text without white space at either end."""

    section: Section
    text: str


@dataclass(frozen=True)
class SectionEnd:
    """End of a section: by its tag, by another section's tag, or by the end of the trace."""

    section: Section


@dataclass(frozen=True)
class PauseSeen:
    """End of a pause: the innermost open section, if any, and the number of latent tokens."""

    section: Section | None
    num_latent: int


Event = SectionStart | SectionDelta | SectionEnd | PauseSeen


@dataclass(frozen=True)
class ParsedTrace:
    """Parsed content of a completion.

    Attributes:
        trace: The sections' contents.
        texts: Each section's text as written (a SPEAKER section as lines); equal to its joined deltas.
        raw: All visible text with tags in the checkpoint's spelling, without pauses and turn marks.
        format: Grade of the form.
        missing_sections: The required sections without an opening tag.
        section_num_tokens: Tokens directly inside each section. Pauses and token tags are excluded. A plain-text tag
            counts in the section of its first token.
        answer_text: FINAL_ANSWER, else RESPONSE, else None; an empty section is not an answer.
        pauses: Every pause, in order.
        trailing_text: Text in `raw` after the first closed FINAL_ANSWER, stripped.
        termination: The hint given to `finish`, but MALFORMED for a complete trace of malformed format.
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
    """Parse a whole completion; see `TraceParser`."""
    parser = TraceParser(tokenizer, pause_mode=pause_mode, latent_tokens=latent_tokens)
    for token_id in token_ids:
        parser.feed(token_id)
    parser.finish(termination_hint)
    return parser.result


def parse_text(text: str) -> ParsedTrace:
    """Parse a trace from trusted text, such as a data set's, in our spelling or an older one.

    Tokens are not counted. A pause is everything between its tags.
    """
    grammar = _Grammar()
    scanner = _Scanner(reads_tags=True)
    for piece in (*scanner.feed(text), *scanner.finish()):
        grammar.add(piece)
    grammar.finish()
    return grammar.result(Termination.COMPLETE)


class TraceParser:
    """Parser of a completion, fed token by token.

    Args:
        tokenizer: The checkpoint's tokenizer.
        pause_mode: The manifest's mode. Pauses with plain-text tags are spans in either mode.
        latent_tokens: The length of a parallel pause, if known; it separates two consecutive pauses.
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
        """Parse the next token and return the completed events; partial characters are buffered.

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
            # Count the token before its words: a token at the end of a plain-text tag belongs to the section before the
            # tag.
            grammar.count_token()
            self._add_words(self._utf8.decode(self._tokenizer.token_bytes(token_id)))

    def finish(self, termination_hint: Termination = Termination.COMPLETE) -> list[Event]:
        """End the trace; return the buffered events and the end of every open section."""
        if self._termination is None:
            self._termination = termination_hint
            self._flush()
            self._grammar.finish()
        return self._grammar.take_events()

    @property
    def open_sections(self) -> tuple[Section, ...]:
        """Return the open sections, the outermost first."""
        return self._grammar.open_sections

    @property
    def result(self) -> ParsedTrace:
        """Return the parsed trace; before `finish`, the trace so far, as if it ended here."""
        return self._grammar.result(self._termination or Termination.TRUNCATED)

    def ids_to_final_answer(self) -> list[int]:
        """Return the ids to close all open sections and open FINAL_ANSWER; none if it was opened already."""
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
    """Words of a section, and their form in `raw`, with markup-like strings escaped."""

    text: str
    raw: str


class _Mark(NamedTuple):
    """A tag or pause tag, in our spelling and as written."""

    meaning: str
    raw: str


_BODIES = {markup[1:]: markup for markup in MARKUP}
_BODY_PREFIXES = frozenset(body[:length] for body in _BODIES for length in range(1, len(body)))


class _Scanner:
    """Scanner for markup and its escapes in a stream of text; it buffers possible beginnings of either.

    In all markup `<` is only the first character. A failed candidate cannot hide the start of another, so every
    character is examined once.
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
                start = text.find("<", at)
                words = text[at:] if start < 0 else text[at:start]
                if words:
                    yield _Words(words, words)
                if start < 0:
                    return
                self._is_holding = True
                at = start + 1
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
        """Release the buffered candidate as words."""
        if self._is_holding:
            text = "<" + "\\" * self._num_slashes + self._body
            self._is_holding, self._num_slashes, self._body = False, 0, ""
            yield _Words(text, text)

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
    """Kind of the current pause: a run of latent ids ends by itself, a span by its closing id or text."""

    NO = 0
    RUN = 1
    TOKEN_SPAN = 2
    TEXT_SPAN = 3


@dataclass
class _SectionText:
    """Collected words of a section; white space is buffered until more words follow."""

    parts: list[str] = field(default_factory=list[str])
    spaces: list[str] = field(default_factory=list[str])

    def add(self, text: str) -> str:
        """Add text and return its displayable part."""
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
    """Stack of open sections: turns words and marks into events and finally a ParsedTrace."""

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
    """Parse the lines of a SPEAKER section; the inverse of `render_speakers`. Never raises.

    Lines in another form are parsed loosely. Quoted text, or else the text after the colon, is speech. The text before
    it is the description. A speaker without a number gets the line's number.
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
        # An accent behind a line break has combined with the escape's letter.
        letter, *accents = unicodedata.normalize("NFD", match[1])
        return "".join(("\n", *accents)) if letter == "n" else match[1]

    return _ESCAPED.sub(character, text)
