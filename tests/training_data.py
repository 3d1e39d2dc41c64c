"""A small bank and substitutes for the recordings, to test training without synthesizers or downloads."""

from __future__ import annotations

import json
import random
import struct
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from hyper_model.audio import SAMPLE_RATE_HZ
from training.data.clips import scene_to_json
from training.data.encoder import num_audio_tokens
from training.data.scenes import SceneBuilder
from training.data.sources.downloads import ENCODER_FILE, SOUNDS_FOLDER
from training.data.sources.open_text import split_of
from training.data.sources.recordings import list_recordings
from training.data.sources.sentences import SLOTS, draw_line
from training.data.sources.voices import TARGET_RMS, Bank, Split, Utterance, list_voices
from training.data.text_scenes import SceneWriter
from training.export import model_from_scratch
from training.recipes import SftRecipe
from training.sft.trainer import ENCODER_WIDTH, ClipSequences, SftTrainer, read_clips, train_tokenizer_on
from training.trainer import prepare_run_dir


def write_bank(folder: Path, *, lines_per_voice: int = 3) -> Path:
    """Write a bank in the real format, with a tone of its own as the speech of every voice."""
    folder.mkdir(parents=True)
    for number, voice in enumerate(list_voices()):
        rng = random.Random(voice.name)
        utterances, pieces, start = [], [], 0
        for place in range(lines_per_voice):
            num_samples = int(rng.uniform(0.4, 0.8) * SAMPLE_RATE_HZ)
            wave = np.sin(2 * np.pi * (120 + 7 * number) * np.arange(num_samples) / SAMPLE_RATE_HZ) * TARGET_RMS * 1.4
            pieces.append((wave * 32767).astype("<i2"))
            is_open = place % 2 == 1
            text = _open_line(rng, voice.split) if is_open else draw_line(rng).text
            utterances.append(Utterance(voice.name, voice.sex, text, start, num_samples, is_open))
            start += num_samples
        (folder / f"{voice.name}.0.i16").write_bytes(np.concatenate(pieces).tobytes())
        (folder / f"{voice.name}.0.json").write_text(json.dumps([asdict(u) for u in utterances]))
    return folder


def _open_line(rng: random.Random, split: Split) -> str:
    while True:
        words = [rng.choice(SLOTS[slot]) for slot in ("name", "quality", "object", "animal")]
        text = "{} keeps one {} {} and some {}".format(*words)
        if split_of(text) == split:
            return text


def write_sounds(folder: Path) -> Path:
    """Write 0.3 s of noise for each recording; the files are WAV, whatever their names."""
    noise = np.random.default_rng(0).standard_normal(SAMPLE_RATE_HZ * 3 // 10).astype(np.float32) * 0.1
    for recording in list_recordings():
        for name in recording.files:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, noise, SAMPLE_RATE_HZ, format="WAV")
    return folder


def write_clips(work: Path, *, num_clips: int = 12) -> Path:
    """Fill a work folder with a bank, recordings, an encoder, and scenes of random states of the right length."""
    builder = SceneBuilder(Bank(write_bank(work / "bank")), write_sounds(work / "assets" / SOUNDS_FOLDER), "train")
    write_encoder(work / "assets" / ENCODER_FILE)
    out = work / "clips/train"
    out.mkdir(parents=True)
    torch.manual_seed(0)
    rows: list[str] = []
    with (out / "scene-0000.bf16").open("wb") as states:
        for seed in range(num_clips):
            scene, samples_S = builder.draw(seed)
            states_AD = torch.randn(num_audio_tokens(len(samples_S)), ENCODER_WIDTH, dtype=torch.bfloat16)
            states.write(states_AD.view(torch.int16).numpy().tobytes())
            rows.append(json.dumps({"num_tokens": len(states_AD), "scene": scene_to_json(scene)}))
    (out / "scene-0000.jsonl").write_text("\n".join(rows) + "\n")
    return work


@dataclass
class TinyRun:
    """Stage I run over clips of random states, on an encoder of random weights."""

    trainer: Any
    checkpoint: Path | None

    def train(self) -> None:
        """Train to the end, from the checkpoint if there is one."""
        self.trainer.train(resume_from_checkpoint=None if self.checkpoint is None else str(self.checkpoint))

    def state(self) -> dict[str, torch.Tensor]:
        """Return the weights."""
        return self.trainer.run_model.policy.state_dict()


def write_encoder(file: Path, width: int = 384) -> Path:
    """Write a small random encoder in CTranslate2's format; the default width is that of Whisper tiny.en."""
    if file.exists():
        return file
    rng = np.random.default_rng(0)
    inner = 4 * width
    shapes: dict[str, tuple[int, ...]] = {
        "conv1/weight": (width, 80, 3),
        "conv1/bias": (width,),
        "conv2/weight": (width, width, 3),
        "conv2/bias": (width,),
        "position_encodings/encodings": (1500, width),
        "layer_norm/gamma": (width,),
        "layer_norm/beta": (width,),
        "layer_0/self_attention/layer_norm/gamma": (width,),
        "layer_0/self_attention/layer_norm/beta": (width,),
        "layer_0/self_attention/linear_0/weight": (3 * width, width),
        "layer_0/self_attention/linear_0/bias": (3 * width,),
        "layer_0/self_attention/linear_1/weight": (width, width),
        "layer_0/self_attention/linear_1/bias": (width,),
        "layer_0/ffn/layer_norm/gamma": (width,),
        "layer_0/ffn/layer_norm/beta": (width,),
        "layer_0/ffn/linear_0/weight": (inner, width),
        "layer_0/ffn/linear_0/bias": (inner,),
        "layer_0/ffn/linear_1/weight": (width, inner),
        "layer_0/ffn/linear_1/bias": (width,),
    }

    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    parts = [struct.pack("<I", 6), text("WhisperSpec"), struct.pack("<I", 3), struct.pack("<I", len(shapes))]
    for name, shape in shapes.items():
        values = np.ones(shape) if name.endswith("gamma") else rng.standard_normal(shape) * 0.05
        data = values.astype("<f4").tobytes()
        parts += [text(f"encoder/{name}"), struct.pack("<B", len(shape)), struct.pack(f"<{len(shape)}I", *shape)]
        parts += [struct.pack("<B", 0), struct.pack("<I", len(data)), data]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"".join([*parts, struct.pack("<I", 0)]))
    return file


def tiny_run(recipe: SftRecipe, work: Path, run_dir: Path, *, is_resumed: bool) -> TinyRun:
    """Build the same run as `hyper train`, without the command."""
    checkpoint = prepare_run_dir(run_dir, recipe, is_resumed=is_resumed)
    torch.manual_seed(recipe.seed)
    clips = read_clips(work / "clips/train")
    train_tokenizer_on(clips, recipe, run_dir / "tokenizer.json")
    assert recipe.decoder is not None
    model = model_from_scratch(
        recipe.decoder,
        run_dir / "tokenizer.json",
        write_encoder(work / "assets" / ENCODER_FILE),
        dtype=getattr(torch, recipe.dtype),
    )
    sequences = ClipSequences(clips, [], model.tokenizer, recipe, SceneWriter([], frozenset()))
    return TinyRun(SftTrainer(model, recipe, run_dir, sequences), checkpoint)


def write_wordnet(folder: Path) -> Path:
    """Write files in WordNet's format with our own sentences, enough for every split."""
    folder.mkdir(parents=True)
    rng = random.Random(0)
    for part in ("noun", "verb", "adj", "adv"):
        rows = ["  1 This line stands for the licence.  "]
        for number in range(400):
            things = " ".join(rng.choice(SLOTS["object"]) for _ in range(3))
            quality, city = rng.choice(SLOTS["quality"]), rng.choice(SLOTS["city"])
            gloss = f'a {quality} kind of {things}; "the {things} was sold in {city}"'
            rows.append(f"{number:08d} 03 n 01 thing 0 000 | {gloss}  ")
        (folder / f"data.{part}").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder
