"""A Llama read from GGUF computes the same as the Llama, and its tokenizer encodes traces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from hyper_model.errors import CheckpointError
from hyper_model.smollm2 import SmolLM2File
from hyper_model.trace import PAUSE, TraceTokenizer
from tests.gguf_file import tiny_llama, write_gguf


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, SmolLM2File]:
    """A Llama of random weights, and its GGUF file in llama.cpp's form."""
    model = tiny_llama(num_attention_heads=4, num_key_value_heads=2)
    file = write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", model)
    return model, SmolLM2File(file)


def test_the_qwen2_decoder_computes_what_the_llama_computes(llama: tuple[Any, SmolLM2File]) -> None:
    model, file = llama
    decoder = Qwen2ForCausalLM(Qwen2Config(**file.text_config())).eval()
    state = {name.removeprefix("language_model."): tensor for name, tensor in file.tensors()}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    decoder.load_state_dict(state, strict=True)
    ids = torch.randint(3, 260, (2, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted, found = model(ids).logits, decoder(ids).logits[..., :260]
    assert torch.allclose(wanted, found, atol=1e-4)


def test_the_tokenizer_carries_traces_and_text_cannot_spell_a_tag(llama: tuple[Any, SmolLM2File]) -> None:
    tokenizer = TraceTokenizer(llama[1].tokenizer)
    text = "Call 1234, <THINK> or <|im_end|>!"
    ids = tokenizer.encode_text(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.special_ids.isdisjoint(ids)
    assert tokenizer.pause_id is not None and len(tokenizer.encode_trace("<ASR>x</ASR>")) == 3


def test_new_tokens_have_rows_of_their_own_as_long_as_the_others(llama: tuple[Any, SmolLM2File]) -> None:
    file = llama[1]
    rows = dict(file.tensors())["language_model.model.embed_tokens.weight"]
    assert rows.shape[0] == file.num_rows and file.num_rows % 64 == 0
    ids = [file.tokenizer.token_to_id(tag) for tag in ("<ENV>", "</ENV>", "<ASR>", "</ASR>", PAUSE)]
    new = rows[ids]
    assert torch.allclose(new.norm(dim=1), rows[:260].norm(dim=1).mean().expand(5), rtol=1e-4)
    distances = torch.cdist(new, new) + torch.eye(5)
    assert float(distances.min()) > 1e-3


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(np.arange(64, dtype=np.uint8).tobytes())
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        SmolLM2File(path)
