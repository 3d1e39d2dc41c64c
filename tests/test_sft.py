"""What holds of Stage I, from states to an exported checkpoint that vLLM's names fit."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, WhisperFeatureExtractor
from transformers.models.qwen2_audio.configuration_qwen2_audio import Qwen2AudioEncoderConfig
from transformers.models.qwen2_audio.modeling_qwen2_audio import Qwen2AudioEncoder

from hyper_model.trace import Section, TraceTokenizer, build_prompt
from tests.training_data import write_bank, write_sounds
from training import lean
from training.assets import MissingDataError
from training.clips import open_clips, scene_to_json
from training.encoder import HOP, ClipEncoder, num_audio_tokens
from training.questions import draw_example
from training.recipes import debug
from training.scenes import SceneBuilder
from training.sft import ENCODER_WIDTH, ExampleStream, SftTrainer, learning_rate, prepare_run, train
from training.tokens import IGNORED, encode_example
from training.voices import Bank


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve scenes with random states of the right length, in the clips' own format."""
    folder = tmp_path_factory.mktemp("sft")
    builder = SceneBuilder(Bank(write_bank(folder / "bank")), write_sounds(folder / "sounds"), "train")
    out = folder / "clips"
    out.mkdir()
    torch.manual_seed(0)
    rows = []
    with (out / "0000.bf16").open("wb") as states:
        for seed in range(12):
            scene, samples_S = builder.draw(seed)
            states_AD = torch.randn(num_audio_tokens(len(samples_S)), ENCODER_WIDTH, dtype=torch.bfloat16)
            states.write(states_AD.view(torch.int16).numpy().tobytes())
            rows.append(json.dumps({"num_tokens": len(states_AD), "scene": scene_to_json(scene)}))
    (out / "0000.jsonl").write_text("\n".join(rows) + "\n")
    return out


@pytest.fixture(scope="module")
def tokenizer(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> TraceTokenizer:
    run_dir = tmp_path_factory.mktemp("tokenizer")
    prepare_run(debug(), clips, run_dir)
    return TraceTokenizer.from_file(run_dir / "tokenizer.json")


def test_loss_falls_on_the_trace_alone_and_never_on_a_latent_token(clips: Path, tokenizer: TraceTokenizer) -> None:
    for clip in open_clips(clips, ENCODER_WIDTH):
        example = dataclasses.replace(draw_example(clip.scene, random.Random(0)), num_pauses=2)
        encoded = encode_example(tokenizer, example, latent_tokens=4)
        prompt = build_prompt(tokenizer, example.question, example.choices)
        assert encoded.token_ids[: len(prompt)] == prompt
        assert tokenizer.pause_id is not None
        assert encoded.token_ids.count(tokenizer.pause_id) == 8
        assert set(encoded.labels[: len(prompt) - 1]) == {IGNORED}
        targets = [label for label in encoded.labels if label != IGNORED]
        assert tokenizer.pause_id not in targets
        completion = [t for t in encoded.token_ids[len(prompt) :] if t != tokenizer.pause_id]
        assert targets == completion
        at = encoded.token_ids.index(tokenizer.tag_ids[Section.SPEAKER][0])
        assert encoded.token_ids[at + 1 : at + 5] == [tokenizer.pause_id] * 4


def test_the_lean_pass_equals_the_librarys_decoder_forward_and_backward() -> None:
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=50,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    )
    embedded_BTH = torch.randn(2, 17, 64)
    weight = torch.randn(2, 17, 64)
    results = []
    for forward in (
        lambda x: model.model(inputs_embeds=x, use_cache=False).last_hidden_state,
        lambda x: lean.hidden_states(model, x),
    ):
        model.zero_grad()
        hidden = forward(embedded_BTH)
        (hidden * weight).sum().backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        results.append((hidden.detach(), gradients))
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-5, rtol=1e-4)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(gradient, results[1][1][name], atol=1e-4, rtol=1e-3, msg=name)


def test_the_unpadded_encoder_equals_transformers_padded_pass() -> None:
    torch.manual_seed(0)
    config = Qwen2AudioEncoderConfig(
        num_mel_bins=80, d_model=64, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=128
    )
    tower = Qwen2AudioEncoder(config).eval()
    encode = ClipEncoder(tower)
    for seconds in (0.1, 0.333, 2.0, 7.7):
        samples_S = torch.randn(int(seconds * 16_000)).mul(0.1).numpy()
        padded = WhisperFeatureExtractor(feature_size=80)(
            samples_S, sampling_rate=16_000, padding="max_length", return_attention_mask=True, return_tensors="pt"
        )
        num_states = (len(samples_S) // HOP - 1) // 2 + 1
        mask = torch.zeros(1, 1, 1_500, 1_500)
        mask[..., num_states:] = float("-inf")
        with torch.inference_mode():
            expected = tower(padded["input_features"], attention_mask=mask).last_hidden_state[0]
        states_AD = encode(samples_S)
        assert len(states_AD) == num_audio_tokens(len(samples_S))
        torch.testing.assert_close(states_AD, expected[: len(states_AD)], atol=1e-4, rtol=1e-4)


def test_learning_rate_warms_up_and_ends_at_its_minimum() -> None:
    recipe = dataclasses.replace(debug(), num_steps=100, warmup_steps=10)
    rates = [learning_rate(step, recipe) for step in range(101)]
    assert rates[9] == pytest.approx(recipe.learning_rate)
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[100] == pytest.approx(recipe.min_learning_rate)


def test_training_resumes_bit_for_bit(clips: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(debug(), clips, whole)
    prepare_run(debug(), clips, broken)
    first = SftTrainer(debug(), clips, broken)
    stream = ExampleStream(first.clips, first.tokenizer, first.recipe)
    for _ in range(3):
        first.train_step(stream.batch(first.step))
    first.save()
    train(debug(), clips, broken)
    states = [torch.load(run / "state.pt", weights_only=True) for run in (whole, broken)]
    assert states[0]["step"] == states[1]["step"] == debug().num_steps
    for name, parameter in states[0]["policy"].items():
        assert torch.equal(parameter, states[1]["policy"][name]), name


def test_the_loss_falls_when_one_batch_is_repeated(clips: Path, tmp_path: Path) -> None:
    recipe = dataclasses.replace(debug(), num_steps=1_000, learning_rate=3e-3)
    prepare_run(recipe, clips, tmp_path)
    trainer = SftTrainer(recipe, clips, tmp_path)
    batch = ExampleStream(trainer.clips, trainer.tokenizer, recipe).batch(0)
    losses = [trainer.train_step(batch) for _ in range(30)]
    assert losses[-1] < 0.6 * losses[0]


def test_no_clips_is_said_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(MissingDataError, match="make scenes"):
        prepare_run(debug(), tmp_path, tmp_path / "run")
