"""The int8 form of a checkpoint (W8A8): names, tensors and config in compressed-tensors' format.

The decoder's projections and the head are stored as int8 with one float32 scale per output channel. Engines quantise
activations at run time, with one scale per token. Embedding, norms, audio tower and projector stay as they are.

Importing the module loads no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

EMBEDDING = "language_model.model.embed_tokens.weight"
LM_HEAD = "language_model.lm_head.weight"
SCHEME = "w8a8"
MAX_INT8 = 127
CONFIG: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "config_groups": {
        "group_0": {
            # The head is no Linear in vLLM.
            "targets": ["Linear", "re:.*lm_head"],
            "weights": {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False},
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "strategy": "token",
                "symmetric": True,
                "dynamic": True,
            },
        }
    },
    "ignore": ["re:.*audio_tower.*", "re:.*multi_modal_projector.*"],
}
"""The `quantization_config` of config.json, in the form that vLLM and transformers read."""


def is_int8(name: str) -> bool:
    """Return whether the int8 form stores the tensor `name` (its name on disk) as int8."""
    is_projection = name.startswith("language_model.model.layers.") and name.endswith("_proj.weight")
    return is_projection or name == LM_HEAD


def scale_name(name: str) -> str:
    """Return the name of the scales [channels, 1] of an int8 tensor."""
    return f"{name}_scale"


def scales_of(weight_CI: torch.Tensor) -> torch.Tensor:
    """Return the scale [C, 1] of each output channel in float32: its largest magnitude becomes 127.

    A channel of zeros gets the scale 1.
    """
    scales_C1 = weight_CI.float().abs().amax(dim=1, keepdim=True) / MAX_INT8
    return scales_C1.masked_fill(scales_C1 == 0, 1.0)


def rounded(weight_CI: torch.Tensor) -> torch.Tensor:
    """Return a weight [C, I] of output channels C and inputs I as int8, rounded to the nearest step of its scale."""
    import torch

    return (weight_CI.float() / scales_of(weight_CI)).round().clamp(-MAX_INT8, MAX_INT8).to(torch.int8)
