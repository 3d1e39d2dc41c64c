"""A build of clips resumes after an interruption, keeps finished shards, and separates kinds."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from hyper_model.audio_encoder import num_audio_tokens
from tests.noise_data import write_musan
from tests.training_data import write_bank, write_sounds
from training.data.clips import ClipKind, build_clips, open_clips
from training.data.sources.downloads import ENCODER_FILE, SOUNDS_FOLDER

WIDTH = 64


def _write_encoder(path: Path) -> None:
    """Write a random encoder of one layer in the form of CTranslate2's files."""
    rng = np.random.default_rng(0)
    variables: dict[str, np.ndarray] = {}

    def linear(name: str, *shape: int) -> None:
        variables[f"encoder/{name}/weight"] = (0.05 * rng.standard_normal(shape)).astype(np.float32)
        variables[f"encoder/{name}/bias"] = np.zeros(shape[0], np.float32)

    def norm(name: str) -> None:
        variables[f"encoder/{name}/gamma"] = np.ones(WIDTH, np.float32)
        variables[f"encoder/{name}/beta"] = np.zeros(WIDTH, np.float32)

    linear("conv1", WIDTH, 80, 3)
    linear("conv2", WIDTH, WIDTH, 3)
    variables["encoder/position_encodings/encodings"] = np.zeros((1500, WIDTH), np.float32)
    norm("layer_norm")
    norm("layer_0/self_attention/layer_norm")
    linear("layer_0/self_attention/linear_0", 3 * WIDTH, WIDTH)
    linear("layer_0/self_attention/linear_1", WIDTH, WIDTH)
    norm("layer_0/ffn/layer_norm")
    linear("layer_0/ffn/linear_0", 4 * WIDTH, WIDTH)
    linear("layer_0/ffn/linear_1", WIDTH, 4 * WIDTH)

    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    data = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<II", 3, len(variables))
    for name, values in variables.items():
        data += text(name) + struct.pack(f"<B{values.ndim}I", values.ndim, *values.shape)
        data += struct.pack("<BI", 0, values.nbytes) + values.tobytes()
    path.parent.mkdir(parents=True)
    path.write_bytes(data + struct.pack("<I", 0))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    _write_encoder(folder / "assets" / ENCODER_FILE)
    write_sounds(folder / "assets" / SOUNDS_FOLDER)
    write_bank(folder / "bank", lines_per_voice=4)
    return folder


def _build(work: Path, folder: Path, kind: ClipKind, num_shards: int, noise: tuple[Path, ...] = ()) -> None:
    build_clips(
        work / "assets",
        work / "bank",
        folder,
        "train",
        kind=kind,
        num_shards=num_shards,
        num_workers=1,
        noise=noise,
        clips_per_shard=6,
    )


def test_a_broken_build_is_completed_and_finished_shards_are_left_alone(work: Path, tmp_path: Path) -> None:
    folder = tmp_path / "train"
    _build(work, folder, "speech", 2)
    _build(work, folder, "scene", 1)
    assert sorted(p.name for p in folder.glob("*.jsonl")) == [
        "scene-0000.jsonl",
        "speech-0000.jsonl",
        "speech-0001.jsonl",
    ]
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    kept = (folder / "speech-0000.bf16").stat().st_mtime_ns
    # After a killed build: states half written, and no list of them.
    (folder / "speech-0001.jsonl").rename(folder / "speech-0001.jsonl.partial")
    (folder / "speech-0001.bf16").write_bytes(before["speech-0001.bf16"][:100])
    assert len(list(open_clips(folder, WIDTH, kind="speech"))) == 6
    _build(work, folder, "speech", 2)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert (folder / "speech-0000.bf16").stat().st_mtime_ns == kept


def test_kinds_are_told_apart_and_every_clip_has_the_states_of_its_length(work: Path, tmp_path: Path) -> None:
    folder = tmp_path / "train"
    _build(work, folder, "speech", 1)
    _build(work, folder, "scene", 1)
    musan = write_musan(tmp_path / "musan")
    _build(work, folder, "noise", 1, (musan,))
    kinds = {kind: list(open_clips(folder, WIDTH, kind=kind)) for kind in ("speech", "scene", "noise")}
    assert [len(found) for found in kinds.values()] == [6, 6, 6]
    assert len(list(open_clips(folder, WIDTH))) == 18
    seeds = [clip.scene.seed for found in kinds.values() for clip in found]
    assert len(set(seeds)) == 18
    for clip in open_clips(folder, WIDTH):
        states_AD = clip.states(WIDTH)
        assert states_AD.shape == (num_audio_tokens(round(clip.scene.duration_s * 16_000)), WIDTH)
        assert states_AD.float().isfinite().all()
    assert {c.scene.recording for c in kinds["noise"]} - {None} <= {str(path) for path in musan.rglob("*.wav")}
    assert "Public Domain" in (folder / "noise-licences.json").read_text(encoding="utf-8")
