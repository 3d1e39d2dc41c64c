"""The policy: a clip shared by rows equals one clip per row, and scores equal the library's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen2AudioForConditionalGeneration, WhisperFeatureExtractor

from hyper_model.audio_encoder import LogMel
from hyper_model.checkpoint import Checkpoint, open_checkpoint
from hyper_model.errors import CheckpointError
from hyper_model.trace import build_prompt
from hyper_model.weights import StoredTensors, read_entries, weight_files
from training import policy as module
from training.export import model_of_checkpoint
from training.policy import IGNORED, HyperPolicy, Row, branch, load_tensors, merged, named_tensors, open_policy, pack
from training.recipes import Lora, debug


@pytest.fixture(scope="module")
def checkpoint(random_checkpoint: Path) -> Checkpoint:
    return open_checkpoint(random_checkpoint, verify=False)


@pytest.fixture
def policy(checkpoint: Checkpoint) -> HyperPolicy:
    return open_policy(checkpoint)


def mel(seconds: float, seed: int) -> torch.Tensor:
    noise = np.random.default_rng(seed).standard_normal(int(16_000 * seconds)).astype(np.float32)
    return LogMel(80)(noise * 0.1)


def row(checkpoint: Checkpoint, clip: int, completion: list[int]) -> Row:
    prompt = build_prompt(checkpoint.tokenizer, "What is heard?")
    targets = [IGNORED] * (len(prompt) - 1) + completion + [IGNORED]
    return Row([*prompt, *completion], targets, prompt.index(checkpoint.tokenizer.audio_id), clip)


def gradients(policy: HyperPolicy, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    policy.zero_grad()
    scores = policy(**batch)
    scores.logprobs_N.sum().backward()
    return scores.logprobs_N.detach(), {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}


def test_a_clip_shared_by_its_rollouts_is_the_clip_of_each(policy: HyperPolicy, checkpoint: Checkpoint) -> None:
    completions = [[70, 71, 72], [80], [90, 91, 92, 93, 94]]
    clips = [mel(1.3, 0), mel(0.7, 1)]
    places = [1, 0, 1]
    shared = pack(
        [row(checkpoint, clip, c) for clip, c in zip(places, completions, strict=True)],
        clips,
        pad_id=0,
        is_encoded=False,
    )
    apart = pack(
        [row(checkpoint, i, c) for i, c in enumerate(completions)],
        [clips[clip] for clip in places],
        pad_id=0,
        is_encoded=False,
    )
    scores, grads = gradients(policy, shared)
    others, other_grads = gradients(policy, apart)
    torch.testing.assert_close(scores, others, atol=1e-5, rtol=1e-5)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, other_grads[name], atol=2e-4, rtol=1e-3, msg=name)
    # Each row has its own clip: the other clip gives another score.
    swapped = pack([row(checkpoint, 0, completions[0])], clips, pad_id=0, is_encoded=False)
    assert not torch.allclose(policy(**swapped).logprobs_N, scores[:3], atol=1e-3)


def test_neighbours_and_padding_change_nothing(policy: HyperPolicy, checkpoint: Checkpoint) -> None:
    long, short = row(checkpoint, 0, list(range(70, 110))), row(checkpoint, 1, [75, 76])
    clips = [mel(2.0, 0), mel(0.4, 1)]
    both = policy(**pack([long, short], clips, pad_id=0, is_encoded=False)).logprobs_N
    alone = policy(
        **pack([Row(short.token_ids, short.targets, short.audio_at, 0)], clips[1:], pad_id=0, is_encoded=False)
    )
    torch.testing.assert_close(both[-2:], alone.logprobs_N, atol=1e-5, rtol=1e-5)


def test_scores_are_those_of_the_librarys_own_forward(policy: HyperPolicy, checkpoint: Checkpoint) -> None:
    samples_S = np.random.default_rng(3).standard_normal(16_000).astype(np.float32) * 0.1
    one = row(checkpoint, 0, [70, 71, 72, 73])
    ours = policy(**pack([one], [LogMel(80)(samples_S)], pad_id=0, is_encoded=False)).logprobs_N
    features = WhisperFeatureExtractor(feature_size=80)(
        samples_S, sampling_rate=16_000, padding="max_length", return_attention_mask=True, return_tensors="pt"
    )
    ids: list[int] = []
    for token_id in one.token_ids:
        ids += [token_id] * (25 if token_id == checkpoint.tokenizer.audio_id else 1)
    library: Any = Qwen2AudioForConditionalGeneration.from_pretrained(str(checkpoint.path), dtype=torch.float32).eval()
    with torch.no_grad():
        logits = library(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            input_features=features["input_features"],
            feature_attention_mask=features["attention_mask"],
        ).logits[0]
    theirs = logits[-5:-1].log_softmax(-1)[range(4), [70, 71, 72, 73]]
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)


def test_what_the_sampler_could_not_choose_has_no_share_and_no_gradient(
    policy: HyperPolicy, checkpoint: Checkpoint
) -> None:
    batch = pack([row(checkpoint, 0, [70, 71])], [mel(0.5, 0)], pad_id=0, is_encoded=False)
    banned = torch.tensor([100, 101])
    head: Any = policy.lm_head
    with torch.no_grad():
        whole = policy(**batch).logprobs_N
    policy.zero_grad()
    left = policy(**batch, banned_ids=banned)
    left.logprobs_N.sum().backward()
    assert (left.logprobs_N > whole).all()
    assert head.weight.grad[banned].abs().max() == 0 and head.weight.grad[70].abs().max() > 0
    assert torch.isfinite(left.entropies_N).all()


def test_scoring_in_pieces_gives_the_same_gradient(
    policy: HyperPolicy, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = pack([row(checkpoint, 0, list(range(60, 90)))], [mel(0.5, 0)], pad_id=0, is_encoded=False)
    whole, grads = gradients(policy, batch)
    monkeypatch.setattr(module, "SCORED_AT_ONCE", 7)
    pieces, piece_grads = gradients(policy, batch)
    torch.testing.assert_close(whole, pieces)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, piece_grads[name], atol=1e-5, rtol=1e-4, msg=name)


def test_tensors_go_out_under_the_names_of_the_disk_and_come_back(policy: HyperPolicy, checkpoint: Checkpoint) -> None:
    stored = StoredTensors(read_entries(weight_files(checkpoint.path)))
    tensors = dict(named_tensors(policy))
    assert tensors.keys() == stored.keys()
    with torch.no_grad():
        policy.lm_head.weight.zero_()
    load_tensors(policy, stored.items())
    assert torch.equal(policy.lm_head.weight, stored["language_model.lm_head.weight"])
    with pytest.raises(CheckpointError, match="lack"):
        load_tensors(policy, list(stored.items())[1:])


def test_adapters_are_saved_loaded_merged_and_taken_out_exactly(random_checkpoint: Path, tmp_path: Path) -> None:
    lora = Lora(rank=2, alpha=4)
    one = model_of_checkpoint(random_checkpoint, dtype=torch.float32, lora=lora)
    trained = [p for n, p in one.policy.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in n for n, p in one.policy.named_parameters() if p.requires_grad)
    with torch.no_grad():
        for parameter in trained:
            parameter.normal_(std=0.1)
    before = {n: p.detach().clone() for n, p in one.policy.named_parameters()}
    with merged(one.policy) as whole:
        tensors = {name: tensor.clone() for name, tensor in named_tensors(whole)}
    assert all(torch.equal(before[n], p) for n, p in one.policy.named_parameters())
    one.save(tmp_path)
    other = model_of_checkpoint(random_checkpoint, dtype=torch.float32, lora=lora)
    other.load(tmp_path)
    with merged(other.policy) as whole:
        again = {name: tensor.clone() for name, tensor in named_tensors(whole)}
    assert tensors.keys() == again.keys()
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)
    base = StoredTensors(read_entries(weight_files(random_checkpoint)))
    changed = {name for name in tensors if not torch.equal(tensors[name], base[name])}
    assert changed and all("language_model.model.layers" in name for name in changed)


def test_an_adapted_policy_scores_as_its_merged_export(
    random_checkpoint: Path, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    model = model_of_checkpoint(random_checkpoint, dtype=torch.float32, lora=Lora(rank=2, alpha=4))
    with torch.no_grad():
        for name, parameter in model.policy.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    batch = pack([row(checkpoint, 0, [70, 71, 72])], [mel(0.5, 0)], pad_id=0, is_encoded=False)
    exported = model.export(tmp_path / "merged", recipe=debug(), num_steps=1, dtype=None)
    with torch.no_grad():
        torch.testing.assert_close(
            model.policy(**batch).logprobs_N, open_policy(exported)(**batch).logprobs_N, atol=1e-4, rtol=1e-4
        )


def test_completions_that_share_their_prompt_score_as_if_they_did_not(
    policy: HyperPolicy, checkpoint: Checkpoint
) -> None:
    prompt = build_prompt(checkpoint.tokenizer, "What is heard?")
    audio_at = prompt.index(checkpoint.tokenizer.audio_id)
    written = [[70, 71, 72], [80], [70, 91, 92, 93, 94]]
    clips = [mel(1.3, 0), mel(0.7, 1)]
    shared = [branch(prompt, [(w, w) for w in written], audio_at, 0), branch(prompt, [([75], [75])], audio_at, 1)]
    apart = [row(checkpoint, 0, w) for w in written] + [row(checkpoint, 1, [75])]
    scores, grads = gradients(policy, pack(shared, clips, pad_id=0, is_encoded=False))
    others, other_grads = gradients(policy, pack(apart, clips, pad_id=0, is_encoded=False))
    torch.testing.assert_close(scores, others, atol=1e-5, rtol=1e-5)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, other_grads[name], atol=2e-4, rtol=1e-3, msg=name)
