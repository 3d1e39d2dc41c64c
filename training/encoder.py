"""Reads the frozen audio encoder (Whisper tiny.en, MIT) out of its CTranslate2 file and runs it on unpadded clips.

Axes: S samples at 16 kHz, M mel bins, F mel frames (10 ms), A audio tokens (40 ms), D model width.
The tower is transformers' `Qwen2AudioEncoder`, which is Whisper's encoder with a pooler before the last layer norm.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import WhisperFeatureExtractor
from transformers.models.qwen2_audio.configuration_qwen2_audio import Qwen2AudioEncoderConfig
from transformers.models.qwen2_audio.modeling_qwen2_audio import Qwen2AudioEncoder

from hyper_model.audio import SAMPLE_RATE_HZ

_DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
HOP = 160
"""Samples a mel frame."""


def read_ctranslate2(path: Path) -> dict[str, np.ndarray]:
    """Read the variables of a CTranslate2 `model.bin` (format version 6).

    Raises:
        ValueError: the file is of another version or has bytes left over.
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
    text()  # The specification's name.
    unpack("I")  # Its revision.
    variables: dict[str, np.ndarray] = {}
    for _ in range(unpack("I")):
        name = text()
        shape = [unpack("I") for _ in range(unpack("B"))]
        dtype = np.dtype(_DTYPES[unpack("B")])
        num_bytes = unpack("I")
        variables[name] = np.frombuffer(data, dtype, num_bytes // dtype.itemsize, offset).reshape(shape)
        offset += num_bytes
    for _ in range(unpack("I")):  # Aliases, which the encoder does not use.
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


def num_audio_tokens(num_samples: int) -> int:
    """Return the audio tokens A of a clip of S samples (Qwen2-Audio: two strides of two over the mel frames)."""
    num_frames = min(num_samples // HOP, 3000)
    num_states = (num_frames - 1) // 2 + 1
    return (num_states - 2) // 2 + 1


class ClipEncoder:
    """Runs mel extraction and the tower on the valid part of a clip only.

    Equal to the padded 30 s pass with its mask, to rounding (measured 6e-5 in float32): the tower sees a few frames of
    the padding, as the convolutions do, and attention is cut to the valid states.
    """

    def __init__(self, encoder: Qwen2AudioEncoder, dtype: torch.dtype = torch.float32) -> None:
        tower: Any = encoder  # The library types `to` for whole models only.
        self.encoder: Any = tower.to(dtype)
        self.dtype = dtype
        self.extractor = WhisperFeatureExtractor(feature_size=encoder.config.num_mel_bins)

    def mel(self, samples_S: np.ndarray) -> np.ndarray:
        """Return log-mel [M, F] of the clip and two frames of the silence that follows it.

        Whisper normalises against the loudest frame of the whole 30 s window, which padding never is, so a shorter
        window gives the same numbers.
        """
        num_frames = min(len(samples_S) // HOP, 3000)
        padded_S = np.zeros((num_frames + 8) * HOP, np.float32)
        padded_S[: min(len(samples_S), len(padded_S))] = samples_S[: len(padded_S)]
        features = self.extractor(
            padded_S, sampling_rate=SAMPLE_RATE_HZ, padding="do_not_pad", truncation=False, return_tensors="np"
        )
        return features["input_features"][0][:, : num_frames + 4]

    @torch.inference_mode()
    def __call__(self, samples_S: np.ndarray) -> torch.Tensor:
        """Encode one clip: [A, D] in this encoder's dtype."""
        tower = self.encoder
        mel_MF = torch.from_numpy(self.mel(samples_S)).to(self.dtype)
        hidden = torch.nn.functional.gelu(tower.conv1(mel_MF[None]))
        hidden = torch.nn.functional.gelu(tower.conv2(hidden)).transpose(1, 2)
        num_states = (min(len(samples_S) // HOP, 3000) - 1) // 2 + 1
        hidden = hidden[:, :num_states] + tower.embed_positions.weight[:num_states]
        for layer in tower.layers:
            output = layer(hidden, None)
            hidden = output[0] if isinstance(output, tuple) else output
        pooled = tower.avg_pooler(hidden.transpose(1, 2)).transpose(1, 2)
        return tower.layer_norm(pooled)[0, : num_audio_tokens(len(samples_S))]
