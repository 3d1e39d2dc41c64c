"""Let a checkpoint answer a suite's items in this process, through vLLM and the procedure that serves.

Has no notion of figures.
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
"""Items that are asked once more, each alone, to see how long one takes."""

_NUM_WARM_UP = 2

NUM_PROBED = 300
"""Items whose hidden states are looked at."""


def load_prompt(backend: VllmBackend, item: Item, gate: GateSettings | None, *, cuts_long: bool) -> Prompt:
    """Load an item's clip, and return the prompt that asks about it.

    Raises:
        HyperError: The clip cannot be read or is too long, or the model has no room to answer.
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
        has_tokens=True,
        num_pauses=result.num_pauses,
        is_aborted=result.parsed.termination is Termination.ABORTED,
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
            prompt = load_prompt(backend, item, gate, cuts_long=cuts_long)
        except HyperError:
            continue
        started_s = time.perf_counter()
        backend.answer([prompt], gate=gate, use_tqdm=False)
        seconds.append(time.perf_counter() - started_s)
    return seconds[_NUM_WARM_UP:]
