"""The model of a run: creation, saving, loading and export as a HyPeR checkpoint."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import Qwen2Config

from hyper_model.checkpoint import Checkpoint, export, open_checkpoint, require_float_weights
from hyper_model.compose import Parts, adapter_of_parts
from hyper_model.errors import CheckpointError
from hyper_model.trace import TraceTokenizer
from hyper_model.weights import StoredTensors, canonical_name, read_entries, weight_files
from training.data.encoder import load_encoder
from training.data.sources import recordings as sounds
from training.policy import (
    HyperPolicy,
    adapt,
    build_policy,
    freeze_encoder,
    load_tensors,
    merged,
    named_tensors,
    open_policy,
)
from training.recipes import Decoder, Lora

MODEL, ADAPTER = "model", "adapter"
MAX_MODEL_LEN = 2_048
"""Context length, in tokens, of a decoder from scratch."""


@dataclass(eq=False)
class RunModel:
    """A policy with all parts of its checkpoint.

    Attributes:
        policy: A `HyperPolicy`, or peft's model around one.
        config: Its `config.json`, as a dictionary.
        tokenizer_json: The text of its tokenizer.
        manifest: Fields of the manifest.
    """

    policy: Any
    tokenizer: TraceTokenizer
    config: dict[str, Any]
    tokenizer_json: str
    manifest: dict[str, Any]

    @property
    def is_adapted(self) -> bool:
        """Return True if only LoRA adapters are trained."""
        return hasattr(self.policy, "merge_adapter")

    @property
    def core(self) -> HyperPolicy:
        """Return the policy without peft's wrapper."""
        return self.policy.base_model.model if self.is_adapted else self.policy

    def save(self, folder: Path, state_dict: Mapping[str, torch.Tensor] | None = None) -> None:
        """Write the input of `load`: the adapters, or the whole model as a checkpoint.

        Args:
            state_dict: Tensors gathered from the shards of all ranks; None for an unsharded policy.
        """
        if self.is_adapted:
            self.policy.save_pretrained(folder / ADAPTER, state_dict=state_dict)
        else:
            self._write(folder / MODEL, state_dict or dict(named_tensors(self.policy)), recipe=None, dtype=None)

    def load(self, folder: Path, model: nn.Module | None = None) -> None:
        """Restore saved weights exactly.

        Args:
            model: The wrapped policy; None without a wrapper.
        """
        if self.is_adapted:
            from peft import set_peft_model_state_dict
            from safetensors.torch import load_file

            set_peft_model_state_dict(self.policy, load_file(folder / ADAPTER / "adapter_model.safetensors"))
        else:
            stored = StoredTensors(read_entries(weight_files(folder / MODEL)))
            load_tensors(model or self.policy, stored.items())

    def load_parts(self, parts: Parts) -> None:
        """Put trained parts of hyper-small into the adapters and the projector.

        The projector of parts without `audio_layers` gets zeros for the states of these layers.

        Raises:
            CheckpointError: The parts do not fit the adapters of this policy.
        """
        from peft import set_peft_model_state_dict

        tensors = adapter_of_parts(parts)
        own = {name.replace(".default.", "."): p.shape for name, p in self.policy.named_parameters()}
        for name, tensor in tensors.items():
            place = name.replace("projector.linear.", "projector.modules_to_save.linear.")
            if name.endswith("projector.linear.weight") and not parts.fields.audio_layers:
                tensor = tensors[name] = _widened(tensor, self.core.stack, len(self.core.layers))
            if own.get(place) != tensor.shape:
                raise CheckpointError(
                    f"the parts hold {name} {tuple(tensor.shape)}; the adapters of this run have {own.get(place)} there"
                )
        set_peft_model_state_dict(self.policy, tensors)

    def export(
        self, directory: Path, *, recipe: Any, num_steps: int, dtype: torch.dtype | None, overwrite: bool = False
    ) -> Checkpoint:
        """Write a servable checkpoint with merged adapters.

        Args:
            recipe: The training recipe, for the manifest.
            dtype: Target dtype of the weights; None keeps them unchanged.
        """
        with merged(self.policy) as model:
            recorded = asdict(recipe) | {"trained_steps": num_steps}
            return self._write(directory, dict(named_tensors(model)), recipe=recorded, dtype=dtype, overwrite=overwrite)

    def _write(
        self,
        directory: Path,
        tensors: Mapping[str, torch.Tensor],
        *,
        recipe: dict[str, Any] | None,
        dtype: torch.dtype | None,
        overwrite: bool = True,
    ) -> Checkpoint:
        fields = copy.deepcopy(self.manifest)
        if recipe is not None:
            fields["recipe"] = json.dumps(recipe, sort_keys=True)
        return export(
            directory,
            state_dict=tensors,
            config=self.config,
            tokenizer_json=self.tokenizer_json,
            manifest_fields=fields,
            dtype=dtype,
            overwrite=overwrite,
        )


def _widened(weight_HD: torch.Tensor, stack: int, num_layers: int) -> torch.Tensor:
    """Return a projector's weight with zeros for the states of further layers: [H, (1 + num_layers) * D]."""
    rows = weight_HD.reshape(len(weight_HD), stack, -1)
    return nn.functional.pad(rows, (0, num_layers * rows.shape[2])).flatten(1)


def model_of_checkpoint(directory: Path, *, dtype: torch.dtype, lora: Lora | None = None) -> RunModel:
    """Open a checkpoint for training; its audio tower is frozen.

    Raises:
        CheckpointError: The checkpoint is unreadable, or its tags are plain text.
    """
    checkpoint = open_checkpoint(directory)
    if not checkpoint.tokenizer.tag_ids:
        raise CheckpointError(
            f"{directory} writes its tags as plain text, and training wants a token for each: adopt its source with "
            "--tag-style token"
        )
    policy: Any = open_policy(checkpoint, dtype=dtype)
    freeze_encoder(policy)
    fields = checkpoint.manifest.model_dump(mode="json", exclude={"files", "format_version", "recipe"})
    # Thresholds are valid only for their own weights, so a trained checkpoint is calibrated anew.
    fields["pause"].pop("calibration", None)
    fields.pop("confidence", None)
    fields["trace"]["tags"] = {
        name: {"open": tag["open"], "close": tag["close"]} for name, tag in fields["trace"]["tags"].items()
    }
    fields["base_model"] = f"{checkpoint.manifest.name} ({checkpoint.manifest_sha256[:12]})"
    if lora is not None:
        policy = adapt(policy, lora)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    text = (directory / "tokenizer.json").read_text(encoding="utf-8")
    return RunModel(policy, checkpoint.tokenizer, config, text, fields)


def model_from_scratch(
    decoder: Decoder,
    tokenizer_file: Path,
    encoder_file: Path,
    *,
    dtype: torch.dtype,
    base: Path | None = None,
    pause_mode: Literal["parallel", "sampled"] = "parallel",
) -> RunModel:
    """Build the embedded checkpoint's model: Whisper's encoder with a random decoder or a checkpoint's decoder.

    Args:
        base: A checkpoint with a decoder of this shape; its vocabulary may differ (`carry_over`).

    Raises:
        CheckpointError: The base is unreadable or has another shape.
    """
    tokenizer = TraceTokenizer.from_file(tokenizer_file)
    if decoder.has_position_tokens:
        tokenizer = tokenizer.with_positions(decoder.latent_tokens)
    text_config = Qwen2Config(
        vocab_size=tokenizer.vocab_size,
        hidden_size=decoder.hidden_size,
        intermediate_size=decoder.ffn_size,
        num_hidden_layers=decoder.num_layers,
        num_attention_heads=decoder.num_heads,
        num_key_value_heads=decoder.num_heads,
        max_position_embeddings=MAX_MODEL_LEN,
        tie_word_embeddings=True,
    )
    encoder = load_encoder(encoder_file)
    policy = build_policy(text_config, encoder, audio_id=tokenizer.audio_id)
    origin = "trained from scratch"
    if base is not None:
        checkpoint = open_checkpoint(base)
        require_float_weights(checkpoint)
        carry_over(checkpoint, policy, tokenizer)
        origin = f"begun from {checkpoint.manifest.name} ({checkpoint.manifest_sha256[:12]})"
    policy = policy.to(dtype)  # pyright: ignore[reportArgumentType]
    freeze_encoder(policy)
    config = {
        "architectures": ["Qwen2AudioForConditionalGeneration"],
        "model_type": "qwen2_audio",
        "audio_config": encoder.config.to_dict(),
        "text_config": text_config.to_dict(),
    }
    fields = {
        "name": "hyper-mini",
        "base_model": f"Whisper tiny.en encoder (frozen) + Qwen2 decoder {origin}",
        "environment_labels": [*sounds.labels(), sounds.QUIET, sounds.BACKGROUND_SPEECH],
        "max_model_len": MAX_MODEL_LEN,
        "trace": {"answer_style": "text"},
        # Training sequences have latent spans; the gate needs thresholds from calibration, so its budget is 0.
        "pause": {
            "mode": pause_mode,
            "latent_tokens": decoder.latent_tokens,
            "position_ids": tokenizer.position_ids or None,
            "max_pauses": 0,
        },
    }
    return RunModel(policy, tokenizer, config, tokenizer_file.read_text(encoding="utf-8"), fields)


def carry_over(checkpoint: Checkpoint, policy: HyperPolicy, tokenizer: TraceTokenizer) -> None:
    """Copy a checkpoint's decoder and projector into a policy of equal shape; the vocabularies may differ.

    Known tokens keep their embedding. A pause position starts as the pause token. Any other token starts as the mean of
    its pieces in the old vocabulary (Gee et al. 2022, "Fast Vocabulary Transfer").

    Raises:
        CheckpointError: The decoder has another shape.
    """
    own = {canonical_name(name): tensor for name, tensor in policy.state_dict(keep_vars=True).items()}
    with torch.no_grad():
        for name, tensor in StoredTensors(read_entries(weight_files(checkpoint.path))).items():
            if name.startswith("audio_tower."):
                continue
            if name.endswith(("embed_tokens.weight", "lm_head.weight")):
                spelled = [_spelled_by(checkpoint.tokenizer, tokenizer, i) for i in range(tokenizer.vocab_size)]
                tensor = torch.stack([tensor[ids].float().mean(0) for ids in spelled])
            if name not in own or own[name].shape != tensor.shape:
                raise CheckpointError(f"{checkpoint.path}: {name} {tuple(tensor.shape)} is not of the recipe's decoder")
            own[name].copy_(tensor)


def _spelled_by(before: TraceTokenizer, now: TraceTokenizer, token_id: int) -> list[int]:
    """List the ids of a token's pieces in another tokenizer."""
    token = now.tokenizer.id_to_token(token_id)
    assert token is not None
    known_id = before.tokenizer.token_to_id(token)
    if known_id is not None:
        return [known_id]
    if token_id in now.latent_ids and before.pause_id is not None:
        return [before.pause_id]
    # A piece of a character is no text; its bytes are in every byte-level vocabulary.
    text = now.token_bytes(token_id).decode("utf-8", errors="ignore")
    return before.encode_text(text) or [i for char in token if (i := before.tokenizer.token_to_id(char)) is not None]
