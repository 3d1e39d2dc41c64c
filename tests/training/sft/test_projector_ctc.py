"""The projector learns the transcript from the order of the words alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hyper_model.trace import TraceTokenizer
from tests.training_data import write_bank, write_encoder, write_sounds
from training.data.clips import Clip
from training.data.scenes import SceneBuilder
from training.data.sources.downloads import ENCODER_FILE
from training.data.sources.voices import Bank
from training.export import RunModel, model_from_scratch
from training.recipes import Spelling, debug
from training.sft.projector_ctc import teach_spelling
from training.sft.trainer import ENCODER_WIDTH, train_tokenizer_on


def _spoken(tokenizer: TraceTokenizer, clip: Clip, path: Path) -> Clip:
    """Give a clip states for its transcript: each token's own vector twice, with silence between."""
    vectors_VD = torch.randn(tokenizer.vocab_size, ENCODER_WIDTH, generator=torch.Generator().manual_seed(1))
    silence_D = torch.zeros(ENCODER_WIDTH)
    states = [silence_D]
    for token_id in tokenizer.encode_text(clip.scene.transcript):
        states += [vectors_VD[token_id], vectors_VD[token_id], silence_D]
    path.write_bytes(torch.stack(states).bfloat16().view(torch.int16).numpy().tobytes())
    return Clip(clip.scene, path, 0, len(states))


@pytest.fixture
def run(tmp_path: Path) -> tuple[RunModel, list[Clip]]:
    builder = SceneBuilder(Bank(write_bank(tmp_path / "bank")), write_sounds(tmp_path / "assets/sounds"), "train")
    drawn = [Clip(builder.draw_parts(seed).scene, tmp_path, 0, 0) for seed in range(50)]
    train_tokenizer_on(drawn, debug(), tmp_path / "tokenizer.json")
    decoder = debug().decoder
    assert decoder is not None
    torch.manual_seed(0)
    encoder_file = write_encoder(tmp_path / "assets" / ENCODER_FILE)
    model = model_from_scratch(decoder, tmp_path / "tokenizer.json", encoder_file, dtype=torch.float32)
    return model, [_spoken(model.tokenizer, clip, tmp_path / f"{i}.bf16") for i, clip in enumerate(drawn)]


def test_the_projector_learns_to_spell_and_a_second_call_puts_back_what_it_learnt(
    run: tuple[RunModel, list[Clip]], tmp_path: Path
) -> None:
    model, clips = run
    core: Any = model.core
    projector, embedding = core.model.multi_modal_projector.linear, core.get_input_embeddings().weight
    before = embedding.detach().clone()
    spelling, file = Spelling(num_steps=120, batch_size=16, learning_rate=1e-2), tmp_path / "spelling.safetensors"
    found = teach_spelling(model.core, model.tokenizer, clips, spelling, file, seed=0)
    assert found is not None and found.num_clips == 5
    assert found.word_error < 0.5
    learnt = projector.weight.detach().clone()
    assert not torch.equal(embedding, before)
    with torch.no_grad():
        projector.weight.zero_()
    assert teach_spelling(model.core, model.tokenizer, clips, spelling, file, seed=0) is None
    assert torch.equal(projector.weight, learnt)


def test_the_head_stays_the_embedding(run: tuple[RunModel, list[Clip]], tmp_path: Path) -> None:
    model, clips = run
    spelling = Spelling(num_steps=2, batch_size=4, learning_rate=1e-2)
    teach_spelling(model.core, model.tokenizer, clips, spelling, tmp_path / "spelling.safetensors", seed=0)
    assert model.core.lm_head.weight is model.core.get_input_embeddings().weight
