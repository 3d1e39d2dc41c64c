"""The int8 form of a checkpoint opens, answers in vLLM as its arithmetic says, or is refused with the reason."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor

from hyper_model import int8, quantize, weights
from hyper_model.checkpoint import open_checkpoint, update_pause
from hyper_model.commands import checkpoint as command
from hyper_model.errors import CheckpointError
from hyper_model.positions import give_positions
from hyper_model.trace import build_prompt
from tests.builders import build_random_checkpoint
from tests.hyper_model.test_checkpoint import CLIP_S, VLLM_SCRIPT, edit_json, edit_tensors, reseal

MODEL: Any = Qwen2AudioForConditionalGeneration
PROCESSOR: Any = Qwen2AudioProcessor


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint and its int8 form."""
    folder = tmp_path_factory.mktemp("quantize")
    build_random_checkpoint(folder / "float", num_padding_rows=10, max_shard_bytes=300_000)
    (folder / "float/LICENSE").write_text("Apache-2.0")
    quantize.quantize(folder / "float", folder / "int8")
    return folder / "float", folder / "int8"


@pytest.fixture
def copy(pair: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(pair[1], tmp_path / "model", ignore=shutil.ignore_patterns("LICENSE")))


def stored(path: Path) -> weights.StoredTensors:
    return weights.StoredTensors(weights.read_entries(weights.weight_files(path)))


def test_it_names_its_form_and_keeps_everything_else(pair: tuple[Path, Path]) -> None:
    before, after = (open_checkpoint(path).manifest for path in pair)
    assert (before.quantization, after.quantization) == (None, "w8a8")
    assert before.model_dump(exclude={"files", "quantization"}) == after.model_dump(exclude={"files", "quantization"})
    assert "quantization" not in json.loads((pair[0] / "hyper.json").read_text())
    assert (pair[1] / "LICENSE").read_text() == "Apache-2.0"
    assert json.loads((pair[1] / "config.json").read_text())["text_config"]["tie_word_embeddings"] is False


def test_every_weight_is_within_half_a_step_and_the_rest_is_unchanged(pair: tuple[Path, Path]) -> None:
    before, after = (stored(path) for path in pair)
    quantised = {name for name in before if after[name].dtype is torch.int8}
    assert quantised == {name for name in before if int8.is_int8(name)}
    # Two layers of seven projections, and the head.
    assert len(quantised) == 15
    for name in before:
        if name in quantised:
            scales = after[int8.scale_name(name)]
            assert scales.dtype is torch.float32 and scales.shape == (len(before[name]), 1)
            assert ((after[name].float() * scales - before[name]).abs() <= scales / 2 + 1e-6).all()
            assert after[name].abs().amax() == int8.MAX_INT8
        else:
            assert torch.equal(after[name], before[name])


def test_a_channel_of_zeros_stays_zero() -> None:
    weight = torch.tensor([[0.0, 0.0], [1.0, -2.0]])
    assert int8.rounded(weight).tolist() == [[0, 0], [64, -127]]
    assert torch.isfinite(int8.scales_of(weight)).all()


class RoundedLinear(torch.nn.Module):
    """A product of int8 weights and activations of int8 per token, in exact arithmetic."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = int8.rounded(weight).float() * int8.scales_of(weight), bias

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        scales = inputs.abs().amax(-1, keepdim=True) / 127
        return torch.nn.functional.linear((inputs / scales).round() * scales, self.weight, self.bias)


def test_vllm_answers_as_the_arithmetic_of_int8(pair: tuple[Path, Path], tmp_path: Path) -> None:
    prompt = build_prompt(open_checkpoint(pair[1]).tokenizer, "What is heard?", choices=("one", "two"))
    (tmp_path / "ask.py").write_text(VLLM_SCRIPT)
    np.save(tmp_path / "clip.npy", CLIP_S)
    settings = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    ran = subprocess.run(
        [sys.executable, str(tmp_path / "ask.py"), str(pair[1]), str(tmp_path / "clip.npy"), json.dumps(prompt)],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in ran.stdout.splitlines() if line.startswith("RESULT")]
    assert lines, ran.stdout[-2000:] + ran.stderr[-4000:]
    prompt_ids, token_ids, logprobs = json.loads(lines[0].removeprefix("RESULT"))

    model = MODEL.from_pretrained(pair[0]).eval()
    for layer in model.model.language_model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, child in list(part.named_children()):
                if isinstance(child, torch.nn.Linear):
                    setattr(part, name, RoundedLinear(child.weight, child.bias))
    model.lm_head = RoundedLinear(model.lm_head.weight, None)
    extract = PROCESSOR.from_pretrained(pair[0]).feature_extractor
    features = extract(CLIP_S, sampling_rate=16_000, return_tensors="pt", return_attention_mask=True)
    ids = torch.tensor([prompt_ids + token_ids])
    with torch.no_grad():
        logits = model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            input_features=features["input_features"],
            feature_attention_mask=features["attention_mask"],
        ).logits[0, len(prompt_ids) - 1 : -1]
    expected = logits.log_softmax(-1)[range(len(token_ids)), token_ids]
    # A rounding step of one activation flips where the two sums differ in their last bits.
    torch.testing.assert_close(torch.tensor(logprobs), expected, atol=2e-2, rtol=0)


def test_the_command_writes_a_checkpoint_and_reports_its_size(pair: tuple[Path, Path], tmp_path: Path) -> None:
    run = CliRunner().invoke(command, ["quantize", str(pair[0]), str(tmp_path / "made")])
    assert run.exit_code == 0, run.output
    assert "w8a8" in run.output and "(were" in run.output and "calibrate" not in run.output
    assert open_checkpoint(tmp_path / "made").manifest_sha256 == open_checkpoint(pair[1]).manifest_sha256
    described = CliRunner().invoke(command, ["info", str(tmp_path / "made")]).output
    assert "int8 (w8a8)" in described


def test_gate_settings_of_an_int8_checkpoint_can_be_changed(copy: Path) -> None:
    assert update_pause(copy, {"tau_pause": 0.4}).manifest.quantization == "w8a8"


def test_a_quantised_checkpoint_is_refused_as_a_source(pair: tuple[Path, Path], tmp_path: Path) -> None:
    from training.policy import open_policy

    for convert in (quantize.quantize, give_positions):
        with pytest.raises(CheckpointError, match="float weights"):
            convert(pair[1], tmp_path / "made")
    with pytest.raises(CheckpointError, match="float weights"):
        open_policy(open_checkpoint(pair[1]))
    assert not (tmp_path / "made").exists()


def test_unsuitable_folders_are_refused_with_the_reason(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        quantize.quantize(tmp_path / "absent", tmp_path / "made")
    with pytest.raises(CheckpointError, match="is the source"):
        quantize.quantize(pair[0], pair[0], overwrite=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("")
    with pytest.raises(CheckpointError, match="exists already"):
        quantize.quantize(pair[0], tmp_path / "full")
    with pytest.raises(CheckpointError, match="cannot be written"):
        quantize.quantize(pair[0], tmp_path / "full/file/made")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_a_disk_without_room_is_refused_before_writing(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(quantize.shutil, "disk_usage", lambda folder: usage(10**9, 10**9, 1000))
    with pytest.raises(CheckpointError, match="0 MB free"):
        quantize.quantize(pair[0], tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_the_size_is_known_before_writing(pair: tuple[Path, Path]) -> None:
    estimated = quantize.num_bytes(weights.read_entries(weights.weight_files(pair[0])))
    written = sum(tensor.numel() * tensor.element_size() for tensor in stored(pair[1]).values())
    assert estimated == written


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda config: config.pop("quantization_config"), "quantised"),
        (lambda config: config["quantization_config"].update(format="pack-quantized"), "only the form"),
    ],
)
def test_another_config_of_the_weights_is_refused(copy: Path, edit: Any, reason: str) -> None:
    edit_json(copy / "config.json", edit)
    reseal(copy)
    with pytest.raises(CheckpointError, match=reason):
        open_checkpoint(copy)


def test_float_weights_are_refused_in_an_int8_checkpoint(copy: Path) -> None:
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    edit_tensors(copy, lambda tensors: tensors.update({name: tensors[name].float()}))
    reseal(copy)
    with pytest.raises(CheckpointError, match=r"up_proj.weight is stored as F32; supported are I8"):
        open_checkpoint(copy)


def test_scales_are_required(copy: Path) -> None:
    edit_tensors(copy, lambda tensors: tensors.pop(int8.scale_name(weights.LM_HEAD)))
    reseal(copy)
    with pytest.raises(CheckpointError, match=r"lack language_model\.lm_head\.weight_scale"):
        open_checkpoint(copy)
