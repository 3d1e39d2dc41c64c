"""Generates completions with vLLM in this process: what evaluation, calibration and Stage II's rollouts run on.

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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from tqdm import tqdm

from hyper_model.audio import SAMPLE_RATE_HZ
from hyper_model.checkpoint import Checkpoint
from hyper_model.engine_environment import native_dtype, prepare_environment
from hyper_model.errors import CheckpointError
from hyper_model.pause import Gate, GateSettings, replay
from hyper_model.trace import PauseMode, Section, TagStyle, TraceTokenizer
from hyper_model.trace_parser import TraceParser

if TYPE_CHECKING:
    import torch

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


@dataclass(frozen=True)
class Rollout:
    """Holds one sampled completion.

    Attributes:
        token_ids: With spans, forced tags and the token that ended it.
        logprobs: Of each token as the engine sampled it, over what was allowed there; 0 where it was forced.
        is_forced: Whether nobody chose the token: pauses, spans, and the tags that close what the gate gave up.
        gate: A gate that has followed it; None where none was asked for.
        is_cut: Whether it ran into the limit.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    is_forced: tuple[bool, ...]
    gate: Gate | None
    is_cut: bool


def banned_ids(tokenizer: TraceTokenizer, gate: GateSettings | None) -> list[int]:
    """Lists what a rollout may not choose: pauses, which the gate opens, and the tokens of turns and of the clip.

    A sampled AUDIO token has no sound behind it, and a scorer that finds one placeholder too many fails. Whoever scores
    the rollouts leaves the same tokens out of the distribution.
    """
    found = set(tokenizer.control_ids) - set(tokenizer.stop_ids) | tokenizer.pause_ids
    if gate is not None and gate.mode is PauseMode.SAMPLED:
        # A sampled span may be closed by the model, and the gate sees to it that nothing else is.
        found.discard(gate.close_id)
    return sorted(found)


def follow(
    settings: GateSettings | None, token_ids: Sequence[int], confidences: Sequence[float | None]
) -> tuple[Gate | None, tuple[bool, ...]]:
    """Follows a rollout; returns the gate at its end, and which tokens were forced."""
    if settings is None:
        return None, (False,) * len(token_ids)
    gate, is_forced = Gate(settings), list[bool]()
    for token_id, confidence in zip(token_ids, confidences, strict=True):
        # Pauses cannot be chosen in a rollout, so where one stands it was forced; and so is all of its span.
        forced = gate.is_pausing or bool(gate.forced) or token_id in (settings.open_id, settings.close_id)
        gate.push(token_id, None if forced else confidence)
        is_forced.append(forced)
    return gate, tuple(is_forced)


class VllmBackend:
    """Holds one in-process engine on a checkpoint.

    Args:
        dtype: What it computes in; None is `native_dtype`.
        is_sampler: Lets it return the log-probabilities of what it sampled from, as Stage II compares them.
        gpu_memory_utilization: Share of a GPU's memory; None is vLLM's own.

    Raises:
        CheckpointError: its tags are plain text, which no single token ends; ask such a checkpoint through the service.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: Literal["bfloat16", "float16", "float32"] | None = None,
        max_num_seqs: int = 32,
        is_sampler: bool = False,
        gpu_memory_utilization: float | None = None,
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
        memory: dict[str, Any] = {}
        if current_platform.is_cpu():
            # As in the service: the rollouts of a prompt share its whole blocks, and smaller ones share more of it.
            memory["block_size"] = 32
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            # One whole engine a rank: it takes the trainer's process group as it is, and starts none of its own.
            memory["distributed_executor_backend"] = "external_launcher"
        if gpu_memory_utilization is not None:
            memory["gpu_memory_utilization"] = gpu_memory_utilization
        is_v2 = EngineArgs(model=str(checkpoint.path)).create_engine_config().use_v2_model_runner
        self.llm = LLM(
            model=str(checkpoint.path),
            logits_processors=[processor_name(is_v2=is_v2)],
            dtype=dtype or native_dtype(),
            max_model_len=checkpoint.manifest.max_model_len,
            max_num_seqs=max_num_seqs,
            limit_mm_per_prompt={"audio": 1},
            enable_prefix_caching=True,
            enforce_eager=current_platform.is_cpu(),
            generation_config="vllm",
            # A scorer can only be compared with the distribution that was sampled from.
            logprobs_mode="processed_logprobs" if is_sampler else "raw_logprobs",
            seed=0,
            **memory,
        )
        # Its renderer asks for one thread a prompt, and its worker, in the same process here, says each time that it
        # does not let it.
        logging.getLogger("vllm.v1.worker.cpu_worker").setLevel(logging.ERROR)
        # And when weights are replaced, it misses some for modules that have none.
        logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)

    def sync(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replaces the weights of the running engine, and forgets everything that was computed with the old ones.

        Args:
            tensors: All of them, under their names on disk.
        """
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(tensors)})
        # In this order. Without the first, the scheduler believes that clips are encoded that the worker has forgotten,
        # and the engine dies; without the last, prompts of more than one block are answered from stale keys.
        self.llm.llm_engine.reset_encoder_cache()
        self.llm.reset_mm_cache()
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("the engine's cache is in use; weights can only be replaced between rollouts")

    def rollouts(
        self,
        prompts: Sequence[Prompt],
        *,
        group_size: int,
        seeds: Sequence[int],
        temperature: float,
        max_tokens: int,
        gate: GateSettings | None,
    ) -> list[list[Rollout]]:
        """Samples a group of completions for each prompt, all of what they say their own: no choice is scored.

        Args:
            seeds: One a prompt; each of its rollouts gets one of its own from it.
            max_tokens: Of visible tokens.
            gate: Lets rollouts pause, by the gate that serves; None, and none does.
        """
        from vllm import SamplingParams

        from hyper_model.pause_vllm import arguments

        tokenizer = self.checkpoint.tokenizer
        room = gate.max_pauses * gate.span_tokens if gate else 0

        def params(seed: int) -> SamplingParams:
            return SamplingParams(
                temperature=temperature,
                top_p=1.0,
                top_k=0,
                seed=seed,
                max_tokens=max_tokens + room,
                stop_token_ids=list(tokenizer.stop_ids),
                detokenize=False,
                logprobs=1,
                logit_bias=dict.fromkeys(banned_ids(tokenizer, gate), -100.0),
                extra_args=arguments(Gate(gate), f"rollout-{next(self.numbers)}") if gate else None,
            )

        jobs = [
            (prompt, (seed + i) % 2**63) for prompt, seed in zip(prompts, seeds, strict=True) for i in range(group_size)
        ]
        outputs = self._generate(
            [p for p, _ in jobs], [p.token_ids for p, _ in jobs], [params(seed) for _, seed in jobs]
        )
        found = [self._rollout(output.outputs[0], max_tokens, gate) for output in outputs]
        return [found[i : i + group_size] for i in range(0, len(found), group_size)]

    def _rollout(self, output: Any, max_tokens: int, gate: GateSettings | None) -> Rollout:
        token_ids = tuple(output.token_ids)
        num = num_kept(gate, token_ids, max_tokens) if gate else len(token_ids)
        token_ids = token_ids[:num]
        followed, is_forced = follow(gate, token_ids, _confidences(output.logprobs)[:num])
        logprobs = tuple(p[t].logprob for t, p in zip(token_ids, output.logprobs, strict=False))
        is_cut = not token_ids or token_ids[-1] not in self.checkpoint.tokenizer.stop_ids
        return Rollout(token_ids, logprobs, is_forced, followed, is_cut)

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
            fields["logit_bias"] = dict.fromkeys(tokenizer.pause_ids, -100.0)

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
