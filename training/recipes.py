"""Holds the training recipes: functions that return a frozen, complete configuration.

A recipe's name and values travel in the exported checkpoint's manifest and model card.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SftRecipe:
    """Configures Stage I: cross entropy on perceptual traces over precomputed encoder states."""

    name: str
    seed: int
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    ffn_size: int
    latent_tokens: int
    num_steps: int
    batch_size: int
    learning_rate: float
    min_learning_rate: float
    warmup_steps: int
    weight_decay: float
    max_grad_norm: float
    dropout_states: float
    """Share of audio tokens blanked in training, in short spans: so that words lean on more than one state."""
    save_every_s: float


def mini_sft() -> SftRecipe:
    """The embedded checkpoint: Whisper-tiny states, a five-layer decoder of 320, on two cores."""
    return SftRecipe(
        name="mini_sft",
        seed=0,
        vocab_size=2304,
        hidden_size=320,
        num_layers=5,
        num_heads=4,
        num_kv_heads=4,
        ffn_size=896,
        latent_tokens=8,
        num_steps=4_300,
        batch_size=16,
        learning_rate=1.0e-3,
        min_learning_rate=5e-5,
        warmup_steps=200,
        weight_decay=0.05,
        max_grad_norm=1.0,
        dropout_states=0.04,
        save_every_s=300.0,
    )


def debug() -> SftRecipe:
    """A few steps of a tiny decoder, for tests."""
    return SftRecipe(
        name="debug",
        seed=0,
        vocab_size=700,
        hidden_size=64,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        ffn_size=128,
        latent_tokens=4,
        num_steps=6,
        batch_size=2,
        learning_rate=1e-3,
        min_learning_rate=1e-4,
        warmup_steps=2,
        weight_decay=0.01,
        max_grad_norm=1.0,
        dropout_states=0.0,
        save_every_s=0.0,
    )


RECIPES = {"mini_sft": mini_sft, "debug": debug}
