"""The unpadded encoder equals transformers' padded, masked pass.

The reference is computed as in vLLM's own Qwen2-Audio class and in transformers: a mel of 30 s from
WhisperFeatureExtractor, a dense mask of minus infinity, the library's own forward.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen2AudioForConditionalGeneration, WhisperFeatureExtractor
from transformers.models.qwen2_audio.configuration_qwen2_audio import Qwen2AudioEncoderConfig
from transformers.models.qwen2_audio.modeling_qwen2_audio import Qwen2AudioEncoder

from hyper_model.audio import decode
from hyper_model.audio_encoder import MAX_SAMPLES, LogMel, encode, num_audio_tokens, num_states
from tests.paths import ROOT

CLIPS = sorted(path for path in (ROOT / "tests/assets/clips").iterdir() if path.suffix != ".json")
DURATIONS_S = (0.1, 0.5, 1.23, 5.0, 10.0, 29.99, 30.0)
ODD_NUM_SAMPLES = (321, 322, 481, 1_601, 16_000 + 1, 16_000 - 1, 479_841, 479_999)
"""Lengths around the borders of frames, states and the 30 s."""


@pytest.fixture(scope="module")
def recordings() -> list[np.ndarray]:
    return [decode(path.read_bytes()).samples_S for path in CLIPS]


@pytest.fixture(scope="module")
def speech(recordings: list[np.ndarray]) -> np.ndarray:
    """More than 30 s of real sound."""
    joined_S = np.concatenate(recordings)
    assert len(joined_S) >= MAX_SAMPLES
    return joined_S


@pytest.fixture(scope="module")
def tower() -> Any:
    """Tower of the embedded checkpoint, in float32."""
    model = Qwen2AudioForConditionalGeneration.from_pretrained(ROOT / "checkpoints/hyper-mini", dtype=torch.float32)
    return model.eval().requires_grad_(False).model.audio_tower


@pytest.fixture(scope="module")
def padded_recordings(tower: Any, recordings: list[np.ndarray]) -> list[torch.Tensor]:
    return [padded_pass(tower, samples_S) for samples_S in recordings]


def random_tower(**shape: Any) -> Any:
    """Return a tower with weights large enough for attention to matter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tower = Qwen2AudioEncoder(Qwen2AudioEncoderConfig(**shape)).eval().requires_grad_(False)
        for parameter in tower.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.08)
    return tower


def padded_mel(samples_S: np.ndarray, num_mel_bins: int) -> tuple[torch.Tensor, int]:
    """Return transformers' mel of 30 s [1, M, 3000] and the number of the clip's own frames."""
    features = WhisperFeatureExtractor(feature_size=num_mel_bins)(
        samples_S, sampling_rate=16_000, padding="max_length", return_attention_mask=True, return_tensors="pt"
    )
    return features["input_features"], int(features["attention_mask"].sum())


@torch.inference_mode()
def padded_pass(tower: Any, samples_S: np.ndarray) -> torch.Tensor:
    """Return the states of a clip as computed by transformers and vLLM's own class: [A, D]."""
    mel, num_frames = padded_mel(samples_S, tower.config.num_mel_bins)
    states, tokens = tower._get_feat_extract_output_lengths(torch.tensor(num_frames))
    mask = torch.zeros(1, 1, 1_500, 1_500, dtype=tower.conv1.weight.dtype)
    mask[..., int(states) :] = float("-inf")
    return tower(mel, attention_mask=mask).last_hidden_state[0, : int(tokens)]


@torch.inference_mode()
def unpadded_pass(tower: Any, clips: Sequence[np.ndarray]) -> list[torch.Tensor]:
    log_mel = LogMel(tower.config.num_mel_bins)
    rows_AD, num_rows = encode(tower, [log_mel(samples_S) for samples_S in clips])
    return list(rows_AD.split(num_rows))


def largest_difference(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> float:
    assert [rows.shape for rows in ours] == [rows.shape for rows in theirs]
    return max((a.double() - b.double()).abs().max().item() for a, b in zip(ours, theirs, strict=True))


def assert_equal_to_rounding(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> None:
    """Allow float32 rounding: in a few rows of the recordings the padded pass is itself up to 4e-4 from float64."""
    assert largest_difference(ours, theirs) <= 5e-4
    differences = (torch.cat(list(ours)) - torch.cat(list(theirs))).abs().flatten()
    assert differences.kthvalue(int(0.9999 * len(differences))).values <= 5e-5


@pytest.mark.parametrize("num_mel_bins", [80, 128])
def test_the_mel_equals_the_padded_one_on_every_frame_that_the_tower_looks_at(
    speech: np.ndarray, num_mel_bins: int
) -> None:
    log_mel = LogMel(num_mel_bins)
    for num_samples in (*(int(seconds * 16_000) for seconds in DURATIONS_S), *ODD_NUM_SAMPLES):
        mel_MW = log_mel(speech[:num_samples])
        padded_M3000, num_frames = padded_mel(speech[:num_samples], num_mel_bins)
        width = mel_MW.shape[1]
        assert width >= min(num_frames + 1, 3_000) and (width == 3_000 or width == 2 * num_states(num_samples) + 1)
        torch.testing.assert_close(mel_MW, padded_M3000[0, :, :width], atol=1e-6, rtol=0)


@pytest.mark.parametrize("place", ["first", "last"])
def test_the_mel_of_silence_with_one_click_is_cut_off_at_the_same_level(place: str) -> None:
    """The loudest frame sets the cut-off, wherever it is; the mirrored ends of the 30 s contain clicks too."""
    for num_samples in (1_600, 1_601, 1_759, 479_900, 480_000):
        samples_S = np.zeros(num_samples, np.float32)
        samples_S[1 if place == "first" else -2] = 0.9
        mel_MW = LogMel(80)(samples_S)
        padded_M3000, _ = padded_mel(samples_S, 80)
        torch.testing.assert_close(mel_MW, padded_M3000[0, :, : mel_MW.shape[1]], atol=1e-6, rtol=0)


def test_counts_are_those_of_transformers_for_every_length(tower: Any) -> None:
    num_samples = torch.arange(321, 480_001)
    # A frame counts from its first sample on: WhisperFeatureExtractor takes every 160th value of its mask.
    states, tokens = tower._get_feat_extract_output_lengths((num_samples + 159) // 160)
    for index in (*range(0, 3_000), *range(3_000, len(num_samples), 997), -1):
        assert num_states(int(num_samples[index])) == int(states[index])
        assert num_audio_tokens(int(num_samples[index])) == int(tokens[index])


def test_a_clip_alone_gives_the_padded_result(tower: Any, speech: np.ndarray) -> None:
    """Measured here on real sound: 1e-5 to 3e-5, among values up to 13."""
    for seconds in DURATIONS_S:
        samples_S = speech[: int(seconds * 16_000)]
        assert largest_difference(unpadded_pass(tower, [samples_S]), [padded_pass(tower, samples_S)]) <= 1e-4, seconds


def test_recordings_packed_in_one_call_give_the_padded_results(
    tower: Any, recordings: list[np.ndarray], padded_recordings: list[torch.Tensor]
) -> None:
    order = [*range(len(recordings)), 1, 1, 3]
    ours = unpadded_pass(tower, [recordings[index] for index in order])
    assert_equal_to_rounding(ours, [padded_recordings[index] for index in order])


def test_packing_clips_of_every_duration_gives_the_padded_results(tower: Any, speech: np.ndarray) -> None:
    clips = [speech[: int(seconds * 16_000)] for seconds in (30.0, *DURATIONS_S)]
    expected = [padded_pass(tower, samples_S) for samples_S in clips[1:]]
    assert largest_difference(unpadded_pass(tower, clips)[1:], expected) <= 1e-4


@pytest.mark.parametrize(
    "shape",
    [
        {"num_mel_bins": 128, "d_model": 96, "encoder_layers": 3, "encoder_attention_heads": 4, "encoder_ffn_dim": 200},
        {"num_mel_bins": 80, "d_model": 64, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 64},
    ],
    ids=["128 mel bins, heads of 24", "one layer"],
)
def test_any_shape_of_tower_and_any_number_of_samples_gives_the_padded_result(
    speech: np.ndarray, shape: dict[str, Any]
) -> None:
    tower = random_tower(**shape)
    clips = [speech[:num_samples] for num_samples in ODD_NUM_SAMPLES]
    assert largest_difference(unpadded_pass(tower, clips), [padded_pass(tower, clip) for clip in clips]) <= 1e-4


def test_what_differs_is_rounding_alone(tower: Any) -> None:
    """In float64, on the same mel, no difference remains, even for white noise, with 5e-4 in float32."""
    tower = copy.deepcopy(tower).double()
    noise_S = np.random.default_rng(0).standard_normal(MAX_SAMPLES).astype(np.float32) * 0.1
    clips = [noise_S[:num_samples] for num_samples in (480_000, 16_161, 1_600, 80_000, 80_000, 321)]
    mels = [
        padded_mel(samples_S, 80)[0][0, :, : min(2 * num_states(len(samples_S)) + 1, 3_000)].double()
        for samples_S in clips
    ]
    with torch.inference_mode():
        rows_AD, num_rows = encode(tower, mels)
    expected = [padded_pass(tower, samples_S) for samples_S in clips]
    assert largest_difference(rows_AD.split(num_rows), expected) <= 1e-9


def test_in_bfloat16_it_is_as_near_to_the_truth_as_the_padded_pass(
    tower: Any, recordings: list[np.ndarray], padded_recordings: list[torch.Tensor]
) -> None:
    """Measured: both differ from float32 by 0.008 on average and 0.2 at most, and from each other by 0.005."""
    half = copy.deepcopy(tower).bfloat16()
    ours = torch.cat(unpadded_pass(half, recordings)).float()
    theirs = torch.cat([padded_pass(half, samples_S) for samples_S in recordings]).float()
    truth = torch.cat(padded_recordings)
    assert (ours - theirs).abs().mean() <= 0.01
    assert (ours - truth).abs().mean() <= 1.1 * (theirs - truth).abs().mean()


def test_neither_order_nor_neighbours_matter(tower: Any, recordings: list[np.ndarray]) -> None:
    order = [3, 0, 9, 9, 5, 1, 8, 2, 7, 6, 4]
    together = unpadded_pass(tower, recordings)
    shuffled = unpadded_pass(tower, [recordings[index] for index in order])
    assert largest_difference(shuffled, [together[index] for index in order]) <= 1e-6
    alone = [unpadded_pass(tower, [samples_S])[0] for samples_S in recordings]
    assert_equal_to_rounding(together, alone)


@pytest.mark.parametrize(
    ("num_samples", "message"),
    [
        (480_001, r"at most 480000 samples \(30 s at 16000 Hz\), this one has 480001 \(30.0001 s\)"),
        (320, r"at least 321 samples .* this one has 320"),
        (0, r"at least 321 samples .* this one has 0"),
    ],
)
def test_a_clip_that_does_not_fit_is_refused_and_never_cut(num_samples: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LogMel(80)(np.zeros(num_samples, np.float32))
    with pytest.raises(ValueError, match=message):
        num_audio_tokens(num_samples)


def test_two_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="2"):
        LogMel(80)(np.zeros((2, 16_000), np.float32))


def test_the_tower_of_a_7b_checkpoint_runs_in_shape() -> None:
    """Use the shapes of Qwen2-Audio-7B's tower (Whisper large-v3), without its 1.3 GB of weights."""
    with torch.device("meta"):
        config = Qwen2AudioEncoderConfig(
            num_mel_bins=128, d_model=1280, encoder_layers=32, encoder_attention_heads=20, encoder_ffn_dim=5120
        )
        tower = Qwen2AudioEncoder(config).to(torch.bfloat16)  # pyright: ignore[reportArgumentType]
        mels = [torch.empty(128, 2 * num_states(num_samples) + 1) for num_samples in (1_600, 80_000, 80_000, 400_123)]
        rows_AD, num_rows = encode(tower, mels)
    assert num_rows == [2, 125, 125, 625]
    assert rows_AD.shape == (877, 1280) and rows_AD.dtype == torch.bfloat16


def test_an_early_layer_stands_behind_the_last_one_in_each_row(speech: np.ndarray) -> None:
    tower = random_tower(d_model=32, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=64, num_mel_bins=80)
    # A tower that ends after the first layer, with a norm that has no weights.
    early = copy.deepcopy(tower)
    early.layers = early.layers[:1]
    early.layer_norm.weight.fill_(1.0)
    early.layer_norm.bias.zero_()
    mels_MW = [LogMel(80)(speech[:16_000]), LogMel(80)(speech[:9_600])]
    (last_AD, lengths), (early_AD, _) = encode(tower, mels_MW), encode(early, mels_MW)
    joined_AD, _ = encode(tower, mels_MW, layers=(1,))
    assert torch.allclose(joined_AD, torch.cat([last_AD, early_AD], -1), atol=1e-5)
    stacked_AD, stacked_lengths = encode(tower, mels_MW, stack=2, layers=(1,))
    assert stacked_lengths == [-(-length // 2) for length in lengths]
    assert torch.equal(stacked_AD[0], joined_AD[:2].flatten())
