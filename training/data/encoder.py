"""Load a frozen audio encoder (Whisper, MIT) from its CTranslate2 file and encode clips.

Axes: S samples at 16 kHz, A audio tokens (40 ms), D model width. The tower is transformers' `Qwen2AudioEncoder`:
Whisper's encoder with a pooler before the last layer norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.models.qwen2_audio.configuration_qwen2_audio import Qwen2AudioEncoderConfig
from transformers.models.qwen2_audio.modeling_qwen2_audio import Qwen2AudioEncoder

from hyper_model.audio_encoder import HOP, LogMel, encode, num_audio_tokens
from hyper_model.compose import WHISPER_BASE, locate
from hyper_model.ctranslate2_file import audio_config, read_variables, tower_tensors

__all__ = ["HOP", "ClipEncoder", "load_encoder", "num_audio_tokens"]


def load_encoder(model_bin: Path) -> Qwen2AudioEncoder:
    """Build the frozen tower (float32, eval mode) from Whisper's CTranslate2 weights.

    Raises:
        CheckpointError: The file is no whole CTranslate2 file of the known version.
    """
    return _build(model_bin.read_bytes())


def load_base_encoder() -> Qwen2AudioEncoder:
    """Build the frozen tower of Whisper base from the pinned packages of hyper-small.

    Raises:
        CheckpointError: A package is missing or another than the pinned one.
    """
    return _build(b"".join(locate(file).read_bytes() for file in WHISPER_BASE))


def _build(data: bytes) -> Qwen2AudioEncoder:
    variables = read_variables(data)
    encoder = Qwen2AudioEncoder(Qwen2AudioEncoderConfig(**audio_config(variables)))
    encoder.load_state_dict(dict(tower_tensors(variables)), strict=True)
    return encoder.eval().requires_grad_(False)


class ClipEncoder:
    """Encoder from clips to audio token states, with the code of the serving model.

    Args:
        layers: Layers with states joined behind those of the last one (`audio_rows.audio_layers`).
    """

    def __init__(
        self, encoder: Qwen2AudioEncoder, dtype: torch.dtype = torch.float32, layers: Sequence[int] = ()
    ) -> None:
        tower: Any = encoder  # The library types `to` for whole models only.
        self.encoder: Any = tower.to(dtype)
        self.log_mel = LogMel(encoder.config.num_mel_bins)
        self.layers = tuple(layers)

    @torch.inference_mode()
    def __call__(self, samples_S: np.ndarray) -> torch.Tensor:
        """Encode one clip: [A, (1 + L) * D] in the dtype of this encoder, with L `layers`.

        Raises:
            ValueError: the clip is longer than 30 s or shorter than one audio token.
        """
        states_AD, _ = encode(self.encoder, [self.log_mel(samples_S)], layers=self.layers)
        return states_AD
