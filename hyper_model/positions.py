"""Conversion of a checkpoint to one token per position of its parallel pauses.

The source's span repeats one token; the result has one token per position. Every new token starts as a copy of the
pause token's embedding, so outputs hardly change. The copies take a negligible share of probability, because the pause
token is never a training target. Training may then let the copies diverge. The module is independent of training and
serving.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hyper_model import weights
from hyper_model.checkpoint import LICENCE_FILES, Checkpoint, export, open_checkpoint, require_float_weights
from hyper_model.errors import CheckpointError
from hyper_model.manifest import parse_json
from hyper_model.trace import PauseMode, TraceTokenizer, add_position_tokens

if TYPE_CHECKING:
    import torch


def give_positions(source: str | Path, destination: str | Path) -> Checkpoint:
    """Write a copy of the checkpoint `source` with position tokens to `destination`.

    Thresholds and their calibration are kept, because outputs do not change.

    Args:
        source: A checkpoint with parallel pauses of one token.
        destination: The new directory; must be missing or empty.

    Raises:
        CheckpointError: If the source cannot be opened or has no parallel pauses of one token, or the destination is
            not empty.
    """
    checkpoint = open_checkpoint(source)
    require_float_weights(checkpoint)
    root, pause = checkpoint.path, checkpoint.manifest.pause
    if pause.mode != PauseMode.PARALLEL:
        raise CheckpointError(f"{root}: its pauses are {pause.mode}; only parallel ones have positions")
    if pause.position_ids is not None:
        raise CheckpointError(f"{root}: each position of its pauses has a token of its own already")
    # Read the tokenizer anew, because the checkpoint's own must not change.
    old_tokenizer = checkpoint.tokenizer
    tokenizer = type(old_tokenizer.tokenizer).from_file(str(root / "tokenizer.json"))
    add_position_tokens(tokenizer, pause.latent_tokens)
    position_tokenizer = TraceTokenizer(
        tokenizer, old_tokenizer.tag_style, tags=old_tokenizer.tags, pause_tags=old_tokenizer.pause_tags
    )
    positions = position_tokenizer.with_positions(pause.latent_tokens).position_ids
    fields = checkpoint.manifest.model_dump(mode="json", exclude={"files", "format_version"})
    fields["pause"]["position_ids"] = list(positions)
    converted = export(
        destination,
        state_dict=_SpreadTensors(weights.read_entries(weights.weight_files(root)), positions),
        config=parse_json((root / "config.json").read_bytes(), "config.json"),
        tokenizer_json=tokenizer.to_str(),
        manifest_fields=fields,
    )
    for name in ("README.md", *LICENCE_FILES):
        if (root / name).is_file():
            shutil.copyfile(root / name, converted.path / name)
    return converted


class _SpreadTensors(Mapping[str, "torch.Tensor"]):
    """Lazy mapping of a checkpoint's tensors, with the pause token's row at each position's id."""

    def __init__(self, entries: Mapping[str, weights.TensorEntry], positions: Sequence[int]) -> None:
        self._stored = weights.StoredTensors(entries)
        self._positions = positions

    def __getitem__(self, name: str) -> torch.Tensor:
        import torch

        tensor = self._stored[name]
        if name not in (weights.EMBEDDING, weights.LM_HEAD):
            return tensor
        row = tensor[self._positions[0]].clone()
        num_more = max(0, max(self._positions) + 1 - len(tensor))
        # Position ids may fall on padding rows of the embedding, and the content of those is unused.
        tensor = torch.cat([tensor, row.expand(num_more, -1)])
        tensor[list(self._positions)] = row
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)
