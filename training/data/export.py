"""Export scenes as a public data set: audio files, questions, traces in PAQA's form, and licences.

The JSON Lines file has one row per item, in LLaMA-Factory's alpaca columns (`instruction`, `output`, `audios`). `hyper
data check` reads these columns. Further columns hold the truth about the clip.

Items are built in parallel in chunks of a hundred; an interrupted build resumes. This module depends on no model.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import soundfile
from tqdm import tqdm

from hyper_model.audio import SAMPLE_RATE_HZ
from hyper_model.files import replacing, write_whole
from hyper_model.trace import render
from training.data.clips import SEED_STRIDE
from training.data.hard_sets import ASKED_KIND, builder_for
from training.data.questions import SceneExample, draw_example
from training.data.scenes import Rendered, SceneBuilder
from training.data.sources.downloads import MissingDataError
from training.data.sources.noise import NoiseFolder
from training.data.sources.recordings import LICENCES
from training.data.sources.voices import VOICE_LICENCES, Bank, Split, list_voices, trained_lines

ITEMS_PER_CHUNK = 100
_FIRST_SEED = 9_000_000
"""Offset to the split's first seed; exported scenes occur in no training or evaluation of the embedded checkpoint."""


@dataclass(frozen=True)
class ExportPlan:
    """The configuration of an export; equal plans give equal files.

    Attributes:
        suite: a hard set's name, or None for the usual mixture.
        noise: MUSAN or FSD50K folders in place of the recordings.
        with_parts: also write speech and background of each clip as separate 24-bit files.
    """

    bank: Path
    sounds_folder: Path
    split: Split
    num_items: int
    suite: str | None = None
    noise: tuple[Path, ...] = ()
    audio: Literal["wav", "flac"] = "flac"
    with_parts: bool = False
    seed: int = 0

    def as_json(self) -> dict[str, Any]:
        """Return all settings with an effect on the files, as plain data."""
        return {
            "split": self.split,
            "num_items": self.num_items,
            "suite": self.suite,
            "noise": [str(path) for path in self.noise],
            "audio": self.audio,
            "with_parts": self.with_parts,
            "seed": self.seed,
        }

    def builder(self) -> SceneBuilder:
        """Open the bank and the recordings."""
        # Held-out lines stay held out, so that a model trained on an exported training split can be tested on ours.
        without = frozenset[str]() if self.split == "train" else trained_lines(seed=self.seed)
        bank = Bank(self.bank, without=without)
        if self.suite is not None:
            return builder_for(self.suite, bank, self.sounds_folder, self.split)
        noise = NoiseFolder(self.noise, self.split) if self.noise else None
        return SceneBuilder(bank, self.sounds_folder, self.split, noise=noise)


def export_scenes(plan: ExportPlan, folder: Path, *, num_workers: int) -> Path:
    """Write the items of a plan and return the JSON Lines file; resume an interrupted export.

    Raises:
        MissingDataError: the folder holds an export of another plan.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plan_file = folder / "plan.json"
    text = json.dumps(plan.as_json(), indent=2) + "\n"
    if plan_file.exists() and plan_file.read_text(encoding="utf-8") != text:
        raise MissingDataError(
            f"{folder} holds another export (see its plan.json): remove it, or choose another folder"
        )
    plan_file.write_text(text, encoding="utf-8")
    chunks_folder = folder / "chunks"
    chunks_folder.mkdir(exist_ok=True)
    (folder / "audio").mkdir(exist_ok=True)
    firsts = range(0, plan.num_items, ITEMS_PER_CHUNK)
    jobs = [(plan, folder, first) for first in firsts if not (chunks_folder / f"{first:06d}.jsonl").exists()]
    if num_workers == 1:
        # Starting a process takes longer than a hundred items.
        for job in tqdm(jobs, desc="items", unit="hundred"):
            _write_chunk(job)
    else:
        with ProcessPoolExecutor(num_workers, mp_context=get_context("spawn")) as pool:
            for _ in tqdm(pool.map(_write_chunk, jobs), total=len(jobs), desc="items", unit="hundred"):
                pass
    rows_file = folder / f"{plan.suite or plan.split}.jsonl"
    backgrounds: set[str] = set()
    voices: set[str] = set()
    with replacing(rows_file) as partial, partial.open("w", encoding="utf-8") as out:
        for first in firsts:
            # Texts may contain other line ends, such as U+2028.
            for line in filter(None, (chunks_folder / f"{first:06d}.jsonl").read_text(encoding="utf-8").split("\n")):
                row = json.loads(line)
                backgrounds |= {row["recording"]} - {None}
                voices |= set(row["voices"])
                out.write(line + "\n")
    licences = json.dumps(_licences(plan, backgrounds, voices), indent=2, sort_keys=True)
    write_whole(folder / "LICENCES.json", licences + "\n")
    return rows_file


def _write_chunk(job: tuple[ExportPlan, Path, int]) -> int:
    plan, folder, first = job
    builder = plan.builder()
    rows = [json.dumps(row) for row in _write_items(plan, builder, folder, first)]
    # The rows are written last and whole; a chunk without rows is built again.
    write_whole(folder / "chunks" / f"{first:06d}.jsonl", "\n".join(rows) + "\n")
    return first


def _write_items(plan: ExportPlan, builder: SceneBuilder, folder: Path, first: int) -> Iterator[dict[str, Any]]:
    for number in range(first, min(first + ITEMS_PER_CHUNK, plan.num_items)):
        rendered = builder.draw_parts(SEED_STRIDE[plan.split] + _FIRST_SEED + number)
        rng = random.Random(f"export/{plan.seed}/{number}")
        example = draw_example(rendered.scene, rng, kind=ASKED_KIND.get(plan.suite or ""))
        name = f"{number:06d}"
        path = Path("audio") / f"{name}.{plan.audio}"
        soundfile.write(folder / path, rendered.mixture_S, SAMPLE_RATE_HZ, subtype="PCM_16")
        if plan.with_parts:
            for part, samples_S in (("speech", rendered.speech_S), ("background", rendered.background_S)):
                part_path = folder / "audio" / f"{name}.{part}.{plan.audio}"
                soundfile.write(part_path, samples_S, SAMPLE_RATE_HZ, subtype="PCM_24")
        yield _row(name, path, rendered, example)


def _row(name: str, path: Path, rendered: Rendered, example: SceneExample) -> dict[str, Any]:
    scene = rendered.scene
    listed = "".join(f"\n{chr(ord('A') + i)}. {choice}" for i, choice in enumerate(example.choices))
    return {
        "id": name,
        "instruction": f"<audio>{example.question}{listed}",
        "output": render(example.trace),
        "audios": [path.as_posix()],
        "category": example.kind,
        "environment": scene.environment,
        "transcript": scene.transcript,
        "num_speakers": len(scene.speakers),
        "snr_db": scene.snr_db,
        "overlap_share": round(scene.overlap_share, 3),
        "recording": scene.recording,
        "background_line": scene.background_line,
        "voices": [speaker.voice for speaker in scene.speakers],
        "turns": [
            {"speaker": t.speaker, "text": t.line.text, "start_s": round(t.start_s, 3), "end_s": round(t.end_s, 3)}
            for t in scene.turns
        ],
        "duration_s": round(scene.duration_s, 3),
    }


def _licences(plan: ExportPlan, backgrounds: set[str], voices: set[str]) -> dict[str, Any]:
    """Collect the licence terms of the used files' sources."""
    if plan.noise:
        licences = NoiseFolder(plan.noise, plan.split).licences()
        recordings: dict[str, Any] = {path: licences[path] for path in backgrounds if path in licences}
    else:
        recordings = {path: {"licence": LICENCES[path.split("/")[0]]} for path in backgrounds}
    engines = {voice.engine for voice in list_voices() if voice.name in voices}
    return {
        "recordings": recordings,
        "voices": {engine: VOICE_LICENCES[engine] for engine in engines},
        "texts": "Sentence patterns and grammar: this project's licence. Example sentences and glosses: WordNet 3.0, "
        "Copyright 2006 by Princeton University, WordNet licence.",
    }
