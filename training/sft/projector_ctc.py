"""Pretrain the projector with CTC (Graves et al. 2006) on the transcript, before the decoder trains.

Afterwards the state of an audio token points at the embedding of its spoken text token. A decoder with the ability to
copy text can then copy speech. Training is cheap: it computes only the projector and the embedding, with the embedding
as classifier, starting from its current values. It needs only the order of the words, not their times.

The embedding of a pretrained language model stays as it is: its rows, centred and of length 1, are the classifier.

CTC alone removes a third of what the encoder holds of the background (docs/LOG.md). A second loss keeps it: the mean of
a clip's rows points at the name of the background class, and at "woman" and "man" if they speak.

Axes: B clips, A audio tokens, D encoder width, H hidden width, V vocabulary. This module depends on no question or
trace.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from hyper_model.audio_encoder import stack_rows
from hyper_model.files import replacing
from hyper_model.trace import TraceTokenizer
from training.data.clips import Clip
from training.policy import HyperPolicy
from training.recipes import Spelling
from training.text_metrics import edit_distance, words

_BLANK = 0
_MAX_CHECKED = 200
_VOICES = ("woman", "man")
_NUM_OTHERS = 512
_OWN = ("bias_V", "blank_H", "blank_bias", "scale")
"""Parameters of the classifier, absent from the policy."""
_FROZEN_SCALE = 0.5
"""Initial scale of the logits over rows of length 1."""
_WINDOW_BATCHES = 8


@dataclass(frozen=True)
class Spelled:
    """Accuracy of the projector on held-back clips, by the likeliest token at each state.

    Attributes:
        word_error: Word error rate without a language model.
        sound_accuracy: Share of right background classes; None without the loss for sounds.
    """

    word_error: float
    sound_accuracy: float | None
    num_clips: int


class _Speller(nn.Module):
    """The projector, the embedding as a classifier, and a blank.

    Args:
        policy: Owner of the projector and the embedding; it stays unchanged.
        is_frozen: True keeps the embedding unchanged.
        names: Tokens of the names of sounds; empty without the loss for sounds.
    """

    def __init__(self, policy: HyperPolicy, *, is_frozen: bool, names: Sequence[Sequence[int]] = ()) -> None:
        super().__init__()
        linear = _projector(policy)
        weight_VH = policy.get_input_embeddings().weight.detach().float()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
        self.projector = nn.Linear(linear.in_features, linear.out_features)
        self.projector.load_state_dict({k: v.detach().float() for k, v in linear.state_dict().items()})
        self.rms = float(weight_VH.square().mean().sqrt())
        if is_frozen:
            weight_VH = F.normalize(weight_VH - weight_VH.mean(0))
        self.embedding_VH = nn.Parameter(weight_VH.clone(), requires_grad=not is_frozen)
        self.bias_V = nn.Parameter(torch.zeros(len(weight_VH)))
        self.blank_H = nn.Parameter(torch.zeros(weight_VH.shape[1]))
        # Most states are silence or the middle of a word.
        self.blank_bias = nn.Parameter(torch.tensor([2.0]))
        self.scale = nn.Parameter(torch.tensor(_FROZEN_SCALE if is_frozen else 1.0))
        self.names = [torch.tensor(ids) for ids in names]
        self.sound_scale = nn.Parameter(torch.tensor(_FROZEN_SCALE))
        self.sound_bias_C = nn.Parameter(torch.zeros(len(names)))

    def sounds(self, states_BAD: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        """Return the logits [B, C] of the named sounds, from the mean of each clip's rows."""
        hidden_BAH = self.projector(states_BAD)
        hidden_BAH = F.rms_norm(hidden_BAH, hidden_BAH.shape[-1:])
        is_state_BA = torch.arange(states_BAD.shape[1]) < lengths_B[:, None]
        mean_BH = (hidden_BAH * is_state_BA[..., None]).sum(1) / lengths_B[:, None]
        names_CH = F.normalize(torch.stack([self.embedding_VH[ids].mean(0) for ids in self.names]), dim=-1)
        return F.linear(mean_BH * self.sound_scale, names_CH, self.sound_bias_C)

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

    def transcribe_states(self, states_AD: torch.Tensor, tokenizer: TraceTokenizer) -> str:
        """Return the text of one clip, limited to tokens drawn at least once in training."""
        batch = {"states_BAD": states_AD[None], "lengths_B": torch.tensor([len(states_AD)])}
        return self.transcribe(batch, tokenizer, self.bias_V.detach().nonzero().flatten().tolist())[0]

    @torch.no_grad()
    def transcribe(
        self, batch: dict[str, torch.Tensor], tokenizer: TraceTokenizer, vocabulary: Sequence[int]
    ) -> list[str]:
        """Return the text of each clip by the likeliest token at each state.

        Args:
            vocabulary: Permitted tokens of a text.
        """
        ids = torch.tensor(vocabulary)
        best_BA = self(batch["states_BAD"], ids).argmax(-1).transpose(0, 1)
        texts: list[str] = []
        for best_A, length in zip(best_BA, batch["lengths_B"].tolist(), strict=True):
            best = best_A[:length].unique_consecutive()
            texts.append(tokenizer.decode(ids[best[best != _BLANK] - 1].tolist()))
        return texts


def _projector(policy: HyperPolicy) -> nn.Linear:
    """Return the projector's layer, or its trained copy with adapters (peft)."""
    module: Any = policy.model.multi_modal_projector
    return module.modules_to_save["default"].linear if hasattr(module, "modules_to_save") else module.linear


def _encode(tokenizer: TraceTokenizer, transcript: str) -> list[int]:
    """Encode a transcript with a space before it; its first word then has the token of a word inside a line."""
    return tokenizer.encode_text(f" {transcript}") if transcript else []


def _batch(
    clips: Sequence[Clip], tokenizer: TraceTokenizer, width: int, stack: int, classes: Sequence[str] = ()
) -> dict[str, torch.Tensor]:
    """Collect clips of one batch.

    Args:
        classes: Background classes, if the loss for sounds needs them.
        width: Width of the projector's input, `stack` states of the encoder.
    """
    states = [stack_rows(clip.states(width // stack).float(), [clip.num_tokens], stack)[0] for clip in clips]
    lengths = [len(states_AD) for states_AD in states]
    states_BAD = nn.utils.rnn.pad_sequence(states, batch_first=True)
    transcripts = [_encode(tokenizer, clip.scene.transcript) for clip in clips]
    sexes = [{speaker.sex for speaker in clip.scene.speakers} for clip in clips]
    return {
        "classes_B": torch.tensor([classes.index(clip.scene.environment) for clip in clips] if classes else []),
        "is_heard_B2": torch.tensor([[sex in found for sex in _VOICES] for found in sexes], dtype=torch.float32),
        "states_BAD": states_BAD,
        "lengths_B": torch.tensor(lengths),
        "ids": torch.tensor([token_id for ids in transcripts for token_id in ids], dtype=torch.long),
        "target_lengths_B": torch.tensor([len(ids) for ids in transcripts]),
    }


def _loss(
    speller: _Speller, batch: dict[str, torch.Tensor], rng: random.Random, vocabulary: Sequence[int]
) -> torch.Tensor:
    """Return the CTC loss in nats per text token.

    Args:
        vocabulary: Candidates for negative tokens.
        rng: Draws the negative tokens. The full vocabulary would spend most of the time on tokens outside the batch
            (Jean et al. 2015, "On Using Very Large Target Vocabulary").
    """
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


def _sound_loss(speller: _Speller, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the cross entropy of background class and voices in nats per clip."""
    logits_BC = speller.sounds(batch["states_BAD"], batch["lengths_B"])
    num_classes = logits_BC.shape[1] - len(_VOICES)
    of_class = F.cross_entropy(logits_BC[:, :num_classes], batch["classes_B"])
    return of_class + F.binary_cross_entropy_with_logits(logits_BC[:, num_classes:], batch["is_heard_B2"])


def load_speller(policy: HyperPolicy, saved: Mapping[str, torch.Tensor]) -> _Speller:
    """Return the saved classifier of `teach_spelling`, over the embedding of the policy."""
    speller = _Speller(policy, is_frozen="embedding" not in saved)
    speller.projector.load_state_dict({name: saved[name] for name in ("weight", "bias")})
    with torch.no_grad():
        for name in _OWN:
            getattr(speller, name).copy_(saved[name])
    return speller


def teach_spelling(
    policy: HyperPolicy,
    tokenizer: TraceTokenizer,
    clips: Sequence[Clip],
    spelling: Spelling,
    file: Path,
    *,
    seed: int,
    keeps_scale: bool = False,
) -> Spelled | None:
    """Train projector and embedding of a policy, or restore the result of an earlier call from `file`.

    A pretrained embedding (`Spelling.freezes_embedding`) is not trained, and the projector is scaled to its size.

    Args:
        clips: Clips of one width; a few are held back for the check.
        keeps_scale: Keep the size of the projector's output. A decoder trained behind this projector expects it.

    Returns:
        The accuracy on the held-back clips; None if `file` existed.
    """
    spelled = None
    if not file.exists():
        spelled = _teach(policy, tokenizer, clips, spelling, file, seed, keeps_scale)
    saved = load_file(file)
    projector = _projector(policy)
    embedding: Any = policy.get_input_embeddings()
    with torch.no_grad():
        projector.weight.copy_(saved["weight"])
        projector.bias.copy_(saved["bias"])
        if "embedding" in saved:
            embedding.weight.copy_(saved["embedding"])
    return spelled


def _teach(
    policy: HyperPolicy,
    tokenizer: TraceTokenizer,
    clips: Sequence[Clip],
    spelling: Spelling,
    file: Path,
    seed: int,
    keeps_scale: bool,
) -> Spelled:
    rng = random.Random(f"{seed}/spelling")
    clips = rng.sample(clips, len(clips))
    num_checked = min(_MAX_CHECKED, len(clips) // 10)
    checked, taught = clips[:num_checked], clips[num_checked:]
    classes: list[str] = []
    if spelling.sound_weight:
        classes = sorted({clip.scene.environment for clip in clips})
    names = [tokenizer.encode_text(f" {name}") for name in (*classes, *_VOICES)] if classes else []
    speller = _Speller(policy, is_frozen=spelling.freezes_embedding, names=names)
    width, stack = speller.projector.in_features, policy.stack
    rms = _output_rms(speller.projector, _batch(checked, tokenizer, width, stack)) if keeps_scale else speller.rms
    vocabulary: Sequence[int] = range(len(speller.embedding_VH))
    if spelling.freezes_embedding:
        # Most tokens of a language model are in no transcript; separating them would cost steps without any gain.
        vocabulary = sorted({token_id for clip in clips for token_id in _encode(tokenizer, clip.scene.transcript)})
    trained = [parameter for parameter in speller.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=spelling.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
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
        batch = _batch(waiting.pop(), tokenizer, width, stack, classes)
        if spelling.dropout_states:
            kept_BA = torch.rand(batch["states_BAD"].shape[:2]) > spelling.dropout_states
            batch["states_BAD"] *= kept_BA[..., None]
        loss = _loss(speller, batch, rng, vocabulary)
        if classes:
            loss = loss + spelling.sound_weight * _sound_loss(speller, batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{float(loss.detach()):.2f}")
    transcripts = [clip.scene.transcript for clip in checked]
    found = [
        text
        for start in range(0, len(checked), size)
        for text in speller.transcribe(
            _batch(checked[start : start + size], tokenizer, width, stack), tokenizer, vocabulary
        )
    ]
    num_errors, num_words = word_errors(transcripts, found)
    sounds = _sound_accuracy(speller, checked, tokenizer, width, stack, classes) if classes else None
    spelled = Spelled(num_errors / max(1, num_words), sounds, len(checked))
    scale = rms / _output_rms(speller.projector, _batch(checked, tokenizer, width, stack))
    _save(speller, file, scale=scale if spelling.freezes_embedding else None)
    return spelled


def _save(speller: _Speller, file: Path, *, scale: float | None) -> None:
    """Write the trained classifier.

    Args:
        scale: Factor of the projector over a frozen embedding; None if the embedding was trained too.
    """
    saved = {"weight": speller.projector.weight.detach(), "bias": speller.projector.bias.detach()}
    if scale is None:
        saved["embedding"] = speller.embedding_VH.detach()
    else:
        saved = {name: tensor * scale for name, tensor in saved.items()}
    saved |= {name: getattr(speller, name).detach() for name in _OWN}
    with replacing(file) as partial:
        save_file(saved, partial)


@torch.no_grad()
def _sound_accuracy(
    speller: _Speller, clips: Sequence[Clip], tokenizer: TraceTokenizer, width: int, stack: int, classes: Sequence[str]
) -> float:
    """Return the share of clips with the right background class."""
    num_right = 0
    for clip in clips:
        batch = _batch([clip], tokenizer, width, stack, classes)
        logits_BC = speller.sounds(batch["states_BAD"], batch["lengths_B"])[:, : len(classes)]
        num_right += int(logits_BC.argmax(1) == batch["classes_B"])
    return num_right / max(1, len(clips))


def word_errors(references: Sequence[str], found: Sequence[str]) -> tuple[int, int]:
    """Count the word errors of texts, and the words of their references."""
    pairs = [(words(reference), words(text)) for reference, text in zip(references, found, strict=True)]
    return sum(edit_distance(*pair) for pair in pairs), sum(len(reference) for reference, _ in pairs)


@torch.no_grad()
def _output_rms(projector: nn.Linear, batch: dict[str, torch.Tensor]) -> float:
    """Return the root mean square of the projector's output over the states of a batch, without padding."""
    is_state_BA = torch.arange(batch["states_BAD"].shape[1]) < batch["lengths_B"][:, None]
    return float(projector(batch["states_BAD"][is_state_BA]).square().mean().sqrt())
