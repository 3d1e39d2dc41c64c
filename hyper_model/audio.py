"""Turns the bytes of a clip into a Waveform, mono float32 at 16 kHz and of known length, or says why it cannot.

Serving and training hear through this module alone, so a clip sounds the same to both.

The bytes are hostile until they are samples. No header is believed: length is counted in decoded samples, and a header
can only make us refuse. WAV and FLAC are read by libsndfile, everything else by FFmpeg's libraries, both in the calling
process: training calls `decode` directly, the service calls it in a sandboxed process (`server.decoding.pool`).
What a decoder prints is never read. A clip that breaks off is refused: a shorter one would be answered wrongly, and
nobody would notice.

Knows no HTTP, no model and no client's file name: callers hand in bytes and get a value or an AudioError.

Axes: S samples, C channels.
"""

from __future__ import annotations

import hashlib
import io
import math
import struct
import warnings
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from hyper_model.audio_limits import (
    SAMPLE_RATE_HZ,
    Allowance,
    AudioLimits,
    refuse_broken_off,
    refuse_damaged,
)
from hyper_model.errors import AudioTooLargeError, AudioTooLongError, InvalidAudioError, UnsupportedAudioError
from hyper_model.ffmpeg import find_ffmpeg
from hyper_model.libav import decode_with_libav
from hyper_model.resampling import Gatherer, resample

if TYPE_CHECKING:
    from pydub import AudioSegment  # pyright: ignore[reportMissingTypeStubs]

__all__ = [
    "FORMATS",
    "SAMPLE_RATE_HZ",
    "WINDOW_S",
    "AudioLimits",
    "Quality",
    "Waveform",
    "decode",
    "find_ffmpeg",
    "identify",
    "mix",
    "require_single_window",
    "sniff",
]

WINDOW_S = 30.0

# Container as we name it -> FFmpeg's demuxer, which is told and not guessed.
_DEMUXERS = {
    "wav": "wav",
    "flac": "flac",
    "mp3": "mp3",
    "ogg": "ogg",
    "m4a": "mov",
    "webm": "matroska",
    "aac": "aac",
    "aiff": "aiff",
    "caf": "caf",
    "amr": "amr",
    "wma": "asf",
    "w64": "w64",
}
FORMATS = tuple(_DEMUXERS)

# What libsndfile is asked to decode, by its names and FFmpeg's; ADPCM, GSM and MPEG inside a WAV are left to FFmpeg.
_SNDFILE_CODECS = {
    "PCM_U8": "pcm_u8",
    "PCM_S8": "pcm_s8",
    "PCM_16": "pcm_s16le",
    "PCM_24": "pcm_s24le",
    "PCM_32": "pcm_s32le",
    "FLOAT": "pcm_f32le",
    "DOUBLE": "pcm_f64le",
    "ULAW": "pcm_mulaw",
    "ALAW": "pcm_alaw",
}

_BLOCK_SAMPLES = 2**18
# Delay and padding that an MP3 encoder counts as frames and a decoder takes off again: at most two and a half frames.
_MP3_PADDING_SAMPLES = 2880
# libsndfile reports 2**63 - 1 frames for a FLAC stream that does not state its length, and then fails in seeking.
_LENGTH_NOT_STATED = 2**62
# Sizes that streaming writers leave in a header they could not go back to: 2**31 - 1 less a little, or 2**32 - 1.
_SIZE_NOT_STATED = 0x7FFF_0000

_WEBM_SEGMENT = b"\x18\x53\x80\x67"
# Top-level elements of a WebM that are looked at: a file of nothing but two-byte ones would take seconds.
_MAX_ELEMENTS = 100_000

_SILENT_DBFS = -50.0
_LOWEST_DBFS = -120.0
_FULL_SCALE = 0.999
_QUALITY_FRAME_SAMPLES = SAMPLE_RATE_HZ // 50


@dataclass(frozen=True)
class Quality:
    """Tells why a recording may be hard to hear.

    Attributes:
        silence_ratio: Share of 20 ms frames whose RMS is below -50 dBFS.
        clipping_ratio: Share of samples at full scale (0.999 and above).
        peak_dbfs: Largest sample in dB of full scale; -120 for digital silence, so that it stays a JSON number.
    """

    silence_ratio: float
    clipping_ratio: float
    peak_dbfs: float


@dataclass(frozen=True, eq=False)
class Waveform:
    """Holds a clip as the model hears it.

    Attributes:
        samples_S: float32 [S], mono, 16 kHz, finite, in [-1, 1].
        codec: How the clip was coded, such as "mp3"; the container's name where the decoder did not tell.
        source_sample_rate_hz: Rate before resampling; 0 where the decoder did not tell.
        source_channels: Channels before the down-mix, which is their mean; 0 where the decoder did not tell.
    """

    samples_S: NDArray[np.float32]  # noqa: N815
    codec: str = "pcm"
    source_sample_rate_hz: int = SAMPLE_RATE_HZ
    source_channels: int = 1

    def __post_init__(self) -> None:
        if self.samples_S.ndim != 1 or self.samples_S.dtype != np.float32:
            raise ValueError(f"a Waveform wants float32 [S], not {self.samples_S.dtype} {list(self.samples_S.shape)}")

    @classmethod
    def from_samples(cls, samples: NDArray[Any], sample_rate_hz: int, *, codec: str = "pcm") -> Waveform:
        """Brings an array [S] or [S, C] in [-1, 1] at any rate to a Waveform."""
        samples_SC = np.asarray(samples, dtype=np.float32).reshape(len(samples), -1)
        mono_S = resample(samples_SC.mean(axis=1, dtype=np.float32), sample_rate_hz)
        return cls(np.clip(mono_S, -1.0, 1.0), codec, sample_rate_hz, samples_SC.shape[1])

    @classmethod
    def from_segment(cls, segment: AudioSegment) -> Waveform:
        """Takes over a pydub segment of any rate, width and number of channels."""
        source = cast(Any, segment)
        samples = np.array(source.get_array_of_samples(), dtype=np.float32) / float(1 << (8 * source.sample_width - 1))
        return cls.from_samples(samples.reshape(-1, source.channels), source.frame_rate)

    def segment(self) -> AudioSegment:
        """Gives the samples to pydub, rounded to 16 bits, for listening, cutting and measuring."""
        # pydub warns on import when PATH holds no ffmpeg; we never let it open a file, so that is no news to anyone.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from pydub import AudioSegment  # pyright: ignore[reportMissingTypeStubs]
        pcm = np.clip(np.rint(self.samples_S * 32768.0), -32768, 32767).astype("<i2")
        return AudioSegment(pcm.tobytes(), sample_width=2, frame_rate=SAMPLE_RATE_HZ, channels=1)

    @property
    def num_samples(self) -> int:
        return len(self.samples_S)

    @property
    def duration_s(self) -> float:
        return self.num_samples / SAMPLE_RATE_HZ

    @cached_property
    def quality(self) -> Quality:
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
        """Cuts out [start_s, end_s), to the nearest sample; an end past the clip means its end.

        Raises:
            ValueError: Nothing lies between the two.
        """
        start, end = round(start_s * SAMPLE_RATE_HZ), round(end_s * SAMPLE_RATE_HZ)
        if not 0 <= start < min(end, self.num_samples):
            raise ValueError(f"no samples between {start_s} s and {end_s} s of a clip of {self.duration_s:.3f} s")
        return replace(self, samples_S=self.samples_S[start:end])

    @cached_property
    def sha256(self) -> str:
        """Names the sound: the digest of the samples as little-endian float32, whatever file they came from."""
        return hashlib.sha256(self.samples_S.astype("<f4", copy=False).tobytes()).hexdigest()


def require_single_window(waveform: Waveform) -> None:
    """Refuses a clip that one window cannot hold, to the sample: the encoder would drop the rest without a word.

    Raises:
        AudioTooLongError: The clip is longer than WINDOW_S.
    """
    if waveform.num_samples > WINDOW_S * SAMPLE_RATE_HZ:
        raise AudioTooLongError(
            f"The clip lasts {waveform.duration_s:.2f} s; one window holds {WINDOW_S:g} s.",
            limit=WINDOW_S,
            actual=round(waveform.duration_s, 4),
            hint="Send a shorter clip, or choose how a long one is divided.",
        )


def mix(foreground_S: NDArray[np.float32], background_S: NDArray[np.float32], snr_db: float) -> NDArray[np.float32]:
    """Lays a background under a foreground at exactly `snr_db`.

    The background is repeated or cut to the foreground's length and scaled by sqrt(P_fg / (P_bg * 10^(snr_db / 10))),
    with P the mean square over that length (arXiv 2604.14806, data construction). Where the sum would pass full scale,
    all of it is scaled down: clipping would change the ratio.

    Returns:
        float32 [S], as long as the foreground, in [-1, 1].

    Raises:
        ValueError: One of the two is silent, so no gain gives the ratio.
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
    gain = math.sqrt(foreground_power / (background_power * 10 ** (snr_db / 10)))
    mixed = foreground + gain * background
    return (mixed / max(1.0, float(np.abs(mixed).max()))).astype(np.float32)


def sniff(data: bytes) -> str:
    """Names the container by its magic bytes, one of FORMATS; file names and content types are a client's word only.

    Raises:
        InvalidAudioError: There are no bytes.
        UnsupportedAudioError: Anything else: text, playlists, session descriptions, pictures, archives.
    """
    if not data:
        raise InvalidAudioError("The clip is empty.", code="empty_audio", limit=1, actual=0)
    start = _skip_id3(data)
    head = data[start : start + 64]
    kind = head[8:12]
    if (head[:4] in (b"RIFF", b"RIFX", b"RF64", b"BW64")) and kind == b"WAVE":
        return "wav"
    if head[:4] == b"FORM" and kind in (b"AIFF", b"AIFC"):
        return "aiff"
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide"):
        return "m4a"
    for magic, container in (
        (b"fLaC", "flac"),
        (b"OggS", "ogg"),
        (b"\x1a\x45\xdf\xa3", "webm"),
        (b"caff", "caf"),
        (b"#!AMR", "amr"),
        (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "wma"),
        (b"riff\x2e\x91\xcf\x11", "w64"),
    ):
        if head.startswith(magic):
            return container
    if len(head) >= 4 and head[0] == 0xFF:
        if head[1] & 0xF6 == 0xF0:
            return "aac"
        # Sync word, MPEG 1 / 2 / 2.5, layer III, and neither a reserved bit rate nor a reserved sample rate.
        if head[1] & 0xE6 == 0xE2 and head[1] & 0x18 != 0x08 and head[2] & 0xF0 != 0xF0 and head[2] & 0x0C != 0x0C:
            return "mp3"
    if start:
        return "mp3"
    raise UnsupportedAudioError(
        f"This is not audio that we decode. We decode {', '.join(FORMATS)}.",
        actual="text" if _looks_like_text(data[:512]) else "unknown",
        hint="Send the recording itself, not a playlist, a link or an archive.",
    )


def decode(data: bytes, limits: AudioLimits | None = None) -> Waveform:
    """Decodes a clip within the limits.

    Blocks for as long as decoding takes. Safe in several threads at once.

    Args:
        data: The whole file.
        limits: What it may cost; AudioLimits() when left out.

    Raises:
        UnsupportedAudioError: Not a container or codec we decode.
        InvalidAudioError: Empty, damaged, broken off, too short, without audio, or too slow to decode.
        AudioTooLargeError: More bytes or more decoded seconds than the limits allow.
    """
    limits = limits or AudioLimits()
    container = identify(data, limits)
    allowance = Allowance(limits)
    waveform = _read_in_blocks(data, allowance) if container in ("wav", "flac") else None
    if waveform is None:
        waveform = _read_with_libav(data, container, allowance)
    if _breaks_off(data, container):
        refuse_broken_off()
    if waveform.duration_s < limits.min_duration_s:
        raise InvalidAudioError(
            f"The clip holds {waveform.duration_s:.3f} s of audio; at least {limits.min_duration_s:g} s are needed.",
            code="audio_too_short",
            limit=limits.min_duration_s,
            actual=round(waveform.duration_s, 4),
        )
    return waveform


def identify(data: bytes, limits: AudioLimits) -> str:
    """Names the container of a clip of allowed size, by a look at its first bytes and without a decoder.

    Raises:
        UnsupportedAudioError: Not a container that we decode.
        InvalidAudioError: There are no bytes.
        AudioTooLargeError: More bytes than the limits allow.
    """
    if len(data) > limits.max_bytes:
        raise AudioTooLargeError(
            f"The clip has {len(data)} bytes; at most {limits.max_bytes} are accepted.",
            limit=limits.max_bytes,
            actual=len(data),
            hint="Send a shorter clip, or a compressed format such as mp3, m4a or opus.",
        )
    return sniff(data)


def _read_in_blocks(data: bytes, allowance: Allowance) -> Waveform | None:
    """Reads WAV or FLAC with libsndfile; None where FFmpeg has to (a rare codec, a stream that states no length)."""
    import soundfile  # pyright: ignore[reportMissingTypeStubs]

    gatherer = Gatherer(allowance)
    try:
        with cast(Any, soundfile).SoundFile(io.BytesIO(data)) as file:
            rate_hz, channels, stated_frames = int(file.samplerate), int(file.channels), int(file.frames)
            if file.subtype not in _SNDFILE_CODECS or stated_frames >= _LENGTH_NOT_STATED:
                return None
            codec = "flac" if file.format == "FLAC" else _SNDFILE_CODECS[file.subtype]
            allowance.set_source(rate_hz, channels)
            allowance.require_duration(stated_frames / rate_hz)
            # One block at a time: `read()` without a size would allocate whatever the header says.
            while len(block_SC := file.read(_BLOCK_SAMPLES // channels, dtype="float32", always_2d=True)):
                gatherer.add(block_SC, rate_hz)
    except soundfile.SoundFileError:
        refuse_damaged()
    if gatherer.num_source_samples < stated_frames:
        refuse_broken_off()
    return Waveform(gatherer.finish(), codec, rate_hz, channels)


def _read_with_libav(data: bytes, container: str, allowance: Allowance) -> Waveform:
    decoded = decode_with_libav(data, _DEMUXERS[container], allowance)
    stated_samples = _stated_mp3_samples(data) if container == "mp3" else None
    if stated_samples is not None and stated_samples - decoded.num_source_samples > _MP3_PADDING_SAMPLES:
        refuse_broken_off()
    return Waveform(decoded.samples_S, decoded.codec, decoded.source_sample_rate_hz, decoded.source_channels)


def _breaks_off(data: bytes, container: str) -> bool:
    """Tells whether the end of the file is missing, for the containers whose decoders keep quiet about it."""
    match container:
        case "wav":
            return _wav_breaks_off(data)
        case "webm":
            return _webm_breaks_off(data)
        case "aiff":
            (size,) = struct.unpack_from(">I", data, 4)
            return 8 + size > len(data) and size < _SIZE_NOT_STATED
        case "ogg":
            page = data.rfind(b"OggS")
            sizes = data[page + 27 : page + 27 + data[page + 26]] if page + 26 < len(data) else b""
            return not sizes or page + 27 + len(sizes) + sum(sizes) > len(data)
        case _:
            return False


def _wav_breaks_off(data: bytes) -> bool:
    """Tells whether the data chunk states more bytes than follow it."""
    if data[:4] != b"RIFF":
        return False
    position = 12
    while position + 8 <= len(data):
        (size,) = struct.unpack_from("<I", data, position + 4)
        if data[position : position + 4] == b"data":
            return position + 8 + size > len(data) and size < _SIZE_NOT_STATED
        position += 8 + size + size % 2
    return False


def _webm_breaks_off(data: bytes) -> bool:
    """Tells whether the segment, or the last element in it, states more bytes than follow it."""
    position, is_inside = 0, False
    for _ in range(_MAX_ELEMENTS):
        if position >= len(data):
            return position > len(data)
        id_bytes = _ebml_width(data, position, longest=4)
        size_bytes = _ebml_width(data, position + id_bytes, longest=8)
        start = position + id_bytes + size_bytes
        if not id_bytes or not size_bytes or start > len(data):
            return True
        mask = (1 << 7 * size_bytes) - 1
        size = int.from_bytes(data[position + id_bytes : start]) & mask
        is_stated = size != mask
        if is_stated and start + size > len(data):
            return True
        if not is_inside and data[position : position + id_bytes] == _WEBM_SEGMENT:
            is_inside, position = True, start
        elif is_stated:
            position = start + size
        else:
            return False
    return False


def _ebml_width(data: bytes, position: int, *, longest: int) -> int:
    """Returns how many bytes a variable-length number has, which its leading zeros say; 0 where there is none."""
    width = 9 - data[position].bit_length() if position < len(data) else 0
    return width if 1 <= width <= longest else 0


def _stated_mp3_samples(data: bytes) -> int | None:
    """Returns the samples that an MP3's encoder counted, delay and padding included; None where it left no count."""
    start = _skip_id3(data)
    head = data[start : start + 4]
    if len(head) < 4 or head[0] != 0xFF:
        return None
    is_mpeg_1, is_mono = head[1] & 0x18 == 0x18, head[3] & 0xC0 == 0xC0
    tag = start + (36 if is_mpeg_1 and not is_mono else 13 if is_mono and not is_mpeg_1 else 21)
    if data[tag : tag + 4] not in (b"Xing", b"Info") or len(data) < tag + 12:
        return None
    flags, num_frames = struct.unpack_from(">II", data, tag + 4)
    return num_frames * (1152 if is_mpeg_1 else 576) if flags & 1 else None


def _skip_id3(data: bytes) -> int:
    """Gives the offset behind an ID3v2 tag, which may stand before MP3, AAC or FLAC."""
    if len(data) < 10 or data[:3] != b"ID3":
        return 0
    size = 0
    for byte in data[6:10]:
        size = size << 7 | byte & 0x7F
    return 10 + size + (10 if data[5] & 0x10 else 0)


def _looks_like_text(head: bytes) -> bool:
    text = head.decode("utf-8", "replace").rstrip("\ufffd")
    return bool(text) and "\0" not in text and text.translate({9: None, 10: None, 13: None}).isprintable()
