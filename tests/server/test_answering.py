"""One question from waveform to reply, with scripted traces, good and bad."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.samples import Sample

from hyper_model.answering import ANSWER_TOKENS, Question
from hyper_model.audio import SAMPLE_RATE_HZ, Waveform
from hyper_model.checkpoint import Checkpoint
from hyper_model.trace import Section, TagStyle, TraceTokenizer, build_prompt, render
from hyper_model.trace import Trace as Written
from server.answering import AnswerRun
from server.api.qa import AudioQa
from server.api.stream import ServerSentEvent
from server.api.types import QaOptions, QaReply, TraceReply
from server.engines.protocol import ScriptedEngine
from server.engines.scripted import scripted_checkpoint
from server.request_context import RequestContext
from server.service import Service
from server.telemetry.metrics import Metrics
from tests.serving import scripted

CHECKPOINT = scripted_checkpoint()
WORDS = Written(
    planning="Listen.",
    environment="rain, a far engine",
    transcript="the train leaves at nine",
    reasoning="It rains.",
    summary="Rain.",
    response="sun",
    reflection="No: rain.",
    final_answer="rain",
)


def ask(
    text: str,
    choices: Sequence[str] = (),
    *,
    checkpoint: Checkpoint = CHECKPOINT,
    max_tokens: int = 2000,
    max_pauses: int = 0,
    edit: Callable[[list[int], TraceTokenizer], list[int]] | None = None,
    shows_reasoning: bool = True,
) -> tuple[QaReply, list[tuple[str, dict[str, Any]]], Service]:
    """Answer with an engine writing this text; return the reply, the events and the service."""

    def write(_: object, tokenizer: TraceTokenizer) -> list[int]:
        token_ids = [*tokenizer.encode_trace(text), tokenizer.im_end_id]
        return edit(token_ids, tokenizer) if edit else token_ids

    tokenizer = checkpoint.tokenizer
    engine = ScriptedEngine(tokenizer, script=write)
    service = Service(scripted(), checkpoint, engine, Metrics())
    prompt = tuple(build_prompt(tokenizer, "What?", choices))
    gate = service.answerer.gate.with_budget(max_pauses) if service.answerer.gate else None
    question = Question(prompt, tuple(choices), max_tokens=max_tokens, gate=gate)
    waveform = Waveform(np.full(SAMPLE_RATE_HZ, 0.25, dtype=np.float32))
    events: list[tuple[str, dict[str, Any]]] = []

    async def emit(event: ServerSentEvent) -> None:
        assert event.name is not None and not isinstance(event.data, str)
        events.append((event.name, dict(event.data)))

    async def run() -> QaReply:
        await engine.start()
        context = RequestContext("test", is_body_complete=True)
        options = QaOptions(question="What?", choices=list(choices), reasoning="full" if shows_reasoning else "answer")
        handler = AudioQa(service, context, options, b"")
        handler.run = AnswerRun(service.answerer, context, question, waveform)
        reply = await handler.answer(emit)
        for event in handler.last_events(reply):
            await emit(event)
        return reply

    reply = asyncio.run(run())
    assert engine.num_in_flight == 0
    service.pool.shutdown()
    texts = "".join(data["text"] for name, data in events if name == "answer.delta")
    assert texts == reply.answer.text and [name for name, _ in events][-3:] == ["answer.done", "usage", "done"]
    return reply, events, service


def trace_of(reply: QaReply) -> TraceReply:
    assert reply.trace is not None
    return reply.trace


def test_a_strict_trace_fills_the_reply() -> None:
    reply, _, service = ask(render(WORDS))
    assert trace_of(reply).format == "strict" and reply.termination == "complete" and reply.answer.text == "rain"
    assert reply.perception and reply.perception.environment == ["rain", "a far engine"]
    assert reply.perception.transcript == "the train leaves at nine"
    assert reply.reasoning and reply.reasoning.reflection and reply.reasoning.reflection.changed_answer
    assert value(service.metrics.registry, "hyper_traces_total", format="strict", termination="complete") == 1


@pytest.mark.parametrize(
    ("text", "counted"),
    [
        (render(WORDS), {"hyper_reflections_total": {"changed": "true"}}),
        (render(replace(WORDS, response="rain")), {"hyper_reflections_total": {"changed": "false"}}),
        ("<THINK>x</THINK><RESPONSE>rain</RESPONSE>", {"hyper_parse_failures_total": {"kind": "weak"}}),
        ("rain", {"hyper_parse_failures_total": {"kind": "malformed"}, "hyper_sections_missing_total": {}}),
    ],
)
def test_how_well_a_trace_keeps_its_form_is_counted(text: str, counted: dict[str, dict[str, str]]) -> None:
    _, _, service = ask(text)
    found = {
        name: {tuple(sample.labels.items()) for sample in samples_of(service.metrics.registry, name) if sample.value}
        for name in ("hyper_reflections_total", "hyper_parse_failures_total", "hyper_sections_missing_total")
    }
    for name, labels in counted.items():
        assert found[name] and (not labels or found[name] == {tuple(labels.items())})
    if "hyper_reflections_total" in counted:
        assert not found["hyper_parse_failures_total"] and not found["hyper_sections_missing_total"]


def samples_of(registry: CollectorRegistry, name: str) -> list[Sample]:
    return [sample for family in registry.collect() for sample in family.samples if sample.name == name]


@pytest.mark.parametrize("style", ["letter", "text"])
def test_an_answer_has_changed_only_where_its_words_have(style: str) -> None:
    trace = CHECKPOINT.manifest.trace.model_copy(update={"answer_style": style})
    manifest = CHECKPOINT.manifest.model_copy(update={"trace": trace})
    checkpoint = Checkpoint(CHECKPOINT.path, manifest, CHECKPOINT.tokenizer, CHECKPOINT.manifest_sha256)
    choices = ("rain", "the  Sun")
    for response, index in (("Rain", 0), ("A. rain", 0), ("the sun", 1), ("B. the Sun", 1)):
        reply, _, _ = ask(render(replace(WORDS, response=response)), choices, checkpoint=checkpoint)
        assert reply.reasoning and reply.reasoning.reflection
        assert reply.reasoning.reflection.changed_answer == (reply.answer.choice_index != index), response


def test_the_answer_falls_back_to_the_response() -> None:
    reply, events, _ = ask("<THINK>hm</THINK><RESPONSE>rain and wind</RESPONSE>")
    assert (reply.answer.text, trace_of(reply).format, reply.termination) == ("rain and wind", "weak", "complete")
    assert ("answer.delta", {"text": "rain and wind"}) in events


@pytest.mark.parametrize("choices", [(), ("rain", "sun")])
@pytest.mark.parametrize("max_tokens", [1, 5, 30, 60])
def test_a_truncated_trace_is_closed_and_answered(choices: tuple[str, ...], max_tokens: int) -> None:
    reply, _, _ = ask(render(WORDS), choices, max_tokens=max_tokens)
    assert reply.termination == "truncated" and reply.answer.text in ("rain", "sun")
    assert reply.usage.completion_tokens <= max_tokens + ANSWER_TOKENS
    raw = trace_of(reply).raw
    assert raw and raw.endswith("</FINAL_ANSWER>") and raw.count("<FINAL_ANSWER>") == 1


@pytest.mark.parametrize(
    "text",
    ["", "just words", "</THINK></ASR>", "<THINK><ENV>rain", "<ASR><ASR><ASR>", "<THINK></THINK>", "<PAUSE>" * 9],
)
def test_whatever_the_model_writes_there_is_a_reply(text: str) -> None:
    for choices in ((), ("one", "two")):
        reply, _, _ = ask(text, choices, max_pauses=2)
        assert reply.termination in ("malformed", "truncated")
        assert bool(reply.answer.text) is bool(choices)
        if choices:
            assert reply.answer.scores and sum(reply.answer.scores) == pytest.approx(1)
        else:
            assert "empty_answer" in [warning.code for warning in reply.warnings]


def test_random_tokens_give_a_reply() -> None:
    random = np.random.default_rng(5)
    for _ in range(20):
        token_ids = random.integers(0, CHECKPOINT.tokenizer.vocab_size, 200).tolist()
        for choices in ((), ("one", "two")):
            reply, _, _ = ask("", choices, edit=lambda _ids, _tokenizer, ids=token_ids: ids, max_pauses=3)
            assert not choices or reply.answer.choice_index is not None
            assert reply.pause.count <= 3


def with_pauses(*sections: Section) -> Callable[[list[int], TraceTokenizer], list[int]]:
    """Return an edit that adds a <PAUSE> after the opening tag of each section."""

    def edit(token_ids: list[int], tokenizer: TraceTokenizer) -> list[int]:
        for section in sections:
            token_ids.insert(token_ids.index(tokenizer.tag_ids[section][0]) + 1, tokenizer.pause_id or 0)
        return token_ids

    return edit


def test_a_pause_costs_latent_tokens_and_shows_nothing() -> None:
    plain, _, _ = ask(render(WORDS), max_pauses=3)
    reply, events, service = ask(render(WORDS), max_pauses=3, edit=with_pauses(Section.ENV, Section.REASONING))
    assert [pause.section for pause in reply.pause.at] == ["ENV", "REASONING"]
    assert (reply.pause.count, reply.pause.latent_tokens, reply.usage.pause_tokens) == (2, 128, 128)
    assert reply.usage.completion_tokens == plain.usage.completion_tokens
    assert reply.usage.total_tokens == plain.usage.total_tokens + 128
    assert (reply.answer, reply.perception, reply.trace) == (plain.answer, plain.perception, plain.trace)
    assert [data for name, data in events if name == "pause"] == [
        {"section": "ENV", "latent_tokens": 64},
        {"section": "REASONING", "latent_tokens": 64},
    ]
    assert value(service.metrics.registry, "hyper_pauses_total", section="ENV") == 1
    assert value(service.metrics.registry, "hyper_pause_tokens_total") == 128


def test_pauses_stop_at_the_budget() -> None:
    edit = with_pauses(Section.ENV, Section.ASR, Section.REASONING)
    for max_pauses in (0, 1, 2):
        reply, _, service = ask(render(WORDS), max_pauses=max_pauses, edit=edit)
        assert reply.pause.count == max_pauses and reply.answer.text == "rain" and trace_of(reply).format == "strict"
        spent = value(service.metrics.registry, "hyper_pause_budget_spent_total")
        assert spent == (max_pauses > 0)


def test_pauses_do_not_count_against_max_tokens() -> None:
    num_tokens = ask(render(WORDS))[0].usage.completion_tokens
    reply, _, _ = ask(render(WORDS), max_tokens=num_tokens, max_pauses=2, edit=with_pauses(Section.ENV, Section.ASR))
    assert reply.termination == "complete" and reply.pause.count == 2


@pytest.mark.parametrize("num_hidden", [0, 3, 200])
def test_a_sampled_pause_is_hidden_and_bounded(num_hidden: int) -> None:
    pause = CHECKPOINT.manifest.pause.model_copy(update={"mode": "sampled", "latent_tokens": 8})
    manifest = CHECKPOINT.manifest.model_copy(update={"pause": pause})
    checkpoint = Checkpoint(CHECKPOINT.path, manifest, CHECKPOINT.tokenizer, CHECKPOINT.manifest_sha256)

    def edit(token_ids: list[int], tokenizer: TraceTokenizer) -> list[int]:
        at = token_ids.index(tokenizer.tag_ids[Section.REASONING][0]) + 1
        hidden = [tokenizer.pause_id or 0, *tokenizer.encode_text("h" * num_hidden), tokenizer.pause_close_id or 0]
        return [*token_ids[:at], *hidden, *token_ids[at:]]

    reply, events, _ = ask(render(WORDS), checkpoint=checkpoint, max_pauses=1, edit=edit)
    assert reply.pause.count == 1 and [pause.section for pause in reply.pause.at] == ["REASONING"]
    # At most eight hidden tokens, and the two tags around them.
    assert reply.usage.pause_tokens == min(num_hidden, 8) + 2
    assert [data["latent_tokens"] for name, data in events if name == "pause"] == [min(num_hidden, 8)]
    if num_hidden < 8:
        assert (
            "h" * 3 not in (trace_of(reply).raw or "")
            and reply.answer.text == "rain"
            and trace_of(reply).format == "strict"
        )


def test_only_the_answer_is_shown_when_asked_for() -> None:
    reply, events, _ = ask(render(WORDS), shows_reasoning=False)
    assert (reply.perception, reply.reasoning, trace_of(reply).raw) == (None, None, None)
    assert trace_of(reply).format == "strict" and reply.answer.text == "rain"
    assert {name for name, _ in events} == {"answer.delta", "answer.done", "usage", "done"}


def text_style_checkpoint() -> Checkpoint:
    """Return the scripted checkpoint in the form of an adopted one: tags are plain text."""
    tokenizer = TraceTokenizer(CHECKPOINT.tokenizer.tokenizer, TagStyle.TEXT)
    trace = CHECKPOINT.manifest.trace.model_copy(update={"tag_style": TagStyle.TEXT, "answer_style": "text"})
    manifest = CHECKPOINT.manifest.model_copy(update={"trace": trace})
    return Checkpoint(CHECKPOINT.path, manifest, tokenizer, CHECKPOINT.manifest_sha256)


def test_plain_text_tags_and_choices_by_their_words() -> None:
    def spell_out(_: list[int], tokenizer: TraceTokenizer) -> list[int]:
        return [*tokenizer.encode_text(render(WORDS)), tokenizer.im_end_id]

    checkpoint = text_style_checkpoint()
    reply, _, service = ask("", checkpoint=checkpoint, edit=spell_out)
    assert value(service.metrics.registry, "hyper_parse_failures_total", kind="trailing_text") == 0
    assert (reply.answer.text, trace_of(reply).format, reply.termination) == ("rain", "strict", "complete")
    # Here the engine cannot detect the end of an answer, so a model may continue.
    _, _, service = ask(
        "", checkpoint=checkpoint, edit=lambda _, tokenizer: tokenizer.encode_text(render(WORDS) + " and more")
    )
    assert value(service.metrics.registry, "hyper_parse_failures_total", kind="trailing_text") == 1
    choices = ("the sound of rain", "sun")
    reply, _, _ = ask("", choices, checkpoint=checkpoint, edit=spell_out)
    assert reply.answer.text in choices and reply.termination == "complete" and trace_of(reply).format == "strict"
    assert reply.answer.scores and sum(reply.answer.scores) == pytest.approx(1)


def test_a_checkpoint_that_answers_in_words_has_the_words_written_into_its_trace() -> None:
    trace = CHECKPOINT.manifest.trace.model_copy(update={"answer_style": "text"})
    manifest = CHECKPOINT.manifest.model_copy(update={"trace": trace})
    checkpoint = Checkpoint(CHECKPOINT.path, manifest, CHECKPOINT.tokenizer, CHECKPOINT.manifest_sha256)
    choices = ("rain", "rain  and wind", "sun")
    reply, _, _ = ask(render(WORDS), choices, checkpoint=checkpoint)
    assert reply.answer.choice_index is not None and reply.answer.choice == choices[reply.answer.choice_index]
    assert reply.answer.scores and sum(reply.answer.scores) == pytest.approx(1)
    words = " ".join(reply.answer.text.split())
    raw = trace_of(reply).raw
    assert raw is not None and raw.endswith(f"<FINAL_ANSWER>{words}</FINAL_ANSWER>")
    assert trace_of(reply).format == "strict"


def test_choices_may_look_like_markup() -> None:
    choices = ("<THINK>", "</FINAL_ANSWER>")
    reply, _, _ = ask(render(WORDS), choices)
    assert reply.answer.text in choices and trace_of(reply).format == "strict"


def value(registry: CollectorRegistry, name: str, **labels: str) -> float:
    return registry.get_sample_value(name, labels) or 0.0
