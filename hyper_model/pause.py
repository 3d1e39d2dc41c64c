"""The gate: decides at every step whether a completion goes on, pauses or is given up (method, section 3).

One `Gate` follows one completion. Before a token is sampled it is asked what may happen (`decide`), and afterwards it
is told what was (`push`). Its state is a handful of numbers that can be carried somewhere else (`state`), so the
engine, a server that reads along and a plain loop over a model all run the same gate and come to the same decisions,
however the completion is cut into chunks.

Pure: no torch, no batch, no text. It sees token ids and confidences, and neither model, engine nor clock. The tensors
of `hyper_model.pause_vllm` are this gate for many rows at once; a test compares them row for row.

Words: a token's *confidence* is the probability of the likeliest token at its position, from the raw logits at
temperature 1. A *span* is what a pause adds to the completion: in parallel mode latent copies of the pause token, in
sampled mode the pause token, hidden tokens of the model's own, and the closing token. A checkpoint may have a token of
its own for each position of a parallel span, in place of the copies; the first of them is the pause token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property
from typing import Any, NamedTuple, Self, cast

from hyper_model.manifest import Manifest
from hyper_model.trace import PARENTS, PauseMode, Section, TagStyle, TraceTokenizer

KEYWORDS = ("tone", "intonation", "pitch", "volume", "noise", "emotion", "background music")
"""Words of the acoustic prior: where one stands in the recent text, sound is being described."""

KEYWORD_MEMORY_TOKENS = 64
"""How long a keyword counts as recent (method, section 3)."""

LOOP_PERIOD_TOKENS = 16
"""The longest phrase whose endless repetition the loop guard sees; 1 is a run of identical tokens."""

_NO_REPEATS = (0,) * LOOP_PERIOD_TOKENS
_SECTIONS = tuple(Section)
_BIT = {section: 1 << place for place, section in enumerate(_SECTIONS)}


def _ancestors(section: Section) -> int:
    parent = PARENTS[section]
    return 0 if parent is None else _BIT[parent] | _ancestors(parent)


_ANCESTORS = {section: _ancestors(section) for section in _SECTIONS}
_DEPTH = {section: _ANCESTORS[section].bit_count() for section in _SECTIONS}
NUM_OPEN_SETS = 1 << len(_SECTIONS)
"""Open sections are a set of bits in the order of `Section`; they always form one chain of ancestors."""


def innermost(open_sections: int) -> Section | None:
    """Names the deepest section of a set of open ones."""
    held = [section for section in _SECTIONS if open_sections & _BIT[section]]
    return max(held, key=_DEPTH.__getitem__, default=None)


class TagEffect(NamedTuple):
    """Says what a tag does to the set of open sections: `(open & keeps) | adds`, where `needs` is open already.

    The same mending as the parser's: a tag closes what has no place in it, and a closing tag without its opening one
    does nothing.
    """

    keeps: int
    adds: int
    needs: int


class Verdict(Enum):
    """Says what the gate wants at a position."""

    CONTINUE = "continue"
    PAUSE = "pause"
    ABORT = "abort"


class Decision(NamedTuple):
    """Says what may be sampled at a position.

    Attributes:
        verdict: PAUSE and ABORT force the token that says so; CONTINUE does not mean that nothing is forced.
        forced_id: The one token that may stand here, or None.
        banned_ids: What may not be sampled where nothing is forced.
        is_biased: Whether the acoustic prior adds its bias to the pause token.
    """

    verdict: Verdict
    forced_id: int | None = None
    banned_ids: tuple[int, ...] = ()
    is_biased: bool = False


@dataclass(frozen=True)
class GateSettings:
    """Holds what a gate goes by: the manifest's figures, as token ids and numbers.

    Attributes:
        max_pauses: The budget of one completion; a request may lower the manifest's, see `lowered`.
        tau_pause, tau_abort: A window's confidence at or below these pauses and aborts.
        window_tokens, rest_tokens: Sampled tokens of a window, and between a pause and the next.
        tags: What each tag token does.
        gated: The sets of open sections in which the gate works: those whose innermost section the manifest names.
        closing_ids: Each section's closing tag.
        answer_id: The tag that opens the final answer.
        end_ids: What ends a completion, or the part of it that may pause: not to be sampled inside a span.
        acoustic_bias: Added to the logit of the pause token where a keyword is recent; 0 turns the prior off.
        keyword_ids: The keywords as token ids.
        loop_tokens: A completion whose last so many sampled tokens repeat one phrase is given up.
        position_ids: The tokens of a parallel span; empty where they are copies of the pause token.
        is_fed: Whether the span of a parallel pause is given to the engine by whoever reads the completion, which then
            ends on the pause token. Else the gate forces it token by token.
    """

    mode: PauseMode
    open_id: int
    close_id: int
    latent_tokens: int
    max_pauses: int
    tau_pause: float
    tau_abort: float
    window_tokens: int
    rest_tokens: int
    tags: Mapping[int, TagEffect]
    gated: frozenset[int]
    closing_ids: Mapping[Section, int]
    answer_id: int
    end_ids: tuple[int, ...]
    acoustic_bias: float = 0.0
    keyword_ids: tuple[tuple[int, ...], ...] = ()
    loop_tokens: int = 64
    position_ids: tuple[int, ...] = ()
    is_fed: bool = False

    @classmethod
    def of(cls, manifest: Manifest, tokenizer: TraceTokenizer) -> GateSettings | None:
        """Returns the settings of a checkpoint; None where it has no gate.

        There is none for a checkpoint whose tags are plain text: no single token tells where a section begins, and a
        gate that does not know where it is could pause inside the answer.
        """
        pause = manifest.pause
        if manifest.trace.tag_style is not TagStyle.TOKEN or pause.max_pauses == 0:
            return None
        tags: dict[int, TagEffect] = {}
        for section, (open_id, close_id) in tokenizer.tag_ids.items():
            bit, outer = _BIT[section], _ANCESTORS[section]
            tags[open_id] = TagEffect(keeps=outer, adds=bit, needs=0)
            tags[close_id] = TagEffect(keeps=outer, adds=0, needs=bit)
        return cls(
            mode=PauseMode(pause.mode),
            open_id=pause.open_id,
            close_id=pause.close_id,
            latent_tokens=pause.latent_tokens,
            max_pauses=pause.max_pauses,
            tau_pause=pause.tau_pause,
            tau_abort=pause.tau_abort,
            window_tokens=pause.window_tokens,
            rest_tokens=pause.rest_tokens,
            tags=tags,
            gated=frozenset(held for held in range(NUM_OPEN_SETS) if innermost(held) in pause.sections),
            closing_ids={section: ids[1] for section, ids in tokenizer.tag_ids.items()},
            answer_id=tokenizer.tag_ids[Section.FINAL_ANSWER][0],
            end_ids=(*tokenizer.stop_ids, *tokenizer.tag_ids[Section.FINAL_ANSWER]),
            acoustic_bias=pause.acoustic_bias,
            keyword_ids=_encode_keywords(tokenizer) if pause.acoustic_bias else (),
            loop_tokens=pause.loop_tokens,
            position_ids=pause.position_ids or (),
        )

    def with_budget(self, max_pauses: int) -> Self:
        """Returns the same settings with a smaller budget; a larger one is cut to the checkpoint's."""
        return replace(self, max_pauses=min(max_pauses, self.max_pauses))

    @property
    def span_tokens(self) -> int:
        """The most tokens that one pause adds to a completion."""
        return self.latent_tokens if self.mode is PauseMode.PARALLEL else self.latent_tokens + 2

    @property
    def span_ids(self) -> tuple[int, ...]:
        """The whole span of a parallel pause."""
        return self.position_ids or (self.open_id,) * self.latent_tokens

    @cached_property
    def decisions(self) -> Mapping[str, Decision]:
        """The few decisions that there are, made once: a gate makes one at every step of every row."""
        # A span begins with the pause token, chosen or forced; its other tokens are never anybody's choice.
        never = (self.close_id, *self.position_ids[1:])
        return {
            "plain": Decision(Verdict.CONTINUE, banned_ids=(self.open_id, *never)),
            "free": Decision(Verdict.CONTINUE, banned_ids=never),
            "biased": Decision(Verdict.CONTINUE, banned_ids=never, is_biased=True),
            "pause": Decision(Verdict.PAUSE, self.open_id),
            "abort": Decision(Verdict.ABORT, self.close_id),
            "hidden": Decision(Verdict.CONTINUE, banned_ids=(self.open_id, *self.end_ids)),
            "close": Decision(Verdict.CONTINUE, self.close_id),
        }

    @cached_property
    def latent_decisions(self) -> Sequence[Decision]:
        """What is forced at each place of a parallel span."""
        return tuple(Decision(Verdict.CONTINUE, token_id) for token_id in self.span_ids)


def _encode_keywords(tokenizer: TraceTokenizer) -> tuple[tuple[int, ...], ...]:
    """Encodes each keyword as it stands inside a sentence and at the beginning of one."""
    spellings = [form for word in KEYWORDS for form in (f" {word}", word, word.capitalize())]
    return tuple(dict.fromkeys(tuple(tokenizer.encode_text(spelling)) for spelling in spellings))


class PauseTaken(NamedTuple):
    """Says where a pause was taken, and the confidence of the window there; None while no window is full.

    Attributes:
        is_forced: Whether the gate wanted it; else the model chose it.
    """

    section: Section | None
    confidence: float | None
    is_forced: bool


class GateReport(NamedTuple):
    """Says what a gate has seen, when its completion is over.

    Attributes:
        lowest: The lowest group confidence; None while no window was full.
        confidences: Of the window at each pause, in order; None where there was no full one.
    """

    lowest: float | None = None
    confidences: tuple[float | None, ...] = ()


@dataclass
class Gate:
    """Follows one completion; see the module's first lines.

    Attributes:
        settings: What it goes by.
        window: Confidences of the last sampled tokens in gated sections, at most `window_tokens`.
        total: Their sum, kept and not computed anew, so that a copy goes on with exactly this number.
        lowest: The lowest group confidence: the smallest mean of a full window so far.
        num_pauses: Pauses taken, this gate's predecessors' included.
        pauses: Those that this gate saw begin.
        num_resting: Sampled tokens still to come before the next pause.
        open_sections, seen_sections: Sets of sections, as bits.
        num_in_span: Tokens of the span that is being written; 0 outside.
        recent: The last sampled tokens, as many as the loop guard and the keywords look back.
        repeats: How many tokens in a row equal the one p places before them, for p from 1.
        keyword_age: Sampled tokens since a keyword ended; None where there was none.
        is_aborted: Whether it gave the completion up.
        forced: What remains to be forced after an abort that nobody outside closes.
    """

    settings: GateSettings
    window: list[float] = field(default_factory=list[float])
    total: float = 0.0
    lowest: float | None = None
    num_pauses: int = 0
    pauses: list[PauseTaken] = field(default_factory=list[PauseTaken])
    num_resting: int = 0
    open_sections: int = 0
    seen_sections: int = 0
    num_in_span: int = 0
    recent: list[int] = field(default_factory=list[int])
    repeats: list[int] = field(default_factory=lambda: [*_NO_REPEATS])
    keyword_age: int | None = None
    is_aborted: bool = False
    forced: list[int] = field(default_factory=list[int])

    def decide(self, confidence: float) -> Decision:
        """Says what may stand at the next position; changes nothing, so it may be asked again or in vain.

        Args:
            confidence: The probability of the likeliest token there.
        """
        settings = self.settings
        decisions = settings.decisions
        if self.forced:
            return Decision(Verdict.CONTINUE, self.forced[0])
        if self.num_in_span:
            if settings.mode is PauseMode.PARALLEL:
                # A state comes from outside, so its place may lie behind the span.
                return settings.latent_decisions[min(self.num_in_span, settings.latent_tokens - 1)]
            return decisions["close" if self.num_in_span > settings.latent_tokens else "hidden"]
        if self.is_aborted:
            return decisions["plain"]
        if max(self.repeats) >= settings.loop_tokens:
            return decisions["abort"]
        if self.open_sections not in settings.gated:
            return decisions["plain"]
        mean = self.window_confidence(confidence)
        if mean is not None and mean <= settings.tau_abort:
            return decisions["abort"]
        if self.num_resting or self.num_pauses >= settings.max_pauses:
            return decisions["plain"]
        if mean is not None and mean <= settings.tau_pause:
            return decisions["pause"]
        is_biased = settings.acoustic_bias > 0 and self.keyword_age is not None
        return decisions["biased" if is_biased else "free"]

    def window_confidence(self, confidence: float) -> float | None:
        """Returns the mean of the window that ends with this confidence; None while there is no full one."""
        num_missing = self.settings.window_tokens - len(self.window)
        if num_missing > 1:
            return None
        oldest = self.window[0] if num_missing == 0 else 0.0
        return (self.total - oldest + confidence) / self.settings.window_tokens

    def push(self, token_id: int, confidence: float | None) -> None:
        """Takes the token that stands at the position.

        Args:
            confidence: The probability of the likeliest token there; None where it is not known (a completion that is
                read again), which leaves the window as it is.
        """
        settings = self.settings
        if self.forced and token_id == self.forced[0]:
            del self.forced[0]
            self._note_tag(token_id)
        elif self.num_in_span:
            self._extend_span(token_id)
        elif token_id == settings.open_id:
            self._begin_span(confidence)
        elif token_id == settings.close_id:
            self._abort()
        else:
            self._note_sampled(token_id, confidence)

    def _note_sampled(self, token_id: int, confidence: float | None) -> None:
        settings = self.settings
        if confidence is not None and self.open_sections in settings.gated:
            mean = self.window_confidence(confidence)
            if mean is not None and (self.lowest is None or mean < self.lowest):
                self.lowest = mean
            oldest = self.window.pop(0) if len(self.window) == settings.window_tokens else 0.0
            self.window.append(confidence)
            self.total = self.total - oldest + confidence
        if self.num_resting:
            self.num_resting -= 1
        recent = self.recent
        if token_id in recent:
            counted = [
                count + 1 if other == token_id else 0
                for count, other in zip(self.repeats, reversed(recent), strict=False)
            ]
            self.repeats = counted + [0] * (LOOP_PERIOD_TOKENS - len(counted))
        else:
            self.repeats = [*_NO_REPEATS]
        recent.append(token_id)
        if len(recent) > LOOP_PERIOD_TOKENS:
            del recent[0]
        if settings.keyword_ids:
            self._note_keyword()
        self._note_tag(token_id)

    def _note_keyword(self) -> None:
        recent = tuple(self.recent)
        if any(recent[-len(ids) :] == ids for ids in self.settings.keyword_ids):
            self.keyword_age = 0
        elif self.keyword_age is not None:
            age = self.keyword_age + 1
            self.keyword_age = age if age < KEYWORD_MEMORY_TOKENS else None

    def _note_tag(self, token_id: int) -> None:
        effect = self.settings.tags.get(token_id)
        if effect is not None and self.open_sections & effect.needs == effect.needs:
            self.open_sections = self.open_sections & effect.keeps | effect.adds
            self.seen_sections |= effect.adds

    def _begin_span(self, confidence: float | None) -> None:
        mean = None if confidence is None else self.window_confidence(confidence)
        is_forced = confidence is not None and self.decide(confidence).verdict is Verdict.PAUSE
        self.pauses.append(PauseTaken(innermost(self.open_sections), mean, is_forced))
        self.num_pauses += 1
        self.num_resting = self.settings.rest_tokens
        self.num_in_span = 1
        if self.settings.mode is PauseMode.PARALLEL and self.settings.latent_tokens == 1:
            self.num_in_span = 0

    def _extend_span(self, token_id: int) -> None:
        settings = self.settings
        self.num_in_span += 1
        if settings.mode is PauseMode.PARALLEL:
            is_over = self.num_in_span >= settings.latent_tokens
        else:
            is_over = token_id == settings.close_id
        if is_over:
            self.num_in_span = 0

    def _abort(self) -> None:
        self.is_aborted = True
        if not self.settings.is_fed:
            self.forced = self.ids_to_answer()

    def ids_to_answer(self) -> list[int]:
        """Returns the tags that close what stands open and open the final answer, or end a completion that has one."""
        held = [section for section in _SECTIONS if self.open_sections & _BIT[section]]
        held.sort(key=_DEPTH.__getitem__, reverse=True)
        has_answer = self.seen_sections & _BIT[Section.FINAL_ANSWER]
        last_id = self.settings.end_ids[0] if has_answer else self.settings.answer_id
        return [*(self.settings.closing_ids[section] for section in held), last_id]

    def inherit(self, other: Gate, confidence: float | None) -> None:
        """Takes over what only the gate of the chunk before has heard: confidences.

        Args:
            confidence: At the position of the pause token that ended the chunk, of which that gate was not told.
        """
        if self.num_pauses > other.num_pauses:
            other.push(self.settings.open_id, confidence)
        self.window, self.total, self.lowest = other.window, other.total, other.lowest
        self.pauses = other.pauses

    @property
    def is_listening(self) -> bool:
        """Whether the confidence at the next position enters a window; where it does not, none need be computed."""
        return not (self.forced or self.num_in_span) and self.open_sections in self.settings.gated

    def report(self) -> GateReport:
        """Returns what the gate has seen."""
        return GateReport(self.lowest, tuple(pause.confidence for pause in self.pauses))

    @property
    def is_pausing(self) -> bool:
        """Whether a span has begun and not ended."""
        return self.num_in_span > 0

    def feed_span(self) -> tuple[int, ...]:
        """Ends a parallel span that somebody feeds to the engine at once; returns all of its tokens.

        The first of them stands for the pause token that was sampled.
        """
        self.num_in_span = 0
        return self.settings.span_ids

    def state(self) -> dict[str, Any]:
        """Returns what another gate needs to go on from here, as plain numbers; `resume` takes it."""
        return {name: getattr(self, name) for name in _STATE_FIELDS} | {
            name: list(getattr(self, name)) for name in _STATE_LISTS
        }

    @staticmethod
    def is_state(value: object) -> bool:
        """Tells whether a value has the form that `state` writes."""
        if not isinstance(value, dict):
            return False
        state = cast("dict[str, Any]", value)
        if state.keys() != {*_STATE_FIELDS, *_STATE_LISTS}:
            return False
        lists_fit = all(
            isinstance(state[name], list) and all(isinstance(each, kind) for each in state[name])
            for name, kind in _STATE_LISTS.items()
        )
        sets = (state["open_sections"], state["seen_sections"])
        return (
            lists_fit
            and len(state["repeats"]) == LOOP_PERIOD_TOKENS
            and all(isinstance(state[name], kind) for name, kind in _STATE_FIELDS.items())
            and all(0 <= each < NUM_OPEN_SETS for each in sets)
            and state["num_in_span"] >= 0
        )

    @classmethod
    def resume(cls, settings: GateSettings, state: Mapping[str, Any] | None) -> Self:
        """Makes the gate that goes on from a state; from the beginning where there is none."""
        if state is None:
            return cls(settings)
        fields: dict[str, Any] = {name: state[name] for name in _STATE_FIELDS}
        fields.update((name, list(state[name])) for name in _STATE_LISTS)
        return cls(settings, **fields)


_STATE_FIELDS: Mapping[str, Any] = {
    "total": float | int,
    "lowest": float | int | None,
    "num_pauses": int,
    "num_resting": int,
    "open_sections": int,
    "seen_sections": int,
    "num_in_span": int,
    "keyword_age": int | None,
    "is_aborted": bool,
}
_STATE_LISTS: Mapping[str, Any] = {"window": float | int, "recent": int, "repeats": int, "forced": int}


def replay(settings: GateSettings, token_ids: Iterable[int], confidences: Sequence[float | None]) -> Gate:
    """Follows a finished completion, such as one that calibration looks at; returns the gate at its end."""
    gate = Gate(settings)
    for token_id, confidence in zip(token_ids, confidences, strict=True):
        gate.push(token_id, confidence)
    return gate
