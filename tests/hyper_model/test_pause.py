"""Properties of the gate for any model output, any confidence, and any division into chunks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from hyper_model.pause import (
    KEYWORD_MEMORY_TOKENS,
    LOOP_PERIOD_TOKENS,
    Decision,
    Gate,
    GateSettings,
    Verdict,
    has_loop,
    innermost,
    replay,
)
from hyper_model.trace import (
    PARENTS,
    PauseMode,
    Section,
    TagStyle,
    Termination,
    TraceTokenizer,
    add_position_tokens,
)
from hyper_model.trace_parser import TraceParser
from server.engines.scripted import scripted_checkpoint

unhurried = settings(deadline=None)  # other work may occupy the cores
CHECKPOINT = scripted_checkpoint()
MAX_LATENT = 4
add_position_tokens(CHECKPOINT.tokenizer.tokenizer, MAX_LATENT)
TOKENIZER = TraceTokenizer(CHECKPOINT.tokenizer.tokenizer)
# By length of the span: the tokenizer of a checkpoint with one token per position.
POSITIONED = {num: TOKENIZER.with_positions(num) for num in range(1, MAX_LATENT + 1)}
POSITIONS = POSITIONED[MAX_LATENT].position_ids
OPEN, CLOSE = CHECKPOINT.manifest.pause.open_id, CHECKPOINT.manifest.pause.close_id
TAG_IDS = [tag_id for ids in TOKENIZER.tag_ids.values() for tag_id in ids]
OPENING = {ids[0]: section for section, ids in TOKENIZER.tag_ids.items()}
END_IDS = TOKENIZER.stop_ids
WORDS = TOKENIZER.encode_text("abcd")
REASONING = (TOKENIZER.tag_ids[Section.THINK][0], TOKENIZER.tag_ids[Section.REASONING][0])


def gate_settings(*, is_fed: bool = False, **fields: Any) -> GateSettings:
    """Return the scripted checkpoint's settings with changed manifest values."""
    manifest = CHECKPOINT.manifest
    fields = {"window_tokens": 4, "rest_tokens": 3, "latent_tokens": 3, "loop_tokens": 16} | fields
    found = GateSettings.of(manifest.model_copy(update={"pause": manifest.pause.model_copy(update=fields)}), TOKENIZER)
    assert found is not None
    return replace(found, is_fed=is_fed)


def resumed(gate: Gate) -> Gate:
    """Return the next chunk's gate, from a state passed through JSON."""
    return Gate.resume(gate.settings, json.loads(json.dumps(gate.state())))


@dataclass
class Step:
    """One step: the state before it, the gate's decision, and the token."""

    before: dict[str, Any]
    decision: Decision
    token_id: int
    confidence: float
    after: dict[str, Any]

    @property
    def is_forced(self) -> bool:
        return self.decision.forced_id is not None

    @property
    def section(self) -> Section | None:
        return innermost(self.before["open_sections"])


@dataclass
class Run:
    """A completion; `token_ids` includes fed spans."""

    gate: Gate
    steps: list[Step] = field(default_factory=list[Step])
    token_ids: list[int] = field(default_factory=list[int])
    pauses: list[Any] = field(default_factory=list[Any])


Draws = Sequence[tuple[int, float]]


def write(found: GateSettings, draws: Draws, *, cuts: frozenset[int] = frozenset()) -> Run:
    """Write a completion like an engine: each token is drawn unless the gate forces another or bans it.

    Args:
        found: The gate's settings.
        draws: The model's token and confidence at each step.
        cuts: Steps before which the gate's state moves to another gate.
    """
    gate = Gate(found)
    run = Run(gate)
    for place, (token_id, confidence) in enumerate(draws):
        if place in cuts:
            gate = resumed(gate)
        before = gate.state()
        decision = gate.decide(confidence)
        if decision.forced_id is not None:
            token_id = decision.forced_id
        elif token_id in decision.banned_ids:
            token_id = WORDS[place % len(WORDS)]
        num_pauses = gate.num_pauses
        known = len(gate.pauses)
        gate.push(token_id, confidence)
        run.pauses += gate.pauses[known:]
        run.steps.append(Step(before, decision, token_id, confidence, gate.state()))
        if found.is_fed and gate.num_pauses > num_pauses:
            run.token_ids += gate.feed_span()
        else:
            run.token_ids.append(token_id)
        if (token_id in END_IDS and not gate.is_pausing) or (found.is_fed and gate.is_aborted):
            break
    run.gate = gate
    return run


def spans(found: GateSettings, token_ids: Sequence[int]) -> tuple[list[list[int]], list[int]]:
    """Return the whole spans of a completion, from the manifest's values alone, and the tokens of a cut one."""
    whole: list[list[int]] = []
    span: list[int] = []
    for token_id in token_ids:
        if not span and token_id != OPEN:
            continue
        span.append(token_id)
        is_over = len(span) == found.latent_tokens if found.mode is PauseMode.PARALLEL else token_id == CLOSE
        if is_over:
            whole.append(span)
            span = []
    return whole, span


confidences = st.sampled_from([0.0, 0.02, 0.05, 0.1, 0.4, 0.5, 0.6, 0.9, 1.0]) | st.floats(0, 1)
written_ids = st.one_of(
    st.sampled_from(WORDS),
    st.sampled_from(WORDS),
    st.sampled_from([*TAG_IDS, OPEN, CLOSE]),
    st.sampled_from(END_IDS),
    st.sampled_from(POSITIONS),
)
low = st.sampled_from([0.0, 0.02, 0.1, 0.3, 0.5, 0.7])
beginnings = st.sampled_from([(), ((REASONING[0], 1.0), (REASONING[1], 1.0))])
draws = st.builds(
    lambda first, then: [*first, *then],
    beginnings,
    st.one_of(
        st.lists(st.tuples(written_ids, confidences), max_size=100),
        st.lists(st.tuples(st.sampled_from([*WORDS, OPEN, CLOSE, *END_IDS]), low), min_size=10, max_size=100),
    ),
)


@st.composite
def any_settings(draw: st.DrawFn, **fixed: Any) -> GateSettings:
    """Draw small settings of every kind."""
    mode = draw(st.sampled_from(["parallel", "sampled"]))
    latent_tokens = draw(st.integers(1, MAX_LATENT))
    fields: dict[str, Any] = {
        "mode": mode,
        "max_pauses": draw(st.integers(1, 3)),
        "latent_tokens": latent_tokens,
        "position_ids": draw(st.sampled_from([None, POSITIONS[:latent_tokens]])) if mode == "parallel" else None,
        "window_tokens": draw(st.integers(1, 5)),
        "rest_tokens": draw(st.integers(0, 4)),
        "tau_pause": draw(st.sampled_from([0.0, 0.5, 0.9, 1.0])),
        "tau_abort": draw(st.sampled_from([0.0, 0.0, 0.05])),
        "acoustic_bias": draw(st.sampled_from([0.0, 5.0])),
        "max_closed_loops": draw(st.integers(0, 2)),
        "sections": draw(
            st.sampled_from([CHECKPOINT.manifest.pause.sections, (Section.REASONING,), (Section.ENV, Section.THINK)])
        ),
    }
    fields["tau_abort"] = min(fields["tau_abort"], fields["tau_pause"])
    is_fed = mode == "parallel" and draw(st.booleans())
    return gate_settings(is_fed=is_fed, **fields | fixed)


@unhurried
@given(any_settings(), draws)
def test_a_completion_never_takes_more_pauses_than_its_budget(found: GateSettings, draws: Draws) -> None:
    run = write(found, draws)
    whole, rest = spans(found, run.token_ids)
    assert len(whole) + bool(rest) == run.gate.num_pauses == len(run.pauses) <= found.max_pauses


@unhurried
@given(any_settings(), draws)
def test_every_span_closes_and_has_the_length_that_the_manifest_gives_it(found: GateSettings, draws: Draws) -> None:
    run = write(found, draws)
    whole, cut = spans(found, run.token_ids)
    assert bool(cut) == run.gate.is_pausing
    for span in whole:
        if found.mode is PauseMode.PARALLEL:
            assert tuple(span) == found.span_ids == (found.position_ids or (OPEN,) * found.latent_tokens)
        else:
            assert (span[0], span[-1]) == (OPEN, CLOSE)
            assert len(span) <= found.span_tokens
            assert not {OPEN, *END_IDS}.intersection(span[1:])
    assert len(cut) <= found.span_tokens


def test_each_position_has_its_own_token_where_the_manifest_names_them() -> None:
    found = gate_settings(latent_tokens=4, position_ids=POSITIONS, tau_pause=1.0, tau_abort=0.0, window_tokens=1)
    gate, forced = in_reasoning(found), list[int | None]()
    for _ in range(4):
        decision = gate.decide(0.5)
        forced.append(decision.forced_id)
        gate = resumed(gate)
        gate.push(decision.forced_id or 0, None)
    assert tuple(forced) == POSITIONS
    assert (gate.num_pauses, gate.is_pausing) == (1, False)
    assert gate.feed_span() == POSITIONS


@pytest.mark.parametrize("place", [1, 3, 1000])
@pytest.mark.parametrize("position_ids", [None, POSITIONS[:3]])
def test_a_state_from_outside_may_say_a_place_behind_the_span(place: int, position_ids: tuple[int, ...] | None) -> None:
    gate = Gate(gate_settings(position_ids=position_ids))
    state = gate.state() | {"num_in_span": place}
    assert Gate.is_state(state)
    assert Gate.resume(gate.settings, state).decide(1.0).forced_id in gate.settings.span_ids


@unhurried
@given(draws)
def test_a_sampled_span_is_closed_by_force_once_its_tokens_are_spent(draws: Draws) -> None:
    found = gate_settings(mode="sampled", tau_pause=1.0, tau_abort=0.0)
    for step in write(found, draws).steps:
        if step.before["num_in_span"] > found.latent_tokens:
            assert step.decision.forced_id == CLOSE
        elif step.before["num_in_span"]:
            assert step.decision.forced_id is None


@unhurried
@given(any_settings(), draws)
def test_forced_tokens_leave_window_rest_and_loop_guard_as_they_were(found: GateSettings, draws: Draws) -> None:
    run = write(found, draws)
    for step in run.steps:
        if step.is_forced and step.after["num_closed_loops"] == step.before["num_closed_loops"]:
            kept = ["window", "total", "lowest", "recent", "repeats", "keyword_age"]
            if step.token_id != OPEN:
                kept += ["num_resting", "num_pauses"]
            assert {name: step.before[name] for name in kept} == {name: step.after[name] for name in kept}


@unhurried
@given(any_settings(), draws)
def test_a_forced_pause_token_inside_a_span_is_no_further_pause(found: GateSettings, draws: Draws) -> None:
    for step in write(found, draws).steps:
        if step.before["num_in_span"]:
            assert step.after["num_pauses"] == step.before["num_pauses"]
            assert step.decision.verdict is Verdict.CONTINUE


@unhurried
@given(any_settings(), draws, confidences)
def test_asking_changes_nothing(found: GateSettings, draws: Draws, confidence: float) -> None:
    gate = Gate(found)
    for token_id, sureness in draws:
        before, pauses = json.dumps(gate.state()), list(gate.pauses)
        assert gate.decide(confidence) == gate.decide(confidence)
        assert json.dumps(gate.state()) == before
        assert gate.pauses == pauses
        gate.push(token_id, sureness)


@unhurried
@given(any_settings(), draws, st.frozensets(st.integers(0, 100)))
def test_it_does_not_matter_how_a_completion_is_cut_into_chunks(
    found: GateSettings, draws: Draws, cuts: frozenset[int]
) -> None:
    whole, cut = write(found, draws), write(found, draws, cuts=cuts)
    assert [(step.decision, step.token_id) for step in whole.steps] == [
        (step.decision, step.token_id) for step in cut.steps
    ]
    assert [step.after for step in whole.steps] == [step.after for step in cut.steps]
    assert whole.pauses == cut.pauses


@unhurried
@given(any_settings(), draws)
def test_whoever_reads_the_completion_comes_to_the_same_gate(found: GateSettings, draws: Draws) -> None:
    assume(not found.is_fed)
    run = write(found, draws)
    reader = replay(found, run.token_ids, [step.confidence for step in run.steps])
    assert reader.state() == run.gate.state()
    assert reader.pauses == run.pauses


@unhurried
@given(any_settings(), draws)
def test_pause_tags_can_be_sampled_only_where_they_may_stand(found: GateSettings, draws: Draws) -> None:
    for step in write(found, draws).steps:
        before = step.before
        if step.is_forced:
            continue
        is_hidden = found.mode is PauseMode.SAMPLED and before["num_in_span"] > 0
        may_pause = (
            not is_hidden
            and not before["is_aborted"]
            and before["open_sections"] in found.gated
            and before["num_resting"] == 0
            and before["num_pauses"] < found.max_pauses
        )
        assert (OPEN not in step.decision.banned_ids) == may_pause
        assert (CLOSE not in step.decision.banned_ids) == is_hidden
        assert set(found.position_ids[1:]) <= set(step.decision.banned_ids)


@unhurried
@given(any_settings(), draws)
def test_nothing_pauses_in_the_answer_between_sections_or_where_the_manifest_does_not_say(
    found: GateSettings, draws: Draws
) -> None:
    named = {innermost(held) for held in found.gated}
    assert None not in named and Section.FINAL_ANSWER not in named
    run = write(found, draws)
    for step in run.steps:
        if step.section not in named:
            assert step.decision.verdict is not Verdict.PAUSE
            assert step.after["num_pauses"] == step.before["num_pauses"]
    assert {pause.section for pause in run.pauses} <= named


@unhurried
@given(any_settings(), draws)
def test_between_two_pauses_lies_the_rest(found: GateSettings, draws: Draws) -> None:
    num_sampled: int | None = None
    for step in write(found, draws).steps:
        if step.after["num_pauses"] > step.before["num_pauses"]:
            assert num_sampled is None or num_sampled >= found.rest_tokens
            num_sampled = 0
        elif num_sampled is not None and not step.is_forced and not step.before["num_in_span"]:
            num_sampled += 1


@unhurried
@given(any_settings(), draws)
def test_the_lowest_group_confidence_is_the_least_mean_of_any_window(found: GateSettings, draws: Draws) -> None:
    run = write(found, draws)
    entered = [
        step.confidence
        for step in run.steps
        if not step.is_forced
        and not step.before["num_in_span"]
        and step.before["open_sections"] in found.gated
        and step.token_id not in (OPEN, CLOSE)
    ]
    size = found.window_tokens
    means = [sum(entered[end - size : end]) / size for end in range(size, len(entered) + 1)]
    assert run.gate.window == entered[-size:]
    assert run.gate.lowest == (pytest.approx(min(means), abs=1e-12) if means else None)


def in_reasoning(found: GateSettings, window: Sequence[float] = ()) -> Gate:
    """Return a gate inside REASONING with these confidences so far."""
    gate = Gate(found)
    for tag_id in REASONING:
        gate.push(tag_id, 1.0)
    for place, confidence in enumerate(window):
        gate.push(WORDS[place % len(WORDS)], confidence)
    return gate


@pytest.mark.parametrize(
    ("last", "verdict"),
    [
        (0.5, Verdict.PAUSE),
        (0.5000001, Verdict.CONTINUE),
        (0.25, Verdict.PAUSE),
        (0.0625, Verdict.ABORT),
        (0.0626, Verdict.PAUSE),
    ],
)
def test_a_window_at_a_threshold_is_acted_on(last: float, verdict: Verdict) -> None:
    gate = in_reasoning(gate_settings(tau_pause=0.5, tau_abort=0.0625), [last] * 3)
    assert gate.decide(last).verdict is verdict


def test_no_window_is_judged_before_it_is_full() -> None:
    gate = in_reasoning(gate_settings(), [0.0] * 2)
    assert gate.decide(0.0).verdict is Verdict.CONTINUE
    assert gate.lowest is None


def test_an_abort_comes_even_where_no_pause_may() -> None:
    gate = in_reasoning(gate_settings(max_pauses=1, rest_tokens=100))
    gate.push(OPEN, 1.0)
    gate.feed_span()
    for _ in range(4):
        gate.push(WORDS[0], 0.04)
    assert gate.num_resting and gate.num_pauses == 1
    assert gate.decide(0.04).verdict is Verdict.ABORT


def parser_of(found: GateSettings) -> TraceParser:
    tokenizer = POSITIONED[found.latent_tokens] if found.position_ids else TOKENIZER
    return TraceParser(tokenizer, pause_mode=found.mode, latent_tokens=found.latent_tokens)


@unhurried
@given(any_settings(tau_pause=1.0, tau_abort=1.0), draws)
def test_an_abort_closes_what_is_open_and_opens_the_answer(found: GateSettings, draws: Draws) -> None:
    found = replace(found, is_fed=False)
    # An endless run is aborted, whatever was written before.
    unending = [(WORDS[1] if token_id in END_IDS else token_id, confidence) for token_id, confidence in draws]
    run = write(found, [*unending, *[(WORDS[0], 0.0)] * 60])
    at = next(place for place, step in enumerate(run.steps) if step.decision.verdict is Verdict.ABORT)
    assert run.steps[at].token_id == CLOSE
    has_answer = any(OPENING.get(step.token_id) is Section.FINAL_ANSWER for step in run.steps[:at])
    gate = Gate.resume(found, run.steps[at].after)
    parser = parser_of(found)
    for step in run.steps[: at + 1]:
        parser.feed(step.token_id)
    wanted = parser.ids_to_final_answer()
    closing: list[int] = []
    while gate.forced:
        forced_id = gate.decide(1.0).forced_id
        assert forced_id is not None
        closing.append(forced_id)
        parser.feed(forced_id)
        gate.push(forced_id, 1.0)
    if has_answer:
        assert closing[-1] in END_IDS and parser.open_sections == ()
    else:
        assert closing == wanted
        assert parser.open_sections == (Section.FINAL_ANSWER,)
    assert gate.decide(0.0) == Decision(Verdict.CONTINUE, banned_ids=(OPEN, CLOSE, *found.position_ids[1:]))
    assert [step.token_id for step in run.steps[at + 1 :]][: len(closing)] == closing[: len(run.steps) - at - 1]


@unhurried
@given(any_settings(tau_pause=1.0, tau_abort=1.0), draws)
def test_a_completion_that_was_given_up_neither_pauses_nor_is_given_up_again(found: GateSettings, draws: Draws) -> None:
    for step in write(found, draws).steps:
        if step.before["is_aborted"]:
            assert step.decision.verdict is Verdict.CONTINUE
            assert step.after["num_pauses"] == step.before["num_pauses"]


def test_a_fed_gate_leaves_the_closing_to_whoever_reads() -> None:
    gate = in_reasoning(gate_settings(is_fed=True), [0.0] * 4)
    assert gate.decide(0.0).forced_id == CLOSE
    gate.push(CLOSE, 0.0)
    assert gate.is_aborted and not gate.forced
    parser = parser_of(gate.settings)
    for token_id in [*REASONING, *gate.ids_to_answer()]:
        parser.feed(token_id)
    assert parser.open_sections == (Section.FINAL_ANSWER,)


@pytest.mark.parametrize("period", range(1, LOOP_PERIOD_TOKENS + 1))
def test_the_loop_guard_sees_runs_and_phrases(period: int) -> None:
    found = gate_settings(loop_tokens=20)
    phrase = TOKENIZER.encode_text("abcdefghijklmnop")[:period]
    gate = in_reasoning(found)
    for place in range(period + found.loop_tokens):
        assert gate.decide(1.0).verdict is Verdict.CONTINUE
        gate.push(phrase[place % period], 1.0)
    assert gate.decide(1.0) == Decision(Verdict.ABORT, CLOSE)


ENDABLE = [section for section in Section if section is not Section.FINAL_ANSWER]


def looping(section: Section, **fields: Any) -> Gate:
    """Return a gate inside a section whose last tokens are equal, at the step of the guard."""
    gate = Gate(gate_settings(**fields))
    for token_id in (*(TOKENIZER.tag_ids[each][0] for each in ancestors(section)), TOKENIZER.tag_ids[section][0]):
        gate.push(token_id, 1.0)
    repeat(gate)
    return gate


def ancestors(section: Section) -> list[Section]:
    parent = PARENTS[section]
    return [] if parent is None else [*ancestors(parent), parent]


def repeat(gate: Gate) -> None:
    while gate.decide(1.0).forced_id is None:
        gate.push(WORDS[0], 1.0)


@pytest.mark.parametrize("section", ENDABLE)
def test_a_loop_ends_its_section_and_the_completion_goes_on(section: Section) -> None:
    gate = looping(section, max_closed_loops=1)
    closing_id = TOKENIZER.tag_ids[section][1]
    window = gate.window.copy()
    assert gate.decide(1.0) == Decision(Verdict.CONTINUE, closing_id) and gate.closes_loop(closing_id)
    gate.push(closing_id, 0.0)
    parent = PARENTS[section]
    assert innermost(gate.open_sections) is parent and not gate.is_aborted and not gate.is_looping
    assert gate.window == window, "a forced token has no confidence"
    assert gate.decide(1.0).forced_id is None


def test_loops_beyond_the_limit_abort() -> None:
    gate = looping(Section.ASR, max_closed_loops=2)
    for section in (Section.ASR, Section.REASONING):
        gate.push(TOKENIZER.tag_ids[section][1], 1.0)
        following = Section.REASONING if section is Section.ASR else Section.SUMMARY
        gate.push(TOKENIZER.tag_ids[following][0], 1.0)
        repeat(gate)
    assert gate.num_closed_loops == 2 and gate.decide(1.0) == Decision(Verdict.ABORT, CLOSE)


def test_a_loop_in_the_answer_or_outside_of_any_section_aborts() -> None:
    assert looping(Section.FINAL_ANSWER, max_closed_loops=9).decide(1.0).verdict is Verdict.ABORT
    gate = Gate(gate_settings(max_closed_loops=9))
    repeat(gate)
    assert gate.decide(1.0).verdict is Verdict.ABORT


@given(st.lists(st.sampled_from(WORDS[:2]), max_size=60))
def test_a_loop_of_tokens_is_that_of_the_gate(token_ids: list[int]) -> None:
    gate = Gate(gate_settings(loop_tokens=6))
    for place, token_id in enumerate(token_ids):
        gate.push(token_id, None)
        assert has_loop(token_ids[: place + 1], 6) == gate.is_looping


def test_a_closing_tag_of_the_models_own_ends_no_loop() -> None:
    gate = in_reasoning(gate_settings(max_closed_loops=1))
    gate.push(WORDS[0], 1.0)
    gate.push(TOKENIZER.tag_ids[Section.REASONING][1], 1.0)
    assert gate.num_closed_loops == 0


def test_the_loop_guard_works_in_the_answer_and_then_ends_the_completion() -> None:
    gate = Gate(gate_settings())
    gate.push(TOKENIZER.tag_ids[Section.FINAL_ANSWER][0], 1.0)
    while gate.decide(1.0).verdict is Verdict.CONTINUE:
        gate.push(WORDS[0], 1.0)
    gate.push(CLOSE, 1.0)
    assert gate.forced == [TOKENIZER.tag_ids[Section.FINAL_ANSWER][1], END_IDS[0]]


@pytest.mark.parametrize(
    "text",
    [
        "A dog barks twice, then a man laughs, and a door is shut. The dog barks again while the man walks away.",
        "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20",
        "no, no, no, no: the voice says no and no again",
        'S1 man: "yes yes yes"\nS2 woman: "yes yes yes"\nS1 man: "well then"',
    ],
)
def test_the_loop_guard_lets_ordinary_text_pass(text: str) -> None:
    gate = in_reasoning(gate_settings(loop_tokens=CHECKPOINT.manifest.pause.loop_tokens))
    for token_id in TOKENIZER.encode_text(text):
        assert gate.decide(1.0).verdict is Verdict.CONTINUE
        gate.push(token_id, 1.0)


def test_a_pause_between_two_equal_tokens_does_not_break_a_run() -> None:
    gate = in_reasoning(gate_settings(), ())
    for _ in range(8):
        gate.push(WORDS[0], 1.0)
    gate.push(OPEN, 1.0)
    gate.feed_span()
    for _ in range(9):
        gate.push(WORDS[0], 1.0)
    assert gate.decide(1.0).verdict is Verdict.ABORT


@pytest.mark.parametrize("word", ["pitch", " noise", "Tone", " emotion"])
def test_the_acoustic_prior_remembers_a_keyword_for_so_many_tokens(word: str) -> None:
    gate = in_reasoning(gate_settings(acoustic_bias=5.0, rest_tokens=0))
    filler = TOKENIZER.encode_text("xyz")
    assert not gate.decide(1.0).is_biased
    *first, last = TOKENIZER.encode_text(word)
    for token_id in first:
        gate.push(token_id, 1.0)
        assert not gate.decide(1.0).is_biased
    gate.push(last, 1.0)
    for place in range(KEYWORD_MEMORY_TOKENS):
        decision = gate.decide(1.0)
        assert decision.is_biased and OPEN not in decision.banned_ids
        gate.push(filler[place % 3 if place % 7 else 0], 1.0)
    assert not gate.decide(1.0).is_biased


def test_without_a_bias_nothing_is_biased() -> None:
    gate = in_reasoning(gate_settings(acoustic_bias=0.0))
    for token_id in TOKENIZER.encode_text("the tone"):
        gate.push(token_id, 1.0)
    assert not gate.decide(1.0).is_biased


@unhurried
@given(st.lists(st.sampled_from([*TAG_IDS, *WORDS]), max_size=60))
@example([TOKENIZER.tag_ids[Section.ENV][0], TOKENIZER.tag_ids[Section.THINK][1]])
def test_the_gate_and_the_parser_agree_on_what_is_open(token_ids: list[int]) -> None:
    found = gate_settings()
    gate, parser = Gate(found), parser_of(found)
    for token_id in token_ids:
        gate.push(token_id, 1.0)
        parser.feed(token_id)
        assert_same_sections(gate, parser)


@unhurried
@given(any_settings(), draws)
def test_they_agree_across_pauses_and_aborts_too(found: GateSettings, draws: Draws) -> None:
    run = write(found, draws)
    parser = parser_of(found)
    for token_id in run.token_ids:
        parser.feed(token_id)
    assert_same_sections(run.gate, parser)
    whole, cut = spans(found, run.token_ids)
    parser.finish(Termination.TRUNCATED)
    assert [pause.section for pause in parser.result.pauses] == [pause.section for pause in run.pauses]
    assert len(parser.result.pauses) == len(whole) + bool(cut)


def assert_same_sections(gate: Gate, parser: TraceParser) -> None:
    held = [section for place, section in enumerate(Section) if gate.open_sections >> place & 1]
    assert sorted(parser.open_sections) == sorted(held)
    assert innermost(gate.open_sections) == (parser.open_sections[-1] if parser.open_sections else None)
    for outer, inner in zip(parser.open_sections, parser.open_sections[1:], strict=False):
        ancestors = {PARENTS[inner], PARENTS[PARENTS[inner] or Section.THINK]}
        assert outer in ancestors


@given(st.integers(1, 50))
def test_a_request_can_lower_its_budget_and_never_raise_it(max_pauses: int) -> None:
    found = gate_settings(max_pauses=3)
    assert found.with_budget(max_pauses).max_pauses == min(3, max_pauses)
    assert replace(found.with_budget(max_pauses), max_pauses=3) == found


@pytest.mark.parametrize("budget", [1, 2])
def test_a_lowered_budget_is_the_one_that_holds(budget: int) -> None:
    found = gate_settings(max_pauses=3, tau_pause=1.0, tau_abort=0.0, rest_tokens=0).with_budget(budget)
    run = write(found, [*((tag_id, 1.0) for tag_id in REASONING), *((word, 0.5) for word in WORDS * 20)])
    assert run.gate.num_pauses == budget


def test_a_checkpoint_whose_tags_are_text_has_no_gate() -> None:
    manifest = CHECKPOINT.manifest
    as_text = manifest.trace.model_copy(update={"tag_style": TagStyle.TEXT})
    assert GateSettings.of(manifest.model_copy(update={"trace": as_text}), TOKENIZER) is None


def test_a_checkpoint_that_never_pauses_has_no_gate() -> None:
    manifest = CHECKPOINT.manifest
    never = manifest.pause.model_copy(update={"max_pauses": 0})
    assert GateSettings.of(manifest.model_copy(update={"pause": never}), TOKENIZER) is None


def test_a_gate_that_is_read_again_without_confidences_keeps_budget_and_sections() -> None:
    found = gate_settings(tau_pause=1.0, rest_tokens=0)
    run = write(found, [*((tag_id, 1.0) for tag_id in REASONING), *((word, 0.5) for word in WORDS * 5)])
    again = replay(found, run.token_ids, [None] * len(run.token_ids))
    assert (again.num_pauses, again.open_sections) == (run.gate.num_pauses, run.gate.open_sections)
    assert again.window == [] and again.lowest is None
    assert [pause.is_forced for pause in again.pauses] == [False] * again.num_pauses
