"""Renders scenes once and keeps the frozen encoder's states of each clip: what Stage I trains on.

Axes: A audio tokens (40 ms), D encoder width. A shard is `NNNN.bf16` (the clips' states, one after the other) and
`NNNN.jsonl` (the truth, a line a clip). Shards are made in parallel, resumed where they stopped, and usable at once.
Knows nothing of questions or prompts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from training.assets import ENCODER_FILE, SOUNDS_FOLDER
from training.encoder import ClipEncoder, load_encoder
from training.lines import line_from_text
from training.scenes import Scene, SceneBuilder, SceneSpeaker, Turn
from training.voices import Bank, Split

CLIPS_PER_SHARD = 500
SEED_STRIDE = {"train": 0, "validation": 10_000_000, "test": 20_000_000}
"""First scene seed of each split: no clip of one split shares a seed with another's."""


def scene_to_json(scene: Scene) -> dict[str, Any]:
    """Return the truth as plain data; a line is its text, from which its questions follow."""
    row = asdict(scene)
    row["turns"] = [{**turn, "line": turn["line"]["text"]} for turn in row["turns"]]
    return row


def scene_from_json(row: dict[str, Any]) -> Scene:
    """Invert `scene_to_json`."""
    speakers = tuple(SceneSpeaker(**speaker) for speaker in row["speakers"])
    turns = tuple(Turn(**{**turn, "line": line_from_text(turn["line"])}) for turn in row["turns"])
    return Scene(**{**row, "speakers": speakers, "turns": turns})


def _build_shard(job: tuple[int, Split, Path, Path, Path]) -> int:
    shard, split, assets, bank_folder, folder = job
    torch.set_num_threads(1)
    builder = SceneBuilder(Bank(bank_folder), assets / SOUNDS_FOLDER, split)
    encode = ClipEncoder(load_encoder(assets / ENCODER_FILE), torch.bfloat16)
    first = SEED_STRIDE[split] + shard * CLIPS_PER_SHARD
    rows: list[str] = []
    with (folder / f"{shard:04d}.bf16").open("wb") as states:
        for seed in range(first, first + CLIPS_PER_SHARD):
            scene, samples_S = builder.draw(seed)
            states_AD = encode(samples_S)
            rows.append(json.dumps({"num_tokens": len(states_AD), "scene": scene_to_json(scene)}))
            states.write(states_AD.contiguous().view(torch.int16).numpy().tobytes())
    # The index is written last and renamed into place: a shard without one is made again.
    partial = folder / f"{shard:04d}.jsonl.partial"
    partial.write_text("\n".join(rows) + "\n", encoding="utf-8")
    partial.rename(folder / f"{shard:04d}.jsonl")
    return shard


def build_clips(assets: Path, bank: Path, folder: Path, split: Split, *, num_shards: int, num_workers: int) -> None:
    """Make every missing shard of a split."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [shard for shard in range(num_shards) if not (folder / f"{shard:04d}.jsonl").exists()]
    jobs = [(shard, split, assets, bank, folder) for shard in missing]
    with ProcessPoolExecutor(num_workers, mp_context=get_context("spawn")) as pool:
        for _ in tqdm(pool.map(_build_shard, jobs), total=len(jobs), desc=f"{split} clips", unit="shard"):
            pass


@dataclass(frozen=True)
class Clip:
    """A scene and where its encoder states lie."""

    scene: Scene
    path: Path
    offset_bytes: int
    num_tokens: int

    def states(self, width: int) -> torch.Tensor:
        """Read the encoder states: bfloat16 [A, D]."""
        raw = np.fromfile(self.path, np.int16, self.num_tokens * width, offset=self.offset_bytes)
        return torch.from_numpy(raw).view(torch.bfloat16).reshape(self.num_tokens, width)


def open_clips(folder: Path, width: int) -> Iterator[Clip]:
    """Yield the clips of every finished shard, in order."""
    for index in sorted(folder.glob("*.jsonl")):
        offset = 0
        for line in index.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            yield Clip(scene_from_json(row["scene"]), index.with_suffix(".bf16"), offset, row["num_tokens"])
            offset += 2 * width * row["num_tokens"]
