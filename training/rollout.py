"""Generates completions with vLLM in this process: what evaluation, and later rollouts, run on.

Takes and returns token ids; choices are scored as the service scores them. Knows nothing of rewards or metrics.
The environment that vLLM reads is set before it is imported.
"""

from __future__ import annotations

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
from hyper_model.trace import Section, TagStyle
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
    """What the model wrote, and how it scored the choices (log-probabilities, a number a choice)."""

    token_ids: list[int]
    choice_scores: tuple[float, ...]


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
        from vllm import LLM
        from vllm.platforms import current_platform

        self.checkpoint = checkpoint
        self.llm = LLM(
            model=str(checkpoint.path),
            dtype=dtype,
            max_model_len=checkpoint.manifest.max_model_len,
            max_num_seqs=max_num_seqs,
            limit_mm_per_prompt={"audio": 1},
            enable_prefix_caching=True,
            enforce_eager=current_platform.is_cpu(),
            generation_config="vllm",
            seed=0,
        )

    def complete(self, prompts: Sequence[Prompt], *, max_tokens: int = 512, use_tqdm: bool = True) -> list[Completion]:
        """Complete every prompt greedily; where there are choices, up to FINAL_ANSWER, then score them."""
        completions: list[Completion] = []
        with tqdm(total=len(prompts), desc="questions", disable=not use_tqdm) as bar:
            for start in range(0, len(prompts), PROMPTS_AT_ONCE):
                some = prompts[start : start + PROMPTS_AT_ONCE]
                completions += self._complete_some(some, max_tokens)
                bar.update(len(some))
        return completions

    def _complete_some(self, prompts: Sequence[Prompt], max_tokens: int) -> list[Completion]:
        from vllm import SamplingParams

        tokenizer = self.checkpoint.tokenizer
        (final_id,) = tokenizer.open_ids(Section.FINAL_ANSWER)
        banned = {token_id: -100.0 for token_id in (tokenizer.audio_id, tokenizer.pause_id) if token_id is not None}

        def params(prompt: Prompt) -> SamplingParams:
            stop = [*tokenizer.stop_ids, *([final_id] if prompt.choices else [])]
            return SamplingParams(
                max_tokens=max_tokens, temperature=0.0, stop_token_ids=stop, logit_bias=banned, detokenize=False
            )

        outputs = self._generate(prompts, [p.token_ids for p in prompts], [params(p) for p in prompts])
        ends = set(tokenizer.stop_ids)
        written = [[token for token in output.outputs[0].token_ids if token not in ends] for output in outputs]
        asked = [i for i, prompt in enumerate(prompts) if prompt.choices]
        for i in asked:
            parser = TraceParser(tokenizer)
            for token_id in written[i]:
                parser.feed(token_id)
            written[i] += parser.ids_to_final_answer()
        scores = self._score(prompts, written, asked)
        for i, totals in scores.items():
            written[i] += self._candidates(prompts[i])[int(np.argmax(totals))]
            if self._answers_by_letter:
                written[i] += tokenizer.close_ids(Section.FINAL_ANSWER)
        return [Completion(tokens, scores.get(i, ())) for i, tokens in enumerate(written)]

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
