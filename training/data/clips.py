"""Render scenes once and store the frozen encoder's states of each clip, the training data of Stage I.

Axes: A audio tokens (40 ms), D encoder width.

A shard is a pair of files. `KIND-NNNN.bf16` holds the states of its clips, concatenated. `KIND-NNNN.jsonl` holds the
truth, one line per clip. KIND is `speech` (one voice, short open text), `scene`, `noise` (scenes over user-supplied
recordings), `talk`, or `base-scene` (scenes too). The last two have Whisper base's states, the others Whisper tiny's.

Shards are built in parallel. An interrupted build resumes, and finished shards are usable at once. This module depends
on no question or prompt.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm

from hyper_model.engine_environment import native_dtype
from hyper_model.files import write_whole
from training.data.encoder import ClipEncoder, load_base_encoder, load_encoder
from training.data.scenes import Scene, SceneBuilder, SceneSpeaker, Turn
from training.data.sources.downloads import ENCODER_FILE, SOUNDS_FOLDER, MissingDataError
from training.data.sources.noise import NoiseFolder
from training.data.sources.sentences import line_from_text
from training.data.sources.voices import Bank, Split
from training.data.speech import SpeechBuilder
from training.data.talk import TalkBuilder

ClipKind = Literal["speech", "scene", "noise", "talk", "base-scene"]

CLIPS_PER_SHARD = 500
BASE_LAYERS = (1,)
"""Layers of Whisper base joined to its last one, for the background."""
BASE_ENCODER_WIDTH = 512 * (1 + len(BASE_LAYERS))
"""Width of the states of `talk` and `base-scene`: Whisper base's last layer and `BASE_LAYERS`."""
SEED_STRIDE = {"train": 0, "validation": 10_000_000, "test": 20_000_000}
"""First scene seed of each split; no two splits share a seed."""
_KIND_STRIDE: dict[ClipKind, int] = {
    "scene": 0,
    "noise": 2_500_000,
    "speech": 5_000_000,
    "talk": 7_500_000,
    "base-scene": 8_750_000,
}


def first_seed(kind: ClipKind, split: Split) -> int:
    """Return the seed of the first clip of a kind and split."""
    return SEED_STRIDE[split] + _KIND_STRIDE[kind]


def scene_to_json(scene: Scene) -> dict[str, Any]:
    """Return the truth as plain data; a line is stored as text, since its questions follow from it."""
    row = asdict(scene)
    row["turns"] = [{**turn, "line": turn["line"]["text"]} for turn in row["turns"]]
    return row


def scene_from_json(row: dict[str, Any]) -> Scene:
    """Invert `scene_to_json`."""
    speakers = tuple(SceneSpeaker(**speaker) for speaker in row["speakers"])
    turns = tuple(Turn(**{**turn, "line": line_from_text(turn["line"])}) for turn in row["turns"])
    other_lines = tuple(row.get("other_lines", ()))
    return Scene(**{**row, "speakers": speakers, "turns": turns, "other_lines": other_lines})


def _stem(kind: ClipKind, shard: int) -> str:
    return f"{kind}-{shard:04d}"


def _build_shard(job: tuple[ClipKind, int, int, Split, Path, Path, Path, tuple[Path, ...]]) -> str:
    kind, shard, num_clips, split, assets, bank_folder, folder, noise = job
    torch.set_num_threads(1)
    bank, sounds_folder = Bank(bank_folder), assets / SOUNDS_FOLDER
    if kind == "speech":
        builder = SpeechBuilder(bank, sounds_folder, split)
    else:
        own = NoiseFolder(noise, split) if kind == "noise" else None
        builder = SceneBuilder(bank, sounds_folder, split, noise=own)
    encode = ClipEncoder(load_encoder(assets / ENCODER_FILE), getattr(torch, native_dtype()))
    return write_shard(folder, kind, split, shard, builder.draw, encode, num_clips=num_clips)


def write_shard(
    folder: Path,
    kind: ClipKind,
    split: Split,
    shard: int,
    draw: Callable[[int], tuple[Scene, np.ndarray]],
    encode: ClipEncoder,
    *,
    num_clips: int = CLIPS_PER_SHARD,
) -> str:
    """Draw and encode the clips of one shard, and return its name.

    Args:
        draw: Return truth and audio of a seed.
    """
    first = first_seed(kind, split) + shard * num_clips
    stem = _stem(kind, shard)
    rows: list[str] = []
    with (folder / f"{stem}.bf16").open("wb") as states:
        for seed in range(first, first + num_clips):
            scene, samples_S = draw(seed)
            states_AD = encode(samples_S)
            rows.append(json.dumps({"num_tokens": len(states_AD), "scene": scene_to_json(scene)}))
            states.write(states_AD.bfloat16().contiguous().view(torch.int16).numpy().tobytes())
    # The index is written last and whole; a shard without an index is built again.
    write_whole(folder / f"{stem}.jsonl", "\n".join(rows) + "\n")
    return stem


def build_clips(
    assets: Path,
    bank: Path,
    folder: Path,
    split: Split,
    *,
    kind: ClipKind,
    num_shards: int,
    num_workers: int,
    noise: tuple[Path, ...] = (),
    clips_per_shard: int = CLIPS_PER_SHARD,
) -> None:
    """Build every missing shard of a kind and split from the current voices of the bank.

    Args:
        noise: MUSAN or FSD50K folders for the kind `noise`; their licence terms go to `noise-licences.json`.
        clips_per_shard: the value must be equal for all shards of a kind, since the seed of a clip follows from its
            position.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "noise":
        licences = json.dumps(NoiseFolder(noise, split).licences(), indent=1)
        (folder / "noise-licences.json").write_text(licences + "\n", encoding="utf-8")
    missing = [shard for shard in range(num_shards) if not (folder / f"{_stem(kind, shard)}.jsonl").exists()]
    jobs = [(kind, shard, clips_per_shard, split, assets, bank, folder, noise) for shard in missing]
    with ProcessPoolExecutor(num_workers, mp_context=get_context("spawn")) as pool:
        for _ in tqdm(pool.map(_build_shard, jobs), total=len(jobs), desc=f"{split} {kind} clips", unit="shard"):
            pass


def build_base_clips(
    assets: Path,
    folder: Path,
    split: Split,
    *,
    kind: Literal["talk", "base-scene"],
    shards: range,
    bank: Bank | None = None,
    clips_per_shard: int = CLIPS_PER_SHARD,
) -> None:
    """Build the missing shards of talk or scenes with Whisper base's states.

    Whisper base is frozen and training reads each clip several times, so its states are stored: 51 kB per second.

    Args:
        assets: Folder of the fetched texts, recordings and voices.
        bank: Utterances of the voices. Scenes need it. Talk uses its slow synthesizers. Existing shards stay
            unchanged, also after a change of the bank.
        clips_per_shard: Equal for all shards of a folder, since a clip's seed follows from its position.

    Raises:
        MissingDataError: Scenes without a bank.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    if kind == "talk":
        draw = TalkBuilder(assets, split, bank=bank).draw
    elif bank is None:
        raise MissingDataError("scenes need the voices of a bank: build it first (make bank)")
    else:
        draw = SceneBuilder(bank, assets / SOUNDS_FOLDER, split).draw
    encode = ClipEncoder(load_base_encoder(), getattr(torch, native_dtype()), BASE_LAYERS)
    for shard in tqdm(shards, desc=f"{split} {kind}", unit="shard"):
        if not (folder / f"{_stem(kind, shard)}.jsonl").exists():
            write_shard(folder, kind, split, shard, draw, encode, num_clips=clips_per_shard)


@dataclass(frozen=True)
class Clip:
    """A scene and the location of its encoder states."""

    scene: Scene
    path: Path
    offset_bytes: int
    num_tokens: int

    def states(self, width: int) -> torch.Tensor:
        """Read the encoder states, bfloat16 [A, D]."""
        raw = np.fromfile(self.path, np.int16, self.num_tokens * width, offset=self.offset_bytes)
        return torch.from_numpy(raw).view(torch.bfloat16).reshape(self.num_tokens, width)


def open_clips(folder: Path, width: int, *, kind: ClipKind | None = None, shard: int | None = None) -> Iterator[Clip]:
    """Yield the clips of every finished shard in order, optionally of one kind or one shard."""
    number = "*" if shard is None else f"{shard:04d}"
    for index in sorted(folder.glob(f"{kind or '*'}-{number}.jsonl")):
        offset = 0
        for line in filter(None, index.read_text(encoding="utf-8").split("\n")):
            row = json.loads(line)
            yield Clip(scene_from_json(row["scene"]), index.with_suffix(".bf16"), offset, row["num_tokens"])
            offset += 2 * width * row["num_tokens"]
