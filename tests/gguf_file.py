"""A Llama file in the form of llama.cpp's converter, unquantised, and a small checkpoint composed with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM

from hyper_model import compose
from hyper_model.checkpoint import Checkpoint
from hyper_model.ctranslate2_file import audio_config, read_variables, tower_tensors
from hyper_model.smollm2 import SmolLM2File
from tests.training_data import write_encoder

_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_SPACE = "\u0120"
"""A space as byte-level BPE writes it."""
_NAMES = {
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


def write_gguf(path: Path, model: Any) -> Path:
    """Write a LlamaForCausalLM of 260 tokens: three special ones, the 256 bytes, and " t"."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    tokens = [*_SPECIAL, *sorted(ByteLevel.alphabet()), f"{_SPACE}t"]
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * 257)
    writer.add_token_merges([f"{_SPACE} t"])
    state = model.state_dict()
    tensors = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    for layer in range(config.num_hidden_layers):
        tensors |= {f"blk.{layer}.{theirs}": f"model.layers.{layer}.{ours}" for theirs, ours in _NAMES.items()}
    for theirs, ours in tensors.items():
        weight = state[f"{ours}.weight"].float()
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(theirs.split(".")[-1])
        writer.add_tensor(f"{theirs}.weight", (weight if heads is None else _permute(weight, heads)).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _permute(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Reorder rows as llama.cpp's converter (`LlamaModel.permute`) does."""
    rows, columns = weight.shape
    halves = weight.reshape(num_heads, 2, rows // num_heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns).contiguous()


def tiny_llama(**fields: Any) -> Any:
    """Return a Llama of two layers of 64 with random weights."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    } | fields
    config = LlamaConfig(
        vocab_size=260,
        num_hidden_layers=2,
        max_position_embeddings=2_048,
        rope_parameters={"rope_theta": 1e5, "rope_type": "default"},
        tie_word_embeddings=True,
        **sizes,
    )
    return LlamaForCausalLM(config).eval()


def compose_tiny(parts: compose.Parts, folder: Path, *, width: int) -> Checkpoint:
    """Compose a checkpoint of a tiny Llama and a random encoder.

    Args:
        parts: The trained parts.
        folder: Folder for the files of both, and the checkpoint as `made`.
        width: Width of the encoder.
    """
    decoder = SmolLM2File(write_gguf(folder / "tiny.gguf", tiny_llama()))
    variables = read_variables(write_encoder(folder / "model.bin", width).read_bytes())
    tensors = {f"audio_tower.{name}": tensor for name, tensor in tower_tensors(variables)}
    tensors |= dict(compose.merge(decoder.tensors(), parts))
    return compose.write_composed(
        parts, folder / "made", tensors, audio_config(variables), decoder, report=lambda _: None, overwrite=False
    )
