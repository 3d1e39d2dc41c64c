"""The trained model: Qwen2-Audio, scored at the tokens of its completions, with one encoding per clip.

Axes: B sequences, T positions, C clips, A audio tokens of all clips, N scored positions of all sequences. D is the
width of the encoder, H the hidden width, V the vocabulary. Sequences are padded on the right. Attention is causal, so
no scored position sees padding, and only branched rows need a mask.

A batch holds each clip once. Its states are encoded and projected once, then copied to all rollouts of its prompt. This
happens inside the root module's `forward`, visible to wrappers of the root (FSDP, DDP). This module depends on no data
source, reward or optimizer.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute
from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration, Qwen2Config
from transformers.models.qwen2_audio.modeling_qwen2_audio import Qwen2AudioEncoder

from hyper_model.audio_encoder import encode, num_states_of_mel
from hyper_model.audio_rows import audio_layers, audio_stack, row_width
from hyper_model.checkpoint import Checkpoint, require_float_weights
from hyper_model.errors import CheckpointError
from hyper_model.weights import StoredTensors, canonical_name, read_entries, weight_files
from training.recipes import Lora

IGNORED = -100
"""Target of a position without a score: the prompt, the audio and every forced token."""

SCORED_AT_ONCE = 2_048
"""Maximum number of positions with logits in memory; more are computed in pieces and recomputed for the gradient."""


@dataclass(frozen=True, eq=False)
class Row:
    """One sequence to score, or several with a common beginning.

    Attributes:
        token_ids: Prompt and completion, with one AUDIO id in place of the clip.
        targets: The token to predict at each position, already shifted by one; IGNORED at positions without a score.
        audio_at: Position of the AUDIO id.
        clip: Index of its clip in the batch.
        branches: Start of each continuation. A continuation sees the tokens before the first start and its own tokens.
            An empty tuple means a single sequence.
    """

    token_ids: Sequence[int]
    targets: Sequence[int]
    audio_at: int
    clip: int
    branches: tuple[int, ...] = ()


def branch(
    prompt: Sequence[int], completions: Sequence[tuple[Sequence[int], Sequence[int]]], audio_at: int, clip: int
) -> Row:
    """Build a row of several completions of one prompt, computed once for all of them.

    Args:
        completions: Tokens and targets of each completion (IGNORED for tokens without a score).
    """
    # The prompt's last token predicts the first token of a completion, so each branch has its own copy of it.
    token_ids, targets, starts = [*prompt[:-1]], [IGNORED] * (len(prompt) - 1), list[int]()
    for written, wanted in completions:
        starts.append(len(token_ids))
        token_ids += [prompt[-1], *written]
        targets += [*wanted, IGNORED]
    return Row(token_ids, targets, audio_at, clip, tuple(starts))


def pack(
    rows: Sequence[Row], clips: Sequence[torch.Tensor], *, pad_id: int, is_encoded: bool, stack: int = 1
) -> dict[str, Any]:
    """Build the arguments of `HyperPolicy.forward`.

    Args:
        clips: Per clip, the encoder's states [A, D] or its log-mel [M, W] (`audio_encoder.LogMel`).
        is_encoded: True for encoder states.
        stack: Rows of the tower that one audio token joins (`audio_rows.audio_stack`); states come joined already.
    """
    lengths = [len(clip) if is_encoded else -(-(num_states_of_mel(clip.shape[1]) // 2) // stack) for clip in clips]
    starts = [sum(lengths[:c]) for c in range(len(clips))]
    sizes = [len(row.token_ids) - 1 + lengths[row.clip] for row in rows]
    shape = (len(rows), max(sizes))
    token_ids_BT = torch.full(shape, pad_id)
    targets_BT = torch.full(shape, IGNORED)
    is_audio_BT = torch.zeros(shape, dtype=torch.bool)
    audio_rows: list[torch.Tensor] = []
    for b, row in enumerate(rows):
        at, end, size = row.audio_at, row.audio_at + lengths[row.clip], sizes[b]
        token_ids_BT[b, :at] = torch.tensor(row.token_ids[:at], dtype=torch.long)
        token_ids_BT[b, end:size] = torch.tensor(row.token_ids[at + 1 :], dtype=torch.long)
        targets_BT[b, :at] = torch.tensor(row.targets[:at], dtype=torch.long)
        # The AUDIO id's own target, if any, belongs to the last of the audio tokens.
        targets_BT[b, end - 1] = row.targets[at]
        targets_BT[b, end:size] = torch.tensor(row.targets[at + 1 :], dtype=torch.long)
        is_audio_BT[b, at:end] = True
        audio_rows.append(torch.arange(starts[row.clip], starts[row.clip] + lengths[row.clip]))
    shifted = [tuple(at + lengths[row.clip] - 1 for at in row.branches) for row in rows]
    arguments: dict[str, Any] = {
        "token_ids_BT": token_ids_BT,
        "targets_BT": targets_BT,
        "is_audio_BT": is_audio_BT,
        "audio_rows": torch.cat(audio_rows),
    }
    if any(shifted):
        arguments |= _branched(shifted, sizes, shape[1])
    return arguments | ({"states_AD": torch.cat(list(clips))} if is_encoded else {"mels_MW": list(clips)})


def _branched(starts: Sequence[tuple[int, ...]], sizes: Sequence[int], num_positions: int) -> dict[str, torch.Tensor]:
    """Return the attention mask [B, 1, T, T] of branched rows, and positions within each sequence [B, T]."""
    positions_BT = torch.arange(num_positions).repeat(len(starts), 1)
    branch_BT = torch.zeros(len(starts), num_positions, dtype=torch.long)
    for b, (begins, size) in enumerate(zip(starts, sizes, strict=True)):
        for number, (begin, end) in enumerate(itertools.pairwise((*begins, size)), 1):
            branch_BT[b, begin:end] = number
            positions_BT[b, begin:end] = torch.arange(begins[0], begins[0] + end - begin)
    is_before_TT = torch.ones(num_positions, num_positions, dtype=torch.bool).tril()
    same_BTT = branch_BT[:, :, None] == branch_BT[:, None]
    mask_BTT = is_before_TT & (same_BTT | (branch_BT == 0)[:, None])
    return {"mask_BTT": mask_BTT[:, None], "positions_BT": positions_BT}


class Scores(NamedTuple):
    """The model's scores of the targets, in the order of the sequences.

    Attributes:
        logprobs_N: float32, of the targets, over the allowed tokens.
        entropies_N: float32, of the distribution; without gradient.
    """

    logprobs_N: torch.Tensor  # noqa: N815  # the axis suffix
    entropies_N: torch.Tensor  # noqa: N815


class HyperPolicy(Qwen2AudioForConditionalGeneration):
    """Qwen2-Audio for training; its parameters and their names are the library's.

    With `audio_stack` or `audio_layers` in the config, the projector is wider (`audio_rows.row_width`).
    """

    def __init__(self, config: Qwen2AudioConfig) -> None:
        super().__init__(config)
        self.stack, self.layers = audio_stack(config), audio_layers(config)
        if is_widened(config):
            projector: Any = self.model.multi_modal_projector
            projector.linear = nn.Linear(row_width(config), cast(Any, config.text_config).hidden_size)

    def encode(self, mels_MW: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[int]]:
        """Return the projector's input rows of all clips, and the number of rows per clip."""
        tower: Any = self.model.audio_tower
        return encode(tower, mels_MW, self.stack, self.layers)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        *,
        token_ids_BT: torch.Tensor,
        targets_BT: torch.Tensor,
        is_audio_BT: torch.Tensor,
        audio_rows: torch.Tensor,
        states_AD: torch.Tensor | None = None,
        mels_MW: Sequence[torch.Tensor] | None = None,
        mask_BTT: torch.Tensor | None = None,
        positions_BT: torch.Tensor | None = None,
        banned_ids: torch.Tensor | None = None,
        temperature: float = 1.0,
    ) -> Scores:
        """Score the targets of a batch from `pack`.

        Args:
            banned_ids: Tokens banned in the sampler at every scored position, excluded from the distribution.
            temperature: Temperature of the sampler.
        """
        hidden_BTH = self.hidden_states(
            token_ids_BT,
            is_audio_BT,
            audio_rows,
            states_AD=states_AD,
            mels_MW=mels_MW,
            mask_BTT=mask_BTT,
            positions_BT=positions_BT,
        )
        is_scored_BT = targets_BT != IGNORED
        return self._score(hidden_BTH[is_scored_BT], targets_BT[is_scored_BT], banned_ids, temperature)

    def hidden_states(
        self,
        token_ids_BT: torch.Tensor,
        is_audio_BT: torch.Tensor,
        audio_rows: torch.Tensor,
        *,
        states_AD: torch.Tensor | None = None,
        mels_MW: Sequence[torch.Tensor] | None = None,
        mask_BTT: torch.Tensor | None = None,
        positions_BT: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the decoder's last hidden states [B, T, H]."""
        model: Any = self.model
        embedded_BTH = model.language_model.get_input_embeddings()(token_ids_BT)
        if states_AD is None:
            assert mels_MW is not None
            states_AD, _ = self.encode(mels_MW)
        projected_AH = model.multi_modal_projector(states_AD.to(embedded_BTH.dtype))
        embedded_BTH = embedded_BTH.masked_scatter(is_audio_BT[..., None], projected_AH[audio_rows])
        output = model.language_model(
            inputs_embeds=embedded_BTH, attention_mask=mask_BTT, position_ids=positions_BT, use_cache=False
        )
        return output.last_hidden_state

    def _score(
        self,
        hidden_NH: torch.Tensor,
        targets_N: torch.Tensor,
        banned_ids: torch.Tensor | None,
        temperature: float,
    ) -> Scores:
        def score(hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            logits = self.lm_head(hidden).float() / temperature
            if banned_ids is not None:
                logits = logits.index_fill(1, banned_ids, -torch.inf)
            logprobs = logits.log_softmax(-1)
            with torch.no_grad():
                # A banned token has log-probability minus infinity and adds nothing to the entropy.
                entropies = -(logprobs.exp() * logprobs.clamp(min=-1e9)).sum(-1)
            return logprobs.gather(1, targets[:, None])[:, 0], entropies

        if len(targets_N) <= SCORED_AT_ONCE:
            return Scores(*score(hidden_NH, targets_N))
        pieces: list[Any] = []
        for start in range(0, len(targets_N), SCORED_AT_ONCE):
            piece = slice(start, start + SCORED_AT_ONCE)
            pieces.append(recompute(score, hidden_NH[piece], targets_N[piece], use_reentrant=False))
        return Scores(*(torch.cat(parts) for parts in zip(*pieces, strict=True)))


def is_widened(config: Any) -> bool:
    """Return whether the projector of a config is wider than transformers'."""
    return row_width(config) != cast(Any, config.audio_config).d_model


def open_policy(checkpoint: Checkpoint, *, dtype: torch.dtype = torch.float32) -> HyperPolicy:
    """Load the weights of a checkpoint.

    Raises:
        CheckpointError: The checkpoint is quantised, or a tensor is missing or unknown. The library itself would only
            warn and train a random tensor.
    """
    require_float_weights(checkpoint)
    library: Any = Qwen2AudioForConditionalGeneration
    config: Any = Qwen2AudioConfig.from_pretrained(str(checkpoint.path))
    if is_widened(config):
        policy = HyperPolicy(config)
        if policy.config.tie_word_embeddings:
            tie(policy)
        load_tensors(policy, StoredTensors(read_entries(weight_files(checkpoint.path))).items())
        return policy.to(dtype).train()  # pyright: ignore[reportArgumentType]
    policy, info = library.from_pretrained(str(checkpoint.path), dtype=dtype, output_loading_info=True)
    wrong = {name: sorted(info[name]) for name in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[name]}
    if wrong:
        raise CheckpointError(f"{checkpoint.path}: the weights do not fit: {wrong}")
    # The library finds the names on disk by its own class; ours only adds methods.
    policy.__class__ = HyperPolicy
    policy.stack, policy.layers = 1, ()
    if policy.config.tie_word_embeddings:
        tie(policy)
    return policy.train()


def build_policy(decoder: Qwen2Config, encoder: Qwen2AudioEncoder, *, audio_id: int) -> HyperPolicy:
    """Build a policy from a random decoder and a given encoder."""
    config = Qwen2AudioConfig(
        audio_config=encoder.config.to_dict(),
        text_config=decoder.to_dict(),
        audio_token_index=audio_id,
    )
    policy = HyperPolicy(config)
    tower: Any = policy.model.audio_tower
    tower.load_state_dict(encoder.state_dict(), strict=True)
    if decoder.tie_word_embeddings:
        tie(policy)
    return policy.train()


def tie(policy: HyperPolicy) -> None:
    """Share one parameter between head and embedding; transformers never does this for this architecture."""
    head: Any = policy.lm_head
    head.weight = policy.get_input_embeddings().weight


def freeze_encoder(policy: HyperPolicy) -> None:
    """Exclude the audio tower from training."""
    tower: Any = policy.model.audio_tower
    tower.requires_grad_(False)
    tower.eval()


def adapt(policy: HyperPolicy, lora: Lora) -> Any:
    """Add LoRA adapters (Hu et al. 2022) to the decoder's linear layers, except head and embedding."""
    from peft import LoraConfig, get_peft_model

    targets = rf".*language_model\.layers\.\d+\.(self_attn|mlp)\.({'|'.join(lora.targets)})"
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        modules_to_save=["multi_modal_projector"] if lora.trains_projector else None,
    )
    # In the policy's dtype: the optimizer keeps float32 copies of bfloat16 parameters (`MasterAdamW`).
    return get_peft_model(policy, config, autocast_adapter_dtype=False)  # pyright: ignore[reportArgumentType]


def named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every whole tensor of a policy, wrapped or not, with its name on disk, one at a time.

    Adapters must be merged first (`merged`). FSDP shards are gathered one by one, on all ranks at once.
    """
    for name, tensor in model.state_dict(keep_vars=False).items():
        bare = name.removeprefix("module.").removeprefix("base_model.model.").replace(".base_layer.", ".")
        # peft keeps what it trains whole beside the module as it was.
        bare = bare.replace(".modules_to_save.default.", ".")
        if "lora_" in bare or ".original_module." in bare:
            continue
        full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        yield canonical_name(bare), full.detach()


class merged:  # noqa: N801  # a context manager, as contextlib spells its own
    """Context manager with a policy's LoRA adapters merged into its weights; without adapters it does nothing.

    Unmerging by subtraction is not bit-exact, so the weights are restored from a copy.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model.module if hasattr(model, "module") else model

    def __enter__(self) -> Any:
        self.before: Mapping[str, torch.Tensor] = {}
        model: Any = self.model
        if hasattr(model, "merge_adapter"):
            self.before = {
                n: p.detach().clone() for n, p in model.named_parameters() if n.endswith("base_layer.weight")
            }
            model.merge_adapter()
        return self.model

    def __exit__(self, *_: object) -> None:
        model: Any = self.model
        if hasattr(model, "unmerge_adapter"):
            model.unmerge_adapter()
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name in self.before:
                        parameter.copy_(self.before[name])


def load_tensors(model: nn.Module, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copy tensors, by their names on disk, into a policy, wrapped or not.

    Raises:
        CheckpointError: A tensor is missing or unknown.
    """
    own = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        own[canonical_name(name.removeprefix("module."))] = tensor
    missing = set(own)
    with torch.no_grad():
        for name, tensor in tensors:
            if name not in own:
                raise CheckpointError(f"the saved weights hold {name}, which this model does not have")
            own[name].copy_(_sharded_like(own[name], tensor))
            missing.discard(name)
    if missing:
        raise CheckpointError(f"the saved weights lack {', '.join(sorted(missing)[:3])}")


def _sharded_like(own: Any, tensor: torch.Tensor) -> torch.Tensor:
    if not hasattr(own, "device_mesh"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(own.device), own.device_mesh, own.placements)
