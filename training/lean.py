"""Runs a Qwen2 decoder's training pass in bfloat16 with few memory passes: half the CPU time of the library's own.

The library's module keeps the parameters (so that names and checkpoints are its own) and defines what is right: a test
compares both. Axes: B sequences, T positions, H hidden width, N heads, K head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Qwen2ForCausalLM


class _RmsNorm(torch.autograd.Function):
    """RMSNorm whose forward and backward stay in the input's dtype but for the per-position statistics."""

    @staticmethod
    def forward(ctx: Any, x_BTH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
        norm = torch.linalg.vector_norm(x_BTH, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.rsqrt(norm * norm / x_BTH.shape[-1] + eps)
        normed = x_BTH * scale.to(x_BTH.dtype)
        ctx.save_for_backward(normed, weight_H, scale)
        return normed * weight_H

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        normed, weight_H, scale = ctx.saved_tensors
        (grad,) = grads
        weighted = grad * normed
        grad_weight = weighted.flatten(0, -2).sum(0, dtype=torch.float32).to(weight_H.dtype)
        mean = (weighted @ weight_H.unsqueeze(-1)) / normed.shape[-1]
        grad_x = (grad * weight_H - normed * mean) * scale.to(grad.dtype)
        return grad_x, grad_weight, None


def _rotate(x_BNTK: torch.Tensor, cos_TK: torch.Tensor, sin_TK: torch.Tensor) -> torch.Tensor:
    half = x_BNTK.shape[-1] // 2
    swapped = torch.cat((x_BNTK[..., half:], x_BNTK[..., :half]), dim=-1)
    return x_BNTK * cos_TK + swapped * sin_TK  # The sign of the swapped half is inside `sin_TK`.


def hidden_states(model: Qwen2ForCausalLM, embedded_BTH: torch.Tensor) -> torch.Tensor:
    """Return the decoder's last hidden states [B, T, H] for causal, unmasked input."""
    config = model.config
    num_heads = config.num_attention_heads
    if config.num_key_value_heads != num_heads:
        raise ValueError("the lean pass has no grouped key-value heads")
    num_sequences, num_positions, width = embedded_BTH.shape
    head_width = width // num_heads
    dtype = embedded_BTH.dtype
    positions = torch.arange(num_positions)[None]
    cos, sin = model.model.rotary_emb(embedded_BTH.float(), positions)
    cos_TK, sin_TK = cos[0].to(dtype), sin[0].to(dtype)
    sign = torch.ones(head_width, dtype=dtype)
    sign[: head_width // 2] = -1
    sin_TK = sin_TK * sign
    causal_TT = torch.full((num_positions, num_positions), float("-inf"), dtype=dtype).triu(1)
    causal = causal_TT.expand(num_sequences * num_heads, num_positions, num_positions)
    eps = config.rms_norm_eps

    x = embedded_BTH
    layers: Any = model.model.layers
    for layer in layers:
        attention = layer.self_attn
        normed = _RmsNorm.apply(x, layer.input_layernorm.weight, eps)
        projections: list[nn.Linear] = [attention.q_proj, attention.k_proj, attention.v_proj]
        weight = torch.cat([p.weight for p in projections])
        bias = torch.cat([p.bias for p in projections])
        query, key, value = (
            F.linear(normed, weight, bias)
            .view(num_sequences, num_positions, 3, num_heads, head_width)
            .permute(2, 0, 3, 1, 4)
            .unbind(0)
        )
        query = _rotate(query, cos_TK, sin_TK).reshape(-1, num_positions, head_width)
        key = _rotate(key, cos_TK, sin_TK).reshape(-1, num_positions, head_width)
        scores = torch.baddbmm(causal, query, key.transpose(1, 2), alpha=head_width**-0.5)
        mixed = torch.bmm(scores.softmax(-1), value.reshape(-1, num_positions, head_width))
        mixed = mixed.view(num_sequences, num_heads, num_positions, head_width).transpose(1, 2)
        x = x + attention.o_proj(mixed.reshape(num_sequences, num_positions, width))
        normed = _RmsNorm.apply(x, layer.post_attention_layernorm.weight, eps)
        x = x + layer.mlp.down_proj(F.silu(layer.mlp.gate_proj(normed)) * layer.mlp.up_proj(normed))
    return _RmsNorm.apply(x, model.model.norm.weight, eps)
