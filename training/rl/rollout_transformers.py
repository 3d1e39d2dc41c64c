"""Sample Stage II's rollouts with transformers' `generate`, for hosts without vLLM.

It applies the same gate and uses the policy's own modules. It is slow: one forward pass of the whole batch per token,
until the longest rollout ends. Axes: B rollouts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, Qwen2ForCausalLM

from hyper_model.audio_encoder import LogMel
from hyper_model.pause import Gate, GateSettings
from training.export import RunModel
from training.rl.rollout import Prompt, Rollout, banned_ids, follow, num_kept


@dataclass
class Gates(LogitsProcessor):
    """Logits processor with one gate per row and a ban on tokens never allowed in rollouts."""

    settings: GateSettings | None
    banned: list[int]
    num_rows: int
    gates: list[Gate] = field(default_factory=list[Gate])
    confidences: list[list[float]] = field(default_factory=list[list[float]])

    def __post_init__(self) -> None:
        self.gates = [Gate(self.settings) for _ in range(self.num_rows)] if self.settings else []
        self.confidences = [[] for _ in range(self.num_rows)]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        scores = scores.float()
        best = scores.log_softmax(-1).amax(-1).exp().tolist()
        scores = scores.index_fill(1, torch.tensor(self.banned, device=scores.device), -torch.inf)
        for row, gate in enumerate(self.gates):
            if self.confidences[row]:
                gate.push(int(input_ids[row, -1]), self.confidences[row][-1])
            decision = gate.decide(best[row])
            if decision.forced_id is not None:
                scores[row] = -torch.inf
                scores[row, decision.forced_id] = 0.0
            else:
                scores[row, list(decision.banned_ids)] = -torch.inf
        for row, confidence in enumerate(best):
            self.confidences[row].append(confidence)
        return scores


class TransformersBackend:
    """Rollout backend on the policy itself; `VllmBackend` documents the methods.

    Args:
        rows_at_once: Rollouts per batch.
    """

    def __init__(self, model: RunModel, *, rows_at_once: int) -> None:
        self.model, self.rows_at_once = model, rows_at_once
        core: Any = model.core
        self.log_mel = LogMel(model.config["audio_config"]["num_mel_bins"])
        with torch.device("meta"):
            self.decoder: Any = Qwen2ForCausalLM(core.config.text_config)
        # The decoder shares the policy's modules, so new weights need no copy.
        self.decoder.model, self.decoder.lm_head = core.model.language_model, core.lm_head

    def sync(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Do nothing, since the policy itself generates."""

    @torch.no_grad()
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
        """Sample a group per prompt; the seed of a batch's first rollout seeds the batch."""
        pairs = zip(prompts, seeds, strict=True)
        jobs = [(prompt, (seed + number) % 2**63) for prompt, seed in pairs for number in range(group_size)]
        rollouts_of_jobs: list[Rollout] = []
        was_training = self.decoder.training
        self.decoder.eval()
        for start in range(0, len(jobs), self.rows_at_once):
            batch = jobs[start : start + self.rows_at_once]
            with torch.random.fork_rng():
                torch.manual_seed(batch[0][1])
                rollouts_of_jobs += self._generate([prompt for prompt, _ in batch], temperature, max_tokens, gate)
        self.decoder.train(was_training)
        return [rollouts_of_jobs[i : i + group_size] for i in range(0, len(rollouts_of_jobs), group_size)]

    def _embedded(self, prompts: Sequence[Prompt]) -> list[torch.Tensor]:
        core: Any = self.model.core
        embed, audio_id = core.get_input_embeddings(), self.model.tokenizer.audio_id
        projected: dict[int, torch.Tensor] = {}
        embedded: list[torch.Tensor] = []
        for prompt in prompts:
            key = id(prompt.samples_S)
            if key not in projected:
                states_AD, _ = core.encode([self.log_mel(prompt.samples_S).to(core.device)])
                projected[key] = core.model.multi_modal_projector(states_AD)
            ids = torch.tensor(prompt.token_ids, device=core.device)
            at = prompt.token_ids.index(audio_id)
            embedded.append(torch.cat([embed(ids[:at]), projected[key], embed(ids[at + 1 :])]))
        return embedded

    def inputs(self, prompts: Sequence[Prompt]) -> dict[str, torch.Tensor]:
        """Return the arguments of `generate`: embedded prompts, left-padded to equal length, with their mask."""
        embedded = self._embedded(prompts)
        longest = max(len(row) for row in embedded)
        padded = torch.stack([torch.nn.functional.pad(row, (0, 0, longest - len(row), 0)) for row in embedded])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in embedded], device=padded.device)
        return {"inputs_embeds": padded, "attention_mask": mask}

    def _generate(
        self, prompts: Sequence[Prompt], temperature: float, max_tokens: int, gate: GateSettings | None
    ) -> list[Rollout]:
        tokenizer = self.model.tokenizer
        gates = Gates(gate, banned_ids(tokenizer, gate), len(prompts))
        room = gate.max_pauses * gate.span_tokens if gate else 0
        config = GenerationConfig(
            do_sample=True,
            temperature=temperature,
            # The library's default would sample from the best 50 tokens only.
            top_k=0,
            top_p=1.0,
            max_new_tokens=max_tokens + room,
            eos_token_id=list(tokenizer.stop_ids),
            pad_token_id=tokenizer.end_of_text_id,
            return_dict_in_generate=True,
            output_scores=True,
        )
        output = self.decoder.generate(
            **self.inputs(prompts), generation_config=config, logits_processor=LogitsProcessorList([gates])
        )
        # A model with token ids as input returns them too.
        written_BT = output.sequences[:, -len(output.scores) :]
        logprobs_TB = torch.stack(
            [scores.log_softmax(-1).gather(1, written_BT[:, t : t + 1])[:, 0] for t, scores in enumerate(output.scores)]
        )
        rollouts: list[Rollout] = []
        for row, token_ids in enumerate(written_BT.tolist()):
            ends = [place for place, token_id in enumerate(token_ids) if token_id in tokenizer.stop_ids]
            token_ids = token_ids[: ends[0] + 1] if ends else token_ids
            num = num_kept(gate, token_ids, max_tokens) if gate else len(token_ids)
            kept_ids = tuple(token_ids[:num])
            followed, is_forced = follow(gate, kept_ids, gates.confidences[row][:num])
            logprobs = tuple(logprobs_TB[:num, row].tolist())
            rollouts.append(Rollout(kept_ids, logprobs, is_forced, followed, kept_ids[-1] not in tokenizer.stop_ids))
        return rollouts
