"""Decodes one clip with FFmpeg's libraries, from memory and in this process.

The demuxer is named and no other is tried, so a playlist that slipped past the magic bytes is read as (bad) sound; it
reads from the bytes it is given and may use no protocol; and only the codecs below are opened. What the libraries print
is never read.

Their code is C that meets hostile bytes: whoever decodes for strangers does it in a process that may do nothing else
(`server.decoding.pool`). Knows nothing of clients, windows or models.

Axes: S samples, C channels.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from hyper_model.audio_limits import Allowance, refuse_broken_off, refuse_damaged
from hyper_model.errors import InvalidAudioError, UnsupportedAudioError
from hyper_model.resampling import Gatherer

if TYPE_CHECKING:
    from av.audio.frame import AudioFrame

CODECS = frozenset(
    "pcm_s8 pcm_u8 pcm_s16le pcm_s16be pcm_s24le pcm_s24be pcm_s32le pcm_s32be pcm_f32le pcm_f32be pcm_f64le pcm_f64be "
    "pcm_mulaw pcm_alaw adpcm_ms adpcm_ima_wav adpcm_ima_qt mp3float mp3 flac vorbis libvorbis opus libopus aac "
    "aac_fixed alac amrnb amrwb libopencore_amrnb libopencore_amrwb wmav1 wmav2".split()
)
"""The decoders, by FFmpeg's names, that a clip may ask for."""

# An empty list of protocols would mean all of them; this one belongs to no protocol.
_OPTIONS = {
    "protocol_whitelist": "none",
    "codec_whitelist": ",".join(sorted(CODECS)),
    "probesize": "1048576",
    "analyzeduration": "5000000",
    "max_streams": "8",
    "max_probe_packets": "256",
    "threads": "1",
}
# MP3 decoders are made to find their step again after joins, tags and junk; elsewhere an error is damage.
_MAX_MP3_ERROR_SHARE = 0.1
# Their headers state no length, and FFmpeg makes one up from the bit rate.
_GUESSED_LENGTH = ("mp3", "aac", "amr")
# Less than this may be an encoder's padding, which is not sound.
_PADDING_S = 1.0
_MICROSECONDS = 1_000_000
# Integers to [-1, 1): offset and scale by FFmpeg's names of sample formats, planar or not.
_SCALES = {"u8": (128, 2.0**-7), "s16": (0, 2.0**-15), "s32": (0, 2.0**-31), "s64": (0, 2.0**-63)}


@dataclass(frozen=True, eq=False)
class Decoded:
    """Holds what a clip decodes to, and what its stream is.

    Attributes:
        samples_S: float32 [S], mono, 16 kHz, finite, in [-1, 1].
        codec: Name of the codec, such as "opus".
        source_sample_rate_hz: Rate before resampling.
        source_channels: Channels before the down-mix.
        num_source_samples: Samples before resampling, a channel.
    """

    samples_S: NDArray[np.float32]  # noqa: N815
    codec: str
    source_sample_rate_hz: int
    source_channels: int
    num_source_samples: int


def decode_with_libav(data: bytes, demuxer: str, allowance: Allowance) -> Decoded:
    """Decodes, down-mixes and resamples; counts what comes out.

    Args:
        data: The whole file.
        demuxer: FFmpeg's name of the container that the magic bytes announce; no other is tried.
        allowance: Bounds the work.

    Raises:
        UnsupportedAudioError: The codec is not on our list.
        InvalidAudioError: Damaged, without audio, or too slow to decode.
        AudioTooLargeError: More decoded seconds than the limits allow.
    """
    import av
    import av.error

    try:
        with av.open(io.BytesIO(data), "r", format=demuxer, options=_OPTIONS, metadata_errors="replace") as container:
            return _decode(container, demuxer, allowance)
    # FFmpeg's errors, and what PyAV makes of tags, layouts and numbers that no file should have.
    except (av.error.FFmpegError, ArithmeticError, LookupError, OSError, ValueError, RuntimeError):
        refuse_damaged()


def _decode(container: Any, demuxer: str, allowance: Allowance) -> Decoded:
    import av.error

    if not container.streams.audio:
        raise InvalidAudioError("The file holds no audio.", code="no_audio_stream")
    stream = container.streams.audio[0]
    context = stream.codec_context
    if context is None or context.codec.name not in CODECS:
        raise UnsupportedAudioError(
            "The file is audio, but in a codec that we do not decode.",
            code="unsupported_codec",
            actual=None if context is None else context.codec.name,
            hint="Convert the clip to wav, flac, mp3 or opus.",
        )
    context.thread_count = 1
    if demuxer not in _GUESSED_LENGTH:
        _refuse_by_header(container, stream, allowance)
    gatherer = Gatherer(allowance)
    is_mp3 = demuxer == "mp3"
    num_packets = num_errors = rate_hz = channels = 0
    for packet in container.demux(stream):
        allowance.check()
        num_packets += 1
        try:
            frames: list[AudioFrame] = packet.decode()
        except av.error.InvalidDataError:
            if not is_mp3:
                raise
            num_errors += 1
            continue
        if packet.is_corrupt and not is_mp3:
            refuse_broken_off()
        for frame in frames:
            if frame.is_corrupt and not is_mp3:
                refuse_damaged()
            if not rate_hz:
                rate_hz, channels = frame.sample_rate, frame.layout.nb_channels
            allowance.set_source(frame.sample_rate, frame.layout.nb_channels)
            gatherer.add(_samples_of(frame), frame.sample_rate)
    if num_errors > _MAX_MP3_ERROR_SHARE * num_packets:
        refuse_damaged()
    # A stream of no samples is too short, which the caller says; its source is what its header states.
    return Decoded(
        gatherer.finish(),
        context.codec.canonical_name,
        rate_hz or context.sample_rate,
        channels or context.layout.nb_channels,
        gatherer.num_source_samples,
    )


def _refuse_by_header(container: Any, stream: Any, allowance: Allowance) -> None:
    """Refuses a clip whose header states more than the limits allow; what is allowed is counted all the same."""
    allowance.set_source(stream.codec_context.sample_rate, stream.codec_context.layout.nb_channels)
    if stream.duration is not None:
        allowance.require_duration(float(stream.duration * stream.time_base) - _PADDING_S)
    elif container.duration is not None:
        allowance.require_duration(container.duration / _MICROSECONDS - _PADDING_S)


def _samples_of(frame: AudioFrame) -> NDArray[np.float32]:
    """Returns the samples of a frame, float32 [S, C]; integers are scaled to [-1, 1)."""
    array = frame.to_ndarray()
    samples_SC = array.T if frame.format.is_planar else array.reshape(-1, frame.layout.nb_channels)
    if (scaling := _SCALES.get(frame.format.name.removesuffix("p"))) is not None:
        offset, scale = scaling
        samples_SC = (samples_SC.astype(np.float64) - offset) * scale
    return cast(NDArray[np.float32], samples_SC.astype(np.float32, copy=False))
