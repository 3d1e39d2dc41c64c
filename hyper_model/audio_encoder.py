"""Qwen2-Audio's audio tower on unpadded clips, with the same result as the padded 30 s pass.

transformers and vLLM pad every clip to 30 s, run the tower on 3000 mel frames and mask the padding. Masked states never
affect valid ones, so they can be skipped. Only the convolutions read past the end of a clip, by at most one frame of
silence. Serving (`hyper_model.vllm_plugin`) and training (`training.data.encoder`) share this module and so get the
same states.

The module is independent of vLLM, prompts and file formats. Input is float32 samples; output is one row per audio
token.

Axes: S samples at 16 kHz, F mel frames (10 ms), L samples per frame, B frequency bins, M mel bins, W mel frames passed
to the tower, T states (20 ms) and A audio tokens (40 ms) of all clips, D width of the tower.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F
from transformers.audio_utils import mel_filter_bank

from hyper_model.audio_limits import SAMPLE_RATE_HZ

__all__ = [
    "HOP",
    "MAX_SAMPLES",
    "WINDOW",
    "LogMel",
    "encode",
    "num_audio_tokens",
    "num_states",
    "num_states_of_mel",
    "stack_rows",
]

HOP = 160
"""Samples from one mel frame to the next."""
WINDOW = 400
"""Samples per mel frame."""
MAX_FRAMES = 3000
"""Mel frames with a position embedding in the tower: 30 s."""
MAX_SAMPLES = MAX_FRAMES * HOP
MIN_SAMPLES = 2 * HOP + 1
"""Samples of the shortest clip with an audio token."""
_MARGIN = WINDOW // 2


def num_states(num_samples: int) -> int:
    """Return the number of unmasked states of a clip: one per two mel frames, both rounded up.

    A frame counts from its first sample on, as in WhisperFeatureExtractor's mask.

    Raises:
        ValueError: If the clip is longer than the tower's 30 s, or too short for one audio token.
    """
    if num_samples > MAX_SAMPLES:
        raise ValueError(
            f"a clip may have at most {MAX_SAMPLES} samples ({MAX_SAMPLES / SAMPLE_RATE_HZ:g} s at {SAMPLE_RATE_HZ} Hz)"
            f", this one has {num_samples} ({num_samples / SAMPLE_RATE_HZ:.4f} s)"
        )
    if num_samples < MIN_SAMPLES:
        raise ValueError(
            f"a clip must have at least {MIN_SAMPLES} samples ({1000 * MIN_SAMPLES / SAMPLE_RATE_HZ:.1f} ms at "
            f"{SAMPLE_RATE_HZ} Hz) to make an audio token, this one has {num_samples}"
        )
    num_frames = -(-num_samples // HOP)
    return (num_frames + 1) // 2


def num_audio_tokens(num_samples: int, stack: int = 1) -> int:
    """Return the number of audio tokens of a clip (`Qwen2AudioEncoder._get_feat_extract_output_lengths`).

    Args:
        stack: Rows of the tower that one audio token joins (`audio_rows.audio_stack`).

    Raises:
        ValueError: As in `num_states`.
    """
    return -(-(num_states(num_samples) // 2) // stack)


def num_states_of_mel(num_columns: int) -> int:
    """Return the number of states of a mel, given its columns.

    A mel has two columns per state and one more; a mel of 30 s lacks the extra column.
    """
    return num_columns // 2


class LogMel:
    """Whisper's log-mel spectrogram of a clip and the one frame behind it.

    The frames equal those of `WhisperFeatureExtractor` with padding to 30 s (its torch path, used if torch is
    installed). Whisper clips values to 8 decades below the loudest frame of the window. The padding is never louder
    than the clip, so omitting it changes nothing.
    """

    def __init__(self, num_mel_bins: int) -> None:
        filters_BM = mel_filter_bank(
            num_frequency_bins=1 + WINDOW // 2,
            num_mel_filters=num_mel_bins,
            min_frequency=0.0,
            max_frequency=8000.0,
            sampling_rate=SAMPLE_RATE_HZ,
            norm="slaney",
            mel_scale="slaney",
        )
        self.filters_BM = torch.as_tensor(filters_BM, dtype=torch.float32)
        self.window = torch.hann_window(WINDOW)

    def __call__(self, samples_S: NDArray[np.float32]) -> torch.Tensor:
        """Return the log-mel [M, W] in float32; W is `2 * num_states + 1`, or 3000 for a full 30 s.

        Raises:
            ValueError: If the samples are not one channel, or too many or too few (see `num_states`).
        """
        if samples_S.ndim != 1:
            raise ValueError(f"a clip must be an array of one axis, this one has {samples_S.ndim}")
        states = num_states(len(samples_S))
        # Compute one extra frame: the clip's last samples reach into it, and it counts towards the maximum.
        num_frames = min(2 * states + 2, MAX_FRAMES)
        frames_FL = torch.as_tensor(_framed(samples_S, num_frames)).as_strided((num_frames, WINDOW), (HOP, 1))
        spectrum_FB = cast(torch.Tensor, torch.fft.rfft(frames_FL * self.window))  # pyright: ignore[reportUnknownMemberType]
        # Not abs() ** 2: it takes a root only to square it again, at five times the cost.
        power_FB = torch.real(spectrum_FB).square() + torch.imag(spectrum_FB).square()
        log_FM = (power_FB @ self.filters_BM).clamp_(min=1e-10).log10_()
        log_FM.clamp_(min=log_FM.max() - 8.0).add_(4.0).div_(4.0)
        return log_FM[: 2 * states + 1].transpose(0, 1).contiguous()


def _framed(samples_S: NDArray[np.float32], num_frames: int) -> NDArray[np.float32]:
    """Return the samples under the frames: the clip, silence behind it, and both ends of the 30 s mirrored."""
    framed = np.zeros(2 * _MARGIN + (num_frames - 1) * HOP, np.float32)
    framed[_MARGIN : _MARGIN + len(samples_S)] = samples_S
    framed[:_MARGIN] = framed[2 * _MARGIN : _MARGIN : -1]
    end = _MARGIN + MAX_SAMPLES
    if (beyond := len(framed) - end) > 0:
        framed[end:] = framed[end - 2 : end - 2 - beyond : -1]
    return framed


def encode(
    tower: Any, mels_MW: Sequence[torch.Tensor], stack: int = 1, layers: Sequence[int] = ()
) -> tuple[torch.Tensor, list[int]]:
    """Run the tower once on all clips of a step, packed end to end without padding or mask.

    The result differs from the padded pass by rounding only. On real recordings the difference is 1e-5 to 2e-4 in
    float32, and the padded pass itself is 7e-6 to 4e-4 from float64. In float64 it is below 1e-9. The order and the
    choice of packed clips do not matter. No call waits for the device.

    Args:
        tower: transformers' `Qwen2AudioEncoder`, in any dtype, on any device.
        mels_MW: One mel per clip, as made by `LogMel`.
        stack: Rows that one audio token joins.
        layers: Layers with states joined behind those of the last one (`audio_rows.audio_layers`), pooled and normed.

    Returns:
        The rows [A, stack * (1 + L) * D] of all clips in order, with L `layers`, in the tower's dtype, and the number
        of rows per clip.
    """
    lengths = [num_states_of_mel(mel_MW.shape[1]) for mel_MW in mels_MW]
    hidden_TD = _convolve(tower, mels_MW, lengths)
    kept: dict[int, torch.Tensor] = {}
    for number, layer in enumerate(tower.layers, 1):
        hidden_TD = _run_layer(layer, hidden_TD, lengths)
        if number in layers:
            pooled_AD = _pool(hidden_TD, lengths)
            kept[number] = F.layer_norm(pooled_AD, pooled_AD.shape[-1:])
    last_AD = tower.layer_norm(_pool(hidden_TD, lengths))
    rows = torch.cat([last_AD, *(kept[number] for number in layers)], -1) if layers else last_AD
    return stack_rows(rows, [length // 2 for length in lengths], stack)


def stack_rows(rows_AD: torch.Tensor, lengths: Sequence[int], stack: int) -> tuple[torch.Tensor, list[int]]:
    """Join each `stack` neighbouring rows of a clip to one; zeros complete the last.

    Args:
        rows_AD: The rows of all clips one after the other.
        lengths: The number of rows of each clip.
        stack: Rows to join; 1 changes nothing.
    """
    if stack == 1:
        return rows_AD, list(lengths)
    joined = [
        F.pad(rows, (0, 0, 0, -len(rows) % stack)).reshape(-1, stack * rows_AD.shape[1])
        for rows in torch.split(rows_AD, list(lengths))
    ]
    return torch.cat(joined), [len(rows) for rows in joined]


def _convolve(tower: Any, mels_MW: Sequence[torch.Tensor], lengths: Sequence[int]) -> torch.Tensor:
    """Run both convolutions over all clips in a row and add the positions: [T, D].

    A clip takes `2 * states + 2` columns: its mel, then at least one column of zeros. The zeros replace the first
    convolution's own padding before the next clip. The output of the first convolution is zeroed there, as padding for
    the second.
    """
    weight = cast(torch.Tensor, tower.conv1.weight)
    if len(mels_MW) == 1:
        packed_MW = mels_MW[0].to(weight)
    else:
        packed_MW = weight.new_zeros(mels_MW[0].shape[0], sum(2 * length + 2 for length in lengths))
    starts: list[int] = []
    start = 0
    for mel_MW, length in zip(mels_MW, lengths, strict=True):
        starts.append(start)
        if len(mels_MW) > 1:
            packed_MW[:, start : start + mel_MW.shape[1]] = mel_MW
        start += 2 * length + 2
    first_DW = F.gelu(tower.conv1(packed_MW[None]))
    for start in starts[1:]:
        first_DW[..., start - 1] = 0
    states_TD = F.gelu(tower.conv2(first_DW))[0].T
    positions_TD = cast(torch.Tensor, tower.embed_positions.weight)
    return torch.cat(
        [
            states_TD[start // 2 : start // 2 + length] + positions_TD[:length]
            for start, length in zip(starts, lengths, strict=True)
        ]
    )


def _run_layer(layer: Any, hidden_TD: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Run one `Qwen2AudioEncoderLayer`: attention within each clip, everything else on all rows at once."""
    hidden_TD = hidden_TD + _attend(layer.self_attn, layer.self_attn_layer_norm(hidden_TD), lengths)
    widened_TD = layer.activation_fn(layer.fc1(layer.final_layer_norm(hidden_TD)))
    hidden_TD = hidden_TD + layer.fc2(widened_TD)
    if hidden_TD.dtype == torch.float16:
        # Clamp as the original layer does: float16 overflows in the larger Whisper encoders.
        limit = torch.finfo(torch.float16).max - 1000
        hidden_TD = hidden_TD.clamp(-limit, limit)
    return hidden_TD


def _attend(attention: Any, hidden_TD: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Run self-attention within each clip, in one call for neighbours of equal length."""
    heads = (attention.num_heads, attention.head_dim)
    # As in transformers, scale the queries before the product, in the tower's dtype.
    query = (attention.q_proj(hidden_TD) * attention.scaling).unflatten(-1, heads)
    key = attention.k_proj(hidden_TD).unflatten(-1, heads)
    value = attention.v_proj(hidden_TD).unflatten(-1, heads)
    attended: list[torch.Tensor] = []
    start = 0
    for length, group in groupby(lengths):
        clips = len(list(group))
        rows = slice(start, start + clips * length)
        parts = (part[rows].unflatten(0, (clips, length)).transpose(1, 2) for part in (query, key, value))
        attended.append(F.scaled_dot_product_attention(*parts, scale=1.0).transpose(1, 2).flatten(2).flatten(0, 1))
        start = rows.stop
    return attention.out_proj(attended[0] if len(attended) == 1 else torch.cat(attended))


def _pool(hidden_TD: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Average pairs of neighbouring states of each clip; drop the last state of an odd number."""
    if any(length % 2 for length in lengths):
        hidden_TD = torch.cat([rows[: len(rows) // 2 * 2] for rows in torch.split(hidden_TD, list(lengths))])
    return hidden_TD.reshape(-1, 2, hidden_TD.shape[1]).mean(1)
