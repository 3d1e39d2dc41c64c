"""Drive the answering procedure in batches over vLLM in this process, and sample rollouts for Stage II.

Evaluation and calibration call `VllmBackend.answer`, the procedure of `hyper_model.answering`, driven token by token in
the service. Here one engine call runs every `Generate` of a batch, and one call every `Score`. The serving gate decides
pauses, with spans forced token by token: the same tokens as in the service, at another cost.

Inputs and outputs are token ids. This module depends on no reward or figure. The environment of vLLM is set before its
import.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from tqdm import tqdm

from hyper_model.answering import (
    DEFAULT_MAX_TOKENS,
    Answering,
    AnswerResult,
    FinishReason,
    Generate,
    Question,
    Score,
    max_trace_tokens,
)
from hyper_model.audio import SAMPLE_RATE_HZ
from hyper_model.checkpoint import Checkpoint
from hyper_model.engine_environment import native_dtype, prepare_environment
from hyper_model.errors import CheckpointError, PromptError
from hyper_model.pause import Gate, GateSettings, replay
from hyper_model.trace import PauseMode, TagStyle, TraceTokenizer

if TYPE_CHECKING:
    import torch

PROMPTS_AT_ONCE = 48
"""Small enough to keep each clip's encoder output in the cache until its choices are scored."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """One question about one clip."""

    token_ids: list[int]
    samples_S: np.ndarray  # noqa: N815  # the axis suffix
    choices: tuple[str, ...]


@dataclass(frozen=True)
class Completion:
    """An answer, and the trace in the model's own tokens.

    Attributes:
        gate: A gate after following `written_ids`; None without a gate.
        written_ids: The model's own tokens up to the end of the trace or its break, pauses included.
        confidences: Probability of the likeliest token at each of these positions.
    """

    result: AnswerResult
    gate: Gate | None = None
    written_ids: tuple[int, ...] = ()
    confidences: tuple[float, ...] = ()


@dataclass(frozen=True)
class Rollout:
    """One sampled completion.

    Attributes:
        token_ids: All tokens, with spans, forced tags and the final token.
        logprobs: Log-probability of each token in the engine, over the allowed tokens; 0 for forced ones.
        is_forced: True for tokens outside the policy's choice: pauses, spans, and closing tags of loops and aborts.
        gate: A gate after following the rollout; None without a gate.
        is_cut: True if the rollout reached the length limit.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    is_forced: tuple[bool, ...]
    gate: Gate | None
    is_cut: bool


def banned_ids(tokenizer: TraceTokenizer, gate: GateSettings | None) -> list[int]:
    """List the tokens banned in rollouts: pauses, opened by the gate only, and the tokens of turns and of the clip.

    A sampled AUDIO token has no clip, and a scorer fails on a surplus placeholder. Scorers of the rollouts exclude the
    same tokens from the distribution.
    """
    banned = set(tokenizer.control_ids) - set(tokenizer.stop_ids) | tokenizer.pause_ids
    if gate is not None and gate.mode is PauseMode.SAMPLED:
        # The model may close a sampled span, and the gate prevents other closings.
        banned.discard(gate.close_id)
    return sorted(banned)


def follow(
    settings: GateSettings | None, token_ids: Sequence[int], confidences: Sequence[float | None]
) -> tuple[Gate | None, tuple[bool, ...]]:
    """Follow a rollout; return the gate at its end, and a flag per token for forced ones."""
    if settings is None:
        return None, (False,) * len(token_ids)
    gate, is_forced = Gate(settings), list[bool]()
    for token_id, confidence in zip(token_ids, confidences, strict=True):
        # A rollout cannot choose pauses, so a pause and its span are forced.
        forced = gate.is_pausing or bool(gate.forced) or token_id in (settings.open_id, settings.close_id)
        forced = forced or gate.closes_loop(token_id)
        gate.push(token_id, None if forced else confidence)
        is_forced.append(forced)
    return gate, tuple(is_forced)


class VllmBackend:
    """An in-process engine on a checkpoint.

    Args:
        dtype: Dtype of the computation; None is `native_dtype`.
        is_sampler: Return the log-probabilities of the sampling distribution, for Stage II.
        gpu_memory_utilization: Share of a GPU's memory; None is vLLM's default.

    Raises:
        CheckpointError: its tags are plain text without single end tokens; evaluate such a checkpoint through the
            service.
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
        # The engine runs in this process, so that weights can be replaced without a copy on disk.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        from vllm import LLM, EngineArgs
        from vllm.platforms import current_platform

        from hyper_model.pause_vllm import processor_name

        self.checkpoint = checkpoint
        self.numbers = itertools.count()
        memory: dict[str, Any] = {}
        if current_platform.is_cpu():
            # As in the service: the rollouts of a prompt share its whole blocks, and smaller blocks share more.
            memory["block_size"] = 32
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            # One whole engine per rank, in the trainer's existing process group.
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
            # Stage II compares its scores with the sampling distribution.
            logprobs_mode="processed_logprobs" if is_sampler else "raw_logprobs",
            seed=0,
            **memory,
        )
        # vLLM's renderer requests one thread per prompt; its worker, in this process, logs each refusal.
        logging.getLogger("vllm.v1.worker.cpu_worker").setLevel(logging.ERROR)
        # When weights are replaced, vLLM warns about modules without weights.
        logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)

    def sync(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replace the weights of the running engine, and clear all caches of the old weights.

        Args:
            tensors: All tensors, by their names on disk.
        """
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(tensors)})
        # The order matters. Without the first call, the scheduler still counts clips as encoded after the worker
        # dropped them, and the engine dies. Without the last, prompts of more than one block are answered from stale
        # keys.
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
        """Sample a group of completions per prompt, all tokens from the policy: no choice is scored.

        Args:
            seeds: One per prompt; each of its rollouts derives its own seed.
            max_tokens: Visible tokens.
            gate: The serving gate for pauses in rollouts; None disables pauses.
        """
        tokenizer = self.checkpoint.tokenizer
        jobs = [
            (prompt, (seed + i) % 2**63) for prompt, seed in zip(prompts, seeds, strict=True) for i in range(group_size)
        ]
        steps = [
            Generate(
                prompt.token_ids,
                max_tokens,
                temperature=temperature,
                seed=seed,
                stop_token_ids=tokenizer.stop_ids,
                banned_token_ids=tuple(banned_ids(tokenizer, gate)),
                gate=gate,
            )
            for prompt, seed in jobs
        ]
        outputs = self._generate([prompt for prompt, _ in jobs], steps, has_logprobs=True)
        sampled = [self._rollout(output.outputs[0], max_tokens, gate) for output in outputs]
        return [sampled[i : i + group_size] for i in range(0, len(sampled), group_size)]

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
        """Return the checkpoint's gate with its whole budget, or None."""
        return GateSettings.of(self.checkpoint.manifest, self.checkpoint.tokenizer)

    def answer(
        self,
        prompts: Sequence[Prompt],
        *,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        gate: GateSettings | None = None,
        use_tqdm: bool = True,
    ) -> list[Completion]:
        """Answer every prompt greedily, as the service does.

        Args:
            max_tokens: Maximum number of visible tokens of a trace; the context length may allow fewer.
            gate: The gate for pauses in traces; None disables pauses.

        Raises:
            PromptError: A prompt and its clip leave no tokens for an answer.
        """
        completions: list[Completion] = []
        with tqdm(total=len(prompts), desc="questions", disable=not use_tqdm) as bar:
            for start in range(0, len(prompts), PROMPTS_AT_ONCE):
                batch = prompts[start : start + PROMPTS_AT_ONCE]
                completions += self._answer_some(batch, max_tokens, gate)
                bar.update(len(batch))
        return completions

    def _answer_some(self, prompts: Sequence[Prompt], max_tokens: int, gate: GateSettings | None) -> list[Completion]:
        runs = [_Run(prompt, self._procedure(prompt, max_tokens, gate), gate) for prompt in prompts]
        while any(run.answering.next_step is not None for run in runs):
            self._generate_all(runs)
            self._score_all(runs)
        return [Completion(run.answering.result, run.followed, run.written_ids, run.confidences) for run in runs]

    def room(self, prompt: Prompt, gate: GateSettings | None) -> int:
        """Return the maximum number of visible tokens of a trace with this prompt, clip and pauses; below 1: none."""
        manifest = self.checkpoint.manifest
        return max_trace_tokens(
            prompt.token_ids,
            prompt.choices,
            num_audio_tokens=round(len(prompt.samples_S) / SAMPLE_RATE_HZ * manifest.audio.tokens_per_s),
            gate=gate,
            tokenizer=self.checkpoint.tokenizer,
            manifest=manifest,
        )

    def _procedure(self, prompt: Prompt, max_tokens: int, gate: GateSettings | None) -> Answering:
        room = self.room(prompt, gate)
        if room < 1:
            raise PromptError("the question, the choices and the clip leave the model no room to answer")
        question = Question(tuple(prompt.token_ids), prompt.choices, max_tokens=min(max_tokens, room), gate=gate)
        return Answering(question, self.checkpoint.tokenizer, self.checkpoint.manifest)

    def _generate_all(self, runs: Sequence[_Run]) -> None:
        """Run every `Generate` of a batch until none is left, one engine call per round."""
        while pending := [(run, step) for run in runs if isinstance(step := run.answering.next_step, Generate)]:
            # The gate follows only the trace; tokens after a broken trace need no confidences.
            has_logprobs = any(run.gate is not None and run.is_in_trace for run, _ in pending)
            prompts, steps = [run.prompt for run, _ in pending], [step for _, step in pending]
            outputs = self._generate(prompts, steps, has_logprobs=has_logprobs)
            for (run, step), output in zip(pending, outputs, strict=True):
                run.receive(step, output.outputs[0])

    def _score_all(self, runs: Sequence[_Run]) -> None:
        """Score the choices of every `Score` of a batch in one engine call."""
        from vllm import SamplingParams

        pending = [(run, step) for run in runs if isinstance(step := run.answering.next_step, Score)]
        prompts: list[Prompt] = []
        ids: list[list[int]] = []
        params: list[SamplingParams] = []
        for run, step in pending:
            token_ids = _single_tokens(step)
            # vLLM must write a token; its value does not matter.
            shared: dict[str, Any] = {"max_tokens": 1, "temperature": 0.0, "detokenize": False}
            if token_ids is not None:
                continuations: Sequence[Sequence[int]] = [()]
                params.append(SamplingParams(logprob_token_ids=token_ids, **shared))
            else:
                continuations = step.candidates
                params += [SamplingParams(prompt_logprobs=0, **shared)] * len(continuations)
            prompts += [run.prompt] * len(continuations)
            ids += [[*step.prompt_token_ids, *continuation] for continuation in continuations]
        outputs = iter(self._ask(prompts, ids, params))
        for run, step in pending:
            token_ids = _single_tokens(step)
            if token_ids is not None:
                position = next(outputs).outputs[0].logprobs[0]
                run.answering.receive_scores([position[token_id].logprob for token_id in token_ids])
            else:
                run.answering.receive_scores([_total(next(outputs), candidate) for candidate in step.candidates])

    def _generate(self, prompts: Sequence[Prompt], steps: Sequence[Generate], *, has_logprobs: bool) -> list[Any]:
        """Return the engine's continuation of each step."""
        from vllm import SamplingParams

        from hyper_model.pause_vllm import arguments

        def params(step: Generate) -> SamplingParams:
            gate = step.gate
            return SamplingParams(
                temperature=step.temperature,
                top_p=1.0,
                top_k=0,
                seed=step.seed,
                # vLLM counts the tokens of pauses too, and the abort token of the gate.
                max_tokens=step.max_tokens + (gate.max_pauses * gate.span_tokens + 1 if gate else 0),
                stop_token_ids=list(step.stop_token_ids),
                # vLLM would add the tokenizer's own end token.
                ignore_eos=True,
                detokenize=False,
                logprobs=1 if has_logprobs else 0 if step.wants_logprobs else None,
                logit_bias=dict.fromkeys(step.banned_token_ids, -100.0) or None,
                extra_args=arguments(Gate(gate), f"rollout-{next(self.numbers)}") if gate else None,
            )

        return self._ask(prompts, [list(step.prompt_token_ids) for step in steps], [params(step) for step in steps])

    def _ask(self, prompts: Sequence[Prompt], ids: Sequence[list[int]], params: Sequence[Any]) -> list[Any]:
        inputs: list[Any] = [
            {"prompt_token_ids": token_ids, "multi_modal_data": {"audio": [(prompt.samples_S, SAMPLE_RATE_HZ)]}}
            for prompt, token_ids in zip(prompts, ids, strict=True)
        ]
        return self.llm.generate(inputs, list(params), use_tqdm=False) if inputs else []


@dataclass
class _Run:
    """One prompt of a batch on its way through the procedure.

    Attributes:
        gate: The gate of the procedure, or None.
        followed: This gate at the end of the trace, or None.
    """

    prompt: Prompt
    answering: Answering
    gate: GateSettings | None
    followed: Gate | None = field(default=None, init=False)
    written_ids: tuple[int, ...] = field(default=(), init=False)
    confidences: tuple[float, ...] = field(default=(), init=False)
    is_in_trace: bool = field(default=True, init=False)

    def receive(self, step: Generate, output: Any) -> None:
        """Pass a finished continuation to the procedure, in the same chunks as in the service."""
        token_ids, confidences = tuple(output.token_ids), _confidences(output.logprobs)
        reason: FinishReason = "length" if output.finish_reason == "length" else "stop"
        if step.gate is not None:
            num_kept = self._receive_spans(step, step.gate, token_ids, confidences, reason)
        else:
            num_kept = len(token_ids)
            logprobs = _chosen_logprobs(output) if step.wants_logprobs else ()
            self.answering.receive_tokens(token_ids, reason, logprobs=logprobs)
        if self.is_in_trace:
            self.is_in_trace = False
            self.written_ids, self.confidences = token_ids[:num_kept], confidences[:num_kept]
            if self.gate is not None:
                self.followed = replay(self.gate, self.written_ids, self.confidences)

    def _receive_spans(
        self,
        step: Generate,
        settings: GateSettings,
        token_ids: Sequence[int],
        confidences: Sequence[float],
        reason: FinishReason,
    ) -> int:
        """Separate spans from visible tokens; return the number of tokens up to the end of the trace or its break."""
        gate, visible, span, num_visible = Gate(settings), list[int](), list[int](), 0
        for place, (token_id, confidence) in enumerate(zip(token_ids, confidences, strict=True)):
            is_hidden = gate.is_pausing or token_id == settings.open_id
            gate.push(token_id, confidence)
            if is_hidden:
                span.append(token_id)
                if not gate.is_pausing:
                    self.answering.receive_tokens(visible)
                    self.answering.receive_tokens((), span=span)
                    visible, span = [], []
                continue
            if token_id == settings.close_id:
                # The gate has aborted, but its engine continues. The procedure closes the trace instead.
                self.answering.receive_tokens(visible, "abort", report=gate.report())
                return place + 1
            visible.append(token_id)
            num_visible += 1
            if token_id in step.stop_token_ids or num_visible == step.max_tokens:
                is_stopped = token_id in step.stop_token_ids
                self.answering.receive_tokens(visible, "stop" if is_stopped else "length", report=gate.report())
                return place + 1
        self.answering.receive_tokens(visible, reason, report=gate.report())
        return len(token_ids)


def _single_tokens(step: Score) -> list[int] | None:
    """Return the candidates' tokens if each has a single one, so that one engine step scores all of them; else None."""
    single = [candidate[0] for candidate in step.candidates if len(candidate) == 1]
    return single if len(single) == len(step.candidates) else None


def _total(output: Any, candidate: Sequence[int]) -> float:
    """Return the log-probability of a candidate at the end of a prompt."""
    tail = output.prompt_logprobs[-len(candidate) :]
    return sum(logprobs[token_id].logprob for token_id, logprobs in zip(candidate, tail, strict=True))


def num_kept(settings: GateSettings, token_ids: Sequence[int], max_visible: int) -> int:
    """Return the number of tokens of a completion up to its last allowed visible one."""
    gate, num_visible = Gate(settings), 0
    for place, token_id in enumerate(token_ids):
        is_visible = not gate.is_pausing and token_id not in (settings.open_id, settings.close_id)
        gate.push(token_id, None)
        num_visible += is_visible
        if num_visible == max_visible:
            return place + 1
    return len(token_ids)


def _chosen_logprobs(output: Any) -> tuple[float, ...]:
    """Return the log-probability of each token of a continuation."""
    return tuple(
        position[token_id].logprob for token_id, position in zip(output.token_ids, output.logprobs, strict=True)
    )


def _confidences(logprobs: Any) -> tuple[float, ...]:
    """Return the probability of the likeliest token at each of vLLM's positions; empty if not requested."""
    return tuple(math.exp(max(candidate.logprob for candidate in position.values())) for position in logprobs or ())
