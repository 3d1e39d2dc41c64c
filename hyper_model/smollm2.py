"""Reader of SmolLM2-135M-Instruct's GGUF file as a Qwen2 decoder, with a tokenizer for traces.

A Llama block is a Qwen2 block with zero query, key and value biases. llama.cpp reorders the rows of each query and key
head for its rotary embedding; `_restore_rows` restores them. The weights are quantised to four bits (Q4_1, the
embedding Q8_0) and become float32 here. No package holds unquantised weights.

The module is independent of audio, packages and checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hyper_model.errors import CheckpointError
from hyper_model.trace import CONTROL_TOKENS, PAUSE, PAUSE_CLOSE, SPECIAL_TOKENS, Section

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

_ARCHITECTURE = "llama"
_ROW_MULTIPLE = 64
_NORMAL = 1
"""llama.cpp's type of an ordinary token."""
_TENSORS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
# A new token's embedding starts as the mean over the tokens of these words (Gee et al. 2022, "Fast Vocabulary
# Transfer").
_MEANINGS = {
    "<|audio_bos|>": " begin audio",
    "<|AUDIO|>": " audio",
    "<|audio_eos|>": " end audio",
    PAUSE: " pause",
    PAUSE_CLOSE: " resume",
    **{tag: f" {word} {name}" for tag, word, name in (
        (tag, word, section.value.lower().replace("_", " ").replace("asr", "transcript"))
        for section in Section
        for tag, word in zip(section.tags, ("begin", "end"), strict=True)
    )},
}  # fmt: skip


class SmolLM2File:
    """Open GGUF file of a Llama model with a GPT-2 vocabulary.

    Args:
        path: The file.

    Raises:
        CheckpointError: If the file is not a GGUF of this architecture.
    """

    def __init__(self, path: Path) -> None:
        import gguf

        try:
            self._reader: Any = gguf.GGUFReader(path)
        except (OSError, ValueError, IndexError) as error:
            raise CheckpointError(f"{path}: not a GGUF file ({error})") from error
        self._fields: dict[str, Any] = {name: field.contents() for name, field in self._reader.fields.items()}
        found = self._fields.get("general.architecture")
        if found != _ARCHITECTURE:
            raise CheckpointError(f"{path}: architecture {found}; only {_ARCHITECTURE} becomes a Qwen2 decoder")
        try:
            tokens, merges, kinds = (
                self._fields[f"tokenizer.ggml.{name}"] for name in ("tokens", "merges", "token_type")
            )
        except KeyError as error:
            raise CheckpointError(f"{path}: has no {error}, and so no vocabulary of byte-level BPE") from error
        self.tokenizer = make_tokenizer(tokens, merges, [i for i, kind in enumerate(kinds) if kind != _NORMAL])

    @property
    def num_rows(self) -> int:
        """Return the number of embedding rows: every token, up to a multiple of 64."""
        highest = max(self.tokenizer.get_vocab(with_added_tokens=True).values())
        return -(-(highest + 1) // _ROW_MULTIPLE) * _ROW_MULTIPLE

    def text_config(self) -> dict[str, Any]:
        """Return the `text_config` of the same decoder as Qwen2."""
        fields = {name.removeprefix(f"{_ARCHITECTURE}."): value for name, value in self._fields.items()}
        return {
            "model_type": "qwen2",
            "vocab_size": self.num_rows,
            "hidden_size": fields["embedding_length"],
            "intermediate_size": fields["feed_forward_length"],
            "num_hidden_layers": fields["block_count"],
            "num_attention_heads": fields["attention.head_count"],
            "num_key_value_heads": fields["attention.head_count_kv"],
            "max_position_embeddings": fields["context_length"],
            "rope_parameters": {"rope_theta": fields["rope.freq_base"], "rope_type": "default"},
            "rms_norm_eps": round(fields["attention.layer_norm_rms_epsilon"], 9),
            "tie_word_embeddings": True,
        }

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every tensor of the decoder in float32 by its name on disk; the head is the embedding."""
        import torch

        config = self.text_config()
        heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
        for stored in self._reader.tensors:
            tensor = _dequantize(stored)
            match stored.name.split("."):
                case ["token_embd", "weight"]:
                    yield "language_model.model.embed_tokens.weight", self._grow(tensor)
                case ["output_norm", "weight"]:
                    yield "language_model.model.norm.weight", tensor
                case ["blk", layer, kind, "weight"] if kind in _TENSORS:
                    name = f"language_model.model.layers.{layer}.{_TENSORS[kind]}"
                    yield f"{name}.weight", _restore_rows(tensor, heads[kind]) if kind in heads else tensor
                    if kind in ("attn_q", "attn_k", "attn_v"):
                        yield f"{name}.bias", torch.zeros(tensor.shape[0])
                case _:
                    raise CheckpointError(f"the GGUF file holds {stored.name}, which a Llama decoder does not have")

    def _grow(self, embedding_VH: torch.Tensor) -> torch.Tensor:
        """Add a row for each new token: the mean over its meaning's tokens, scaled to the average row length."""
        import torch

        rows_RH = torch.zeros(self.num_rows - len(embedding_VH), embedding_VH.shape[1])
        length = embedding_VH.square().sum(1).sqrt().mean()
        for token, meaning in _MEANINGS.items():
            mean_H = embedding_VH[self.tokenizer.encode(meaning, add_special_tokens=False).ids].mean(0)
            rows_RH[cast(int, self.tokenizer.token_to_id(token)) - len(embedding_VH)] = (
                mean_H * length / mean_H.square().sum().sqrt()
            )
        return torch.cat([embedding_VH, rows_RH])


def make_tokenizer(tokens: Sequence[str], merges: Sequence[str], special_ids: Sequence[int]) -> Tokenizer:
    """Build SmolLM2's byte-level BPE, which splits numbers into digits, followed by the tokens of traces.

    Args:
        tokens: The vocabulary in the order of its ids.
        merges: Pairs, separated by a space.
        special_ids: Tokens never produced by encoding text.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary: Mapping[str, int] = {token: token_id for token_id, token in enumerate(tokens)}
    pairs = [cast("tuple[str, str]", tuple(merge.split(" "))) for merge in merges]
    tokenizer = Tokenizer(models.BPE(vocab=dict(vocabulary), merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    known = [tokens[token_id] for token_id in special_ids]
    new = [token for token in SPECIAL_TOKENS if token not in vocabulary]
    if not set(CONTROL_TOKENS[:3]) <= set(known):
        raise CheckpointError(f"the vocabulary lacks one of {', '.join(CONTROL_TOKENS[:3])}")
    added: list[str | AddedToken] = [AddedToken(token, special=True, normalized=False) for token in (*known, *new)]
    tokenizer.add_special_tokens(added)  # pyright: ignore[reportUnknownMemberType]
    return tokenizer


def _dequantize(stored: Any) -> torch.Tensor:
    import gguf
    import numpy as np
    import torch

    values: Any = gguf.quants.dequantize(stored.data, stored.tensor_type)
    return torch.tensor(np.array(values, dtype=np.float32))


def _restore_rows(weight_OI: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Restore the row order of each head for transformers' rotary embedding: halves, not pairs."""
    num_rows, num_columns = weight_OI.shape
    pairs = weight_OI.reshape(num_heads, num_rows // num_heads // 2, 2, num_columns)
    return pairs.transpose(1, 2).reshape(num_rows, num_columns).contiguous()
