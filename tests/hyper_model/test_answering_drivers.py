"""The service and the evaluation answer alike: both drivers get the same tokens and results from the same checkpoint.

The service's driver streams each answer from vLLM's own processes, and feeds the span of a pause at once. The batched
driver runs in a process of its own, and the gate forces its spans token by token.
"""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from hyper_model.answering import AnswerResult, Question
from hyper_model.audio import Waveform, decode
from hyper_model.checkpoint import Checkpoint, open_checkpoint
from hyper_model.manifest import AnswerKind, ConfidenceFields
from hyper_model.pause import GateSettings
from hyper_model.trace import Termination, build_prompt
from server.answering import Answerer, AnswerRun, discard
from server.request_context import RequestContext
from tests.conftest import VllmHost
from tests.paths import CLIPS

TRUTH: list[dict[str, Any]] = json.loads((CLIPS / "truth.json").read_text(encoding="utf-8"))

WHOLE, BROKEN_OFF, BROKEN_OFF_AT_ONCE = 300, 25, 1

# Two engines start here, one after the other.
pytestmark = pytest.mark.timeout(600)


@dataclass(frozen=True)
class Case:
    """One question: its clip, its choices if any, and the settings of the procedure."""

    clip: int
    has_choices: bool
    max_tokens: int
    gate: str
    style: str = "text"
    temperature: float | None = None


CASES = [
    *(
        Case(clip, has_choices, max_tokens, gate)
        for clip in (1, 4)
        for has_choices in (True, False)
        for max_tokens, gate in ((WHOLE, "on"), (WHOLE, "off"), (BROKEN_OFF, "on"), (BROKEN_OFF_AT_ONCE, "off"))
    ),
    *(Case(2, True, max_tokens, "on", "letter") for max_tokens in (WHOLE, BROKEN_OFF)),
    Case(3, True, WHOLE, "gives up", "letter"),
    Case(3, False, WHOLE, "gives up"),
    *(
        Case(4, has_choices, max_tokens, "on", temperature=3.0)
        for has_choices in (True, False)
        for max_tokens in (WHOLE, BROKEN_OFF)
    ),
]


def styled(checkpoint: Checkpoint, style: str, temperature: float | None) -> Checkpoint:
    """The same checkpoint, as if it answered with letters or with words, with a confidence of this temperature."""
    trace = checkpoint.manifest.trace.model_copy(update={"answer_style": style})
    confidence = None
    if temperature is not None:
        kind = AnswerKind(temperature=temperature, num_answers=9, ece_before=0, ece_after=0, curve_before=(), curve=())
        confidence = ConfidenceFields(source="made up", choices=kind, open=kind)
    changes = {"trace": trace, "confidence": confidence}
    return replace(checkpoint, manifest=checkpoint.manifest.model_copy(update=changes))


def group_of(case: Case) -> tuple[int, str, str, float]:
    """The settings that one batch shares; a temperature of 0 stands for none."""
    return case.max_tokens, case.gate, case.style, case.temperature or 0.0


def gate_of(checkpoint: Checkpoint, name: str) -> GateSettings | None:
    """The gate of a case; one that gives up does so at its first full window."""
    gate = GateSettings.of(checkpoint.manifest, checkpoint.tokenizer)
    assert gate is not None
    return {"on": gate, "off": None, "gives up": replace(gate, tau_pause=1.0, tau_abort=1.0)}[name]


def clip_of(case: Case) -> Waveform:
    return decode((CLIPS / TRUTH[case.clip]["file"]).read_bytes())


def choices_of(case: Case) -> tuple[str, ...]:
    return tuple(TRUTH[case.clip]["choices"]) if case.has_choices else ()


def answer_in_batches(directory: Path) -> list[AnswerResult]:
    """Answer every case by the batched driver; runs in a process of its own."""
    from training.rl.rollout import Prompt, VllmBackend

    checkpoint = open_checkpoint(directory, verify=False)
    backend = VllmBackend(checkpoint, dtype="float32")
    found: dict[Case, AnswerResult] = {}
    for group in sorted({group_of(case) for case in CASES}):
        max_tokens, gate, style, temperature = group
        cases = [case for case in CASES if group_of(case) == group]
        backend.checkpoint = styled(checkpoint, style, temperature or None)
        prompts = [
            Prompt(
                build_prompt(checkpoint.tokenizer, TRUTH[case.clip]["question"], choices_of(case)),
                clip_of(case).samples_S,
                choices_of(case),
            )
            for case in cases
        ]
        settings = gate_of(checkpoint, gate)
        completions = backend.answer(prompts, max_tokens=max_tokens, gate=settings, use_tqdm=False)
        for case, completion in zip(cases, completions, strict=True):
            found[case] = completion.result
            if settings is not None:
                assert completion.gate is not None and completion.gate.num_pauses == completion.result.num_pauses
                assert completion.gate.is_aborted == (gate == "gives up")
    return [found[case] for case in CASES]


async def answer_as_served(answerer: Answerer) -> list[AnswerResult]:
    """Answer every case by the service's driver, one after the other."""
    found: list[AnswerResult] = []
    for case in CASES:
        checkpoint = styled(answerer.checkpoint, case.style, case.temperature)
        prompt = build_prompt(checkpoint.tokenizer, TRUTH[case.clip]["question"], choices_of(case))
        gate = gate_of(checkpoint, case.gate)
        question = Question(tuple(prompt), choices_of(case), max_tokens=case.max_tokens, gate=gate)
        context = RequestContext("case", is_body_complete=True)
        run = AnswerRun(replace(answerer, checkpoint=checkpoint), context, question, clip_of(case))
        found.append(await run.run(discard))
    return found


@pytest.fixture(scope="module")
def batched(pausing_checkpoint: Path) -> list[AnswerResult]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(answer_in_batches, pausing_checkpoint).result()


@pytest.fixture(scope="module")
def served(pausing_host: VllmHost, batched: list[AnswerResult]) -> list[AnswerResult]:
    # After the other, so that one engine runs at a time.
    del batched
    live = pausing_host.live()
    return live.run(answer_as_served(live.service.answerer), timeout_s=600)


def test_both_drivers_get_the_same_tokens_and_results(batched: list[AnswerResult], served: list[AnswerResult]) -> None:
    for case, ours, theirs in zip(CASES, batched, served, strict=True):
        assert ours.token_ids == theirs.token_ids, case
        assert ours.scores == pytest.approx(theirs.scores, abs=1e-3), case
        assert ours.report.lowest == pytest.approx(theirs.report.lowest, abs=1e-3), case
        assert ours.report.confidences == pytest.approx(theirs.report.confidences, abs=1e-3), case
        # All else to the letter: texts, trace, termination, counts.
        assert ours.confidence == pytest.approx(theirs.confidence, abs=1e-3), case
        others = {"scores": (), "text_confidence": None}
        assert replace(ours, report=theirs.report, **others) == replace(theirs, **others), case
        is_rated = case.has_choices or case.temperature is not None
        assert (ours.confidence is not None) == is_rated, case


def test_the_cases_cover_what_the_drivers_could_do_differently(served: list[AnswerResult]) -> None:
    ends = {(case.has_choices, result.parsed.termination) for case, result in zip(CASES, served, strict=True)}
    wanted = (Termination.COMPLETE, Termination.TRUNCATED, Termination.ABORTED)
    assert ends >= {(has_choices, end) for has_choices in (True, False) for end in wanted}
    assert sum(result.num_pauses for result in served) >= 6
    letters = [
        result for case, result in zip(CASES, served, strict=True) if case.style == "letter" and case.has_choices
    ]
    assert letters and all(result.parsed.trace.final_answer == _with_letter(result) for result in letters)
    open_and_broken = [
        result
        for case, result in zip(CASES, served, strict=True)
        if not case.has_choices and result.parsed.termination is Termination.TRUNCATED
    ]
    assert any(result.text for result in open_and_broken), "an open question is answered after its trace broke off"


def _with_letter(result: AnswerResult) -> str:
    assert result.choice_index is not None
    return f"{'ABCDEFGH'[result.choice_index]}. {result.text}"
