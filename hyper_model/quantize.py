"""Conversion of a checkpoint to int8 (`hyper_model.int8`), by rounding to the nearest step, without calibration data.

The result answers a few per cent of the questions differently, so measure it with `hyper eval` beside its source. The
module is independent of engines; vLLM serves the result like any other checkpoint.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from hyper_model import int8, weights
from hyper_model.checkpoint import LICENCE_FILES, Checkpoint, export, open_checkpoint, require_float_weights
from hyper_model.errors import CheckpointError
from hyper_model.manifest import MANIFEST_FILE, parse_json

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_FLOAT_BYTES = {"F32": 4, "BF16": 2, "F16": 2}


def quantize(
    source: str | Path, destination: str | Path, *, verify: bool = True, overwrite: bool = False
) -> Checkpoint:
    """Write the int8 form of the checkpoint `source` to `destination`.

    The thresholds of the gate are kept; the source's calibration measured them with other weights.

    Args:
        source: A checkpoint with float weights.
        destination: The new directory; must be missing or empty unless `overwrite` is set.
        verify: Whether to compare the checksums of the source first.
        overwrite: Whether to replace an existing directory.

    Raises:
        CheckpointError: If the source cannot be opened or is int8 already, or the destination cannot be written.
    """
    checkpoint = open_checkpoint(source, verify=verify)
    root, target = checkpoint.path, Path(destination)
    require_float_weights(checkpoint)
    if target.resolve() == root.resolve():
        raise CheckpointError(f"{target}: is the source; choose another directory")
    entries = weights.read_entries(weights.weight_files(root))
    _require_space(target, num_bytes(entries))
    fields = checkpoint.manifest.model_dump(mode="json", exclude={"files", "format_version"})
    try:
        made = export(
            target,
            state_dict=_Int8Tensors(entries),
            config=parse_json((root / "config.json").read_bytes(), "config.json")
            | {"quantization_config": int8.CONFIG},
            tokenizer_json=root / "tokenizer.json",
            manifest_fields=fields | {"quantization": int8.SCHEME},
            overwrite=overwrite,
        )
        for name in ("README.md", *LICENCE_FILES):
            if (root / name).is_file():
                shutil.copyfile(root / name, target / name)
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written ({error.strerror or error})") from error
    return made


def quantize_once(checkpoint: Checkpoint, cache: Path, *, verify: bool = True) -> Checkpoint:
    """Return the int8 form of an opened checkpoint in a cache folder, written at the first call.

    Args:
        checkpoint: A checkpoint with float weights.
        cache: The folder; created if missing.
        verify: Whether to compare the checksums of an existing int8 form.

    Raises:
        CheckpointError: As in `quantize`.
    """
    destination = cache / f"{checkpoint.manifest.name}-{checkpoint.manifest_sha256[:12]}-{int8.SCHEME}"
    if (destination / MANIFEST_FILE).is_file():
        try:
            return open_checkpoint(destination, verify=verify)
        except CheckpointError as error:
            logger.warning("quantising anew: %s", error)
    # The source was verified when it was opened.
    return quantize(checkpoint.path, destination, verify=False, overwrite=True)


def num_bytes(entries: Mapping[str, weights.TensorEntry]) -> int:
    """Return the size of the int8 form of these tensors."""
    sizes = (
        math.prod(entry.shape) + 4 * entry.shape[0]
        if int8.is_int8(name)
        else math.prod(entry.shape) * _FLOAT_BYTES[entry.dtype]
        for name, entry in entries.items()
    )
    return sum(sizes)


def _require_space(target: Path, wanted: int) -> None:
    folder = target.absolute()
    while not folder.is_dir():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise CheckpointError(
            f"{target}: the weights need {wanted / 1e6:,.0f} MB, but {folder} has {free / 1e6:,.0f} MB free; choose "
            "another directory or free space"
        )


class _Int8Tensors(Mapping[str, "torch.Tensor"]):
    """Lazy mapping of a checkpoint's tensors in int8 form, by their names on disk."""

    def __init__(self, entries: Mapping[str, weights.TensorEntry]) -> None:
        self._stored = weights.StoredTensors(entries)
        self._scaled = {int8.scale_name(name): name for name in entries if int8.is_int8(name)}

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self._scaled:
            return int8.scales_of(self._stored[self._scaled[name]])
        tensor = self._stored[name]
        return int8.rounded(tensor) if int8.is_int8(name) else tensor

    def __iter__(self) -> Iterator[str]:
        yield from self._stored
        yield from self._scaled

    def __len__(self) -> int:
        return len(self._stored) + len(self._scaled)
