"""The answering procedure: from one question about one clip to an answer, without input or output.

`Answering` holds the procedure without an engine, as h11 holds HTTP without a socket. `next_step` names the needed work
of an engine. The procedure takes token ids and scores, and returns events. The service drives it token by token
(`server.answering`). Evaluation and calibration drive many procedures in batches (`training.rl.rollout`). So both
measure and serve the same answer.

    answering = Answering(question, tokenizer, manifest)
    while (step := answering.next_step) is not None:
        match step:
            case Generate():
                for chunk in engine.generate(step):
                    events = answering.receive_tokens(chunk.token_ids, chunk.finish_reason)
                    if answering.next_step is not step:
                        break
            case Score():
                events = answering.receive_scores(engine.score(step))
    result = answering.result

Steps of the procedure:
  1. The model writes its trace; known content of SPEAKER and ASR (`Question.heard`) is written for it. With choices,
     generation ends at the opening tag of FINAL_ANSWER, because choices are scored. Without choices it ends at the
     closing tag. If the manifest calibrates open questions, a second continuation writes the answer, with the
     log-probabilities that its confidence needs.
  2. An incomplete trace (token limit, gate, end of turn without an answer) is closed with the missing tags.
  3. With choices, each is scored as the continuation of the trace, and the likeliest is written into it. Without
     choices, the model gets `ANSWER_TOKENS` more to answer after an incomplete trace.

The module imports neither torch nor vLLM and is independent of HTTP, clips as samples, and wire formats.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Literal

import numpy as np

from hyper_model.answer_tokens import AnswerToken, AnswerTokens
from hyper_model.manifest import Manifest
from hyper_model.pause import GateReport, GateSettings, has_loop
from hyper_model.trace import (
    PauseMode,
    Section,
    Speaker,
    Termination,
    Trace,
    TraceTokenizer,
    canonical_text,
    escape_markup,
    render_choice,
    render_speakers,
)
from hyper_model.trace_parser import Event as TraceEvent
from hyper_model.trace_parser import ParsedTrace, SectionDelta, TraceParser

DEFAULT_MAX_TOKENS = 1024
"""Default maximum of visible tokens of a trace."""

ANSWER_TOKENS = 64
"""Maximum tokens of an answer after an incomplete trace. They are not part of `max_tokens`, so a reply is never empty.
"""

CLOSING_TOKENS = 16
"""Maximum number of closing tags of an incomplete trace, in tokens."""

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class Heard:
    """Speakers and words of a clip, known before its trace; the procedure writes them in place of the model's own."""

    speakers: tuple[Speaker, ...] = ()
    transcript: str = ""


NOTHING_HEARD = Heard()


SAME_LINE = 0.6
"""Two transcripts of one line have at least this similarity (`difflib.SequenceMatcher.ratio`)."""


def join_heard(pieces: Sequence[Heard], people: Sequence[Speaker] = ()) -> Heard:
    """Join the speakers and words of consecutive pieces of a clip.

    The model numbers the speakers of each piece anew.

    Args:
        pieces: Speakers and words of each piece, in order.
        people: Speakers of the whole clip. A line of a piece belongs to the person with the most similar line, else to
            the first person of its speaker's description, else to a further one. Without people, speakers of one
            description are the same person, unless one piece has several of them.
    """
    transcript = ". ".join(piece.transcript for piece in pieces if piece.transcript)
    return Heard(_join_speakers(pieces, people) if people else _join_by_description(pieces), transcript)


def _join_speakers(pieces: Sequence[Heard], people: Sequence[Speaker]) -> tuple[Speaker, ...]:
    descriptions = [person.description for person in people]
    quotes: list[list[str]] = [[] for _ in people]
    lines = [(line.lower(), place) for place, person in enumerate(people) for line in person.quotes]
    for speaker in (speaker for piece in pieces for speaker in piece.speakers):
        for quote in speaker.quotes:
            likeness = [(SequenceMatcher(None, quote.lower(), line).ratio(), -place) for line, place in lines]
            best, place = max(likeness, default=(0.0, 0))
            if best >= SAME_LINE:
                quotes[-place].append(quote)
                continue
            if speaker.description not in descriptions:
                descriptions.append(speaker.description)
                quotes.append([])
            quotes[descriptions.index(speaker.description)].append(quote)
    return tuple(
        Speaker(f"S{place + 1}", description, tuple(quotes[place])) for place, description in enumerate(descriptions)
    )


def _join_by_description(pieces: Sequence[Heard]) -> tuple[Speaker, ...]:
    names: dict[tuple[str, int], int] = {}
    quotes: list[list[str]] = []
    for piece in pieces:
        num_seen: dict[str, int] = {}
        for speaker in piece.speakers:
            number = num_seen.get(speaker.description, 0)
            num_seen[speaker.description] = number + 1
            place = names.setdefault((speaker.description, number), len(names))
            if place == len(quotes):
                quotes.append([])
            quotes[place] += speaker.quotes
    return tuple(
        Speaker(f"S{place + 1}", description, tuple(quotes[place])) for (description, _), place in names.items()
    )


@dataclass(frozen=True)
class Question:
    """One checked question about one clip.

    Attributes:
        prompt_token_ids: The prompt of `build_prompt`, with one placeholder for the clip.
        choices: The options; empty for an open question.
        max_tokens: Maximum visible tokens of the trace; `max_trace_tokens` is the upper bound.
        gate: Settings of the gate for pauses and for repetitive traces; None turns both off.
        temperature: 0 takes the likeliest token.
        seed: Seed of sampling; None leaves it to the engine.
        heard: Content of SPEAKER and ASR, if it is known; None lets the model write them.
        wants_logprobs: Whether `AnswerDelta` holds the tokens of the answer with their log-probabilities.
    """

    prompt_token_ids: tuple[int, ...]
    choices: tuple[str, ...] = ()
    max_tokens: int = DEFAULT_MAX_TOKENS
    gate: GateSettings | None = None
    temperature: float = 0.0
    seed: int | None = None
    heard: Heard | None = None
    wants_logprobs: bool = False


@dataclass(frozen=True, eq=False)
class Generate:
    """Step for the driver: generate a continuation of a prompt.

    Attributes:
        prompt_token_ids: The question's prompt and the completion so far.
        max_tokens: Maximum visible tokens, including the stop token and excluding pauses.
        stop_token_ids: The continuation ends with the first of these tokens.
        banned_token_ids: Tokens never written.
        gate: Gate of the continuation, or None.
        wants_logprobs: Whether the procedure needs the log-probability of each token.
    """

    prompt_token_ids: Sequence[int]
    max_tokens: int
    temperature: float = 0.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    banned_token_ids: tuple[int, ...] = ()
    gate: GateSettings | None = None
    wants_logprobs: bool = False


@dataclass(frozen=True, eq=False)
class Score:
    """Step for the driver: compute the log-probability of each candidate as the continuation of a prompt."""

    prompt_token_ids: Sequence[int]
    candidates: Sequence[Sequence[int]]


@dataclass(frozen=True)
class AnswerDelta:
    """New text of the answer; joined, the deltas are `AnswerResult.text`.

    Attributes:
        text: The text.
        tokens: Its tokens, if the question wants them. A choice is one token, with the logarithm of its share of the
            choices before calibration.
    """

    text: str
    tokens: tuple[AnswerToken, ...] = ()


Event = TraceEvent | AnswerDelta


@dataclass(frozen=True)
class AnswerResult:
    """An answer with its trace, scores and counts.

    Attributes:
        text: The answer: the chosen option in the caller's words, else the text of FINAL_ANSWER or RESPONSE.
        choice_index: Index of the chosen option; None for an open question.
        scores: One probability per option, of sum 1, at the temperature of the manifest; empty for an open question.
        parsed: The trace, including the written choice.
        token_ids: The whole completion, with pauses and closing tags and without the token at the end of a turn.
        num_completion_tokens: Visible tokens written by the model, stop tokens included.
        num_pauses: Number of pauses; `num_pause_tokens` counts their hidden tokens.
        report: The gate's measurements.
        text_confidence: Probability of the text of an open question, at the temperature of the manifest; None without a
            temperature, or without a FINAL_ANSWER of the model.
    """

    text: str
    choice_index: int | None
    scores: tuple[float, ...]
    parsed: ParsedTrace
    token_ids: tuple[int, ...]
    num_completion_tokens: int
    num_pauses: int
    num_pause_tokens: int
    report: GateReport
    text_confidence: float | None = None

    @property
    def confidence(self) -> float | None:
        """Return the probability of the chosen option, or of the text of an open question; None if unknown."""
        return self.text_confidence if self.choice_index is None else self.scores[self.choice_index]

    @property
    def pause_confidences(self) -> tuple[float | None, ...]:
        """Return the confidence at each pause of the trace; None for early pauses missing in the report."""
        num_pauses = len(self.parsed.pauses)
        padded = (*[None] * num_pauses, *self.report.confidences)
        return padded[len(padded) - num_pauses :]


class Answering:
    """Procedure for one question; the module docstring shows how to drive it.

    Attributes:
        question: The question.
        next_step: The driver's next work; None for a complete answer. A `Generate` stays the next step until its
            continuation has ended.
        token_ids: The completion so far.
    """

    def __init__(self, question: Question, tokenizer: TraceTokenizer, manifest: Manifest) -> None:
        self.question = question
        self.token_ids: list[int] = []
        self.next_step: Generate | Score | None = None
        self._tokenizer = tokenizer
        self._by_letter = manifest.trace.answer_style == "letter"
        pause = manifest.pause
        self._parser = TraceParser(tokenizer, pause_mode=PauseMode(pause.mode), latent_tokens=pause.latent_tokens)
        self._ends = frozenset(tokenizer.stop_ids)
        self._is_in_trace = True
        self._heard = question.heard
        confidence = manifest.confidence
        self._temperature = None if confidence is None else confidence.temperature(has_choices=bool(question.choices))
        self._rates_text = self._temperature is not None and not question.choices
        self._answer_ids: list[int] = []
        self._answer_logprob = 0.0
        self._answer_tokens = AnswerTokens(tokenizer) if question.wants_logprobs else None
        self._hint = Termination.COMPLETE
        self._num_steps = 0
        self._num_completion_tokens = 0
        self._num_pauses = 0
        self._num_pause_tokens = 0
        self._report = GateReport()
        self._result: AnswerResult | None = None
        self._ask_for_trace()

    @property
    def parsed(self) -> ParsedTrace:
        """Return the trace so far."""
        return self._parser.result

    @property
    def result(self) -> AnswerResult:
        """Return the finished answer.

        Raises:
            RuntimeError: If the procedure has a next step.
        """
        if self._result is None:
            raise RuntimeError("the answer is not complete: drive the procedure until next_step is None")
        return self._result

    def receive_tokens(
        self,
        token_ids: Sequence[int],
        finish_reason: FinishReason | None = None,
        *,
        span: Sequence[int] = (),
        report: GateReport | None = None,
        logprobs: Sequence[float] = (),
    ) -> list[Event]:
        """Process the next tokens of the continuation requested by `next_step`, and return the completed events.

        Args:
            token_ids: Visible tokens.
            finish_reason: Reason for the end of the continuation; None if more tokens follow. "abort" if the gate or
                the engine aborted it.
            span: Hidden tokens of a pause before `token_ids`.
            report: The gate's measurements, at the end of a continuation with a gate.
            logprobs: The log-probability of each visible token, for a step with `wants_logprobs`; else empty.
        """
        events: list[Event] = []
        if span:
            self._num_pauses += 1
            self._num_pause_tokens += len(span)
            self._feed(span, events)
        if report is not None:
            self._report = report
        if self._is_in_trace:
            self._receive_trace(token_ids, finish_reason, events, logprobs)
        else:
            self._receive_answer(token_ids, finish_reason, events, logprobs)
        return events

    def receive_scores(self, logprobs: Sequence[float]) -> list[Event]:
        """Process the log-probabilities of the candidates, and write the likeliest choice into the trace."""
        events: list[Event] = []
        tokenizer, choices = self._tokenizer, self.question.choices
        # Sums over whole candidates, not means: the model has read the choices and is about to copy one of them.
        shares = softmax(logprobs)
        # From the model's own shares: a temperature rounds very unequal ones to equal numbers.
        index = int(np.argmax(shares))
        words = render_choice(index, choices) if self._by_letter else " ".join(choices[index].split())
        self._feed([*tokenizer.encode_text(escape_markup(words)), *tokenizer.close_ids(Section.FINAL_ANSWER)], events)
        chosen = AnswerToken(choices[index].encode(), math.log(shares[index]))
        events.append(AnswerDelta(choices[index], (chosen,) if self.question.wants_logprobs else ()))
        scores = shares if self._temperature is None else softmax(logprobs, self._temperature)
        self._finish(events, index, tuple(scores))
        return events

    def _ask_for_trace(self) -> None:
        question = self.question
        opens_answer, closes_answer = self._answer_tags()
        stops = opens_answer if question.choices or self._rates_text else closes_answer
        if self._heard is not None:
            stops |= frozenset(self._tokenizer.tag_ids.get(Section.SPEAKER, ())[:1])
        # The gate follows a trace from its beginning, so a continuation has none.
        gate = question.gate if not self.token_ids else None
        self._generate(max(1, self._num_tokens_left()), stops, gate)

    def _receive_trace(
        self,
        token_ids: Sequence[int],
        finish_reason: FinishReason | None,
        events: list[Event],
        logprobs: Sequence[float],
    ) -> None:
        for place, token_id in enumerate(token_ids):
            self._num_completion_tokens += 1
            if token_id in self._ends:
                self._end_trace("stop", events)
                return
            self._feed((token_id,), events, logprobs[place : place + 1])
            if self._heard is not None and Section.SPEAKER in self._parser.open_sections:
                self._write_heard(self._heard, events)
                return
            # With plain-text tags no single token opens the answer; only the parser detects it, not the engine.
            is_scored = bool(self.question.choices) or self._rates_text
            if is_scored and Section.FINAL_ANSWER in self._parser.open_sections:
                self._end_trace("answer", events)
                return
        if finish_reason is not None:
            self._end_trace(finish_reason, events)

    def _receive_answer(
        self,
        token_ids: Sequence[int],
        finish_reason: FinishReason | None,
        events: list[Event],
        logprobs: Sequence[float],
    ) -> None:
        """Process tokens of a continuation that writes the answer to an open question."""
        gate = self.question.gate
        for place, token_id in enumerate(token_ids):
            self._num_completion_tokens += 1
            self._answer_ids.append(token_id)
            self._answer_logprob += sum(logprobs[place : place + 1])
            if token_id not in self._ends:
                self._feed((token_id,), events, logprobs[place : place + 1])
            # The gate in the engine follows the trace alone.
            if gate is not None and has_loop(self._answer_ids, gate.loop_tokens):
                finish_reason = "abort"
                break
        if finish_reason is not None:
            if self._hint is Termination.COMPLETE:
                self._hint = _TERMINATIONS.get(finish_reason, Termination.COMPLETE)
            self._finish(events)

    def _write_heard(self, heard: Heard, events: list[Event]) -> None:
        """Write SPEAKER and ASR into the trace, and request the rest of it."""
        self._heard = None
        tokenizer = self._tokenizer
        speakers, words = render_speakers(heard.speakers), canonical_text(heard.transcript)
        token_ids = [*tokenizer.encode_text(escape_markup(speakers)), *tokenizer.close_ids(Section.SPEAKER)]
        token_ids += [*tokenizer.open_ids(Section.ASR), *tokenizer.encode_text(escape_markup(words))]
        token_ids += tokenizer.close_ids(Section.ASR)
        # Without room for the rest of the trace, the model writes its own.
        if len(token_ids) + ANSWER_TOKENS <= self._num_tokens_left():
            self._feed(token_ids, events)
        self._ask_for_trace()

    def _num_tokens_left(self) -> int:
        return self.question.max_tokens - (len(self.token_ids) - self._num_pause_tokens)

    def _end_trace(self, reason: FinishReason | Literal["answer"], events: list[Event]) -> None:
        """Close an incomplete trace, and request a choice, an answer, or nothing more."""
        self._is_in_trace = False
        self._hint = _TERMINATIONS.get(reason, Termination.COMPLETE)
        has_answer = reason == "answer" or self._parser.result.answer_text is not None
        if self._hint is Termination.COMPLETE and not has_answer:
            self._hint = Termination.MALFORMED
        if not self.question.choices and has_answer and not (self._rates_text and reason == "answer"):
            self._finish(events)
            return
        self._feed(self._parser.ids_to_final_answer(), events)
        if self.question.choices:
            self._num_steps += 1
            candidates = self._tokenizer.choice_ids(self.question.choices, by_letter=self._by_letter)
            self.next_step = Score(self._prompt(), candidates)
        else:
            _, closes_answer = self._answer_tags()
            num_tokens = max(ANSWER_TOKENS, self._num_tokens_left()) if reason == "answer" else ANSWER_TOKENS
            self._generate(num_tokens, closes_answer, None)

    def _finish(self, events: list[Event], choice_index: int | None = None, scores: tuple[float, ...] = ()) -> None:
        self.next_step = None
        found = self._parser.finish(self._hint)
        if self._answer_tokens is not None:
            self._answer_tokens.finish(found)
        self._add_events(found, events)
        parsed = self._parser.result
        if choice_index is None:
            text = parsed.answer_text or ""
            if not parsed.texts.get(Section.FINAL_ANSWER):
                # The answer was in no delta yet: it is the text of RESPONSE, or empty.
                events.append(AnswerDelta(text, self._new_tokens(Section.RESPONSE)))
        else:
            text = self.question.choices[choice_index]
        self._result = AnswerResult(
            text=text,
            choice_index=choice_index,
            scores=scores,
            parsed=parsed,
            token_ids=tuple(self.token_ids),
            num_completion_tokens=self._num_completion_tokens,
            num_pauses=self._num_pauses,
            num_pause_tokens=self._num_pause_tokens,
            report=self._report,
            text_confidence=self._text_confidence(text) if choice_index is None else None,
        )

    def _text_confidence(self, text: str) -> float | None:
        if self._temperature is None or not self._answer_ids or not text:
            return None
        return tempered(math.exp(min(self._answer_logprob, 0.0)), self._temperature)

    def _generate(self, max_tokens: int, stop: frozenset[int], gate: GateSettings | None) -> None:
        question = self.question
        self.next_step = Generate(
            prompt_token_ids=self._prompt(),
            max_tokens=max_tokens,
            temperature=question.temperature,
            # Each step continues the same draw; with the same seed it would repeat the first step's random numbers.
            seed=None if question.seed is None else (question.seed + self._num_steps) % 2**32,
            stop_token_ids=tuple(sorted(self._ends | stop)),
            banned_token_ids=tuple(sorted(self._tokenizer.pause_ids)) if gate is None else (),
            gate=gate,
            # A choice has the log-probability of its score.
            wants_logprobs=(question.wants_logprobs or (self._rates_text and not self._is_in_trace))
            and not question.choices,
        )
        self._num_steps += 1

    def _prompt(self) -> list[int]:
        return [*self.question.prompt_token_ids, *self.token_ids]

    def _answer_tags(self) -> tuple[frozenset[int], frozenset[int]]:
        """Return the tokens to open and close FINAL_ANSWER; none for plain-text tags."""
        tag_ids = self._tokenizer.tag_ids.get(Section.FINAL_ANSWER)
        return (frozenset(), frozenset()) if tag_ids is None else (frozenset(tag_ids[:1]), frozenset(tag_ids[1:]))

    def _feed(self, token_ids: Iterable[int], events: list[Event], logprobs: Sequence[float] = ()) -> None:
        for place, token_id in enumerate(token_ids):
            self.token_ids.append(token_id)
            if self._answer_tokens is None:
                self._add_events(self._parser.feed(token_id), events)
                continue
            section = next(reversed(self._parser.open_sections), None)
            found = self._parser.feed(token_id)
            self._answer_tokens.add(token_id, logprobs[place] if logprobs else None, section, found)
            self._add_events(found, events)

    def _new_tokens(self, section: Section) -> tuple[AnswerToken, ...]:
        """Return the tokens of a section's text since the last call."""
        return () if self._answer_tokens is None else self._answer_tokens.take(section)

    def _add_events(self, found: Iterable[TraceEvent], events: list[Event]) -> None:
        for event in found:
            if not isinstance(event, SectionDelta) or event.section is not Section.FINAL_ANSWER:
                events.append(event)
            elif not self.question.choices:
                events.append(AnswerDelta(event.text, self._new_tokens(Section.FINAL_ANSWER)))


_TERMINATIONS = {"length": Termination.TRUNCATED, "abort": Termination.ABORTED}


def max_trace_tokens(
    prompt_token_ids: Sequence[int],
    choices: Sequence[str],
    *,
    num_audio_tokens: int,
    gate: GateSettings | None,
    tokenizer: TraceTokenizer,
    manifest: Manifest,
) -> int:
    """Return the maximum visible tokens of a trace beside prompt, clip, pauses and answer.

    It is 0 or negative if there is no room.
    """
    longest_choice = 0
    if manifest.trace.answer_style == "text":
        # As scored: escaped, closed, and with the one token always written by the engine.
        longest_choice = max(map(len, tokenizer.choice_ids(choices, by_letter=False)), default=0) + 1
    reserved = (
        len(prompt_token_ids)
        + num_audio_tokens
        + (gate.max_pauses * gate.span_tokens if gate else 0)
        + CLOSING_TOKENS
        + max(ANSWER_TOKENS, longest_choice)
    )
    return manifest.max_model_len - reserved


def changed_answer(trace: Trace, choices: Sequence[str] = ()) -> bool | None:
    """Return whether FINAL_ANSWER differs from RESPONSE in words; None for a trace without a reflection.

    Args:
        trace: The trace.
        choices: The question's options: for its second one, `two` and `B. two` are the same answer.
    """
    if trace.reflection is None:
        return None
    own_words = {_folded(render_choice(index, choices)): _folded(choice) for index, choice in enumerate(choices)}
    first, last = (own_words.get(_folded(text), _folded(text)) for text in (trace.response, trace.final_answer))
    return bool(first and last and first != last)


def _folded(text: str | None) -> str:
    """Return the words alone, without case and spacing."""
    return " ".join((text or "").casefold().split())


def softmax(logprobs: Sequence[float], temperature: float = 1.0) -> list[float]:
    """Convert log-probabilities of alternatives to shares of 1, for any values (NaN and infinities included).

    Args:
        logprobs: One per alternative.
        temperature: Divisor of the log-probabilities. A higher one makes the shares more equal; their order stays.
    """
    values = np.nan_to_num(np.asarray(logprobs, dtype=np.float64), nan=-1e9, neginf=-1e9)
    shares = np.exp((values - values.max()) / temperature)
    return (shares / shares.sum()).tolist()


def tempered(probability: float, temperature: float) -> float:
    """Return the probability of an event after division of its log-odds by a temperature.

    This is `softmax` over the event and its complement.
    """
    if not 0 < probability < 1:
        return probability
    log_odds = math.log(probability) - math.log1p(-probability)
    # The logistic function, without its overflow.
    return 0.5 * (1 + math.tanh(log_odds / temperature / 2))
