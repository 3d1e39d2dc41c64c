"""Tensors of a Qwen2-Audio model on disk: names, shapes, and safetensors files read and written in pieces.

All files use the names of the hub's Qwen2-Audio, accepted by both vLLM and transformers:

    audio_tower.*    multi_modal_projector.linear.*    language_model.model.*    language_model.lm_head.weight

The module is independent of manifests, tokenizers and traces. Importing it loads neither torch nor safetensors. Opening
a checkpoint needs only the files' headers, in plain JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hyper_model import int8
from hyper_model.audio_rows import row_width
from hyper_model.errors import CheckpointError
from hyper_model.int8 import EMBEDDING, LM_HEAD

if TYPE_CHECKING:
    import torch

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DEFAULT_SHARD_BYTES = 2 * 1024**3
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
INT8 = "I8"

# Used only in an error message: trainers leave other pickles (training_args.bin) beside valid weights.
_PICKLED_WEIGHTS = ("pytorch_model*.bin", "model*.bin", "model*.pt", "model*.pth")
# A header lists a few hundred tensors. A file near this bound (the format's own) is damaged or hostile.
_MAX_HEADER_BYTES = 100_000_000
_WRAPPERS = re.compile(r"^(?:(?:module|_orig_mod|_fsdp_wrapped_module)\.)+")
# The first match wins. transformers saves a model *built from a config* as `language_model.model.model.*`, refused by
# vLLM. In memory it uses `model.language_model.*`. A model *loaded from hub names* is saved under those.
_RENAMES = (
    ("model.language_model.model.", "language_model.model."),
    ("model.language_model.", "language_model.model."),
    ("language_model.model.model.", "language_model.model."),
    ("language_model.model.", "language_model.model."),
    ("language_model.lm_head.", "language_model.lm_head."),
    ("lm_head.", "language_model.lm_head."),
    ("model.audio_tower.", "audio_tower."),
    ("audio_tower.", "audio_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("multi_modal_projector.", "multi_modal_projector."),
)


@dataclass(frozen=True)
class TensorEntry:
    """Location of one stored tensor.

    Attributes:
        shape: Its axes, in the order of safetensors.
        dtype: The safetensors spelling, such as "BF16".
        file: The file with the tensor.
    """

    shape: tuple[int, ...]
    dtype: str
    file: Path


def canonical_name(name: str) -> str:
    """Return the name of a tensor on disk.

    Raises:
        CheckpointError: If the name belongs to no part of a Qwen2-Audio model, or to an unmerged adapter.
    """
    bare = _WRAPPERS.sub("", name)
    if "lora_" in bare or ".base_layer." in bare or bare.startswith("base_model."):
        raise CheckpointError(f"the weights contain an adapter ({name}); merge it first")
    for prefix, replacement in _RENAMES:
        if bare.startswith(prefix):
            return replacement + bare[len(prefix) :]
    raise CheckpointError(f"the weights contain {name}, not part of a Qwen2-Audio model")


def canonical_names(names: list[str]) -> dict[str, str]:
    """Map each canonical name to its name in the source.

    Raises:
        CheckpointError: If two sources exist for one tensor, or as in `canonical_name`.
    """
    sources: dict[str, str] = {}
    for name in names:
        canonical = canonical_name(name)
        if canonical in sources:
            raise CheckpointError(f"the weights contain {canonical} twice, as {sources[canonical]} and as {name}")
        sources[canonical] = name
    return sources


def expected_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor required by a Qwen2-Audio config, by its name on disk.

    The list includes `language_model.lm_head.weight` even for tied embeddings. vLLM does not need it, but transformers
    never ties this architecture and would fill a missing head with random numbers. No model is built.

    Raises:
        CheckpointError: If the config lacks a dimension.
    """
    try:
        width = row_width(config)
        return _text_shapes(config["text_config"]) | _audio_shapes(config["audio_config"], config["text_config"], width)
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"config.json does not describe a Qwen2-Audio model (at {error})") from error


def _text_shapes(text: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, heads, kv_heads = text["hidden_size"], text["num_attention_heads"], text["num_key_value_heads"]
    inner, head_dim = text["intermediate_size"], hidden // heads
    if text.get("head_dim") not in (None, head_dim):
        # transformers reads the field and vLLM's Qwen2 ignores it, so their results would differ.
        raise CheckpointError(f"config.json has heads of {text['head_dim']}; only hidden_size / num_heads is supported")
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (text["vocab_size"], hidden),
        LM_HEAD: (text["vocab_size"], hidden),
        "language_model.model.norm.weight": (hidden,),
    }
    for layer in range(text["num_hidden_layers"]):
        prefix = f"language_model.model.layers.{layer}."
        for projection, num_heads in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            shapes[f"{prefix}self_attn.{projection}_proj.weight"] = (num_heads * head_dim, hidden)
            shapes[f"{prefix}self_attn.{projection}_proj.bias"] = (num_heads * head_dim,)
        shapes |= {
            f"{prefix}self_attn.o_proj.weight": (hidden, heads * head_dim),
            f"{prefix}mlp.gate_proj.weight": (inner, hidden),
            f"{prefix}mlp.up_proj.weight": (inner, hidden),
            f"{prefix}mlp.down_proj.weight": (hidden, inner),
            f"{prefix}input_layernorm.weight": (hidden,),
            f"{prefix}post_attention_layernorm.weight": (hidden,),
        }
    return shapes


def _audio_shapes(audio: Mapping[str, Any], text: Mapping[str, Any], row_width: int) -> dict[str, tuple[int, ...]]:
    width, inner = audio["d_model"], audio["encoder_ffn_dim"]
    shapes: dict[str, tuple[int, ...]] = {
        "audio_tower.conv1.weight": (width, audio["num_mel_bins"], 3),
        "audio_tower.conv1.bias": (width,),
        "audio_tower.conv2.weight": (width, width, 3),
        "audio_tower.conv2.bias": (width,),
        "audio_tower.embed_positions.weight": (audio["max_source_positions"], width),
        "audio_tower.layer_norm.weight": (width,),
        "audio_tower.layer_norm.bias": (width,),
        "multi_modal_projector.linear.weight": (text["hidden_size"], row_width),
        "multi_modal_projector.linear.bias": (text["hidden_size"],),
    }
    for layer in range(audio["encoder_layers"]):
        prefix = f"audio_tower.layers.{layer}."
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes[f"{prefix}self_attn.{projection}.weight"] = (width, width)
            if projection != "k_proj":  # Whisper's keys have no bias
                shapes[f"{prefix}self_attn.{projection}.bias"] = (width,)
        for norm in ("self_attn_layer_norm", "final_layer_norm"):
            shapes |= {f"{prefix}{norm}.weight": (width,), f"{prefix}{norm}.bias": (width,)}
        shapes |= {
            f"{prefix}fc1.weight": (inner, width),
            f"{prefix}fc1.bias": (inner,),
            f"{prefix}fc2.weight": (width, inner),
            f"{prefix}fc2.bias": (width,),
        }
    return shapes


def check_tensors(entries: Mapping[str, TensorEntry], config: Mapping[str, Any]) -> None:
    """Check the stored tensors for exactly the names and shapes of the config, with supported dtypes.

    Args:
        entries: The stored tensors.
        config: The config. With a `quantization_config`, the tensors are those of `hyper_model.int8`.

    Raises:
        CheckpointError: If a tensor is missing, unexpected, misshapen, or of another dtype.
    """
    expected = expected_shapes(config)
    quantised = {name for name in expected if int8.is_int8(name)} if config.get("quantization_config") else set[str]()
    expected |= {int8.scale_name(name): (expected[name][0], 1) for name in quantised}
    for name in entries:
        if name not in expected:
            hint = ""
            try:
                if canonical_name(name) != name:
                    hint = f"; vLLM wants it named {canonical_name(name)}"
            except CheckpointError:
                pass
            raise CheckpointError(f"the weights contain {name}, not part of this model{hint}")
    for name, shape in expected.items():
        if name not in entries:
            raise CheckpointError(f"the weights lack {name}")
        if entries[name].shape != shape:
            raise CheckpointError(f"{name} has shape {entries[name].shape}; config.json requires {shape}")
        supported = (INT8,) if name in quantised else tuple(DTYPES)
        if entries[name].dtype not in supported:
            raise CheckpointError(f"{name} is stored as {entries[name].dtype}; supported are {', '.join(supported)}")


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Read the header of a safetensors file, without its tensors.

    Raises:
        CheckpointError: If the file is not safetensors (for example a renamed pickle) or is truncated.
    """
    refusal = f"{path.name} is not a whole safetensors file"
    size = path.stat().st_size
    with path.open("rb") as file:
        num_header_bytes = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= num_header_bytes <= min(size - 8, _MAX_HEADER_BYTES):
            raise CheckpointError(refusal)
        raw = file.read(num_header_bytes)
    try:
        header = json.loads(raw)
        entries = {
            name: TensorEntry(tuple(value["shape"]), value["dtype"], path)
            for name, value in header.items()
            if name != "__metadata__"
        }
        end = max((value["data_offsets"][1] for name, value in header.items() if name != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise CheckpointError(refusal) from error
    if end != size - 8 - num_header_bytes:
        raise CheckpointError(refusal)
    return entries


def weight_files(directory: Path) -> list[Path]:
    """Return the safetensors files of a directory in the transformers layout: one file, or an index's shards.

    Raises:
        CheckpointError: If there is none, the index is damaged, or it names a file outside the directory.
    """
    index = directory / INDEX_FILE
    if not index.exists():
        single = directory / SINGLE_FILE
        if single.is_file():
            return [single]
        pickles = sorted(path.name for pattern in _PICKLED_WEIGHTS for path in directory.glob(pattern))
        if pickles:
            raise CheckpointError(f"the weights are pickles ({pickles[0]}) and can run code; save them as safetensors")
        raise CheckpointError(f"no {SINGLE_FILE} and no {INDEX_FILE} in the directory")
    try:
        names = set(cast("dict[str, str]", json.loads(index.read_text(encoding="utf-8"))["weight_map"]).values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{INDEX_FILE} is damaged") from error
    for name in names:
        if name != Path(name).name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{INDEX_FILE} lists {name}, not a safetensors file of this directory")
        if not (directory / name).is_file():
            raise CheckpointError(f"{INDEX_FILE} names {name}, which is missing")
    return [directory / name for name in sorted(names)]


def read_entries(files: list[Path]) -> dict[str, TensorEntry]:
    """Read the headers of several files as one.

    Raises:
        CheckpointError: If a tensor is stored twice, or as in `read_header`.
    """
    entries: dict[str, TensorEntry] = {}
    for file in files:
        for name, entry in read_header(file).items():
            if name in entries:
                raise CheckpointError(f"{name} is stored in both {entries[name].file.name} and {file.name}")
            entries[name] = entry
    return entries


class StoredTensors(Mapping[str, "torch.Tensor"]):
    """Lazy mapping of stored tensors, by their names in the safetensors files.

    No tensor is cached, so a 7B model needs memory for one tensor at a time.
    """

    def __init__(self, entries: Mapping[str, TensorEntry]) -> None:
        self.entries = entries

    def __getitem__(self, name: str) -> torch.Tensor:
        from safetensors import safe_open

        # Opened for each tensor: the file is mapped, not read, and no handle outlives the call.
        with cast("Any", safe_open(self.entries[name].file, framework="pt")) as file:
            return cast("torch.Tensor", file.get_tensor(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def write_tensors(
    directory: Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Write tensors in name order, as one file or as shards with an index.

    One shard is in memory at a time.

    Raises:
        CheckpointError: If a tensor has values other than finite numbers.
    """
    import torch
    from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]

    shard: dict[str, torch.Tensor] = {}
    shard_names: list[list[str]] = []
    num_shard_bytes = num_total_bytes = 0

    def flush() -> None:
        path = directory / f"shard-{len(shard_names)}"
        # Create the file first: safetensors makes files readable by their owner only, and servers run as another user.
        path.touch()
        mode = path.stat().st_mode
        save_file(shard, path, metadata={"format": "pt"})
        path.chmod(mode)
        shard_names.append(list(shard))
        shard.clear()

    for name in sorted(tensors):
        # clone, because a tied head shares the embedding's memory, and safetensors refuses shared memory.
        tensor = tensors[name].detach().to(device="cpu", dtype=dtype).clone(memory_format=torch.contiguous_format)
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{name} holds values that are not finite numbers")
        num_bytes = tensor.numel() * tensor.element_size()
        if shard and num_shard_bytes + num_bytes > max_shard_bytes:
            flush()
            num_shard_bytes = 0
        shard[name] = tensor
        num_shard_bytes += num_bytes
        num_total_bytes += num_bytes
    flush()
    if len(shard_names) == 1:
        (directory / "shard-0").rename(directory / SINGLE_FILE)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shard_names):
        file_name = f"model-{number + 1:05d}-of-{len(shard_names):05d}.safetensors"
        (directory / f"shard-{number}").rename(directory / file_name)
        weight_map |= dict.fromkeys(names, file_name)
    index = {"metadata": {"total_size": num_total_bytes}, "weight_map": weight_map}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
