"""Log-probabilities of an answer's tokens, matched to the text of the answer as it appears.

The parser buffers partial characters, white space and possible tags. So a token belongs to the text with the first
words after it. A token without later words in its section (a tag, white space at the end) belongs to no text.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hyper_model.trace import Section, TraceTokenizer
from hyper_model.trace_parser import Event, SectionDelta

ANSWER_SECTIONS = (Section.RESPONSE, Section.FINAL_ANSWER)


@dataclass(frozen=True)
class AnswerToken:
    """One token of an answer.

    Attributes:
        data: Its bytes; a character may span several tokens.
        logprob: Natural logarithm of its probability, before temperature, bans and the gate.
    """

    data: bytes
    logprob: float


class AnswerTokens:
    """Collector of the tokens of RESPONSE and FINAL_ANSWER, fed beside the parser."""

    def __init__(self, tokenizer: TraceTokenizer) -> None:
        self._shown: dict[Section, list[AnswerToken]] = {section: [] for section in ANSWER_SECTIONS}
        self._buffered: dict[Section, list[AnswerToken]] = {section: [] for section in ANSWER_SECTIONS}
        self._tokenizer = tokenizer
        self._markup_ids = tokenizer.control_ids | tokenizer.pause_ids
        self._markup_ids |= {token_id for ids in tokenizer.tag_ids.values() for token_id in ids}

    def add(self, token_id: int, logprob: float | None, section: Section | None, events: Iterable[Event]) -> None:
        """Add a token of the model.

        Args:
            token_id: The token.
            logprob: Its log-probability; None for a token that the model did not write.
            section: The innermost open section before the token.
            events: The parser's events at the token.
        """
        with_words = sections_with_words(events)
        if logprob is not None and token_id not in self._markup_ids:
            for each in ANSWER_SECTIONS:
                if each is section or each in with_words:
                    self._buffered[each].append(AnswerToken(self._tokenizer.token_bytes(token_id), logprob))
        self._show(with_words)

    def finish(self, events: Iterable[Event]) -> None:
        """Add the parser's events at the end of the trace."""
        self._show(sections_with_words(events))

    def take(self, section: Section) -> tuple[AnswerToken, ...]:
        """Return the tokens of a section's text since the last call."""
        taken = tuple(self._shown[section])
        self._shown[section].clear()
        return taken

    def _show(self, sections: Iterable[Section]) -> None:
        for section in sections:
            if section in self._buffered:
                self._shown[section] += self._buffered[section]
                self._buffered[section].clear()


def sections_with_words(events: Iterable[Event]) -> set[Section]:
    """Return the sections with new text in these events."""
    return {event.section for event in events if isinstance(event, SectionDelta)}
