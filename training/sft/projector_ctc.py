"""Pretrain the projector with CTC (Graves et al. 2006) on the transcript, before the decoder trains.

Afterwards the state of an audio token points at the embedding of its spoken text token. A decoder with the ability to
copy text can then copy speech. Training is cheap: it computes only the projector and the embedding, with the embedding
as classifier, starting from its current values. It needs only the order of the words, not their times.

Axes: B clips, A audio tokens, D encoder width, H hidden width, V vocabulary. This module depends on no question or
trace.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from hyper_model.trace import TraceTokenizer
from training.data.clips import Clip
from training.policy import HyperPolicy
from training.recipes import Spelling
from training.text_metrics import edit_distance, words

_BLANK = 0
_MAX_CHECKED = 200
_NUM_OTHERS = 512
_WINDOW_BATCHES = 8


@dataclass(frozen=True)
class Spelled:
    """Accuracy of the projector on held-back clips, by the likeliest token at each state.

    Attributes:
        word_error: Word error rate without a language model.
    """

    word_error: float
    num_clips: int


class _Speller(nn.Module):
    """The projector, the embedding as a classifier, and a blank."""

    def __init__(self, policy: HyperPolicy) -> None:
        super().__init__()
        library: Any = policy.model.multi_modal_projector
        weight_VH = policy.get_input_embeddings().weight.detach().float()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
        self.projector = nn.Linear(*reversed(library.linear.weight.shape))
        self.projector.load_state_dict({k: v.detach().float() for k, v in library.linear.state_dict().items()})
        self.embedding_VH = nn.Parameter(weight_VH.clone())
        self.bias_V = nn.Parameter(torch.zeros(len(weight_VH)))
        self.blank_H = nn.Parameter(torch.zeros(weight_VH.shape[1]))
        # Most states are silence or the middle of a word.
        self.blank_bias = nn.Parameter(torch.tensor([2.0]))
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, states_BAD: torch.Tensor, ids: torch.Tensor | None = None) -> torch.Tensor:
        """Return log-probabilities [A, B, 1 + V], the blank's first.

        Args:
            ids: Tokens of the distribution; None means all.
        """
        hidden_BAH = self.projector(states_BAD)
        # Use only the direction, since the decoder's first norm removes the length as well.
        hidden_BAH = F.rms_norm(hidden_BAH, hidden_BAH.shape[-1:]) * self.scale
        embedding_VH, bias_V = self.embedding_VH, self.bias_V
        if ids is not None:
            embedding_VH, bias_V = embedding_VH[ids], bias_V[ids]
        weight = torch.cat([self.blank_H[None], embedding_VH])
        bias = torch.cat([self.blank_bias, bias_V])
        return F.linear(hidden_BAH, weight, bias).log_softmax(-1).transpose(0, 1)


def _batch(clips: Sequence[Clip], tokenizer: TraceTokenizer, width: int) -> dict[str, torch.Tensor]:
    lengths = [clip.num_tokens for clip in clips]
    states_BAD = torch.zeros(len(clips), max(lengths), width)
    for place, clip in enumerate(clips):
        states_BAD[place, : lengths[place]] = clip.states(width).float()
    transcripts = [tokenizer.encode_text(clip.scene.transcript) for clip in clips]
    return {
        "states_BAD": states_BAD,
        "lengths_B": torch.tensor(lengths),
        "ids": torch.tensor([token_id for ids in transcripts for token_id in ids], dtype=torch.long),
        "target_lengths_B": torch.tensor([len(ids) for ids in transcripts]),
    }


def _loss(speller: _Speller, batch: dict[str, torch.Tensor], rng: random.Random) -> torch.Tensor:
    """Return the CTC loss in nats per text token.

    Args:
        rng: Draws the negative tokens. The full vocabulary would spend most of the time on tokens outside the batch
            (Jean et al. 2015, "On Using Very Large Target Vocabulary").
    """
    vocabulary = range(len(speller.embedding_VH))
    others = torch.tensor(rng.sample(vocabulary, min(_NUM_OTHERS, len(vocabulary))))
    ids = torch.cat([batch["ids"], others]).unique()
    total = F.ctc_loss(
        speller(batch["states_BAD"], ids),
        # The blank is the first token of the distribution.
        1 + torch.searchsorted(ids, batch["ids"]),
        batch["lengths_B"],
        batch["target_lengths_B"],
        blank=_BLANK,
        reduction="sum",
        # A transcript with more tokens than states has no alignment; this affects a few clips in thousands.
        zero_infinity=True,
    )
    return total / batch["target_lengths_B"].sum().clamp(min=1)


def teach_spelling(
    policy: HyperPolicy, tokenizer: TraceTokenizer, clips: Sequence[Clip], spelling: Spelling, file: Path, *, seed: int
) -> Spelled | None:
    """Train projector and embedding of a policy, or restore the result of an earlier call from `file`.

    Args:
        clips: Clips of one width; a few are held back for the check.

    Returns:
        The accuracy on the held-back clips; None if `file` existed.
    """
    spelled = None
    if not file.exists():
        spelled = _teach(policy, tokenizer, clips, spelling, file, seed)
    saved = load_file(file)
    projector: Any = policy.model.multi_modal_projector
    embedding: Any = policy.get_input_embeddings()
    with torch.no_grad():
        projector.linear.weight.copy_(saved["weight"])
        projector.linear.bias.copy_(saved["bias"])
        embedding.weight.copy_(saved["embedding"])
    return spelled


def _teach(
    policy: HyperPolicy, tokenizer: TraceTokenizer, clips: Sequence[Clip], spelling: Spelling, file: Path, seed: int
) -> Spelled:
    rng = random.Random(f"{seed}/spelling")
    clips = rng.sample(clips, len(clips))
    num_checked = min(_MAX_CHECKED, len(clips) // 10)
    checked, taught = clips[:num_checked], clips[num_checked:]
    speller = _Speller(policy)
    width = speller.projector.in_features
    optimizer = torch.optim.AdamW(speller.parameters(), lr=spelling.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, spelling.learning_rate, total_steps=spelling.num_steps, pct_start=0.1, cycle_momentum=False
    )
    size = min(spelling.batch_size, len(taught))
    waiting: list[list[Clip]] = []
    bar = tqdm(range(spelling.num_steps), desc="spelling", unit="step", smoothing=0.1)
    for _ in bar:
        if not waiting:
            # Sorted inside a window, since padding costs time.
            drawn = rng.sample(taught, min(len(taught), _WINDOW_BATCHES * size))
            drawn.sort(key=lambda clip: clip.num_tokens)
            waiting = [drawn[i : i + size] for i in range(0, len(drawn), size)]
            rng.shuffle(waiting)
        loss = _loss(speller, _batch(waiting.pop(), tokenizer, width), rng)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(speller.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{float(loss.detach()):.2f}")
    spelled = _check(speller, tokenizer, checked, size, width)
    saved = {
        "weight": speller.projector.weight.detach(),
        "bias": speller.projector.bias.detach(),
        "embedding": speller.embedding_VH.detach(),
    }
    partial = file.with_suffix(".partial")
    save_file(saved, partial)
    partial.replace(file)
    return spelled


@torch.no_grad()
def _check(speller: _Speller, tokenizer: TraceTokenizer, clips: Sequence[Clip], batch_size: int, width: int) -> Spelled:
    num_errors = num_words = 0
    for start in range(0, len(clips), batch_size):
        batch = clips[start : start + batch_size]
        logprobs_ABV = speller(_batch(batch, tokenizer, width)["states_BAD"])
        for place, clip in enumerate(batch):
            best = logprobs_ABV[: clip.num_tokens, place].argmax(-1).unique_consecutive().tolist()
            text = tokenizer.decode(token_id - 1 for token_id in best if token_id != _BLANK)
            reference = words(clip.scene.transcript)
            num_words += len(reference)
            num_errors += edit_distance(reference, words(text))
    return Spelled(num_errors / max(1, num_words), len(clips))
