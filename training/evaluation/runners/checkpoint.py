"""Answer a suite's items with a checkpoint in this process, through vLLM and the serving procedure.

This module depends on no figure.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from tqdm import tqdm

from hyper_model.errors import HyperError, PromptError
from hyper_model.pause import GateSettings
from hyper_model.trace import Termination, build_prompt
from training.evaluation.score import Reply
from training.evaluation.suites.item import Item
from training.rl.rollout import PROMPTS_AT_ONCE, Completion, Prompt, VllmBackend

NUM_TIMED = 20
"""Number of items answered once more, each alone, to measure latency."""

_NUM_WARM_UP = 2

NUM_PROBED = 300
"""Number of items for the latent probe."""


def load_prompt(backend: VllmBackend, item: Item, gate: GateSettings | None, *, cuts_long: bool) -> Prompt:
    """Load an item's clip, and return the prompt with its question.

    Raises:
        HyperError: The clip is unreadable or too long, or leaves no tokens for an answer.
    """
    truth = item.truth
    token_ids = build_prompt(backend.checkpoint.tokenizer, truth.question, truth.choices)
    prompt = Prompt(token_ids, item.load(cuts_long=cuts_long), truth.choices)
    if backend.room(prompt, gate) < 1:
        raise PromptError("the question, the choices and the clip leave the model no room to answer")
    return prompt


def answer(
    backend: VllmBackend,
    items: Sequence[Item],
    *,
    gate: GateSettings | None,
    cuts_long: bool = False,
    use_tqdm: bool = True,
) -> list[Reply]:
    """Answer every item; an unreadable or too long clip gives a reply with an error."""
    replies: list[Reply] = []
    with tqdm(total=len(items), desc="questions", disable=not use_tqdm) as bar:
        # One batch at a time, to bound the number of clips in memory.
        for start in range(0, len(items), PROMPTS_AT_ONCE):
            batch = items[start : start + PROMPTS_AT_ONCE]
            replies += _answer_some(backend, batch, gate, cuts_long=cuts_long)
            bar.update(len(batch))
    return replies


def complete_for_probe(
    backend: VllmBackend, items: Sequence[Item], *, gate: GateSettings | None, cuts_long: bool = False
) -> tuple[list[Prompt], list[Completion], list[str]]:
    """Return prompts, completions and clusters of the first items with readable clips, for `latent_probe`."""
    prompts: list[Prompt] = []
    clusters: list[str] = []
    for item in items:
        if len(prompts) == NUM_PROBED:
            break
        try:
            prompts.append(load_prompt(backend, item, gate, cuts_long=cuts_long))
        except HyperError:
            continue
        clusters.append(item.voice)
    return prompts, backend.answer(prompts, gate=gate, use_tqdm=False), clusters


def _answer_some(
    backend: VllmBackend, items: Sequence[Item], gate: GateSettings | None, *, cuts_long: bool
) -> list[Reply]:
    replies: list[Reply | None] = []
    prompts: list[Prompt] = []
    for item in items:
        try:
            prompts.append(load_prompt(backend, item, gate, cuts_long=cuts_long))
            replies.append(None)
        except HyperError as error:
            replies.append(Reply.failed(str(error)))
    completions = iter(backend.answer(prompts, gate=gate, use_tqdm=False))
    return [_reply(next(completions)) if reply is None else reply for reply in replies]


def _reply(completion: Completion) -> Reply:
    result = completion.result
    return Reply(
        result.parsed,
        result.choice_index,
        result.text,
        result.confidence,
        has_tokens=True,
        num_pauses=result.num_pauses,
        is_aborted=result.parsed.termination is Termination.ABORTED,
    )


def time_alone(
    backend: VllmBackend, items: Sequence[Item], *, gate: GateSettings | None, cuts_long: bool = False
) -> list[float]:
    """Return the latency in seconds of each of the first items, answered alone; call it before `answer`.

    It is measured from samples to the scored answer, in process: no decoding of files and no HTTP. After `answer`, the
    engine's caches would already hold the clips.
    """
    seconds: list[float] = []
    for item in items:
        if len(seconds) == NUM_TIMED + _NUM_WARM_UP:
            break
        try:
            prompt = load_prompt(backend, item, gate, cuts_long=cuts_long)
        except HyperError:
            continue
        started_s = time.perf_counter()
        backend.answer([prompt], gate=gate, use_tqdm=False)
        seconds.append(time.perf_counter() - started_s)
    return seconds[_NUM_WARM_UP:]
