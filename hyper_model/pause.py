"""The pause gate: at every step a completion continues, pauses or is aborted (method, section 3).

One `Gate` follows one completion. Before a token is sampled, `decide` returns its constraints; afterwards `push`
records the token. The state is a few numbers and can be moved elsewhere (`state`). So the engine, a server reading
along, and a plain loop over a model run the same gate. They make the same decisions, however the completion is cut into
chunks.

The module is pure: no torch, no batch, no text. Its inputs are token ids and confidences; it uses no model, engine or
clock. `hyper_model.pause_vllm` implements the same gate as tensors for many rows; a test compares both row by row.

Terms: the *confidence* of a token is the probability of the likeliest token at its position, from the raw logits at
temperature 1. A *span* is the tokens added by a pause. A parallel span is latent copies of the pause token. A sampled
span is the pause token, hidden tokens of the model, and the closing token. A checkpoint may use a token of its own for
each position of a parallel span; the first is the pause token.
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
"""Words of the acoustic prior. One of them in the recent text indicates a description of sound."""

KEYWORD_MEMORY_TOKENS = 64
"""Number of tokens during which a keyword is recent (method, section 3)."""

LOOP_PERIOD_TOKENS = 16
"""Longest phrase, in tokens, detected by the loop guard; length 1 is a run of identical tokens."""

_NO_REPEATS = (0,) * LOOP_PERIOD_TOKENS
_SECTIONS = tuple(Section)
_BIT = {section: 1 << place for place, section in enumerate(_SECTIONS)}


def _ancestors(section: Section) -> int:
    parent = PARENTS[section]
    return 0 if parent is None else _BIT[parent] | _ancestors(parent)


_ANCESTORS = {section: _ancestors(section) for section in _SECTIONS}
_DEPTH = {section: _ANCESTORS[section].bit_count() for section in _SECTIONS}
NUM_OPEN_SETS = 1 << len(_SECTIONS)
"""Number of sets of open sections.

A set is a bit mask in the order of `Section`; its members form one chain of ancestors.
"""


def innermost(open_sections: int) -> Section | None:
    """Return the deepest section of a set of open ones, or None for the empty set."""
    sections = [section for section in _SECTIONS if open_sections & _BIT[section]]
    return max(sections, key=_DEPTH.__getitem__, default=None)


def has_loop(token_ids: Sequence[int], loop_tokens: int) -> bool:
    """Return whether the last tokens repeat one phrase, as `Gate.is_looping` after these tokens."""
    end = len(token_ids)
    return any(
        token_ids[end - loop_tokens :] == token_ids[end - loop_tokens - period : end - period]
        for period in range(1, min(LOOP_PERIOD_TOKENS, end - loop_tokens) + 1)
    )


class TagEffect(NamedTuple):
    """Effect of a tag on the set of open sections: `(open & keeps) | adds`, if `needs` is already open.

    Faults are mended as in the parser. A tag closes all open sections but the ancestors of its own. A closing tag
    without its opening tag has no effect.
    """

    keeps: int
    adds: int
    needs: int


class Verdict(Enum):
    """The gate's intention at a position."""

    CONTINUE = "continue"
    PAUSE = "pause"
    ABORT = "abort"


class Decision(NamedTuple):
    """Constraints on the token sampled at a position.

    Attributes:
        verdict: PAUSE and ABORT always force their token. CONTINUE may force a token too.
        forced_id: The only permitted token, or None.
        banned_ids: Tokens not permitted if none is forced.
        is_biased: Whether the acoustic prior adds its bias to the pause token.
    """

    verdict: Verdict
    forced_id: int | None = None
    banned_ids: tuple[int, ...] = ()
    is_biased: bool = False


@dataclass(frozen=True)
class GateSettings:
    """Settings of a gate: the manifest's values as token ids and numbers.

    Attributes:
        max_pauses: Budget of one completion; a request may lower the manifest's (see `with_budget`).
        tau_pause, tau_abort: Thresholds; a window's confidence at or below them pauses or aborts.
        window_tokens, rest_tokens: Sampled tokens per window, and between two pauses.
        tags: Effect of each tag token.
        gated: Sets of open sections with an active gate: those whose innermost section is listed in the manifest.
        closing_ids: Closing tag of each section.
        answer_id: Tag at the start of the final answer.
        end_ids: Tokens at the end of a completion, or of its part with pauses; banned inside a span.
        acoustic_bias: Addend to the logit of the pause token while a keyword is recent; 0 turns the prior off.
        keyword_ids: The keywords as token ids.
        loop_tokens: A completion is in a loop when its last `loop_tokens` sampled tokens repeat one phrase.
        max_closed_loops: Loops that only end their section; a further one aborts the completion.
        loop_closing_ids: For each set of open sections whose innermost one a loop may end, its closing tag.
        position_ids: Tokens of a parallel span; empty for copies of the pause token.
        is_fed: Whether the reader of the completion feeds the span of a parallel pause to the engine. The completion
            then ends on the pause token. Otherwise the gate forces the span token by token.
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
    max_closed_loops: int = 0
    loop_closing_ids: Mapping[int, int] = field(default_factory=dict[int, int])
    position_ids: tuple[int, ...] = ()
    is_fed: bool = False

    @classmethod
    def of(cls, manifest: Manifest, tokenizer: TraceTokenizer) -> GateSettings | None:
        """Return the settings of a checkpoint, or None if it has no gate.

        Checkpoints with plain-text tags have no gate, because no single token marks the start of a section. Without
        section boundaries a gate could pause inside the answer.
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
            gated=frozenset(mask for mask in range(NUM_OPEN_SETS) if innermost(mask) in pause.sections),
            closing_ids={section: ids[1] for section, ids in tokenizer.tag_ids.items()},
            answer_id=tokenizer.tag_ids[Section.FINAL_ANSWER][0],
            end_ids=(*tokenizer.stop_ids, *tokenizer.tag_ids[Section.FINAL_ANSWER]),
            acoustic_bias=pause.acoustic_bias,
            keyword_ids=_encode_keywords(tokenizer) if pause.acoustic_bias else (),
            loop_tokens=pause.loop_tokens,
            max_closed_loops=pause.max_closed_loops,
            # The end of the answer would leave nothing to the model.
            loop_closing_ids={
                mask: tokenizer.tag_ids[section][1]
                for mask in range(NUM_OPEN_SETS)
                if (section := innermost(mask)) not in (None, Section.FINAL_ANSWER)
            },
            position_ids=pause.position_ids or (),
        )

    def with_budget(self, max_pauses: int) -> Self:
        """Return the same settings with a smaller budget; a larger budget is cut to the checkpoint's."""
        return replace(self, max_pauses=min(max_pauses, self.max_pauses))

    @property
    def span_tokens(self) -> int:
        """Return the maximum number of tokens added to a completion by one pause."""
        return self.latent_tokens if self.mode is PauseMode.PARALLEL else self.latent_tokens + 2

    @property
    def span_ids(self) -> tuple[int, ...]:
        """Return all tokens of a parallel pause."""
        return self.position_ids or (self.open_id,) * self.latent_tokens

    @cached_property
    def decisions(self) -> Mapping[str, Decision]:
        """Return all possible decisions by name, built once because every step of every row needs one."""
        # A span begins with the pause token, chosen or forced. Its other tokens may never be sampled.
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
        """Return the forcing decision for each position of a parallel span."""
        return tuple(Decision(Verdict.CONTINUE, token_id) for token_id in self.span_ids)


def _encode_keywords(tokenizer: TraceTokenizer) -> tuple[tuple[int, ...], ...]:
    """Encode each keyword as it appears inside a sentence and at the start of one."""
    spellings = [form for word in KEYWORDS for form in (f" {word}", word, word.capitalize())]
    return tuple(dict.fromkeys(tuple(tokenizer.encode_text(spelling)) for spelling in spellings))


class PauseTaken(NamedTuple):
    """A pause: its section and the window's confidence there, or None before the first full window.

    Attributes:
        is_forced: Whether the gate forced the pause; otherwise the model chose it.
    """

    section: Section | None
    confidence: float | None
    is_forced: bool


class GateReport(NamedTuple):
    """Summary of a gate after its completion.

    Attributes:
        lowest: Lowest group confidence, or None without a full window.
        confidences: Window confidence at each pause, in order; None before the first full window.
        num_drafted, num_accepted: Tokens drafted for the completion, and those among them that it contains; 0 in an
            engine without drafts.
    """

    lowest: float | None = None
    confidences: tuple[float | None, ...] = ()
    num_drafted: int = 0
    num_accepted: int = 0


@dataclass
class Gate:
    """Pause gate of one completion; see the module docstring.

    Attributes:
        settings: The gate's settings.
        window: Confidences of the last sampled tokens in gated sections, at most `window_tokens`.
        total: Running sum of the window. It is stored, so a copy continues with exactly the same number.
        lowest: Lowest group confidence: the smallest mean of a full window so far.
        num_pauses: Number of pauses, including those of earlier chunks.
        pauses: Pauses recorded by this gate.
        num_resting: Sampled tokens left before the next pause is permitted.
        open_sections, seen_sections: Sets of sections, as bits.
        num_in_span: Tokens so far of the current span; 0 outside a span.
        recent: The last sampled tokens, as many as the loop guard and the keywords need.
        repeats: For each distance p from 1, the length of the latest run of tokens equal to the one p places before.
        keyword_age: Sampled tokens since the last keyword; None without a recent one.
        num_closed_loops: Loops ended by the closing tag of their section.
        is_aborted: Whether the gate aborted the completion.
        forced: Remaining forced tokens after an abort, if the gate closes the sections itself.
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
    num_closed_loops: int = 0
    is_aborted: bool = False
    forced: list[int] = field(default_factory=list[int])

    def decide(self, confidence: float) -> Decision:
        """Return the constraints on the next position, without changing the gate.

        Args:
            confidence: Probability of the likeliest token there.
        """
        settings = self.settings
        decisions = settings.decisions
        if self.forced:
            return Decision(Verdict.CONTINUE, self.forced[0])
        if self.num_in_span:
            if settings.mode is PauseMode.PARALLEL:
                # A restored state may hold a position beyond the span.
                return settings.latent_decisions[min(self.num_in_span, settings.latent_tokens - 1)]
            return decisions["close" if self.num_in_span > settings.latent_tokens else "hidden"]
        if self.is_aborted:
            return decisions["plain"]
        if self.is_looping:
            closing_id = self.loop_closing_id
            return decisions["abort"] if closing_id is None else Decision(Verdict.CONTINUE, closing_id)
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

    @property
    def is_looping(self) -> bool:
        """Return whether the last tokens repeat one phrase."""
        return max(self.repeats) >= self.settings.loop_tokens

    @property
    def loop_closing_id(self) -> int | None:
        """Return the tag that ends a loop here, or None if a loop aborts the completion."""
        settings = self.settings
        if self.num_closed_loops >= settings.max_closed_loops:
            return None
        return settings.loop_closing_ids.get(self.open_sections)

    def closes_loop(self, token_id: int) -> bool:
        """Return whether the gate forces this token next to end a loop."""
        return self.is_looping and not self.is_aborted and token_id == self.loop_closing_id

    def window_confidence(self, confidence: float) -> float | None:
        """Return the mean of the window ending with this confidence, or None if it is not full."""
        num_missing = self.settings.window_tokens - len(self.window)
        if num_missing > 1:
            return None
        oldest = self.window[0] if num_missing == 0 else 0.0
        return (self.total - oldest + confidence) / self.settings.window_tokens

    def push(self, token_id: int, confidence: float | None) -> None:
        """Record the token at the position.

        Args:
            token_id: The token.
            confidence: Probability of the likeliest token there. None if unknown, as for a completion read a second
                time; the window then stays unchanged.
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
        elif self.closes_loop(token_id):
            # A forced token has no confidence.
            self.num_closed_loops += 1
            self._note_sampled(token_id, None)
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
        """Return the tags to close all open sections and open the final answer.

        If the final answer was opened already, the last id ends the completion instead.
        """
        sections = [section for section in _SECTIONS if self.open_sections & _BIT[section]]
        sections.sort(key=_DEPTH.__getitem__, reverse=True)
        has_answer = self.seen_sections & _BIT[Section.FINAL_ANSWER]
        last_id = self.settings.end_ids[0] if has_answer else self.settings.answer_id
        return [*(self.settings.closing_ids[section] for section in sections), last_id]

    def inherit(self, other: Gate, confidence: float | None) -> None:
        """Copy the confidences and pauses from the gate of the previous chunk.

        Args:
            other: The previous chunk's gate.
            confidence: Confidence at the pause token at the end of that chunk, not yet pushed to its gate.
        """
        if self.num_pauses > other.num_pauses:
            other.push(self.settings.open_id, confidence)
        self.window, self.total, self.lowest = other.window, other.total, other.lowest
        self.pauses = other.pauses

    @property
    def is_listening(self) -> bool:
        """Return whether the next confidence enters a window; otherwise it need not be computed."""
        return not (self.forced or self.num_in_span) and self.open_sections in self.settings.gated

    def report(self) -> GateReport:
        """Return a summary of the completion so far."""
        return GateReport(self.lowest, tuple(pause.confidence for pause in self.pauses))

    @property
    def forced_ids(self) -> tuple[int, ...]:
        """Return the next tokens that the gate forces whatever the model computes: of a span, or after an abort."""
        if self.forced:
            return tuple(self.forced)
        if self.num_in_span and self.settings.mode is PauseMode.PARALLEL:
            return self.settings.span_ids[self.num_in_span :]
        return ()

    @property
    def is_pausing(self) -> bool:
        """Return whether a span has begun and not ended."""
        return self.num_in_span > 0

    def feed_span(self) -> tuple[int, ...]:
        """End a parallel span fed to the engine at once, and return all its tokens.

        The first token replaces the sampled pause token.
        """
        self.num_in_span = 0
        return self.settings.span_ids

    def state(self) -> dict[str, Any]:
        """Return the state for another gate to continue from (see `resume`), as plain numbers."""
        return {name: getattr(self, name) for name in _STATE_FIELDS} | {
            name: list(getattr(self, name)) for name in _STATE_LISTS
        }

    @staticmethod
    def is_state(value: object) -> bool:
        """Return whether a value has the form written by `state`."""
        if not isinstance(value, dict):
            return False
        state = cast("dict[str, Any]", value)
        if state.keys() != {*_STATE_FIELDS, *_STATE_LISTS}:
            return False
        lists_fit = all(
            isinstance(state[name], list) and all(isinstance(item, kind) for item in state[name])
            for name, kind in _STATE_LISTS.items()
        )
        sets = (state["open_sections"], state["seen_sections"])
        return (
            lists_fit
            and len(state["repeats"]) == LOOP_PERIOD_TOKENS
            and all(isinstance(state[name], kind) for name, kind in _STATE_FIELDS.items())
            and all(0 <= item < NUM_OPEN_SETS for item in sets)
            and state["num_in_span"] >= 0
        )

    @classmethod
    def resume(cls, settings: GateSettings, state: Mapping[str, Any] | None) -> Self:
        """Build a gate from a state, or a new gate if it is None."""
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
    "num_closed_loops": int,
    "is_aborted": bool,
}
_STATE_LISTS: Mapping[str, Any] = {"window": float | int, "recent": int, "repeats": int, "forced": int}


def replay(settings: GateSettings, token_ids: Iterable[int], confidences: Sequence[float | None]) -> Gate:
    """Run a finished completion through a gate, as calibration does, and return the gate at its end."""
    gate = Gate(settings)
    for token_id, confidence in zip(token_ids, confidences, strict=True):
        gate.push(token_id, confidence)
    return gate
