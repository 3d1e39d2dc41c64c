"""Decoding of clips: from bytes to a Waveform, mono float32 at 16 kHz, or an error with the reason.

Serving and training decode through this module only, so both get the same samples.

The bytes may be hostile, so no header is trusted. Length is counted in decoded samples; a header can only cause a
refusal. libsndfile reads plain samples, and FFmpeg's libraries read everything else, both in the calling process.
Training calls `decode` directly; the service calls it in a sandboxed process (`server.decoding.pool`). The output of
decoders is never read. A truncated clip is refused, because its answer would be wrong without a sign of it.

The module is independent of HTTP, models and file names.

Axes: S samples, C channels.
"""

from __future__ import annotations

import hashlib
import io
import math
import struct
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from hyper_model.audio_formats import (
    DEMUXERS,
    FORMATS,
    clean_amr,
    find_joined,
    locate,
    mpeg_frame_bytes,
    skip_id3,
    sniff,
)
from hyper_model.audio_limits import (
    MAX_CODEC_PADDING_S,
    SAMPLE_RATE_HZ,
    Allowance,
    AudioLimits,
    Sink,
    refuse_broken_off,
    refuse_damaged,
    refuse_track,
)
from hyper_model.audio_warnings import AudioWarning
from hyper_model.downmix import Downmix
from hyper_model.errors import AudioTooLargeError, AudioTooLongError, InvalidAudioError
from hyper_model.ffmpeg import find_ffmpeg
from hyper_model.libav import Decoded, decode_with_libav
from hyper_model.pcm_files import PCM_CONTAINERS, PcmFile, find_samples, with_true_size
from hyper_model.resampling import Gatherer, resample
from hyper_model.silence import FittedClip, fit

if TYPE_CHECKING:
    from pydub import AudioSegment  # pyright: ignore[reportMissingTypeStubs]

__all__ = [
    "FORMATS",
    "SAMPLE_RATE_HZ",
    "WINDOW_S",
    "AudioLimits",
    "AudioWarning",
    "Channel",
    "Quality",
    "Sink",
    "Waveform",
    "decode",
    "decode_blocks",
    "find_ffmpeg",
    "identify",
    "mix",
    "require_single_window",
    "sniff",
]

WINDOW_S = 30.0

_BLOCK_SAMPLES = 2**18
# Delay and padding counted as frames by an MP3 encoder and removed by a decoder: at most two and a half frames.
_MP3_PADDING_SAMPLES = 2880

_ASF_DATA = b"\x36\x26\xb2\x75\x8e\x66\xcf\x11\xa6\xd9\x00\xaa\x00\x62\xce\x6c"
# Their readers stop at the end of the first of two joined files.
_JOINED_CONTAINERS = ("wav", "m4a", "caf", "aiff", "wma")
_WEBM_SEGMENT = b"\x18\x53\x80\x67"
# Elements of a segment: its index, description, tracks, chapters, clusters, cues, attachments, tags, and padding.
_WEBM_ELEMENTS = frozenset(
    bytes.fromhex(name)
    for name in (
        *("114d9b74", "1549a966", "1654ae6b", "1043a770", "1f43b675", "1c53bb6b", "1941a469", "1254c367"),
        *("ec", "bf", "1a45dfa3", "18538067"),
    )
)
_MIN_JUNK_BYTES = 4
# Maximum number of top-level WebM elements read: a file of two-byte elements alone would take seconds.
_MAX_ELEMENTS = 100_000

Channel = Literal["mix", "left", "right"]
"""Channels of a clip to use."""

_WEIGHTS: Mapping[Channel, NDArray[np.float32]] = {
    "left": np.array([1, 0], np.float32),
    "right": np.array([0, 1], np.float32),
}
_CHANNEL_NAMES = {0: "the left channel", 1: "the right channel"}
# An encoder's delay decodes to less than this.
_PADDING_LEVEL = 1e-3

_SILENT_DBFS = -50.0
_LOWEST_DBFS = -120.0
_FULL_SCALE = 0.999
_QUALITY_FRAME_SAMPLES = SAMPLE_RATE_HZ // 50


@dataclass(frozen=True)
class Quality:
    """Signs of a recording that is hard to understand.

    Attributes:
        silence_ratio: Share of 20 ms frames with an RMS below -50 dBFS.
        clipping_ratio: Share of samples at full scale (0.999 and above).
        peak_dbfs: Largest sample in dB of full scale; -120 for digital silence, to remain a JSON number.
    """

    silence_ratio: float
    clipping_ratio: float
    peak_dbfs: float


@dataclass(frozen=True, eq=False)
class Waveform:
    """Samples of a clip in the model's input format.

    Attributes:
        samples_S: float32 [S], mono, 16 kHz, finite, in [-1, 1].
        codec: Codec of the clip, such as "mp3"; the container's name if the codec is unknown.
        source_sample_rate_hz: Rate before resampling; 0 if unknown.
        source_channels: Channels before the down-mix; 0 if unknown.
        num_tracks: Audio tracks of the file.
        track: The decoded track, from 1.
        channel: The decoded channel.
        missing_s: Seconds stated in the header but missing from the file.
        warnings: Oddities of the file.
    """

    samples_S: NDArray[np.float32]  # noqa: N815
    codec: str = "pcm"
    source_sample_rate_hz: int = SAMPLE_RATE_HZ
    source_channels: int = 1
    num_tracks: int = 1
    track: int = 1
    channel: Channel = "mix"
    missing_s: float = 0.0
    warnings: tuple[AudioWarning, ...] = ()

    def __post_init__(self) -> None:
        if self.samples_S.ndim != 1 or self.samples_S.dtype != np.float32:
            raise ValueError(f"a Waveform wants float32 [S], not {self.samples_S.dtype} {list(self.samples_S.shape)}")

    @classmethod
    def from_samples(cls, samples: NDArray[Any], sample_rate_hz: int, *, codec: str = "pcm") -> Waveform:
        """Build a Waveform from an array [S] or [S, C] in [-1, 1] at any rate."""
        samples_SC = np.asarray(samples, dtype=np.float32).reshape(len(samples), -1)
        mono_S = resample(samples_SC.mean(axis=1, dtype=np.float32), sample_rate_hz)
        return cls(np.clip(mono_S, -1.0, 1.0), codec, sample_rate_hz, samples_SC.shape[1])

    @classmethod
    def from_segment(cls, segment: AudioSegment) -> Waveform:
        """Build a Waveform from a pydub segment of any rate, width and number of channels."""
        source = cast(Any, segment)
        samples = np.array(source.get_array_of_samples(), dtype=np.float32) / float(1 << (8 * source.sample_width - 1))
        return cls.from_samples(samples.reshape(-1, source.channels), source.frame_rate)

    def segment(self) -> AudioSegment:
        """Return the samples as a pydub segment, rounded to 16 bits, to play, cut and measure."""
        # pydub warns at import without ffmpeg on PATH. It opens no file here, so the warning does not apply.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from pydub import AudioSegment  # pyright: ignore[reportMissingTypeStubs]
        pcm = np.clip(np.rint(self.samples_S * 32768.0), -32768, 32767).astype("<i2")
        return AudioSegment(pcm.tobytes(), sample_width=2, frame_rate=SAMPLE_RATE_HZ, channels=1)

    def to_wav(self) -> bytes:
        """Return a WAV file: 16 kHz, 16 bits, one channel. A clip of 16 bits comes out unchanged."""
        file = io.BytesIO()
        cast(Any, self.segment()).export(file, format="wav")
        return file.getvalue()

    @property
    def num_samples(self) -> int:
        """Return the number of samples."""
        return len(self.samples_S)

    @property
    def duration_s(self) -> float:
        """Return the length in seconds."""
        return self.num_samples / SAMPLE_RATE_HZ

    @cached_property
    def fitted(self) -> FittedClip:
        """Return the samples without long silence, for the model, with their places in the clip; computed once."""
        return fit(self.samples_S)

    @cached_property
    def quality(self) -> Quality:
        """Return the measures of quality, computed once."""
        level_S = np.abs(self.samples_S)
        if not level_S.size:
            return Quality(silence_ratio=1.0, clipping_ratio=0.0, peak_dbfs=_LOWEST_DBFS)
        starts = np.arange(0, level_S.size, _QUALITY_FRAME_SAMPLES)
        lengths = np.diff(starts, append=level_S.size)
        power = np.add.reduceat(np.square(level_S, dtype=np.float64), starts) / lengths
        peak = float(level_S.max())
        return Quality(
            silence_ratio=float(np.mean(power < 10 ** (_SILENT_DBFS / 10))),
            clipping_ratio=float(np.mean(level_S >= _FULL_SCALE)),
            peak_dbfs=max(_LOWEST_DBFS, 20 * math.log10(peak)) if peak > 0 else _LOWEST_DBFS,
        )

    def slice(self, start_s: float, end_s: float) -> Waveform:
        """Return the part [start_s, end_s), to the nearest sample; the end is cut to the clip's.

        Raises:
            ValueError: If the part is empty.
        """
        start, end = round(start_s * SAMPLE_RATE_HZ), round(end_s * SAMPLE_RATE_HZ)
        if not 0 <= start < min(end, self.num_samples):
            raise ValueError(f"no samples between {start_s} s and {end_s} s of a clip of {self.duration_s:.3f} s")
        return replace(self, samples_S=self.samples_S[start:end])

    @cached_property
    def sha256(self) -> str:
        """Return the digest of the samples as little-endian float32, independent of the file."""
        return hashlib.sha256(self.samples_S.astype("<f4", copy=False).tobytes()).hexdigest()


def require_single_window(waveform: Waveform) -> None:
    """Refuse a clip longer than one window, because the encoder would drop the rest silently.

    Raises:
        AudioTooLongError: If the clip is longer than WINDOW_S.
    """
    if waveform.num_samples > WINDOW_S * SAMPLE_RATE_HZ:
        raise AudioTooLongError(
            # Rounded up, so that the two figures differ.
            f"The clip lasts {math.ceil(100 * waveform.duration_s) / 100:.2f} s; one window holds {WINDOW_S:g} s.",
            limit=WINDOW_S,
            actual=round(waveform.duration_s, 4),
            hint="Send a shorter clip.",
        )


def snr_gain(foreground_power: float, background_power: float, snr_db: float) -> float:
    """Return the factor of a background that gives the signal-to-noise ratio `snr_db` (arXiv 2604.14806).

    Args:
        foreground_power, background_power: Mean squares, above 0.
    """
    return math.sqrt(foreground_power / (background_power * 10 ** (snr_db / 10)))


def mix(foreground_S: NDArray[np.float32], background_S: NDArray[np.float32], snr_db: float) -> NDArray[np.float32]:
    """Add a background to a foreground at exactly `snr_db`.

    The background is repeated or cut to the foreground's length and scaled by `snr_gain` of the mean squares over that
    length. If the sum exceeds full scale, all of it is scaled down, because clipping would change the ratio.

    Returns:
        float32 [S], as long as the foreground, in [-1, 1].

    Raises:
        ValueError: If one of the two is silent, so no gain gives the ratio.
    """
    foreground = np.asarray(foreground_S, dtype=np.float64)
    if foreground.ndim != 1 or np.ndim(background_S) != 1:
        raise ValueError("mix wants two mono arrays [S]")
    if not foreground.any() or not np.any(background_S):
        raise ValueError("silence has no signal-to-noise ratio")
    background = np.resize(np.asarray(background_S, dtype=np.float64), foreground.shape)
    foreground_power, background_power = np.mean(foreground**2), np.mean(background**2)
    if not background_power:
        raise ValueError("silence has no signal-to-noise ratio")
    gain = snr_gain(float(foreground_power), float(background_power), snr_db)
    mixed = foreground + gain * background
    return (mixed / max(1.0, float(np.abs(mixed).max()))).astype(np.float32)


def decode(
    data: bytes, limits: AudioLimits | None = None, *, track: int | None = None, channel: Channel = "mix"
) -> Waveform:
    """Decode a clip within the limits.

    It blocks until the clip is decoded, and is thread-safe.

    Args:
        data: The whole file.
        limits: Limits of time, size and duration; the default is AudioLimits().
        track: Audio track to decode, from 1; the default is the default track, or one with sound.
        channel: "mix" for the mean of all channels, or a better mix if they cancel; "left" or "right" for one.

    Raises:
        UnsupportedAudioError: If the container or codec is not supported.
        InvalidAudioError: If the clip is empty, damaged, truncated, too short or too slow to decode, or without audio
            or the track.
        AudioTooLargeError: If it has more bytes or more decoded seconds than the limits allow.
    """
    limits = limits or AudioLimits()
    decoded, warnings = _decode_whole(data, Allowance(limits), track, channel)
    samples_S, trimmed_s = _trim_padding(decoded, limits)
    if trimmed_s:
        message = f"{trimmed_s:.3f} s at the end were cut as padding of the codec."
        warnings.append(AudioWarning("padding_trimmed", message, trimmed_s))
    _require_length(len(samples_S), limits)
    return _waveform(decoded, samples_S, warnings)


def decode_blocks(
    data: bytes, sink: Sink, limits: AudioLimits, *, track: int | None = None, channel: Channel = "mix"
) -> tuple[Waveform, int]:
    """Decode a recording of any length within the limits; the sink receives its samples.

    The samples are those of `decode`, except that a codec's padding at the end stays.

    Returns:
        The properties, as a Waveform without samples, and the number of samples. The sink may have received up to
        0.1 s more, as padding of the container.

    Raises:
        AudioError: As `decode`; the blocks so far are then void.
    """
    allowance = Allowance(limits, sink)
    decoded, warnings = _decode_whole(data, allowance, track, channel)
    _require_length(decoded.num_samples, limits)
    return _waveform(decoded, np.zeros(0, np.float32), warnings), decoded.num_samples


def _decode_whole(
    data: bytes, allowance: Allowance, track: int | None, channel: Channel
) -> tuple[Decoded, list[AudioWarning]]:
    """Decode a file to its end, with the best mix of its channels, and describe its oddities."""
    limits = allowance.limits
    container, start = identify(data, limits)
    clip = data[start:] if start else data
    weights_C = None if channel == "mix" else _WEIGHTS[channel]
    decoded = _decode_once(clip, container, allowance, track, weights_C)
    warnings = [*decoded.warnings]
    if start and start != _skip_tags(data):
        warnings.insert(0, AudioWarning("junk_skipped", f"{start} bytes before the audio were skipped."))
    if channel == "mix" and decoded.source_channels > 1:
        statistics = decoded.gatherer.channels
        downmix = statistics.choose()
        if downmix.weights_C is not None:
            # The same track again: its number is now known.
            again = _decode_once(clip, container, allowance, decoded.track, downmix.weights_C)
            decoded = replace(decoded, samples_S=again.samples_S, gatherer=again.gatherer)
        if downmix.cancelled_s:
            warnings.append(_cancellation(downmix))
        elif differing_s := statistics.differing_s():
            message = "The two channels hold different sound, perhaps one person each; their mean was used."
            warnings.append(
                AudioWarning(
                    "channels_differ",
                    f"{message} Send `channel` with left or right to use one.",
                    round(differing_s, 2),
                )
            )
    if allowance.sink is not None and decoded.gatherer is not allowance.gatherer:
        # Another track was tried after the chosen one, and the sink has received that.
        again = _decode_once(clip, container, allowance, decoded.track, weights_C)
        decoded = replace(decoded, gatherer=again.gatherer)
    if _breaks_off(clip, container):
        refuse_broken_off()
    if decoded.missing_s > limits.max_duration_s:
        # A clip of such a length would be refused, so the value is a writer's placeholder.
        decoded = replace(decoded, missing_s=0.0)
        message = "The header states no true length; the clip was read to the end of the file."
        warnings.append(AudioWarning("size_mismatch", message))
    elif decoded.missing_s:
        message = f"The header states {decoded.missing_s:.2f} s of sound that are not in the file."
        warnings.append(AudioWarning("audio_missing", message, decoded.missing_s))
    return decoded, warnings


def _require_length(num_samples: int, limits: AudioLimits) -> None:
    if num_samples < limits.min_duration_s * SAMPLE_RATE_HZ:
        duration_s = num_samples / SAMPLE_RATE_HZ
        raise InvalidAudioError(
            f"The clip has {duration_s:.3f} s of audio; the minimum is {limits.min_duration_s:g} s.",
            code="audio_too_short",
            limit=limits.min_duration_s,
            actual=round(duration_s, 4),
        )


def _waveform(decoded: Decoded, samples_S: NDArray[np.float32], warnings: list[AudioWarning]) -> Waveform:
    return Waveform(
        samples_S,
        decoded.codec,
        decoded.source_sample_rate_hz,
        decoded.source_channels,
        num_tracks=decoded.num_tracks,
        track=decoded.track,
        missing_s=decoded.missing_s,
        warnings=tuple(warnings),
    )


def identify(data: bytes, limits: AudioLimits) -> tuple[str, int]:
    """Return the container of a clip of allowed size and the place of its first byte, without a decoder.

    Raises:
        UnsupportedAudioError: If the container is not supported.
        InvalidAudioError: If there are no bytes.
        AudioTooLargeError: If it has more bytes than the limits allow.
    """
    if len(data) > limits.max_bytes:
        raise AudioTooLargeError(
            f"The clip has {len(data)} bytes; the limit is {limits.max_bytes}.",
            limit=limits.max_bytes,
            actual=len(data),
            hint="Send a shorter clip, or a compressed format such as mp3, m4a or opus.",
        )
    return locate(data)


def _decode_once(
    data: bytes, container: str, allowance: Allowance, track: int | None, weights_C: NDArray[np.float32] | None
) -> Decoded:
    """Decode with the library for the container and its codec."""
    if container in PCM_CONTAINERS:
        source = find_samples(data, container, allowance.limits.max_bytes)
        if source is not None:
            if track not in (None, 1):
                refuse_track(track, 1)
            return _read_samples(data, source, allowance, weights_C)
    if container == "m4a":
        _require_index(data)
    stated_share, warnings = 1.0, list[AudioWarning]()
    if container == "wav":
        data, stated_share = with_true_size(data)
    elif container == "wma":
        stated_share = _asf_share(data)
    elif container == "amr":
        data, num_left_out = clean_amr(data)
        if num_left_out:
            message = f"{num_left_out} bytes behind the last frame are no audio and were left out."
            warnings.append(AudioWarning("damage_skipped", message))
    decoded = decode_with_libav(data, DEMUXERS[container], allowance, track=track, weights_C=weights_C)
    decoded_s = decoded.num_samples / SAMPLE_RATE_HZ
    if stated_share < 1:
        message = "The header states less than the file holds; all of it was read."
        warnings.append(AudioWarning("size_mismatch", message, round((1 - stated_share) * decoded_s, 2)))
    elif stated_share > 1:
        decoded = replace(decoded, missing_s=round((stated_share - 1) * decoded_s, 3))
    if container in _JOINED_CONTAINERS and (place := find_joined(data, container)) is not None:
        message = f"A second recording begins at byte {place} of the file and was not used."
        warnings.append(AudioWarning("unused_sound", message))
    decoded = replace(decoded, warnings=(*decoded.warnings, *warnings))
    if container == "mp3" and (stated_samples := _stated_mp3_samples(data)) is not None:
        missing_samples = stated_samples - decoded.num_source_samples
        if missing_samples > _MP3_PADDING_SAMPLES:
            if _ends_in_a_frame(data):
                refuse_broken_off()
            # Editors cutting between frames leave the old count in the first one.
            return replace(decoded, missing_s=round(missing_samples / decoded.source_sample_rate_hz, 3))
    return decoded


def _read_samples(data: bytes, source: PcmFile, allowance: Allowance, weights_C: NDArray[np.float32] | None) -> Decoded:
    """Read a file of plain samples with libsndfile, from their known places."""
    import soundfile  # pyright: ignore[reportMissingTypeStubs]

    rate_hz, channels = source.rate_hz, source.channels
    allowance.set_source(rate_hz, channels)
    allowance.allow_padding(False)
    seconds_a_byte = 1 / (source.frame_bytes * rate_hz)
    allowance.require_duration(source.num_bytes // source.frame_bytes / rate_hz)
    gatherer = Gatherer(allowance, weights_C)
    endian = "BIG" if source.sample_format.is_big_endian else "LITTLE"
    try:
        for start, end in source.spans:
            raw = io.BytesIO(data[start : end - (end - start) % source.frame_bytes])
            with cast(Any, soundfile).SoundFile(
                raw,
                samplerate=rate_hz,
                channels=channels,
                subtype=source.sample_format.subtype,
                endian=endian,
                format="RAW",
            ) as file:
                while len(block_SC := file.read(_BLOCK_SAMPLES // channels, dtype="float32", always_2d=True)):
                    gatherer.add(block_SC, rate_hz)
    except soundfile.SoundFileError:
        refuse_damaged()
    warnings: list[AudioWarning] = []
    missing_s = 0.0
    difference_s = round((source.stated_bytes - source.num_bytes) * seconds_a_byte, 3)
    if source.is_size_wrong and source.is_placeholder:
        message = "The header states no true size of the samples; they were read to the end of the file."
        warnings.append(AudioWarning("size_mismatch", message))
    elif source.is_size_wrong and difference_s > 0:
        missing_s = difference_s
    elif source.is_size_wrong:
        message = f"The header states {-difference_s:.2f} s less than the file holds; all of it was read."
        warnings.append(AudioWarning("size_mismatch", message, -difference_s))
    if source.unread_bytes:
        message = "A second recording in another sample format follows in the file and was not read."
        warnings.append(AudioWarning("unused_sound", message, round(source.unread_bytes * seconds_a_byte, 2)))
    samples_S = gatherer.finish()
    return Decoded(
        samples_S,
        gatherer.num_samples,
        source.sample_format.codec,
        rate_hz,
        channels,
        gatherer.num_source_samples,
        gatherer,
        missing_s=missing_s,
        warnings=tuple(warnings),
    )


def _cancellation(downmix: Downmix) -> AudioWarning:
    """Describe channels that cancel, and the mix used instead."""
    if downmix.weights_C is None:
        used = "No other mix loses less"
    elif downmix.channel is None:
        used = "Channels of opposite sign were inverted before the mean"
    else:
        used = f"Only {_CHANNEL_NAMES.get(downmix.channel, f'channel {downmix.channel + 1}')} was used"
    lost = f"; {downmix.lost_s:.1f} s are still lost" if downmix.lost_s >= 0.1 else ""
    message = f"The channels are out of phase: their mean would cancel {downmix.cancelled_s:.1f} s. {used}{lost}."
    return AudioWarning("channels_out_of_phase", message, round(downmix.cancelled_s, 2))


def _trim_padding(decoded: Decoded, limits: AudioLimits) -> tuple[NDArray[np.float32], float]:
    """Remove a codec's delay and padding if they alone make a clip too long for a window or the limit.

    Silence at the beginning is removed first, because an encoder's delay is there.

    Returns:
        The samples, and the audible seconds removed.
    """
    samples_S = decoded.samples_S
    if decoded.is_exact:
        return samples_S, 0.0
    for bound_s in (limits.max_duration_s, WINDOW_S):
        excess = len(samples_S) - round(bound_s * SAMPLE_RATE_HZ)
        if not 0 < excess <= MAX_CODEC_PADDING_S * SAMPLE_RATE_HZ + 1:
            continue
        is_sound_S = np.abs(samples_S[:excess]) > _PADDING_LEVEL
        lead = int(np.argmax(is_sound_S)) if is_sound_S.any() else excess
        end = len(samples_S) - (excess - lead)
        cut_S = samples_S[end:]
        samples_S = samples_S[lead:end]
        if len(cut_S) and float(np.sqrt(np.mean(np.square(cut_S)))) > 10 ** (_SILENT_DBFS / 20):
            return samples_S, round(len(cut_S) / SAMPLE_RATE_HZ, 4)
    return samples_S, 0.0


def _breaks_off(data: bytes, container: str) -> bool:
    """Return whether the end of the file is missing, for containers without such a check in their decoders."""
    match container:
        case "webm":
            return _webm_breaks_off(data)
        case "ogg":
            page = data.rfind(b"OggS")
            sizes = data[page + 27 : page + 27 + data[page + 26]] if page + 26 < len(data) else b""
            return not sizes or page + 27 + len(sizes) + sum(sizes) > len(data)
        case _:
            return False


def _require_index(data: bytes) -> None:
    """Refuse an MP4 without an index: truncated, never completed, or a part of a stream.

    Raises:
        InvalidAudioError: If there is no index.
    """
    position, names = 0, set[bytes]()
    for _ in range(_MAX_ELEMENTS):
        if position + 8 > len(data):
            break
        size, name = struct.unpack_from(">I4s", data, position)
        names.add(name)
        if size == 1 and position + 16 <= len(data):
            (size,) = struct.unpack_from(">Q", data, position + 8)
        if size < 8 or name == b"moov":
            break
        position += size
    if b"moov" not in names and (b"moof" in names or b"styp" in names):
        raise InvalidAudioError(
            "The file is one segment of a stream; its index (moov) is in another file.",
            code="damaged_audio",
            hint="Send the initialization segment and the segments joined in one file.",
        )
    if b"moov" not in names and position >= len(data):
        raise InvalidAudioError(
            "The file's index (moov) is missing: the upload was cut off, or the recording was never completed.",
            code="truncated_audio",
            hint="Send the whole file, or export it again.",
        )


def _asf_share(data: bytes) -> float:
    """Return the stated size of an ASF file's data object as a multiple of the true size; 1 if it is right.

    Live streams state zero, or a size below the object's own header.
    """
    place = data.find(_ASF_DATA)
    if place < 0 or place + 24 > len(data):
        return 1.0
    stated, there = int.from_bytes(data[place + 16 : place + 24], "little"), len(data) - place
    return stated / there if stated > there else 1.0


def _webm_breaks_off(data: bytes) -> bool:
    """Return whether the segment or its last element states more bytes than follow.

    Bytes after a complete segment, and non-elements, are junk outside it.
    """
    position, is_inside = 0, False
    for _ in range(_MAX_ELEMENTS):
        if position >= len(data):
            return position > len(data)
        id_bytes = _ebml_width(data, position, longest=4)
        size_bytes = _ebml_width(data, position + id_bytes, longest=8)
        start = position + id_bytes + size_bytes
        name = data[position : position + id_bytes]
        if is_inside and name not in _WEBM_ELEMENTS:
            return not name and len(data) - position < _MIN_JUNK_BYTES and any(data[position:])
        if not id_bytes or not size_bytes or start > len(data):
            return True
        mask = (1 << 7 * size_bytes) - 1
        size = int.from_bytes(data[position + id_bytes : start]) & mask
        is_stated = size != mask
        if is_stated and start + size > len(data):
            return True
        if not is_inside and name == _WEBM_SEGMENT:
            if is_stated:
                return False
            is_inside, position = True, start
        elif is_stated:
            position = start + size
        else:
            return False
    return False


def _ebml_width(data: bytes, position: int, *, longest: int) -> int:
    """Return the width of a variable-length number in bytes, from its leading zeros; 0 if there is none."""
    width = 9 - data[position].bit_length() if position < len(data) else 0
    return width if 1 <= width <= longest else 0


def _stated_mp3_samples(data: bytes) -> int | None:
    """Return the number of samples stated by an MP3's encoder, with delay and padding; None without a statement."""
    start = 0
    head = data[start : start + 4]
    if len(head) < 4 or head[0] != 0xFF:
        return None
    is_mpeg_1, is_mono = head[1] & 0x18 == 0x18, head[3] & 0xC0 == 0xC0
    tag = start + (36 if is_mpeg_1 and not is_mono else 13 if is_mono and not is_mpeg_1 else 21)
    if data[tag : tag + 4] not in (b"Xing", b"Info") or len(data) < tag + 12:
        return None
    flags, num_frames = struct.unpack_from(">II", data, tag + 4)
    return num_frames * (1152 if is_mpeg_1 else 576) if flags & 1 else None


def _skip_tags(data: bytes) -> int:
    """Return the place behind all ID3v2 tags at the beginning."""
    start = 0
    while (behind := skip_id3(data, start)) > start:
        start = behind
    return start


def _ends_in_a_frame(data: bytes) -> bool:
    """Return whether an MP3 ends within a frame, a sign of truncation."""
    position = 0
    while size := mpeg_frame_bytes(data, position):
        position += size
    return position > len(data) or 0 < len(data) - position < 4
