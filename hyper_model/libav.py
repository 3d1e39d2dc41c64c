"""Decode one clip with FFmpeg's libraries, from memory and in this process.

The demuxer is fixed, so a disguised playlist is read as (bad) sound. It reads only the given bytes and may use no
protocol. Only the codecs below are opened. The output of the libraries is never read.

Every stream of the container is counted. The default audio track, or the caller's, is decoded. A silent, damaged or
unsupported track is passed over for one with sound. Pictures, subtitles, attachments, data and chapters are not read.

FFmpeg is C code on hostile bytes. Decode untrusted clips in a sandboxed process (`server.decoding.pool`). The module is
independent of clients, windows and models.

Axes: S samples, C channels.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from hyper_model.audio_limits import SAMPLE_RATE_HZ, Allowance, refuse_broken_off, refuse_damaged, refuse_track
from hyper_model.audio_warnings import AudioWarning
from hyper_model.errors import AudioError, InvalidAudioError, UnsupportedAudioError
from hyper_model.resampling import Gatherer

if TYPE_CHECKING:
    from av.audio.frame import AudioFrame

CODECS = frozenset(
    "pcm_s8 pcm_u8 pcm_s16le pcm_s16be pcm_s24le pcm_s24be pcm_s32le pcm_s32be pcm_f32le pcm_f32be pcm_f64le pcm_f64be "
    "pcm_mulaw pcm_alaw adpcm_ms adpcm_ima_wav adpcm_ima_qt mp3float mp3 mp2float mp2 mp1float mp1 flac vorbis "
    "libvorbis opus libopus aac aac_fixed alac amrnb amrwb libopencore_amrnb libopencore_amrwb wmav1 wmav2".split()
)
"""Permitted decoders, by FFmpeg's names."""

# An empty list of protocols would mean all of them; this one belongs to no protocol.
_OPTIONS = {
    "protocol_whitelist": "none",
    "codec_whitelist": ",".join(sorted(CODECS)),
    "probesize": "1048576",
    "analyzeduration": "5000000",
    "max_streams": "4096",
    "max_probe_packets": "256",
    "threads": "1",
}
# MP3 decoders resynchronise after joins, tags and junk; elsewhere an error is damage.
_MAX_MP3_ERROR_SHARE = 0.1
# Their headers state no length, and FFmpeg estimates one from the bit rate.
_GUESSED_LENGTH = ("mp3", "aac", "amr", "asf")
# Less than this may be an encoder's padding.
_PADDING_S = 1.0
# Possible excess of a codec's last frame over the length in the header.
_FRAME_PADDING_S = 0.1
# A header with this much more than the file holds states missing sound.
_MIN_MISSING_S = 0.25
# An edit list with more cut than an encoder's delay and padding was meant to shorten the recording.
_MIN_EDITED_S = 0.5
# An edit list that keeps less than this of a longer recording is wrong.
_MIN_KEPT_S = 0.1
_NO_EDITS = {"ignore_editlist": "1"}
_MATROSKA_HEAD_BYTES = 2**16
_MICROSECONDS = 1_000_000
# Integers to [-1, 1): offset and scale by FFmpeg's names of sample formats, planar or not.
_SCALES = {"u8": (128, 2.0**-7), "s16": (0, 2.0**-15), "s32": (0, 2.0**-31), "s64": (0, 2.0**-63)}
# Silence, as `Quality.silence_ratio` counts it: no 20 ms louder than -50 dBFS.
_SILENT_POWER = 10 ** (-50 / 10)
# Marks of encryption: sample entries of MP4, and the Content Encryption Object of ASF.
_ENCRYPTED = {
    "mov": (b"enca", b"drms"),
    "asf": (b"\xfb\xb3\x11\x22\x23\xbd\xd2\x11\xb4\xb7\x00\xa0\xc9\x55\xfc\x6e",),
}
# Tracks for other listeners than most are tried last.
_LESS_LIKELY = ("comment", "hearing_impaired", "visual_impaired", "dub", "karaoke", "clean_effects", "descriptions")


@dataclass(frozen=True, eq=False)
class Decoded:
    """Decoded samples of a clip and the properties of its stream.

    Attributes:
        samples_S: float32 [S], mono, 16 kHz, finite, in [-1, 1]; none if a sink has received them.
        num_samples: Number of samples, wherever they are.
        codec: Name of the codec, such as "opus".
        source_sample_rate_hz: Rate before resampling.
        source_channels: Channels before the down-mix.
        num_source_samples: Samples before resampling, per channel.
        gatherer: Collector of the samples, with statistics of the channels.
        num_tracks: Audio tracks of the container.
        track: The decoded track, from 1.
        missing_s: Seconds stated in the header but missing from the file.
        warnings: Oddities of the file.
    """

    samples_S: NDArray[np.float32]  # noqa: N815
    num_samples: int
    codec: str
    source_sample_rate_hz: int
    source_channels: int
    num_source_samples: int
    gatherer: Gatherer
    num_tracks: int = 1
    track: int = 1
    missing_s: float = 0.0
    warnings: tuple[AudioWarning, ...] = ()

    @property
    def is_exact(self) -> bool:
        """Return whether the codec adds no delay and no padding."""
        return self.codec.startswith(("pcm_", "flac", "alac"))

    @property
    def is_silent(self) -> bool:
        """Return whether all its 20 ms frames are below -50 dBFS."""
        return self.gatherer.loudest_power < _SILENT_POWER


def decode_with_libav(
    data: bytes,
    demuxer: str,
    allowance: Allowance,
    *,
    track: int | None = None,
    weights_C: NDArray[np.float32] | None = None,
) -> Decoded:
    """Decode, down-mix and resample a clip, and count its samples.

    Args:
        data: The whole file.
        demuxer: FFmpeg's name of the container, from the magic bytes; no other is tried.
        allowance: Budget of the decode.
        track: Audio track to decode, from 1; the default is the default track, or one with sound.
        weights_C: Weights of the channels, float32 [C]; the default is their mean.

    Raises:
        UnsupportedAudioError: If the codec is not permitted.
        InvalidAudioError: If the clip is damaged, without audio or the track, or too slow to decode.
        AudioTooLargeError: If it has more decoded seconds than the limits allow.
    """
    order, num_tracks, first_error = _read_tracks(data, demuxer, track)
    fallback: Decoded | None = None
    passed_over: list[str] = []
    waiting = list(order)
    while waiting:
        index = waiting.pop(0)
        try:
            decoded = _decode_track(data, demuxer, index, allowance, weights_C)
        except AudioError as error:
            _refuse_encrypted(data, demuxer, error)
            # A late or damaged second track must not take the first one's place.
            if track is not None:
                raise
            first_error = first_error or error
            passed_over.append(f"track {index + 1} is {'late' if error.code == 'decode_timeout' else 'damaged'}")
            if error.code in ("decode_timeout", "audio_duration_too_large"):
                break
            continue
        decoded = replace(decoded, num_tracks=num_tracks, track=index + 1)
        if track is not None or num_tracks == 1 or not decoded.is_silent:
            return _with_track_warnings(decoded, order, passed_over, is_chosen=track is not None)
        fallback = fallback or decoded
        passed_over.append(f"track {index + 1} is silent")
        # A decoded track must not be lost to the search for a better one.
        if allowance.is_half_spent:
            break
        if len(waiting) > 1 and decoded is fallback:
            # Opening the file for each of hundreds of tracks would take too long.
            with_sound = _tracks_with_sound(data, demuxer, waiting, allowance)
            if with_sound:
                silent = waiting[: waiting.index(with_sound[0])]
                passed_over += [f"track {other + 1} is silent" for other in silent]
            waiting = with_sound
    if fallback is None:
        raise first_error or InvalidAudioError(
            "The file has no audio stream.", code="no_audio_stream", hint="Send a file with sound."
        )
    return _with_track_warnings(fallback, order, [], is_chosen=False)


def _refuse_encrypted(data: bytes, demuxer: str, error: AudioError) -> None:
    """Raise the true cause where a damaged clip is an encrypted one."""
    if error.code == "damaged_audio" and any(mark in data for mark in _ENCRYPTED.get(demuxer, ())):
        raise _unsupported(data, demuxer, None) from None


def _tracks_with_sound(data: bytes, demuxer: str, candidates: Sequence[int], allowance: Allowance) -> list[int]:
    """Return the tracks that are not silent, in the order of the candidates; decodes all of them at once.

    The search ends with the first candidate's sound, with the file, or at half of the time. A track that cannot be
    decoded counts as one with sound: its error is reported when it is its turn.
    """
    import av.error

    loud: set[int] = set()
    try:
        with _open(data, demuxer) as container:
            tracks = {container.streams.audio[index].index: index for index in candidates}
            streams = [container.streams.audio[index] for index in candidates]
            for stream in streams:
                stream.codec_context.thread_count = 1
            for packet in container.demux(streams):
                index = tracks[packet.stream.index]
                if allowance.is_half_spent or candidates[0] in loud:
                    break
                if index in loud:
                    continue
                try:
                    frames: list[AudioFrame] = packet.decode()
                except av.error.InvalidDataError:
                    loud.add(index)
                    continue
                if any(float(np.square(_samples_of(frame)).mean(axis=1).max()) > _SILENT_POWER for frame in frames):
                    loud.add(index)
    except _library_errors():
        return list(candidates)
    return [index for index in candidates if index in loud]


def _with_track_warnings(
    decoded: Decoded, order: Sequence[int], passed_over: Sequence[str], *, is_chosen: bool
) -> Decoded:
    """Add the warnings about the choice of the track."""
    warnings: list[AudioWarning] = []
    if decoded.num_tracks > 1 and not is_chosen:
        message = f"The file holds {decoded.num_tracks} audio tracks; track {decoded.track} was used."
        warnings.append(AudioWarning("several_tracks", f"{message} Send `track` to choose another."))
    if passed_over or (not is_chosen and decoded.num_tracks > 1 and decoded.track - 1 != order[0]):
        named = "; ".join(passed_over[:3]) + (f"; and {len(passed_over) - 3} more" if len(passed_over) > 3 else "")
        warnings.append(AudioWarning("track_skipped", f"Track {decoded.track} was used instead: {named}."))
    return replace(decoded, warnings=(*warnings, *decoded.warnings))


def _open(data: bytes, demuxer: str, options: dict[str, str] | None = None) -> Any:
    import av

    return av.open(io.BytesIO(data), "r", format=demuxer, options=_OPTIONS | (options or {}), metadata_errors="replace")


# FFmpeg's errors, and PyAV's errors for invalid tags, layouts and numbers.
def _library_errors() -> tuple[type[Exception], ...]:
    import av.error

    return (av.error.FFmpegError, ArithmeticError, LookupError, OSError, ValueError, RuntimeError, AssertionError)


def _read_tracks(data: bytes, demuxer: str, track: int | None) -> tuple[list[int], int, AudioError | None]:
    """Return the audio tracks to try, from 0, their number, and the error of an excluded first choice.

    Raises:
        UnsupportedAudioError: If no track has a permitted codec.
        InvalidAudioError: If the file is damaged, without audio, or without the track.
    """
    try:
        with _open(data, demuxer) as container:
            streams = container.streams.audio
            num_tracks = len(streams)
            if not num_tracks:
                has_video = bool(container.streams.video)
                message = (
                    "The file holds a video or a picture and no audio." if has_video else "The file holds no audio."
                )
                raise InvalidAudioError(message, code="no_audio_stream")
            names = [None if stream.codec_context is None else stream.codec_context.codec.name for stream in streams]
            ranks = [_rank(int(stream.disposition)) for stream in streams]
    except _library_errors():
        refuse_damaged()
    if track is not None:
        if not 1 <= track <= num_tracks:
            refuse_track(track, num_tracks)
        order = [track - 1]
    else:
        order = sorted(range(num_tracks), key=lambda index: (ranks[index], index))
    usable = [index for index in order if names[index] in CODECS]
    error = None
    if not usable or usable[0] != order[0]:
        error = _unsupported(data, demuxer, names[order[0]])
    if not usable:
        assert error is not None
        raise error
    return usable, num_tracks, error


def _unsupported(data: bytes, demuxer: str, name: str | None) -> UnsupportedAudioError:
    """Return the error for a track that cannot be decoded: encrypted, or in another codec."""
    message = "The audio codec of the file is not supported."
    if any(mark in data for mark in _ENCRYPTED.get(demuxer, ())):
        message = "The file is encrypted, as those of shops and streaming services are."
    return UnsupportedAudioError(
        message,
        code="unsupported_codec",
        actual=name if name is None or len(name) <= 40 else None,
        hint="Convert the clip to wav, flac, mp3 or opus.",
    )


def _rank(disposition: int) -> int:
    """Return the place of a track in the order of trial: the default one first, tracks for few listeners last."""
    from av.stream import Disposition

    if disposition & Disposition.default:
        return 0
    return 2 if any(disposition & Disposition[name] for name in _LESS_LIKELY) else 1


def _decode_track(
    data: bytes, demuxer: str, index: int, allowance: Allowance, weights_C: NDArray[np.float32] | None
) -> Decoded:
    """Decode one audio track, counted from 0."""
    try:
        with _open(data, demuxer) as container:
            decoded = _decode(container, data, demuxer, index, allowance, weights_C)
        if demuxer != "mov" or b"elst" not in data:
            return decoded
        whole_s = _packets_s(data, demuxer, index, _NO_EDITS)
        decoded_s = decoded.num_samples / SAMPLE_RATE_HZ
        if decoded_s < _MIN_KEPT_S < whole_s:
            with _open(data, demuxer, _NO_EDITS) as container:
                decoded = _decode(container, data, demuxer, index, allowance, weights_C)
            message = "The file's edit list keeps none of its sound and was not applied."
            return replace(decoded, warnings=(*decoded.warnings, AudioWarning("edit_list_applied", message)))
        if whole_s - decoded_s > _MIN_EDITED_S:
            removed_s = round(whole_s - decoded_s, 2)
            message = f"The file's edit list leaves out {removed_s:.2f} s of its sound; they were not used."
            return replace(decoded, warnings=(*decoded.warnings, AudioWarning("edit_list_applied", message, removed_s)))
        return decoded
    except _library_errors():
        refuse_damaged()


def _decode(
    container: Any,
    data: bytes,
    demuxer: str,
    index: int,
    allowance: Allowance,
    weights_C: NDArray[np.float32] | None,
) -> Decoded:
    import av.error

    stream = _prepare_stream(container, demuxer, index)
    context = stream.codec_context
    is_exact = context.codec.canonical_name.startswith(("pcm_", "flac", "alac"))
    allowance.allow_padding(not is_exact)
    stated_s = _stated_s(container, stream, data, demuxer)
    if stated_s is not None:
        allowance.set_source(context.sample_rate, context.layout.nb_channels)
        _require_duration(allowance, stated_s, data, demuxer, index)
    gatherer = Gatherer(allowance, weights_C)
    is_mp3 = demuxer == "mp3"
    num_packets = num_errors = rate_hz = channels = 0
    lost_s = 0.0
    for packet in container.demux(stream):
        allowance.check()
        num_packets += 1
        try:
            frames: list[AudioFrame] = packet.decode()
        except av.error.InvalidDataError:
            if not is_mp3:
                raise
            num_errors += 1
            lost_s += float((packet.duration or 0) * (packet.time_base or 0))
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
    # The first frames of an MP3 cut from a longer one refer to missing data.
    if num_errors > max(2, _MAX_MP3_ERROR_SHARE * num_packets):
        refuse_damaged()
    samples_S = gatherer.finish()
    num_samples = _without_padding(gatherer.num_samples, stated_s, demuxer)
    missing_s = 0.0 if stated_s is None else stated_s - num_samples / SAMPLE_RATE_HZ
    # The caller refuses a stream without samples as too short; its properties come from the header.
    return Decoded(
        samples_S[:num_samples],
        num_samples,
        context.codec.canonical_name,
        rate_hz or context.sample_rate,
        channels or context.layout.nb_channels,
        gatherer.num_source_samples,
        gatherer,
        missing_s=round(missing_s, 3) if missing_s > max(_MIN_MISSING_S, 0.01 * (stated_s or 0.0)) else 0.0,
        warnings=tuple(_damage_warnings(lost_s)),
    )


def _prepare_stream(container: Any, demuxer: str, index: int) -> Any:
    """Return the stream with settings for its decoding; the packets of others are dropped."""
    from av.stream import Discard

    stream = container.streams.audio[index]
    for other in container.streams:
        if other.index != stream.index:
            other.discard = Discard.all
    stream.codec_context.thread_count = 1
    if demuxer == "flac":
        # Otherwise the library returns a damaged frame as noise.
        stream.codec_context.options = {"err_detect": "crccheck+explode"}
    return stream


def _require_duration(allowance: Allowance, stated_s: float, data: bytes, demuxer: str, index: int) -> None:
    if allowance.is_too_long(stated_s - _PADDING_S):
        # The header may be wrong; the packets' durations need no decoding.
        allowance.require_duration(min(stated_s, _packets_s(data, demuxer, index)) - _PADDING_S)


def _without_padding(num_samples: int, stated_s: float | None, demuxer: str) -> int:
    """Return the number of samples without the padding of the last frame, if the container states the length."""
    if stated_s is not None and demuxer == "mov":
        excess = num_samples - round(stated_s * SAMPLE_RATE_HZ)
        if 0 < excess <= _FRAME_PADDING_S * SAMPLE_RATE_HZ:
            return num_samples - excess
    return num_samples


def _damage_warnings(lost_s: float) -> Iterator[AudioWarning]:
    if lost_s > 2 * _FRAME_PADDING_S:
        message = f"{lost_s:.2f} s of the clip are damaged and were left out."
        yield AudioWarning("damage_skipped", message, round(lost_s, 2))


def _stated_s(container: Any, stream: Any, data: bytes, demuxer: str) -> float | None:
    """Return the length of a track in the header, in seconds; None if absent, or given only for all tracks."""
    if demuxer in _GUESSED_LENGTH:
        return None
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    if container.duration is None or len(container.streams) > 1:
        return None
    # Without this element FFmpeg estimates a length from the bit rate.
    if demuxer == "matroska" and b"\x44\x89" not in data[:_MATROSKA_HEAD_BYTES]:
        return None
    return container.duration / _MICROSECONDS


def _packets_s(data: bytes, demuxer: str, index: int, options: dict[str, str] | None = None) -> float:
    """Return the total duration of a track's packets in seconds, without decoding them."""
    seconds = 0.0
    with _open(data, demuxer, options) as container:
        for packet in container.demux(container.streams.audio[index]):
            seconds += float((packet.duration or 0) * (packet.time_base or 0))
    return seconds


def _samples_of(frame: AudioFrame) -> NDArray[np.float32]:
    """Return the samples of a frame, float32 [S, C]; integers are scaled to [-1, 1)."""
    array = frame.to_ndarray()
    samples_SC = array.T if frame.format.is_planar else array.reshape(-1, frame.layout.nb_channels)
    if (scaling := _SCALES.get(frame.format.name.removesuffix("p"))) is not None:
        offset, scale = scaling
        samples_SC = (samples_SC.astype(np.float64) - offset) * scale
    return cast(NDArray[np.float32], samples_SC.astype(np.float32, copy=False))
