"""Load the frozen audio encoder (Whisper tiny.en, MIT) from its CTranslate2 file and encode clips.

Axes: S samples at 16 kHz, A audio tokens (40 ms), D model width. The tower is transformers' `Qwen2AudioEncoder`:
Whisper's encoder with a pooler before the last layer norm.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.models.qwen2_audio.configuration_qwen2_audio import Qwen2AudioEncoderConfig
from transformers.models.qwen2_audio.modeling_qwen2_audio import Qwen2AudioEncoder

from hyper_model.audio_encoder import HOP, LogMel, encode, num_audio_tokens

__all__ = ["HOP", "ClipEncoder", "load_encoder", "num_audio_tokens", "read_ctranslate2"]

_DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}


def read_ctranslate2(path: Path) -> dict[str, np.ndarray]:
    """Read the variables of a CTranslate2 `model.bin` (format version 6).

    Raises:
        ValueError: the file has another version, or bytes are left over.
    """
    data, offset = path.read_bytes(), 0

    def unpack(code: str) -> int:
        nonlocal offset
        value = struct.unpack_from("<" + code, data, offset)[0]
        offset += struct.calcsize("<" + code)
        return value

    def text() -> str:
        nonlocal offset
        length = unpack("H")
        value = data[offset : offset + length - 1].decode()
        offset += length
        return value

    version = unpack("I")
    if version != 6:
        raise ValueError(f"{path}: CTranslate2 format version 6 expected, got {version}")
    text()  # Name of the specification.
    unpack("I")  # Revision of the specification.
    variables: dict[str, np.ndarray] = {}
    for _ in range(unpack("I")):
        name = text()
        shape = [unpack("I") for _ in range(unpack("B"))]
        dtype = np.dtype(_DTYPES[unpack("B")])
        num_bytes = unpack("I")
        variables[name] = np.frombuffer(data, dtype, num_bytes // dtype.itemsize, offset).reshape(shape)
        offset += num_bytes
    for _ in range(unpack("I")):  # Aliases; the encoder uses none.
        text()
        text()
    if offset != len(data):
        raise ValueError(f"{path}: {len(data) - offset} bytes left over")
    return variables


def load_encoder(model_bin: Path) -> Qwen2AudioEncoder:
    """Build the frozen tower (float32, eval mode) from Whisper's CTranslate2 weights."""
    weights = read_ctranslate2(model_bin)
    width = weights["encoder/conv1/weight"].shape[0]
    num_layers = len({name.split("/")[1] for name in weights if name.startswith("encoder/layer_")} - {"layer_norm"})
    config = Qwen2AudioEncoderConfig(
        num_mel_bins=weights["encoder/conv1/weight"].shape[1],
        d_model=width,
        encoder_layers=num_layers,
        encoder_attention_heads=width // 64,
        encoder_ffn_dim=4 * width,
        max_source_positions=1500,
        scale_embedding=False,
    )
    state: dict[str, torch.Tensor] = {}

    def tensor(name: str) -> torch.Tensor:
        return torch.from_numpy(np.array(weights[name])).float()

    def norm(ours: str, theirs: str) -> None:
        state[f"{ours}.weight"], state[f"{ours}.bias"] = tensor(f"{theirs}/gamma"), tensor(f"{theirs}/beta")

    def linear(ours: str, theirs: str) -> None:
        state[f"{ours}.weight"], state[f"{ours}.bias"] = tensor(f"{theirs}/weight"), tensor(f"{theirs}/bias")

    linear("conv1", "encoder/conv1")
    linear("conv2", "encoder/conv2")
    norm("layer_norm", "encoder/layer_norm")
    state["embed_positions.weight"] = tensor("encoder/position_encodings/encodings")
    for i in range(num_layers):
        ours, theirs = f"layers.{i}", f"encoder/layer_{i}"
        norm(f"{ours}.self_attn_layer_norm", f"{theirs}/self_attention/layer_norm")
        weight = tensor(f"{theirs}/self_attention/linear_0/weight").chunk(3)
        bias = tensor(f"{theirs}/self_attention/linear_0/bias").chunk(3)
        for name, w, b in zip(("q_proj", "k_proj", "v_proj"), weight, bias, strict=True):
            state[f"{ours}.self_attn.{name}.weight"] = w
            if name != "k_proj":  # Whisper's keys have no bias; the fused file holds zeros there.
                state[f"{ours}.self_attn.{name}.bias"] = b
        linear(f"{ours}.self_attn.out_proj", f"{theirs}/self_attention/linear_1")
        norm(f"{ours}.final_layer_norm", f"{theirs}/ffn/layer_norm")
        linear(f"{ours}.fc1", f"{theirs}/ffn/linear_0")
        linear(f"{ours}.fc2", f"{theirs}/ffn/linear_1")
    encoder = Qwen2AudioEncoder(config)
    encoder.load_state_dict(state, strict=True)
    return encoder.eval().requires_grad_(False)


class ClipEncoder:
    """Encoder from clips to audio token states, with the code of the serving model."""

    def __init__(self, encoder: Qwen2AudioEncoder, dtype: torch.dtype = torch.float32) -> None:
        tower: Any = encoder  # The library types `to` for whole models only.
        self.encoder: Any = tower.to(dtype)
        self.log_mel = LogMel(encoder.config.num_mel_bins)

    @torch.inference_mode()
    def __call__(self, samples_S: np.ndarray) -> torch.Tensor:
        """Encode one clip: [A, D] in the dtype of this encoder.

        Raises:
            ValueError: the clip is longer than 30 s or shorter than one audio token.
        """
        states_AD, _ = encode(self.encoder, [self.log_mel(samples_S)])
        return states_AD
