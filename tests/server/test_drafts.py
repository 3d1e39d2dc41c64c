"""Drafts change no token, confidence or score of the service, with and without pauses, alone and in a batch.

Two engines on the embedded checkpoint with a gate of three pauses per trace, in float32: one with drafts in any batch,
one without. The clips are those of `test_parity`, which compares the default engine with a plain loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from hyper_model.answering import AnswerResult, Question
from hyper_model.trace import build_prompt
from server.answering import AnswerRun, discard
from server.request_context import RequestContext
from tests.conftest import VllmHost
from tests.server.test_parity import clips

MAX_TOKENS = 300
NUM_TOGETHER = 10


@pytest.fixture(scope="module")
def with_drafts(pausing_checkpoint: Path) -> Iterator[VllmHost]:
    """Host of the engine with drafts in any batch."""
    host = VllmHost(pausing_checkpoint, drafts="on")
    yield host
    host.close()


@pytest.fixture(scope="module")
def without_drafts(pausing_checkpoint: Path) -> Iterator[VllmHost]:
    """Host of the engine without drafts."""
    host = VllmHost(pausing_checkpoint, drafts="off")
    yield host
    host.close()


def answers(host: VllmHost, *, max_pauses: int, num_together: int) -> list[AnswerResult]:
    """Ask about all clips, some at a time; open questions and choices take turns in a batch."""
    answerer = host.live().service.answerer
    assert answerer.gate is not None
    gate = answerer.gate.with_budget(max_pauses)

    async def ask() -> list[AnswerResult]:
        limit = asyncio.Semaphore(num_together)

        async def one(number: int) -> AnswerResult:
            waveform, text, choices = asked[number]
            prompt = build_prompt(answerer.checkpoint.tokenizer, text, choices)
            question = Question(tuple(prompt), choices, max_tokens=MAX_TOKENS, gate=gate)
            context = RequestContext(f"drafts-{num_together}-{max_pauses}-{number}", is_body_complete=True)
            async with limit:
                return await AnswerRun(answerer, context, question, waveform).run(discard)

        return await asyncio.gather(*map(one, range(len(asked))))

    asked = clips()
    asked = [row for pair in zip(asked[:10], asked[10:], strict=True) for row in pair]
    return host.live().run(ask())


@pytest.mark.parametrize("max_pauses", [3, 0], ids=["pauses", "no-pauses"])
def test_twenty_clips_get_equal_tokens_confidences_and_scores_with_and_without_drafts(
    with_drafts: VllmHost, without_drafts: VllmHost, max_pauses: int
) -> None:
    expected = answers(without_drafts, max_pauses=max_pauses, num_together=1)
    together = answers(without_drafts, max_pauses=max_pauses, num_together=NUM_TOGETHER)
    assert [result.token_ids for result in together] == [result.token_ids for result in expected]
    assert not any(result.report.num_drafted for result in expected)
    if max_pauses:
        assert sum(result.num_pauses for result in expected) >= 40
    for num_together in (1, NUM_TOGETHER):
        found = answers(with_drafts, max_pauses=max_pauses, num_together=num_together)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.token_ids == theirs.token_ids
            assert (ours.num_pauses, ours.num_pause_tokens) == (theirs.num_pauses, theirs.num_pause_tokens)
            assert ours.scores == pytest.approx(theirs.scores, abs=1e-4)
            assert ours.report.lowest == pytest.approx(theirs.report.lowest, abs=1e-4)
            assert ours.report.confidences == pytest.approx(theirs.report.confidences, abs=1e-4)
        num_accepted = sum(result.report.num_accepted for result in found)
        num_written = sum(result.num_completion_tokens for result in found)
        print(f"{num_together} together: {num_accepted} of {num_written} tokens were drafted")
        assert num_accepted > 0.2 * num_written
