"""Drafts inside vLLM's V1 runner on a CPU, beside the pause gate.

vLLM refuses logits processors together with speculative decoding, and its rejection sampler skips them at drafted
positions. It also samples the position after a draft first, and the gate must decide it last. `DraftingWorker` and
`DraftingRunner` replace this part by subclassing. Accepted tokens are those of greedy decoding under the gate
(`PauseV1.apply_with_spec_decode`). The position after them goes through vLLM's usual sampler, so every request keeps
its parameters: bans, log-probabilities, temperature. Only greedy requests with a gate get drafts.

The subclasses depend on code of vLLM that changes without notice. `hyper_model.draft_support` compares that code with
the tested version. If it differs, the engine runs without drafts.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.logits_processor import build_logitsprocs
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

from hyper_model.checkpoint import open_checkpoint
from hyper_model.draft_support import MAX_BATCH
from hyper_model.drafts import DraftTable, draft_tokens
from hyper_model.pause_vllm import PauseV1
from hyper_model.trace import PauseMode

if TYPE_CHECKING:
    import numpy as np
    from vllm.config import VllmConfig
    from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

PLACEHOLDER_ID = -1


class DraftProposer:
    """vLLM's custom proposer class: drafts for the greedy requests of the gate.

    Attributes:
        gate: The gate of this engine's runner.
        max_batch: Largest batch with drafts.
    """

    def __init__(self, vllm_config: VllmConfig) -> None:
        checkpoint = open_checkpoint(vllm_config.model_config.model, verify=False)
        self.table = DraftTable(checkpoint.tokenizer, PauseMode(checkpoint.manifest.pause.mode))
        self.gate: PauseV1 | None = None
        settings = cast("dict[str, int]", cast("Any", vllm_config).additional_config)
        self.max_batch = settings.get(MAX_BATCH, vllm_config.scheduler_config.max_num_seqs)
        self.max_tokens = vllm_config.num_speculative_tokens
        self.max_model_len = vllm_config.model_config.max_model_len

    def load_model(self, *args: object, **kwargs: object) -> None:
        """Do nothing: drafts need no model."""

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: np.ndarray[Any, Any],
        token_ids_cpu: np.ndarray[Any, Any],
        slot_mappings: object = None,
    ) -> list[list[int]]:
        """Return the draft of each request, empty for none.

        Args:
            sampled_token_ids: The tokens of the last step per request; empty during an incomplete prompt.
            num_tokens_no_spec: Number of tokens of each request, prompt included.
            token_ids_cpu: The tokens of each request [R, max_model_len].
            slot_mappings: Unused.
        """
        drafts: list[list[int]] = [[] for _ in sampled_token_ids]
        if self.gate is None or len(drafts) > self.max_batch:
            return drafts
        for index, row in self.gate.rows.items():
            if not row.is_draftable or index >= len(drafts) or not sampled_token_ids[index]:
                continue
            stops = row.params.stop_token_ids or ()
            if sampled_token_ids[index][-1] in stops:
                continue
            num_tokens = int(num_tokens_no_spec[index])
            max_tokens = min(self.max_tokens, self.max_model_len - num_tokens - 1)
            if row.params.max_tokens is not None:
                max_tokens = min(max_tokens, row.params.max_tokens - len(row.output) - 1)
            if max_tokens < 1:
                continue
            row.catch_up()
            draft = list(row.gate.forced_ids[:max_tokens])
            if not draft and not row.gate.is_pausing:
                token_ids = cast("list[int]", token_ids_cpu[index, :num_tokens].tolist())
                start = self.table.trace_start(token_ids)
                draft = draft_tokens(token_ids[:start], token_ids[start:], self.table, max_tokens)
            # The position of a stop token must stay uncomputed, or a session would keep the token behind a pause.
            end = next((place for place, token_id in enumerate(draft) if token_id in stops), len(draft))
            drafts[index] = draft[:end]
        return drafts


class DraftingRunner(CPUModelRunner):
    """vLLM's CPU runner with drafts that the gate verifies."""

    gate: PauseV1

    def set_up(self, processors: Sequence[Any]) -> None:
        """Build the logits processors refused by vLLM, and connect the proposer with the gate."""
        # A copy without drafts, since vLLM refuses processors by this field.
        config = copy.copy(self.vllm_config)
        config.speculative_config = None
        batch = self.input_batch
        batch.logitsprocs = build_logitsprocs(config, self.device, False, self.is_pooling_model, processors)
        batch.logitsprocs_need_output_token_ids = True
        self.gate = next(each for each in batch.logitsprocs.all if isinstance(each, PauseV1))
        cast("DraftProposer", self.drafter).gate = self.gate

    def _sample(self, logits: torch.Tensor | None, spec_decode_metadata: SpecDecodeMetadata | None) -> SamplerOutput:
        if logits is None or spec_decode_metadata is None or not any(spec_decode_metadata.num_draft_tokens):
            # vLLM's step without drafts.
            return super()._sample(logits, None)
        drafts = self.input_batch.spec_token_ids[: len(spec_decode_metadata.num_draft_tokens)]
        rows, accepted = verify(self.gate, logits, drafts)
        return with_accepted(super()._sample(logits[rows], None), accepted)


def verify(
    gate: PauseV1, logits: torch.Tensor, drafts: Sequence[Sequence[int]]
) -> tuple[list[int], list[Sequence[int]]]:
    """Return for each request the row of the logits to sample from, and the accepted part of its draft.

    Args:
        gate: The gate of the batch.
        logits: [D + R, V], for each of the R requests the logits at its drafted tokens and after them.
        drafts: The drafted tokens of each request, D in all.
    """
    starts, drafted = list[int](), list[int]()
    for draft in drafts:
        starts.append(len(drafted) + len(starts))
        drafted += range(starts[-1], starts[-1] + len(draft))
    # The sampler computes in float32 too.
    logits_DV = logits[drafted].to(torch.float32)
    num_accepted = gate.apply_with_spec_decode(logits_DV, [len(draft) for draft in drafts], drafts)
    rows = [start + num for start, num in zip(starts, num_accepted, strict=True)]
    return rows, [draft[:num] for draft, num in zip(drafts, num_accepted, strict=True)]


def with_accepted(sampled: SamplerOutput, accepted: Sequence[Sequence[int]]) -> SamplerOutput:
    """Return a sampler's output with the accepted tokens of each request before its sampled token.

    Log-probabilities move to the place of the sampled token; requests with drafts have none.
    """
    width = max(map(len, accepted)) + 1
    if width == 1:
        return sampled
    token_ids = torch.full((len(accepted), width), PLACEHOLDER_ID, dtype=torch.int32)
    for row, ids in enumerate(accepted):
        token_ids[row, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
        token_ids[row, len(ids)] = sampled.sampled_token_ids[row, 0]
    logprobs = sampled.logprobs_tensors
    if logprobs is not None:
        places = torch.tensor([row * width + len(ids) for row, ids in enumerate(accepted)])

        def spread(values: torch.Tensor) -> torch.Tensor:
            return values.new_zeros(len(accepted) * width, *values.shape[1:]).index_copy_(0, places, values)

        logprobs = LogprobsTensors(
            spread(logprobs.logprob_token_ids), spread(logprobs.logprobs), spread(logprobs.selected_token_ranks)
        )
    return SamplerOutput(sampled_token_ids=token_ids, logprobs_tensors=logprobs)


class DraftingWorker(CPUWorker):
    """vLLM's CPU worker with a `DraftingRunner`."""

    def init_device(self) -> None:
        """Build the runner without logits processors, which vLLM refuses beside drafts, and add them afterwards."""
        processors = self.model_config.logits_processors
        self.model_config.logits_processors = None
        try:
            super().init_device()
        finally:
            self.model_config.logits_processors = processors
        runner = cast("Any", self.model_runner)
        # vLLM names its runner class in the middle of a long method, so the finished object changes its class.
        runner.__class__ = DraftingRunner
        runner.set_up(processors or ())
