"""Decodes one clip in an ffmpeg child that can open that clip and nothing else.

The child is told the container, so it probes for no other; it may use one protocol (the open file), one demuxer and a
short list of codecs; memory, CPU time, files and wall-clock time are limited; and nobody hears what it prints, except
for the few fields picked out below.

Knows nothing of clients, windows or models: bytes in, counted samples and some facts about the source out.

Axes: S samples.
"""

from __future__ import annotations

import math
import os
import re
import resource
import selectors
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from hyper_model.audio_limits import (
    MAX_SOURCE_CHANNELS,
    SAMPLE_RATE_HZ,
    Allowance,
    AudioLimits,
    refuse_damaged,
)
from hyper_model.errors import HyperError, InvalidAudioError, UnsupportedAudioError

_CODECS = (
    "pcm_s8,pcm_u8,pcm_s16le,pcm_s16be,pcm_s24le,pcm_s24be,pcm_s32le,pcm_s32be,pcm_f32le,pcm_f32be,pcm_f64le,pcm_f64be,"
    "pcm_mulaw,pcm_alaw,adpcm_ms,adpcm_ima_wav,adpcm_ima_qt,mp3float,mp3,flac,vorbis,libvorbis,opus,libopus,aac,aac_fixed,"
    "alac,amrnb,amrwb,libopencore_amrnb,libopencore_amrwb,wmav1,wmav2"
)
_POLL_S = 0.05
_MAX_LOG_BYTES = 2**18
# Anchored at two to four blanks: values of the clip's own tags are printed further in, so no tag can pose as a stream.
_STREAM = re.compile(
    rb"^ {2,4}Stream #0:\d[^\n]*?: Audio: (?P<codec>\w+)[^\n]*?, (?P<rate>\d{1,9}) Hz, (?P<layout>[^,\n]+)[,\n]",
    re.MULTILINE,
)
_DURATION = re.compile(rb"^  Duration: (\d{1,9}):(\d\d):(\d\d\.\d\d)", re.MULTILINE)


@cache
def find_ffmpeg() -> str:
    """Finds the decoder: `ffmpeg` on PATH (which the system keeps patched), else the one inside imageio-ffmpeg.

    Raises:
        HyperError: There is neither.
    """
    if found := shutil.which("ffmpeg"):
        return found
    try:
        import imageio_ffmpeg  # pyright: ignore[reportMissingTypeStubs]

        return cast(str, cast(Any, imageio_ffmpeg).get_ffmpeg_exe())
    except (ImportError, RuntimeError):
        raise HyperError("There is no ffmpeg: put it on PATH or install the package imageio-ffmpeg.") from None


@dataclass(frozen=True, eq=False)
class Decoded:
    """Holds what the child made of a clip, and what it said about it.

    Attributes:
        samples_S: float32 [S], mono, 16 kHz, finite.
        codec: Name of the codec, such as "opus"; None where its line could not be found.
        source_sample_rate_hz: Rate before resampling; 0 where not known.
        source_channels: Channels before the down-mix; 0 where not known.
        stated_duration_s: Length that the header states; None where it states none or ffmpeg had to guess.
        ended_early: The container promised more bytes than there are.
    """

    samples_S: NDArray[np.float32]  # noqa: N815
    codec: str | None
    source_sample_rate_hz: int
    source_channels: int
    stated_duration_s: float | None
    ended_early: bool


def decode_in_child(data: bytes, demuxer: str, allowance: Allowance) -> Decoded:
    """Lets an ffmpeg child decode, down-mix and resample; we count what comes out.

    Args:
        data: The whole file.
        demuxer: ffmpeg's name of the container that the magic bytes announce; no other is tried.
        allowance: Bounds the work.

    Raises:
        UnsupportedAudioError: The codec is not on our list.
        InvalidAudioError: Damaged, without audio, or too slow to decode.
        AudioTooLargeError: More decoded seconds than the limits allow.
        AudioCancelledError: The caller has left.
    """
    with _unnamed_file(data) as source_fd:
        process = subprocess.Popen(
            _command(demuxer, source_fd, allowance.limits),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(source_fd,),
            # Nothing of our environment: FFREPORT writes files, and keys and proxies are not the decoder's business.
            env={"PATH": os.defpath, "LC_ALL": "C", "MALLOC_ARENA_MAX": "1"},
            cwd="/",
            start_new_session=True,
        )
        with process:
            try:
                _limit(process.pid, allowance.limits)
                pcm, log = _drain(process, allowance)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=allowance.remaining_s)
            finally:
                process.kill()
    allowance.check()
    if b"Input #0" in log.text and b": Audio: " not in log.text:
        raise InvalidAudioError("The file holds no audio.", code="no_audio_stream")
    if process.returncode and b"not on whitelist" in log.text:
        raise UnsupportedAudioError(
            "The file is audio, but in a codec that we do not decode.",
            code="unsupported_codec",
            actual=log.codec,
            hint="Convert the clip to wav, flac, mp3 or opus.",
        )
    samples_S = np.frombuffer(pcm, dtype="<f4", count=len(pcm) // 4).astype(np.float32)
    if process.returncode:
        refuse_damaged()
    if not np.isfinite(samples_S).all():
        refuse_damaged("The clip holds samples that are not numbers.")
    ended_early = b"File ended prematurely" in log.text
    return Decoded(samples_S, log.codec, log.rate_hz, log.channels, log.stated_duration_s, ended_early)


def _command(demuxer: str, source_fd: int, limits: AudioLimits) -> list[str]:
    # One second more than the limit: ffmpeg stops at -t without an error, and only the surplus tells a cut from an end.
    seconds = f"{limits.max_duration_s + 1:.3f}"
    # The mean of all channels, as for WAV and FLAC: `<` divides by the number of channels that exist.
    mean = "pan=mono|c0<" + "+".join(f"c{channel}" for channel in range(MAX_SOURCE_CHANNELS))
    # MP3 decoders are made to find their step again after joins, tags and junk; elsewhere an error is damage.
    strictness = ("-max_error_rate", "0.1") if demuxer == "mp3" else ("-xerror",)
    # Each of these spellings works in ffmpeg 5.1, 7.0 and 9.0. `info` prints the stream's codec, rate and channels.
    return [
        *(find_ffmpeg(), "-nostdin", "-hide_banner", "-nostats", "-loglevel", "info", *strictness),
        *("-threads", "1", "-filter_threads", "1", "-max_alloc", str(64 * 2**20)),
        *("-protocol_whitelist", "file", "-format_whitelist", demuxer, "-codec_whitelist", _CODECS),
        *("-probesize", "1048576", "-analyzeduration", "5000000", "-max_streams", "8", "-max_probe_packets", "256"),
        *("-t", seconds, "-f", demuxer, "-i", f"file:/dev/fd/{source_fd}"),
        *("-map", "0:a:0", "-vn", "-sn", "-dn", "-map_metadata", "-1", "-map_chapters", "-1"),
        *("-af", f"aformat=sample_fmts=flt,{mean},aresample={SAMPLE_RATE_HZ}"),
        *("-t", seconds, "-c:a", "pcm_f32le", "-f", "f32le", "pipe:1"),
    ]


@contextmanager
def _unnamed_file(data: bytes) -> Generator[int]:
    """Holds the clip in a file without a name: nobody else can open it, and no crash can leave it behind.

    A file and not a pipe, because MP4 may keep its index at the end.
    """
    if sys.platform == "linux":
        descriptor = os.memfd_create("clip")
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            yield descriptor
    else:
        with tempfile.TemporaryFile() as file:
            file.write(data)
            file.flush()
            file.seek(0)
            yield file.fileno()


def _limit(pid: int, limits: AudioLimits) -> None:
    """Sets the child's limits from outside: code between fork and exec can deadlock in a process with threads."""
    if sys.platform != "linux":
        return
    bounds = {
        resource.RLIMIT_DATA: limits.max_decoder_memory_bytes,
        # Code and reserved address space come on top (the static build alone maps 170 MB).
        resource.RLIMIT_AS: limits.max_decoder_memory_bytes + 2**30,
        resource.RLIMIT_CPU: math.ceil(limits.decode_timeout_s) + 1,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NOFILE: 32,
        resource.RLIMIT_CORE: 0,
    }
    with suppress(ProcessLookupError):
        for kind, bound in bounds.items():
            resource.prlimit(pid, kind, (bound, bound))


class _Log:
    """Picks the few facts we want from what the child prints, and refuses by them before the work is done."""

    def __init__(self, allowance: Allowance) -> None:
        self._allowance = allowance
        self.text = bytearray()
        self.codec: str | None = None
        self.rate_hz = 0
        self.channels = 0
        self.stated_duration_s: float | None = None

    def feed(self, chunk: bytes) -> None:
        if len(self.text) >= _MAX_LOG_BYTES:
            return
        self.text += chunk
        if self.codec is not None:
            return
        if stream := _STREAM.search(self.text):
            self.codec, self.rate_hz = stream["codec"].decode("ascii"), int(stream["rate"])
            self.channels = _count_channels(stream["layout"].decode("ascii", "replace"))
            self._allowance.set_source(self.rate_hz, self.channels)
            stated = _DURATION.search(self.text)
            if stated and b"Estimating duration" not in self.text:
                hours, minutes, seconds = (float(group) for group in stated.groups())
                self.stated_duration_s = 3600 * hours + 60 * minutes + seconds
                # Off by less than a second of padding.
                self._allowance.require_duration(self.stated_duration_s - 1.0)
        elif len(self.text) >= _MAX_LOG_BYTES:
            # The stream's own line stands behind the tags; without it nothing bounds the work but the clock.
            refuse_damaged("The clip's tags are too long.")


def _drain(process: subprocess.Popen[bytes], allowance: Allowance) -> tuple[bytearray, _Log]:
    """Reads both pipes to their ends, unless there is too much, it takes too long, or the caller has left."""
    assert process.stdout is not None and process.stderr is not None
    pcm, log = bytearray(), _Log(allowance)
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        selector.register(process.stderr, selectors.EVENT_READ)
        while selector.get_map():
            ready = selector.select(min(_POLL_S, allowance.remaining_s))
            allowance.check()
            for key, _ in ready:
                chunk = os.read(key.fd, 2**16)
                if not chunk:
                    selector.unregister(key.fileobj)
                elif key.fileobj is process.stderr:
                    log.feed(chunk)
                else:
                    pcm += chunk
                    allowance.require_duration(len(pcm) // 4 / SAMPLE_RATE_HZ)
    return pcm, log


def _count_channels(layout: str) -> int:
    """Counts the channels in ffmpeg's name of a layout: "stereo", "5.1(side)", "12 channels (FL+FR+...)"."""
    if number := re.match(r"(\d+) channels", layout):
        return int(number[1])
    if dotted := re.match(r"\d+(\.\d+)+", layout):
        return sum(int(part) for part in dotted[0].split("."))
    names = {"stereo": 2, "downmix": 2, "binaural": 2, "quad": 4, "hexagonal": 6, "octagonal": 8, "hexadecagonal": 16}
    name = re.match(r"[a-z]*", layout)
    return names.get(name[0] if name else "", 1)
