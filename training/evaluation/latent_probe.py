"""Measure the effect of pauses on the hidden state (the paper's table 4): do they move it towards the answer?

Completions with pauses run once more through transformers' model, latent tokens included. The table has a row each for
the first, second and third pause of a completion:

- `trigger_rate`: share of completions with this pause.
- `cosine_to_answer`: cosine of two states of the last layer, at the span's last latent token and at the first token of
  FINAL_ANSWER.
- `cosine_before`: the same for the token before the span, as the baseline of `cosine_to_answer`.
- `displacement`: distance from the span's first latent token to its last, relative to the norm of the first.

Axes: A audio tokens, T tokens, H hidden width. This module depends on no engine; the caller supplies the completions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from hyper_model.audio_encoder import LogMel
from hyper_model.checkpoint import Checkpoint, require_float_weights
from hyper_model.trace import PauseMode, Section
from training.evaluation.statistics import figure, shares
from training.policy import open_policy
from training.rl.rollout import Completion, Prompt

MAX_PAUSES = 3
"""Number of pauses with their own row; the paper's table has three."""


@dataclass(frozen=True)
class Span:
    """The effect of one pause; `number` counts from 1 within its completion."""

    number: int
    cosine_to_answer: float
    cosine_before: float
    displacement: float


def spans_of(checkpoint: Checkpoint, token_ids: Sequence[int]) -> list[tuple[int, int]]:
    """Return the first and last latent token of each pause, as positions in `token_ids`."""
    tokenizer, pause = checkpoint.tokenizer, checkpoint.manifest.pause
    spans: list[tuple[int, int]] = []
    place = 0
    while place < len(token_ids):
        if token_ids[place] != tokenizer.pause_id:
            place += 1
        elif pause.mode == PauseMode.PARALLEL:
            first, end = place, place + pause.latent_tokens
            while place < min(end, len(token_ids)) and token_ids[place] in tokenizer.latent_ids:
                place += 1
            spans.append((first, place - 1))
        else:
            first = place + 1
            while place < len(token_ids) and token_ids[place] != tokenizer.pause_close_id:
                place += 1
            if place > first:
                spans.append((first, place - 1))
    return spans


class Prober:
    """The checkpoint's model in transformers."""

    def __init__(self, checkpoint: Checkpoint) -> None:

        require_float_weights(checkpoint)
        self.checkpoint = checkpoint
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        model: Any = open_policy(checkpoint)
        self.model: Any = model.eval().to(self.device)
        self.log_mel = LogMel(self.model.config.audio_config.num_mel_bins)

    @torch.inference_mode()
    def states(self, prompt: Prompt, token_ids: Sequence[int]) -> torch.Tensor:
        """Return the last layer's state at each token of a completion: float32 [T, H]."""
        inner = self.model.model
        at = prompt.token_ids.index(self.checkpoint.tokenizer.audio_id)
        rows_AD, _ = self.model.encode([self.log_mel(prompt.samples_S).to(self.device)])
        embed = self.model.get_input_embeddings()

        def embedded(ids: Sequence[int]) -> torch.Tensor:
            return embed(torch.tensor(list(ids), dtype=torch.long, device=self.device))

        audio_AH = inner.multi_modal_projector(rows_AD)
        inputs = torch.cat([embedded(prompt.token_ids[:at]), audio_AH, embedded(prompt.token_ids[at + 1 :])])
        inputs = torch.cat([inputs, embedded(token_ids)])
        hidden = inner.language_model(inputs_embeds=inputs[None], use_cache=False).last_hidden_state[0]
        return hidden[-len(token_ids) :].float()

    def probe_one(self, prompt: Prompt, completion: Completion) -> list[Span] | None:
        """Return the effect of each pause of a completion; None for a completion without an answer."""
        token_ids = completion.result.token_ids
        (answer_tag,) = self.checkpoint.tokenizer.open_ids(Section.FINAL_ANSWER)
        if answer_tag not in token_ids[:-1]:
            return None
        spans = spans_of(self.checkpoint, token_ids)
        if not spans:
            return []
        states_TH = self.states(prompt, token_ids)
        answer_H = states_TH[token_ids.index(answer_tag) + 1]
        cosine = torch.nn.functional.cosine_similarity
        effects: list[Span] = []
        for number, (first, last) in enumerate(spans, 1):
            moved = torch.linalg.vector_norm(states_TH[last] - states_TH[first])
            # A sampled span has its opening tag before it; the token before this tag is the baseline.
            before = first - 1 if self.checkpoint.manifest.pause.mode == PauseMode.PARALLEL else first - 2
            effects.append(
                Span(
                    number,
                    float(cosine(states_TH[last], answer_H, dim=0)),
                    float(cosine(states_TH[max(0, before)], answer_H, dim=0)),
                    float(moved / torch.linalg.vector_norm(states_TH[first])),
                )
            )
        return effects


def probe(
    checkpoint: Checkpoint,
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    clusters: Sequence[str],
    *,
    use_tqdm: bool = True,
) -> dict[str, Any]:
    """Probe completions; return the table as plain data with 95 % intervals over whole clusters."""
    prober = Prober(checkpoint)
    probed: list[tuple[str, list[Span]]] = []
    pairs = zip(prompts, completions, clusters, strict=True)
    for prompt, completion, cluster in tqdm(pairs, desc="latent probe", total=len(prompts), disable=not use_tqdm):
        spans = prober.probe_one(prompt, completion)
        if spans is not None:
            probed.append((cluster, spans))
    rows: list[dict[str, Any]] = []
    for number in range(1, MAX_PAUSES + 1):
        numbered = [(cluster, span) for cluster, spans in probed for span in spans if span.number == number]
        has_one = [len(spans) >= number for _, spans in probed]
        row: dict[str, Any] = {"pause": number, "num_spans": len(numbered)}
        sums = {"trigger_rate": shares(has_one, [cluster for cluster, _ in probed])}
        for name in ("cosine_to_answer", "cosine_before", "displacement"):
            sums[name] = shares([getattr(span, name) for _, span in numbered], [cluster for cluster, _ in numbered])
        for name, sums_of_name in sums.items():
            if sums_of_name.clusters:
                value, interval = figure(sums_of_name)
                row |= {name: round(value, 4), f"{name}_interval_95": [round(bound, 4) for bound in interval]}
        rows.append(row)
    return {"num_completions": len(probed), "num_without_answer": len(prompts) - len(probed), "pauses": rows}
