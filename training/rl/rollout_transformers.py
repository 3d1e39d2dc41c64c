"""Stage II's rollouts by transformers' own `generate`, where there is no vLLM: the same gate, the policy's own weights.

Slow: one forward pass of the whole batch a token, until its longest rollout ends. Axes: B rollouts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, Qwen2ForCausalLM

from hyper_model.audio_encoder import LogMel, encode
from hyper_model.pause import Gate, GateSettings
from training.export import RunModel
from training.rl.rollout import Prompt, Rollout, banned_ids, follow, num_kept


@dataclass
class Gates(LogitsProcessor):
    """Runs a gate a row over the logits, and bans what no rollout may choose."""

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
    """Generates with the policy itself; see `VllmBackend` for what its methods promise.

    Args:
        rows_at_once: Rollouts that are in memory together.
    """

    def __init__(self, model: RunModel, *, rows_at_once: int) -> None:
        self.model, self.rows_at_once = model, rows_at_once
        core: Any = model.core
        self.log_mel = LogMel(model.config["audio_config"]["num_mel_bins"])
        with torch.device("meta"):
            self.decoder: Any = Qwen2ForCausalLM(core.config.text_config)
        # The policy's own parts, so there is nothing to copy when its weights change.
        self.decoder.model, self.decoder.lm_head = core.model.language_model, core.lm_head

    def sync(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Does nothing: the policy generates itself."""

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
        """Samples a group a prompt; the seed of a batch's first rollout is the batch's."""
        pairs = zip(prompts, seeds, strict=True)
        jobs = [(prompt, (seed + number) % 2**63) for prompt, seed in pairs for number in range(group_size)]
        found: list[Rollout] = []
        was_training = self.decoder.training
        self.decoder.eval()
        for start in range(0, len(jobs), self.rows_at_once):
            some = jobs[start : start + self.rows_at_once]
            with torch.random.fork_rng():
                torch.manual_seed(some[0][1])
                found += self._generate([prompt for prompt, _ in some], temperature, max_tokens, gate)
        self.decoder.train(was_training)
        return [found[i : i + group_size] for i in range(0, len(found), group_size)]

    def _embedded(self, prompts: Sequence[Prompt]) -> list[torch.Tensor]:
        core: Any = self.model.core
        embed, audio_id = core.get_input_embeddings(), self.model.tokenizer.audio_id
        heard: dict[int, torch.Tensor] = {}
        found: list[torch.Tensor] = []
        for prompt in prompts:
            key = id(prompt.samples_S)
            if key not in heard:
                states_AD, _ = encode(core.model.audio_tower, [self.log_mel(prompt.samples_S).to(core.device)])
                heard[key] = core.model.multi_modal_projector(states_AD)
            ids = torch.tensor(prompt.token_ids, device=core.device)
            at = prompt.token_ids.index(audio_id)
            found.append(torch.cat([embed(ids[:at]), heard[key], embed(ids[at + 1 :])]))
        return found

    def inputs(self, prompts: Sequence[Prompt]) -> dict[str, torch.Tensor]:
        """Returns what `generate` begins with: embedded prompts, padded so that all write their first token at once."""
        embedded = self._embedded(prompts)
        longest = max(len(each) for each in embedded)
        padded = torch.stack([torch.nn.functional.pad(each, (0, 0, longest - len(each), 0)) for each in embedded])
        mask = torch.tensor([[0] * (longest - len(each)) + [1] * len(each) for each in embedded], device=padded.device)
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
            # The library's own default would sample from the best 50 alone.
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
        # A model that is given token ids returns them too.
        written_BT = output.sequences[:, -len(output.scores) :]
        logprobs_TB = torch.stack(
            [scores.log_softmax(-1).gather(1, written_BT[:, t : t + 1])[:, 0] for t, scores in enumerate(output.scores)]
        )
        found: list[Rollout] = []
        for row, token_ids in enumerate(written_BT.tolist()):
            ends = [place for place, token_id in enumerate(token_ids) if token_id in tokenizer.stop_ids]
            token_ids = token_ids[: ends[0] + 1] if ends else token_ids
            num = num_kept(gate, token_ids, max_tokens) if gate else len(token_ids)
            kept = tuple(token_ids[:num])
            followed, is_forced = follow(gate, kept, gates.confidences[row][:num])
            logprobs = tuple(logprobs_TB[:num, row].tolist())
            found.append(Rollout(kept, logprobs, is_forced, followed, kept[-1] not in tokenizer.stop_ids))
        return found
