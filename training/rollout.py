"""Generates completions with vLLM in this process: what evaluation, calibration, and later rollouts, run on.

Takes and returns token ids; choices are scored as the service scores them, and pauses are decided by the gate that
serves, its spans forced token by token: the same tokens as the service's, at another price. Only where a completion
was given up the model reads one token more before it answers: the one that says so. Knows nothing of rewards or
metrics. The environment that vLLM reads is set before it is imported.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from hyper_model.audio import SAMPLE_RATE_HZ
from hyper_model.checkpoint import Checkpoint
from hyper_model.engine_environment import prepare_environment
from hyper_model.errors import CheckpointError
from hyper_model.pause import Gate, GateSettings, replay
from hyper_model.trace import PauseMode, Section, TagStyle
from hyper_model.trace_parser import TraceParser

PROMPTS_AT_ONCE = 48
"""Few enough that the encoder's output of each clip is still cached when its choices are scored."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """One question about one clip."""

    token_ids: list[int]
    samples_S: np.ndarray  # noqa: N815  # the axis suffix
    choices: tuple[str, ...]


@dataclass(frozen=True)
class Completion:
    """What the model wrote, and how it scored the choices (log-probabilities, a number a choice).

    Attributes:
        gate: A gate that has followed what the model itself wrote; None unless one was asked for.
        written_ids, confidences: What that was, and the probability of the likeliest token at each place.
    """

    token_ids: list[int]
    choice_scores: tuple[float, ...]
    gate: Gate | None = None
    written_ids: tuple[int, ...] = ()
    confidences: tuple[float, ...] = ()


class VllmBackend:
    """Holds one in-process engine on a checkpoint.

    Raises:
        CheckpointError: its tags are plain text, which no single token ends; ask such a checkpoint through the service.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
        max_num_seqs: int = 32,
    ) -> None:
        if checkpoint.manifest.trace.tag_style is not TagStyle.TOKEN:
            raise CheckpointError(f"{checkpoint.path}: only checkpoints whose tags are tokens can be run here")
        prepare_environment()
        # In this process: weights can then be replaced without a copy on disk.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        from vllm import LLM, EngineArgs
        from vllm.platforms import current_platform

        from hyper_model.pause_vllm import processor_name

        self.checkpoint = checkpoint
        self.numbers = itertools.count()
        is_v2 = EngineArgs(model=str(checkpoint.path)).create_engine_config().use_v2_model_runner
        self.llm = LLM(
            model=str(checkpoint.path),
            logits_processors=[processor_name(is_v2=is_v2)],
            dtype=dtype,
            max_model_len=checkpoint.manifest.max_model_len,
            max_num_seqs=max_num_seqs,
            limit_mm_per_prompt={"audio": 1},
            enable_prefix_caching=True,
            enforce_eager=current_platform.is_cpu(),
            generation_config="vllm",
            seed=0,
        )
        # Its renderer asks for one thread a prompt, and its worker, in the same process here, says each time that it
        # does not let it.
        logging.getLogger("vllm.v1.worker.cpu_worker").setLevel(logging.ERROR)

    @property
    def gate(self) -> GateSettings | None:
        """The checkpoint's gate, with its whole budget; None where it has none."""
        return GateSettings.of(self.checkpoint.manifest, self.checkpoint.tokenizer)

    def complete(
        self,
        prompts: Sequence[Prompt],
        *,
        max_tokens: int = 512,
        gate: GateSettings | None = None,
        is_armed: bool = True,
        use_tqdm: bool = True,
    ) -> list[Completion]:
        """Complete every prompt greedily; where there are choices, up to FINAL_ANSWER, then score them.

        Args:
            max_tokens: Of visible tokens.
            gate: Lets completions pause; None, and none does.
            is_armed: False to let the gate only read along: what it would have done, and nothing is changed.
        """
        completions: list[Completion] = []
        with tqdm(total=len(prompts), desc="questions", disable=not use_tqdm) as bar:
            for start in range(0, len(prompts), PROMPTS_AT_ONCE):
                some = prompts[start : start + PROMPTS_AT_ONCE]
                completions += self._complete_some(some, max_tokens, gate, is_armed=is_armed)
                bar.update(len(some))
        return completions

    def _complete_some(
        self, prompts: Sequence[Prompt], max_tokens: int, gate: GateSettings | None, *, is_armed: bool
    ) -> list[Completion]:
        from vllm import SamplingParams

        from hyper_model.pause_vllm import arguments

        tokenizer = self.checkpoint.tokenizer
        (final_id,) = tokenizer.open_ids(Section.FINAL_ANSWER)
        fields: dict[str, Any] = {"max_tokens": max_tokens}
        if gate is not None:
            fields["logprobs"] = 1
        if gate is not None and is_armed:
            fields["max_tokens"] += gate.max_pauses * gate.span_tokens
        else:
            fields["logit_bias"] = {i: -100.0 for i in (tokenizer.pause_id, tokenizer.pause_close_id) if i is not None}

        def params(prompt: Prompt) -> SamplingParams:
            stop = [*tokenizer.stop_ids, *([final_id] if prompt.choices else [])]
            extra_args = arguments(Gate(gate), f"rollout-{next(self.numbers)}") if gate and is_armed else None
            return SamplingParams(
                temperature=0.0, stop_token_ids=stop, detokenize=False, extra_args=extra_args, **fields
            )

        outputs = self._generate(prompts, [p.token_ids for p in prompts], [params(p) for p in prompts])
        sampled = [tuple(output.outputs[0].token_ids) for output in outputs]
        known = [_confidences(output.outputs[0].logprobs) for output in outputs]
        if gate is not None and is_armed:
            # vLLM counts the tokens of pauses too, so it was given room for all of them.
            kept = [num_kept(gate, token_ids, max_tokens) for token_ids in sampled]
            sampled = [token_ids[:num] for token_ids, num in zip(sampled, kept, strict=True)]
            known = [confidences[:num] for confidences, num in zip(known, kept, strict=True)]
        gates = [replay(gate, *each) if gate else None for each in zip(sampled, known, strict=True)]
        ends = set(tokenizer.stop_ids)
        written = [[token for token in token_ids if token not in ends] for token_ids in sampled]
        asked = [i for i, prompt in enumerate(prompts) if prompt.choices]
        for i in asked:
            parser = self.parser()
            for token_id in written[i]:
                parser.feed(token_id)
            written[i] += parser.ids_to_final_answer()
        scores = self._score(prompts, written, asked)
        for i, totals in scores.items():
            written[i] += self._candidates(prompts[i])[int(np.argmax(totals))]
            if self._answers_by_letter:
                written[i] += tokenizer.close_ids(Section.FINAL_ANSWER)
        return [
            Completion(tokens, scores.get(i, ()), gates[i], sampled[i], known[i]) for i, tokens in enumerate(written)
        ]

    def parser(self) -> TraceParser:
        """Returns a reader of this checkpoint's completions."""
        pause = self.checkpoint.manifest.pause
        return TraceParser(
            self.checkpoint.tokenizer, pause_mode=PauseMode(pause.mode), latent_tokens=pause.latent_tokens
        )

    @property
    def _answers_by_letter(self) -> bool:
        return self.checkpoint.manifest.trace.answer_style == "letter"

    def _candidates(self, prompt: Prompt) -> list[list[int]]:
        return self.checkpoint.tokenizer.choice_ids(prompt.choices, by_letter=self._answers_by_letter)

    def _score(
        self, prompts: Sequence[Prompt], written: list[list[int]], asked: list[int]
    ) -> dict[int, tuple[float, ...]]:
        """Return the log-probability of every choice of the prompts `asked`, as the service scores them."""
        from vllm import SamplingParams

        # vLLM must write a token; which one does not matter.
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        jobs = [(i, candidate) for i in asked for candidate in self._candidates(prompts[i])]
        outputs = self._generate(
            [prompts[i] for i, _ in jobs],
            [[*prompts[i].token_ids, *written[i], *candidate] for i, candidate in jobs],
            [params] * len(jobs),
        )
        totals: dict[int, tuple[float, ...]] = dict.fromkeys(asked, ())
        for (i, candidate), output in zip(jobs, outputs, strict=True):
            tail = output.prompt_logprobs[-len(candidate) :]
            total = sum(logprobs[token].logprob for token, logprobs in zip(candidate, tail, strict=True))
            totals[i] = (*totals[i], total)
        return totals

    def _generate(self, prompts: Sequence[Prompt], ids: list[list[int]], params: list[Any]) -> list[Any]:
        inputs: list[Any] = [
            {"prompt_token_ids": token_ids, "multi_modal_data": {"audio": [(prompt.samples_S, SAMPLE_RATE_HZ)]}}
            for prompt, token_ids in zip(prompts, ids, strict=True)
        ]
        return self.llm.generate(inputs, params, use_tqdm=False) if inputs else []


def num_kept(settings: GateSettings, token_ids: Sequence[int], max_visible: int) -> int:
    """Returns how many tokens of a completion stand up to the last visible one that is allowed."""
    gate, num_visible = Gate(settings), 0
    for place, token_id in enumerate(token_ids):
        is_visible = not gate.is_pausing and token_id not in (settings.open_id, settings.close_id)
        gate.push(token_id, None)
        num_visible += is_visible
        if num_visible == max_visible:
            return place + 1
    return len(token_ids)


def _confidences(logprobs: Any) -> tuple[float, ...]:
    """Return the probability of the likeliest token at each of vLLM's positions; none where it was not asked."""
    return tuple(math.exp(max(each.logprob for each in position.values())) for position in logprobs or ())
