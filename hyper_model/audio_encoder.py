"""Runs Qwen2-Audio's audio tower on the sound of a clip alone, with the result that the padded 30 s pass gives.

transformers and vLLM fill every clip to 30 s, run the tower on 3000 mel frames and mask the padding away. A masked
state never reaches a valid one, so it need not be computed: only the convolutions look past the end of the clip, and by
no more than a frame of the silence there. Serving (`hyper_model.vllm_plugin`) and training (`training.data.encoder`)
share this module, so both give a model the same states.

Knows no vLLM, no prompt and no file format: float32 samples in, one row per audio token out.

Axes: S samples at 16 kHz, F mel frames (10 ms), L samples that a frame looks at, B frequency bins, M mel bins,
W mel frames handed to the tower, T states (20 ms) and A audio tokens (40 ms) of all clips, D width of the tower.
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

__all__ = ["HOP", "MAX_SAMPLES", "WINDOW", "LogMel", "encode", "num_audio_tokens", "num_states", "num_states_of_mel"]

HOP = 160
"""Samples from one mel frame to the next."""
WINDOW = 400
"""Samples that one mel frame looks at."""
MAX_FRAMES = 3000
"""Mel frames that the tower has positions for: 30 s."""
MAX_SAMPLES = MAX_FRAMES * HOP
MIN_SAMPLES = 2 * HOP + 1
"""Samples of the shortest clip that makes an audio token."""
_MARGIN = WINDOW // 2


def num_states(num_samples: int) -> int:
    """Returns the states of a clip that are attended to: one for two mel frames, both rounded up.

    A frame counts as soon as a sample lies on it, as in WhisperFeatureExtractor's mask.

    Raises:
        ValueError: the clip is longer than the tower's 30 s, or makes no audio token.
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


def num_audio_tokens(num_samples: int) -> int:
    """Returns the audio tokens of a clip (`Qwen2AudioEncoder._get_feat_extract_output_lengths`).

    Raises:
        ValueError: as `num_states`.
    """
    return num_states(num_samples) // 2


def num_states_of_mel(num_columns: int) -> int:
    """Returns the states of a clip from its mel's width: two columns each and one more, which a clip of 30 s lacks."""
    return num_columns // 2


class LogMel:
    """Computes Whisper's log-mel spectrogram of a clip and of the one frame behind it that the tower looks at.

    Equal to `WhisperFeatureExtractor` with padding to 30 s (its torch path, which is the one it uses wherever torch is
    installed) on those frames. Whisper cuts everything off 8 decades below the loudest frame of the whole window; the
    padding is never louder than the clip, so leaving it out changes nothing.
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
        """Returns the log-mel [M, W] in float32: W is `2 * num_states + 1`, or 3000 where the clip fills the 30 s.

        Raises:
            ValueError: the samples are not one channel, too many or too few (see `num_states`).
        """
        if samples_S.ndim != 1:
            raise ValueError(f"a clip must be an array of one axis, this one has {samples_S.ndim}")
        states = num_states(len(samples_S))
        # One frame more than is handed out: the clip's last samples reach into it, and it counts for the loudest.
        num_frames = min(2 * states + 2, MAX_FRAMES)
        frames_FL = torch.as_tensor(_framed(samples_S, num_frames)).as_strided((num_frames, WINDOW), (HOP, 1))
        spectrum_FB = cast(torch.Tensor, torch.fft.rfft(frames_FL * self.window))  # pyright: ignore[reportUnknownMemberType]
        # Not abs() ** 2, which takes a root only to square it again, at five times the cost.
        power_FB = torch.real(spectrum_FB).square() + torch.imag(spectrum_FB).square()
        log_FM = (power_FB @ self.filters_BM).clamp_(min=1e-10).log10_()
        log_FM.clamp_(min=log_FM.max() - 8.0).add_(4.0).div_(4.0)
        return log_FM[: 2 * states + 1].transpose(0, 1).contiguous()


def _framed(samples_S: NDArray[np.float32], num_frames: int) -> NDArray[np.float32]:
    """Returns the samples that the frames look at: the clip, silence behind it, and both ends of the 30 s mirrored."""
    framed = np.zeros(2 * _MARGIN + (num_frames - 1) * HOP, np.float32)
    framed[_MARGIN : _MARGIN + len(samples_S)] = samples_S
    framed[:_MARGIN] = framed[2 * _MARGIN : _MARGIN : -1]
    end = _MARGIN + MAX_SAMPLES
    if (beyond := len(framed) - end) > 0:
        framed[end:] = framed[end - 2 : end - 2 - beyond : -1]
    return framed


def encode(tower: Any, mels_MW: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[int]]:
    """Runs the tower once on the clips of a step, packed end to end: no padding between them, and no mask.

    Differs from the padded pass by rounding alone: in float32 by 1e-5 to 2e-4 on real recordings, where the padded pass
    is 7e-6 to 4e-4 from float64, and in float64 by less than 1e-9. Neither the order of the clips nor what they are
    packed with matters. Nothing here waits for the device.

    Args:
        tower: transformers' `Qwen2AudioEncoder`, in any dtype, on any device.
        mels_MW: A mel per clip, as `LogMel` makes it.

    Returns:
        The rows [A, D] of all clips one after the other, in the tower's dtype, and the number of rows of each clip.
    """
    lengths = [num_states_of_mel(mel_MW.shape[1]) for mel_MW in mels_MW]
    hidden_TD = _convolve(tower, mels_MW, lengths)
    for layer in tower.layers:
        hidden_TD = _run_layer(layer, hidden_TD, lengths)
    return tower.layer_norm(_pool(hidden_TD, lengths)), [length // 2 for length in lengths]


def _convolve(tower: Any, mels_MW: Sequence[torch.Tensor], lengths: Sequence[int]) -> torch.Tensor:
    """Runs both convolutions over all clips in a row and adds the positions: [T, D].

    A clip takes `2 * states + 2` columns: its mel, then at least one column of zeros, where the next clip, alone, would
    find the first convolution's own padding. The second one must find zeros there too, where the first has computed
    something.
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
    """Runs one `Qwen2AudioEncoderLayer`: everything on all rows at once, attention within each clip."""
    hidden_TD = hidden_TD + _attend(layer.self_attn, layer.self_attn_layer_norm(hidden_TD), lengths)
    widened_TD = layer.activation_fn(layer.fc1(layer.final_layer_norm(hidden_TD)))
    hidden_TD = hidden_TD + layer.fc2(widened_TD)
    if hidden_TD.dtype == torch.float16:
        # As the layer itself does: float16 overflows in the larger Whisper encoders.
        limit = torch.finfo(torch.float16).max - 1000
        hidden_TD = hidden_TD.clamp(-limit, limit)
    return hidden_TD


def _attend(attention: Any, hidden_TD: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Runs self-attention within each clip; neighbours of the same length go through in one call."""
    heads = (attention.num_heads, attention.head_dim)
    # The queries are scaled before the product, in the tower's dtype, as transformers does it.
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
    """Averages each two neighbouring states of a clip; the last of an odd number was heard by the others, and goes."""
    if any(length % 2 for length in lengths):
        hidden_TD = torch.cat([rows[: len(rows) // 2 * 2] for rows in torch.split(hidden_TD, list(lengths))])
    return hidden_TD.reshape(-1, 2, hidden_TD.shape[1]).mean(1)
