"""Gives each latent position of a checkpoint's parallel pauses a token of its own.

A checkpoint whose span is copies of one token becomes one that names a token for each position. Every new token begins
as a copy of the pause token's embedding, so the checkpoint says what it said before (but for the share of probability
that the copies take: about none, as the pause token is no target of training), and training may then let them grow
apart. Knows nothing of training or serving.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hyper_model import weights
from hyper_model.checkpoint import LICENCE_FILES, Checkpoint, export, open_checkpoint
from hyper_model.errors import CheckpointError
from hyper_model.manifest import parse_json
from hyper_model.trace import PauseMode, TraceTokenizer, add_position_tokens

if TYPE_CHECKING:
    import torch


def give_positions(source: str | Path, destination: str | Path) -> Checkpoint:
    """Writes a checkpoint at `destination` that differs from the one at `source` in the tokens of its spans alone.

    Thresholds and their calibration stay, as what the model says does.

    Args:
        destination: Where to; must not exist or be empty.

    Raises:
        CheckpointError: The source cannot be opened, or has no parallel pauses of one token; or the destination is
            taken.
    """
    checkpoint = open_checkpoint(source)
    root, pause = checkpoint.path, checkpoint.manifest.pause
    if pause.mode != PauseMode.PARALLEL:
        raise CheckpointError(f"{root}: its pauses are {pause.mode}; only parallel ones have positions")
    if pause.position_ids is not None:
        raise CheckpointError(f"{root}: each position of its pauses has a token of its own already")
    # Added to a tokenizer that is read anew: the checkpoint's own is not changed.
    before = checkpoint.tokenizer
    tokenizer = type(before.tokenizer).from_file(str(root / "tokenizer.json"))
    add_position_tokens(tokenizer, pause.latent_tokens)
    now = TraceTokenizer(tokenizer, before.tag_style, tags=before.tags, pause_tags=before.pause_tags)
    positions = now.with_positions(pause.latent_tokens).position_ids
    fields = checkpoint.manifest.model_dump(mode="json", exclude={"files", "format_version"})
    fields["pause"]["position_ids"] = list(positions)
    made = export(
        destination,
        state_dict=_SpreadTensors(weights.read_entries(weights.weight_files(root)), positions),
        config=parse_json((root / "config.json").read_bytes(), "config.json"),
        tokenizer_json=tokenizer.to_str(),
        manifest_fields=fields,
    )
    for paper in ("README.md", *LICENCE_FILES):
        if (root / paper).is_file():
            shutil.copyfile(root / paper, made.path / paper)
    return made


class _SpreadTensors(Mapping[str, "torch.Tensor"]):
    """Reads a checkpoint's tensors one at a time; in embedding and head each position's row is the pause token's."""

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
        # Rows that only padded the embedding may be theirs; whatever stood there is nobody's.
        tensor = torch.cat([tensor, row.expand(num_more, -1)])
        tensor[list(self._positions)] = row
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)
