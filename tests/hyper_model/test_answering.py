"""The answering procedure alone: its steps, events and result, with tokens from the tests instead of a model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyper_model.answering import (
    ANSWER_TOKENS,
    DEFAULT_MAX_TOKENS,
    AnswerDelta,
    Answering,
    AnswerResult,
    Event,
    FinishReason,
    Generate,
    Question,
    Score,
    max_trace_tokens,
    softmax,
    tempered,
)
from hyper_model.manifest import AnswerKind, ConfidenceFields, Manifest
from hyper_model.pause import GateReport, GateSettings
from hyper_model.trace import Section, TagStyle, Termination, Trace, TraceTokenizer, build_prompt, render
from hyper_model.trace_parser import SectionDelta, TraceFormat
from server.engines.scripted import scripted_checkpoint
from server.settings import Settings

CHECKPOINT = scripted_checkpoint()
TOKENIZER, MANIFEST = CHECKPOINT.tokenizer, CHECKPOINT.manifest
GATE = GateSettings.of(MANIFEST, TOKENIZER)
WORDS = Trace(
    planning="Listen.",
    environment="rain",
    transcript="the train leaves at nine",
    reasoning="It rains.",
    summary="Rain.",
    response="sun",
    final_answer="rain",
)
CHOICES = ("one", "two")


def styled(answer_style: str) -> Manifest:
    trace = MANIFEST.trace.model_copy(update={"answer_style": answer_style})
    return MANIFEST.model_copy(update={"trace": trace})


def question(choices: Sequence[str] = (), **fields: object) -> Question:
    prompt = tuple(build_prompt(TOKENIZER, "What?", choices))
    return replace(Question(prompt, tuple(choices)), **fields)  # pyright: ignore[reportArgumentType]


def tokens(text: str) -> list[int]:
    return TOKENIZER.encode_trace(text)


def drive(
    answering: Answering,
    written: Iterable[tuple[Sequence[int], FinishReason]],
    logprobs: Sequence[float] = (-2.0, -1.0),
    *,
    chunk_size: int = 1,
) -> tuple[list[Generate | Score], list[Event], AnswerResult]:
    """Drive a procedure with these continuations, in chunks, and return its steps, events and result."""
    steps: list[Generate | Score] = []
    events: list[Event] = []
    continuations = iter(written)
    while (step := answering.next_step) is not None:
        steps.append(step)
        if isinstance(step, Score):
            events += answering.receive_scores(logprobs)
            continue
        token_ids, reason = next(continuations)
        for start in range(0, len(token_ids), chunk_size):
            is_last = start + chunk_size >= len(token_ids)
            chunk = token_ids[start : start + chunk_size]
            events += answering.receive_tokens(chunk, reason if is_last else None)
            if answering.next_step is not step:
                break
        else:
            if answering.next_step is step:
                events += answering.receive_tokens((), reason)
    return steps, events, answering.result


def text_of(events: Sequence[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, AnswerDelta))


def test_an_open_question_takes_one_step_and_ends_at_its_closing_tag() -> None:
    written = tokens(render(WORDS))
    steps, events, result = drive(Answering(question(), TOKENIZER, MANIFEST), [(written, "stop")])
    (step,) = steps
    assert isinstance(step, Generate) and step.max_tokens == DEFAULT_MAX_TOKENS and step.gate is None
    assert set(step.stop_token_ids) == {*TOKENIZER.stop_ids, *TOKENIZER.close_ids(Section.FINAL_ANSWER)}
    assert set(step.banned_token_ids) == TOKENIZER.pause_ids, "without a gate nothing may pause"
    assert (result.text, result.choice_index, result.scores, result.confidence) == ("rain", None, (), None)
    assert result.token_ids == tuple(written) and result.num_completion_tokens == len(written)
    assert result.parsed.termination is Termination.COMPLETE and result.parsed.format is TraceFormat.STRICT
    assert text_of(events) == result.text


@pytest.mark.parametrize("choices", [(), CHOICES])
def test_chunks_of_any_size_give_the_same_events_and_result(choices: tuple[str, ...]) -> None:
    written = [*tokens(render(WORDS)), TOKENIZER.im_end_id]
    found = [
        drive(Answering(question(choices), TOKENIZER, MANIFEST), [(written, "stop")], chunk_size=size)
        for size in (1, 2, 7, 1000)
    ]
    assert all(events == found[0][1] and result == found[0][2] for _, events, result in found)


def test_a_trace_that_breaks_off_is_closed_and_an_open_question_gets_tokens_to_answer() -> None:
    written, answer = tokens("<THINK><PLANNING>Listen"), [*tokens("rain"), *tokens("</FINAL_ANSWER>")]
    asked = question(max_tokens=len(written), gate=GATE, seed=7)
    steps, events, result = drive(Answering(asked, TOKENIZER, MANIFEST), [(written, "length"), (answer, "stop")])
    first, second = steps
    assert isinstance(first, Generate) and isinstance(second, Generate)
    closing = tokens("</PLANNING></THINK><FINAL_ANSWER>")
    assert list(second.prompt_token_ids) == [*asked.prompt_token_ids, *written, *closing]
    assert second.max_tokens == ANSWER_TOKENS and second.gate is None and first.gate is GATE
    assert not first.banned_token_ids and set(second.banned_token_ids) == TOKENIZER.pause_ids
    assert (first.seed, second.seed) == (7, 8), "the same seed twice would repeat its random numbers"
    assert result.text == text_of(events) == "rain" and result.parsed.termination is Termination.TRUNCATED
    assert result.num_completion_tokens == len(written) + len(answer)


def test_a_response_answers_a_trace_without_a_final_answer() -> None:
    written = [*tokens("<THINK>hm</THINK><RESPONSE>rain</RESPONSE>"), TOKENIZER.im_end_id]
    steps, events, result = drive(Answering(question(), TOKENIZER, MANIFEST), [(written, "stop")])
    assert len(steps) == 1 and result.text == text_of(events) == "rain"
    assert result.token_ids == tuple(written[:-1]), "the end of the turn is no part of the trace"
    assert result.num_completion_tokens == len(written)


@pytest.mark.parametrize(("style", "expected"), [("letter", "B. two"), ("text", "two")], ids=["letters", "words"])
def test_the_likeliest_choice_is_written_into_the_trace(style: str, expected: str) -> None:
    written = tokens(render(WORDS).partition("<FINAL_ANSWER>")[0] + "<FINAL_ANSWER>")
    answering = Answering(question(CHOICES), TOKENIZER, styled(style))
    steps, events, result = drive(answering, [(written, "stop")])
    generate, score = steps
    assert isinstance(generate, Generate) and isinstance(score, Score)
    assert set(generate.stop_token_ids) == {*TOKENIZER.stop_ids, *TOKENIZER.open_ids(Section.FINAL_ANSWER)}
    assert score.candidates == TOKENIZER.choice_ids(CHOICES, by_letter=style == "letter")
    assert list(score.prompt_token_ids)[-len(written) :] == written
    assert (result.text, result.choice_index) == ("two", 1) and text_of(events) == "two"
    assert result.parsed.raw.endswith(f"<FINAL_ANSWER>{expected}</FINAL_ANSWER>")
    assert result.parsed.format is TraceFormat.STRICT and result.parsed.termination is Termination.COMPLETE
    assert sum(result.scores) == pytest.approx(1) and result.confidence == result.scores[1]
    assert not any(isinstance(each, SectionDelta) and each.section is Section.FINAL_ANSWER for each in events)


@pytest.mark.parametrize("choices", [(), CHOICES])
def test_a_trace_that_the_gate_gives_up_is_answered_and_says_so(choices: tuple[str, ...]) -> None:
    written = tokens("<THINK><CAPTION><ENV>rain rain rain")
    answering = Answering(question(choices, gate=GATE), TOKENIZER, MANIFEST)
    events = answering.receive_tokens(written, "abort", report=GateReport(0.01, ()))
    _, rest, result = drive(answering, [(tokens("rain</FINAL_ANSWER>"), "stop")])
    assert result.parsed.termination is Termination.ABORTED and result.report.lowest == 0.01
    assert result.text == text_of([*events, *rest]) != ""


def test_a_pause_counts_apart_from_visible_tokens() -> None:
    assert GATE is not None
    answering = Answering(question(gate=GATE), TOKENIZER, MANIFEST)
    head, tail = tokens("<THINK><CAPTION><ENV>rain"), tokens("</ENV></CAPTION></THINK><FINAL_ANSWER>a</FINAL_ANSWER>")
    answering.receive_tokens(head)
    answering.receive_tokens((), span=GATE.span_ids)
    answering.receive_tokens(tail, "stop", report=GateReport(0.4, (0.4,)))
    result = answering.result
    assert (result.num_pauses, result.num_pause_tokens) == (1, GATE.span_tokens)
    assert result.num_completion_tokens == len(head) + len(tail)
    assert [pause.section for pause in result.parsed.pauses] == [Section.ENV] and result.pause_confidences == (0.4,)
    assert "PAUSE" not in result.parsed.raw
    assert replace(result, report=GateReport()).pause_confidences == (None,), "where the report has been forgotten"


def test_there_is_no_result_before_the_last_step() -> None:
    answering = Answering(question(), TOKENIZER, MANIFEST)
    with pytest.raises(RuntimeError, match="not complete"):
        _ = answering.result
    answering.receive_tokens(tokens("<THINK><PLANNING>Listen"))
    assert answering.parsed.texts[Section.PLANNING] == "Listen"


def test_the_room_for_a_trace_leaves_pauses_and_the_longest_choice() -> None:
    assert GATE is not None
    choices = ("<THINK>" * 60, "plain")
    prompt = build_prompt(TOKENIZER, "What?", choices)

    def room(gate: GateSettings | None, style: str) -> int:
        return max_trace_tokens(
            prompt, choices, num_audio_tokens=25, gate=gate, tokenizer=TOKENIZER, manifest=styled(style)
        )

    assert room(None, "letter") - room(GATE, "letter") == GATE.max_pauses * GATE.span_tokens
    longest = max(map(len, TOKENIZER.choice_ids(choices, by_letter=False))) + 1
    assert room(None, "letter") - room(None, "text") == longest - ANSWER_TOKENS > 0


def test_the_service_and_the_evaluation_share_the_default_token_limit() -> None:
    assert Settings().default_max_tokens == DEFAULT_MAX_TOKENS


def test_scores_are_shares_whatever_the_engine_says() -> None:
    for logprobs in ([-1.0, -2.0], [float("-inf"), -3.0], [float("-inf")] * 2, [float("nan"), -1.0], [-1e30, -1e30]):
        shares = softmax(logprobs)
        assert sum(shares) == pytest.approx(1) and min(shares) >= 0
    assert softmax([0.0, float("-inf")]) == [1.0, 0.0]


LOGPROBS = st.lists(st.floats(-60, 0), min_size=2, max_size=26)
TEMPERATURES = st.floats(0.05, 50)


@given(LOGPROBS)
def test_temperature_1_keeps_the_models_own_probabilities(logprobs: list[float]) -> None:
    assert softmax(logprobs, 1.0) == softmax(logprobs)
    for share in softmax(logprobs):
        assert tempered(share, 1.0) == pytest.approx(share)


@given(LOGPROBS, TEMPERATURES)
def test_a_temperature_keeps_the_order_of_the_choices_and_the_sum_of_1(
    logprobs: list[float], temperature: float
) -> None:
    own, calibrated = softmax(logprobs), softmax(logprobs, temperature)
    assert sum(calibrated) == pytest.approx(1) and min(calibrated) >= 0
    order = sorted(range(len(own)), key=logprobs.__getitem__)
    assert [calibrated[place] for place in order] == sorted(calibrated)


@given(st.floats(0, 1), st.floats(0, 1), TEMPERATURES)
def test_the_confidence_of_a_text_rises_with_its_probability(one: float, other: float, temperature: float) -> None:
    low, high = sorted((one, other))
    assert 0 <= tempered(low, temperature) <= tempered(high, temperature) <= 1
    if 1e-6 < low < 1 - 1e-6:
        pair = softmax([math.log(low), math.log1p(-low)], temperature)
        assert tempered(low, temperature) == pytest.approx(pair[0])


def calibrated_manifest(temperature: float) -> Manifest:
    kind = AnswerKind(temperature=temperature, num_answers=9, ece_before=0, ece_after=0, curve_before=(), curve=())
    return MANIFEST.model_copy(update={"confidence": ConfidenceFields(source="made up", choices=kind, open=kind)})


def test_a_calibrated_checkpoint_chooses_the_same_with_other_scores() -> None:
    written, logprobs = tokens(render(WORDS)), (-4.0, -1.0)
    _, events, own = drive(Answering(question(CHOICES), TOKENIZER, MANIFEST), [(written, "stop")], logprobs)
    asked = question(CHOICES, wants_logprobs=True)
    _, events, result = drive(Answering(asked, TOKENIZER, calibrated_manifest(3.0)), [(written, "stop")], logprobs)
    assert result.choice_index == own.choice_index == 1 and result.token_ids == own.token_ids
    assert result.confidence == pytest.approx(1 / (1 + math.exp(-1))) and sum(result.scores) == pytest.approx(1)
    (token,) = [token for event in events if isinstance(event, AnswerDelta) for token in event.tokens]
    assert math.exp(token.logprob) == pytest.approx(own.confidence), "log-probabilities stay the model's own"


def test_a_calibrated_open_question_has_the_probability_of_its_text_in_a_step_of_its_own() -> None:
    manifest = calibrated_manifest(2.0)
    opening, closing = TOKENIZER.open_ids(Section.FINAL_ANSWER), TOKENIZER.close_ids(Section.FINAL_ANSWER)
    start = [*tokens(render(WORDS).partition("<FINAL_ANSWER>")[0]), *opening]
    rest = [*TOKENIZER.encode_text("rain"), *closing]
    answering = Answering(question(), TOKENIZER, manifest)
    first = answering.next_step
    assert isinstance(first, Generate) and not first.wants_logprobs and set(opening) <= set(first.stop_token_ids)
    events = answering.receive_tokens(start, "stop")
    second = answering.next_step
    assert isinstance(second, Generate) and second.wants_logprobs
    assert list(second.prompt_token_ids) == [*question().prompt_token_ids, *start]
    assert second.max_tokens == first.max_tokens - len(start)
    events += answering.receive_tokens(rest[:2], logprobs=(-0.1, -0.2))
    events += answering.receive_tokens(rest[2:], "stop", logprobs=[-0.3] * len(rest[2:]))
    result = answering.result
    _, own_events, own = drive(Answering(question(), TOKENIZER, MANIFEST), [([*start, *rest], "stop")])
    assert own.confidence is None and replace(result, text_confidence=None) == own
    assert text_of(events) == text_of(own_events) == "rain"
    assert result.confidence == pytest.approx(tempered(math.exp(-0.3 - 0.3 * len(rest[2:])), 2.0))


def test_a_calibrated_answer_of_one_long_chunk_is_written_once() -> None:
    """A chunk that runs past the opening tag is cut there, as for choices."""
    start = [*tokens(render(WORDS).partition("<FINAL_ANSWER>")[0]), *TOKENIZER.open_ids(Section.FINAL_ANSWER)]
    rest = [*TOKENIZER.encode_text("rain"), *TOKENIZER.close_ids(Section.FINAL_ANSWER)]
    answering = Answering(question(), TOKENIZER, calibrated_manifest(2.0))
    answering.receive_tokens([*start, *rest], "stop")
    answering.receive_tokens(rest, "stop", logprobs=[-0.1] * len(rest))
    assert answering.result.text == "rain" and list(answering.result.token_ids) == [*start, *rest]


def test_an_answer_cut_at_its_own_limit_is_truncated_and_one_from_response_has_no_confidence() -> None:
    manifest = calibrated_manifest(2.0)
    start = tokens(render(WORDS).partition("<FINAL_ANSWER>")[0])
    _, _, cut = drive(
        Answering(question(), TOKENIZER, manifest),
        [([*start, *TOKENIZER.open_ids(Section.FINAL_ANSWER)], "stop"), (tokens("rai"), "length")],
    )
    assert cut.text == "rai" and cut.parsed.termination is Termination.TRUNCATED
    _, _, early = drive(Answering(question(), TOKENIZER, manifest), [(start, "stop")])
    assert early.text == "sun" and early.confidence is None


def test_a_calibrated_answer_that_repeats_itself_is_aborted_as_without_calibration() -> None:
    assert GATE is not None
    start = [*tokens(render(WORDS).partition("<FINAL_ANSWER>")[0]), *TOKENIZER.open_ids(Section.FINAL_ANSWER)]
    answering = Answering(question(gate=GATE), TOKENIZER, calibrated_manifest(2.0))
    answering.receive_tokens(start, "stop")
    step, given = answering.next_step, 0
    while answering.next_step is step:
        answering.receive_tokens(tokens("a"), logprobs=(-0.1,))
        given += 1
    assert given == GATE.loop_tokens + 1
    assert answering.result.parsed.termination is Termination.ABORTED and answering.result.text == "a" * given


def with_logprobs(
    written: Sequence[tuple[Sequence[int], FinishReason]], logprobs: Sequence[Sequence[float]], chunk_size: int = 3
) -> tuple[list[AnswerDelta], str]:
    """Answer an open question from tokens with log-probabilities; return the deltas and the answer."""
    answering = Answering(question(wants_logprobs=True), TOKENIZER, MANIFEST)
    deltas: list[AnswerDelta] = []
    for (token_ids, reason), values in zip(written, logprobs, strict=True):
        step = answering.next_step
        assert isinstance(step, Generate) and step.wants_logprobs
        for start in range(0, len(token_ids), chunk_size):
            end = start + chunk_size
            last = reason if end >= len(token_ids) else None
            events = answering.receive_tokens(token_ids[start:end], last, logprobs=values[start:end])
            deltas += [event for event in events if isinstance(event, AnswerDelta)]
    return deltas, answering.result.text


def counted(token_ids: Sequence[int]) -> list[float]:
    return [-float(place) for place in range(len(token_ids))]


@pytest.mark.parametrize("answer", ["rain", "Grüße, 雨", "a < b <FINAL", "  rain \n"])
def test_each_token_of_the_answer_has_its_own_log_probability(answer: str) -> None:
    opening, closing = TOKENIZER.open_ids(Section.FINAL_ANSWER), TOKENIZER.close_ids(Section.FINAL_ANSWER)
    before = [*tokens(render(WORDS).partition("<FINAL_ANSWER>")[0]), *opening]
    written = [*before, *TOKENIZER.encode_text(answer), *closing]
    deltas, text = with_logprobs([(written, "stop")], [counted(written)])
    found = [token for delta in deltas for token in delta.tokens]
    assert text == answer.strip()
    assert b"".join(token.data for token in found).decode() == answer.rstrip()
    assert [token.logprob for token in found] == [-float(len(before) + place) for place in range(len(found))]
    for delta in deltas:
        assert b"".join(token.data for token in delta.tokens).decode().strip() == delta.text.strip()


def test_an_answer_from_response_has_the_log_probabilities_of_response() -> None:
    start = tokens(render(WORDS).partition("<FINAL_ANSWER>")[0])
    deltas, text = with_logprobs([(start, "length")], [counted(start)])
    found = [token for delta in deltas for token in delta.tokens]
    assert text == "sun" and b"".join(token.data for token in found) == b"sun"
    place = len(tokens(render(WORDS).partition("sun</RESPONSE>")[0]))
    assert [token.logprob for token in found] == [-float(place + more) for more in range(3)]


def test_an_answer_after_an_incomplete_trace_has_the_log_probabilities_of_its_own_step() -> None:
    start = tokens(render(WORDS).partition("<REASONING>")[0])
    rest = [*tokens("hail"), *TOKENIZER.close_ids(Section.FINAL_ANSWER)]
    deltas, text = with_logprobs([(start, "length"), (rest, "stop")], [[-9.0] * len(start), counted(rest)])
    assert text == "hail"
    assert [token.logprob for delta in deltas for token in delta.tokens] == [0.0, -1.0, -2.0, -3.0]


def test_a_scored_choice_has_the_logarithm_of_its_score() -> None:
    written = tokens(render(WORDS))
    steps, events, result = drive(
        Answering(question(CHOICES, wants_logprobs=True), TOKENIZER, MANIFEST), [(written, "stop")]
    )
    (token,) = [token for event in events if isinstance(event, AnswerDelta) for token in event.tokens]
    assert not any(step.wants_logprobs for step in steps if isinstance(step, Generate)), (
        "the engine needs to do nothing"
    )
    assert token.data == b"two" and math.exp(token.logprob) == pytest.approx(result.confidence)


def test_tags_of_plain_text_are_no_tokens_of_the_answer() -> None:
    tokenizer = TraceTokenizer(TOKENIZER.tokenizer, TagStyle.TEXT)
    text = render(WORDS)
    written = tokenizer.encode_text(text)
    answering = Answering(question(wants_logprobs=True), tokenizer, MANIFEST)
    events = answering.receive_tokens(written, "stop", logprobs=counted(written))
    found = [token for event in events if isinstance(event, AnswerDelta) for token in event.tokens]
    place = text.encode().index(b"rain</FINAL_ANSWER>")
    assert b"".join(token.data for token in found) == b"rain"
    assert [token.logprob for token in found] == [-float(place + more) for more in range(4)]
