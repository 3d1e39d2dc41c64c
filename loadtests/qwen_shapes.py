"""Shapes of Qwen2-Audio-7B and the memory that they need, by the arithmetic of docs/gpu.md.

This module depends on no library; `loadtests.random_qwen` builds the model.
"""

from __future__ import annotations

from dataclasses import dataclass

GIBIBYTE = 2**30
NUM_BYTES = 2
"""bfloat16."""
STEP_TOKENS = 2_048
"""Tokens of one step, vLLM's default."""
STEP_STATES = 2 * STEP_TOKENS + 16
"""Encoder states of a step: two per audio token and one more for each of 16 clips."""
PROCESSES_GIB = 1.0
"""Assumed memory of the processes besides weights, cache and activations (docs/gpu.md)."""


@dataclass(frozen=True)
class Shapes:
    """Widths of a Qwen2-Audio; the number of decoder layers is a variable of the rehearsal.

    Attributes:
        vocab_size: Rows of embedding and head; 0 takes the tokenizer's.
    """

    hidden_size: int = 4_096
    intermediate_size: int = 11_008
    num_heads: int = 32
    vocab_size: int = 156_032
    audio_width: int = 1_280
    audio_layers: int = 32
    audio_heads: int = 20
    audio_ffn: int = 5_120
    num_mel_bins: int = 128
    num_positions: int = 1_500

    def num_parameters(self, layers: int) -> int:
        """Return the number of parameters with this number of decoder layers."""
        hidden, width, ffn = self.hidden_size, self.audio_width, self.audio_ffn
        # Queries, keys and values have a bias; the keys of the encoder have none.
        layer = 4 * hidden * hidden + 3 * hidden + 3 * hidden * self.intermediate_size + 2 * hidden
        decoder = 2 * self.vocab_size * hidden + layers * layer + hidden
        audio_layer = 4 * width * width + 3 * width + 2 * width * ffn + ffn + width + 4 * width
        convolutions = 3 * self.num_mel_bins * width + width + 3 * width * width + width
        encoder = convolutions + self.num_positions * width + self.audio_layers * audio_layer + 2 * width
        return decoder + encoder + width * hidden + hidden

    def weights_gib(self, layers: int) -> float:
        """Return the memory of the weights."""
        return NUM_BYTES * self.num_parameters(layers) / GIBIBYTE

    def activations_gib(self) -> float:
        """Return the peak of one step: a decoder layer, and the feed-forward of an encoder layer."""
        decoder = STEP_TOKENS * (3 * self.intermediate_size + 4 * self.hidden_size)
        return (NUM_BYTES * decoder + STEP_STATES * self.state_bytes()) / GIBIBYTE

    def state_bytes(self) -> int:
        """Return the encoder's peak per state: the residual, and both sides of the activation."""
        return NUM_BYTES * (2 * self.audio_ffn + self.audio_width)

    def plan_gib(self, layers: int, cache_gib: float) -> float:
        """Return the planned memory of the service."""
        return self.weights_gib(layers) + self.activations_gib() + cache_gib + PROCESSES_GIB


FULL = Shapes()
TINY = Shapes(
    hidden_size=64,
    intermediate_size=128,
    num_heads=2,
    vocab_size=0,
    audio_width=64,
    audio_layers=2,
    audio_heads=2,
    audio_ffn=128,
)
SCALES = {"full": FULL, "tiny": TINY}
"""Shapes by name; `tiny` is for tests."""
