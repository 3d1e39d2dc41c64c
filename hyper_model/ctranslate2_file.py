"""Reader of Whisper's audio encoder in a CTranslate2 file, as the audio tower of a Qwen2-Audio model.

The tower is Whisper's encoder with a pooling step before the last layer norm; pooling has no weights. The module is
independent of packages, clips and checkpoints.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from hyper_model.errors import CheckpointError

if TYPE_CHECKING:
    import torch

_FORMAT_VERSION = 6
_DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
_HEAD_WIDTH = 64

Variables = Mapping[str, NDArray[Any]]


def read_variables(data: bytes) -> dict[str, NDArray[Any]]:
    """Read the variables of a CTranslate2 `model.bin` (format version 6).

    Raises:
        CheckpointError: If the file has another version, is truncated or has bytes left over.
    """
    offset = 0

    def unpack(code: str) -> int:
        nonlocal offset
        value = cast(int, struct.unpack_from("<" + code, data, offset)[0])
        offset += struct.calcsize("<" + code)
        return value

    def text() -> str:
        nonlocal offset
        length = unpack("H")
        value = data[offset : offset + length - 1].decode()
        offset += length
        return value

    variables: dict[str, NDArray[Any]] = {}
    try:
        version = unpack("I")
        if version != _FORMAT_VERSION:
            raise CheckpointError(f"CTranslate2 format version {version}; only {_FORMAT_VERSION} can be read")
        text()  # The specification's name.
        unpack("I")  # Its revision.
        for _ in range(unpack("I")):
            name = text()
            shape = [unpack("I") for _ in range(unpack("B"))]
            dtype = np.dtype(_DTYPES[unpack("B")])
            num_bytes = unpack("I")
            variables[name] = np.frombuffer(data, dtype, num_bytes // dtype.itemsize, offset).reshape(shape)
            offset += num_bytes
        for _ in range(unpack("I")):  # Aliases, unused by the encoder.
            text()
            text()
    except (struct.error, ValueError, KeyError) as error:
        raise CheckpointError(f"not a whole CTranslate2 file ({error})") from error
    if offset != len(data):
        raise CheckpointError(f"not a CTranslate2 file: {len(data) - offset} bytes left over")
    return variables


def audio_config(variables: Variables) -> dict[str, Any]:
    """Return the `audio_config` of the tower."""
    width, num_mel_bins = variables["encoder/conv1/weight"].shape[:2]
    layers = {name.split("/")[1] for name in variables if name.startswith("encoder/layer_")} - {"layer_norm"}
    return {
        "model_type": "qwen2_audio_encoder",
        "num_mel_bins": num_mel_bins,
        "d_model": width,
        "encoder_layers": len(layers),
        "encoder_attention_heads": width // _HEAD_WIDTH,
        "encoder_ffn_dim": 4 * width,
        "max_source_positions": variables["encoder/position_encodings/encodings"].shape[0],
        "scale_embedding": False,
    }


def tower_tensors(variables: Variables) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of the tower in float32, by transformers' names inside it."""
    for name in ("conv1", "conv2"):
        yield from _affine(variables, name, f"encoder/{name}")
    yield from _norm(variables, "layer_norm", "encoder/layer_norm")
    yield "embed_positions.weight", _tensor(variables, "encoder/position_encodings/encodings")
    for layer in range(audio_config(variables)["encoder_layers"]):
        ours, theirs = f"layers.{layer}", f"encoder/layer_{layer}"
        yield from _norm(variables, f"{ours}.self_attn_layer_norm", f"{theirs}/self_attention/layer_norm")
        weights = _tensor(variables, f"{theirs}/self_attention/linear_0/weight").chunk(3)
        biases = _tensor(variables, f"{theirs}/self_attention/linear_0/bias").chunk(3)
        for name, weight, bias in zip(("q_proj", "k_proj", "v_proj"), weights, biases, strict=True):
            yield f"{ours}.self_attn.{name}.weight", weight
            if name != "k_proj":  # Whisper's keys have no bias; the fused file has zeros there.
                yield f"{ours}.self_attn.{name}.bias", bias
        yield from _affine(variables, f"{ours}.self_attn.out_proj", f"{theirs}/self_attention/linear_1")
        yield from _norm(variables, f"{ours}.final_layer_norm", f"{theirs}/ffn/layer_norm")
        yield from _affine(variables, f"{ours}.fc1", f"{theirs}/ffn/linear_0")
        yield from _affine(variables, f"{ours}.fc2", f"{theirs}/ffn/linear_1")


def _tensor(variables: Variables, name: str) -> torch.Tensor:
    import torch

    return torch.tensor(np.array(variables[name], dtype=np.float32))


def _affine(variables: Variables, ours: str, theirs: str) -> Iterator[tuple[str, torch.Tensor]]:
    for part in ("weight", "bias"):
        yield f"{ours}.{part}", _tensor(variables, f"{theirs}/{part}")


def _norm(variables: Variables, ours: str, theirs: str) -> Iterator[tuple[str, torch.Tensor]]:
    yield f"{ours}.weight", _tensor(variables, f"{theirs}/gamma")
    yield f"{ours}.bias", _tensor(variables, f"{theirs}/beta")
