"""Lets a checkpoint answer a suite's items in this process, through vLLM, with the service's prompt, gate and parser.

Choices are scored as the service scores them. Knows nothing of truths and figures.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from hyper_model.errors import HyperError
from hyper_model.pause import GateSettings
from hyper_model.trace import build_prompt
from training.evaluation.score import Reply
from training.evaluation.suites.item import Item
from training.rl.rollout import PROMPTS_AT_ONCE, Completion, Prompt, VllmBackend

NUM_TIMED = 20
"""Items that are asked once more, each alone, to see how long one takes."""

_NUM_WARM_UP = 2

NUM_PROBED = 300
"""Items whose hidden states are looked at."""


def make_prompt(backend: VllmBackend, item: Item, samples_S: np.ndarray) -> Prompt:
    """Returns the prompt that asks an item of a clip."""
    truth = item.truth
    return Prompt(build_prompt(backend.checkpoint.tokenizer, truth.question, truth.choices), samples_S, truth.choices)


def answer(
    backend: VllmBackend,
    items: Sequence[Item],
    *,
    gate: GateSettings | None,
    cuts_long: bool = False,
    use_tqdm: bool = True,
) -> list[Reply]:
    """Asks every item; a clip that cannot be read or is too long gets no reply, and says why."""
    replies: list[Reply] = []
    with tqdm(total=len(items), desc="questions", disable=not use_tqdm) as bar:
        # A batch at a time, so that a data set's clips need not be held all at once.
        for start in range(0, len(items), PROMPTS_AT_ONCE):
            some = items[start : start + PROMPTS_AT_ONCE]
            replies += _answer_some(backend, some, gate, cuts_long=cuts_long)
            bar.update(len(some))
    return replies


def complete_for_probe(
    backend: VllmBackend, items: Sequence[Item], *, gate: GateSettings | None, cuts_long: bool = False
) -> tuple[list[Prompt], list[Completion], list[str]]:
    """Returns prompts, completions and clusters of the first items whose clips can be read, for `latent_probe`."""
    prompts: list[Prompt] = []
    clusters: list[str] = []
    for item in items:
        if len(prompts) == NUM_PROBED:
            break
        try:
            prompts.append(make_prompt(backend, item, item.load(cuts_long=cuts_long)))
        except HyperError:
            continue
        clusters.append(item.voice)
    return prompts, backend.complete(prompts, gate=gate, use_tqdm=False), clusters


def _answer_some(
    backend: VllmBackend, items: Sequence[Item], gate: GateSettings | None, *, cuts_long: bool
) -> list[Reply]:
    replies: list[Reply | None] = []
    prompts: list[Prompt] = []
    for item in items:
        try:
            prompts.append(make_prompt(backend, item, item.load(cuts_long=cuts_long)))
            replies.append(None)
        except HyperError as error:
            replies.append(Reply.failed(str(error)))
    completions = iter(backend.complete(prompts, gate=gate, use_tqdm=False))
    return [
        _read(backend, item, next(completions)) if reply is None else reply
        for item, reply in zip(items, replies, strict=True)
    ]


def _read(backend: VllmBackend, item: Item, completion: Completion) -> Reply:
    parser = backend.parser()
    for token_id in completion.token_ids:
        parser.feed(token_id)
    parser.finish()
    parsed, choices = parser.result, item.truth.choices
    choice = int(np.argmax(completion.choice_scores)) if choices else None
    return Reply(
        parsed,
        choice,
        (parsed.answer_text or "") if choice is None else choices[choice],
        has_tokens=True,
        num_pauses=completion.gate.num_pauses if completion.gate else 0,
        is_aborted=completion.gate.is_aborted if completion.gate else False,
    )


def time_alone(
    backend: VllmBackend, items: Sequence[Item], *, gate: GateSettings | None, cuts_long: bool = False
) -> list[float]:
    """Returns the seconds that each of the first items takes when it is asked alone; call it before `answer`.

    From samples to the scored answer, in process: no decoding of files and no HTTP. A clip that was asked before would
    be found in the engine's caches.
    """
    seconds: list[float] = []
    for item in items:
        if len(seconds) == NUM_TIMED + _NUM_WARM_UP:
            break
        try:
            prompt = make_prompt(backend, item, item.load(cuts_long=cuts_long))
        except HyperError:
            continue
        started_s = time.perf_counter()
        backend.complete([prompt], gate=gate, use_tqdm=False)
        seconds.append(time.perf_counter() - started_s)
    return seconds[_NUM_WARM_UP:]
