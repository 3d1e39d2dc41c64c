"""Odd files from users: each kind in the field reports, and others with the same cause.

The reports describe situations; each test names the common cause of its files. Inputs are made here with an ffmpeg
program or by editing bytes.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hyper_model.audio import (
    SAMPLE_RATE_HZ,
    AudioLimits,
    Waveform,
    decode,
    find_ffmpeg,
    require_single_window,
)
from hyper_model.errors import AudioError, AudioTooLongError, InvalidAudioError, UnsupportedAudioError
from hyper_model.trace import Speaker, Trace, TraceTokenizer, render
from server.decoding.pool import DecoderPool
from server.engines.protocol import Clip
from server.telemetry.labels import WorkerFailure
from tests.recording_engine import ToneEngine, recording, words_of
from tests.serving import Live, running, scripted

CLIPS = Path(__file__).parent / "assets/clips"
VOICE = "aevalsrc=0.4*sin(2*PI*220*t)*(0.6+0.4*sin(2*PI*3*t)):s=16000:d={}"
OTHER = "aevalsrc=0.3*sin(2*PI*700*t):s=16000:d={}"
SILENCE = "anullsrc=r=16000:cl=mono:d={}"


@functools.cache
def encode(*arguments: str) -> bytes:
    """Run ffmpeg with a real output file, so that its writer can return to the header."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip"
        subprocess.run([find_ffmpeg(), "-v", "error", "-y", *arguments, str(path)], check=True)
        return path.read_bytes()


def source(*patterns: str, seconds: float = 2.0) -> list[str]:
    """Return ffmpeg's arguments for inputs of this duration."""
    return [part for pattern in patterns for part in ("-f", "lavfi", "-i", pattern.format(seconds))]


def tracks(container: str, *patterns: str, codec: str = "aac", default: int | None = 0) -> bytes:
    """Write a container with one audio track per pattern; at most one is the default."""
    maps = [part for index in range(len(patterns)) for part in ("-map", str(index))]
    marks = [
        part
        for index in range(len(patterns))
        for part in (f"-disposition:a:{index}", "default" if index == default else "0")
    ]
    return encode(*source(*patterns), *maps, *marks, "-c:a", codec, "-f", container)


def codes(waveform: Waveform) -> list[str]:
    return [warning.code for warning in waveform.warnings]


def pitch_hz(waveform: Waveform) -> float:
    """Return the strongest frequency."""
    spectrum = np.abs(np.fft.rfft(waveform.samples_S))
    return float(np.argmax(spectrum[1:]) + 1) * SAMPLE_RATE_HZ / waveform.num_samples


# --- Which track: the container's default, one with sound before a silent one, or the one that is named -------------


@pytest.mark.parametrize("container", ["mp4", "mov", "ipod", "matroska", "asf"])
def test_the_first_of_two_tracks_is_used_and_the_second_is_named(container: str) -> None:
    codec = "wmav2" if container == "asf" else "aac"
    waveform = decode(tracks(container, VOICE, OTHER, codec=codec))
    assert (waveform.num_tracks, waveform.track, codes(waveform)) == (2, 1, ["several_tracks"])
    assert pitch_hz(waveform) == pytest.approx(220, abs=5)
    assert "2 audio tracks" in waveform.warnings[0].message


@pytest.mark.parametrize("container", ["mp4", "mov", "matroska"])
def test_the_default_track_is_used_wherever_it_stands(container: str) -> None:
    waveform = decode(tracks(container, OTHER, SILENCE, VOICE, default=2))
    assert (waveform.num_tracks, waveform.track, codes(waveform)) == (3, 3, ["several_tracks"])
    assert pitch_hz(waveform) == pytest.approx(220, abs=5)


@pytest.mark.parametrize("container", ["mp4", "matroska", "ogg"])
def test_a_silent_default_track_is_passed_over_for_one_with_sound(container: str) -> None:
    waveform = decode(tracks(container, SILENCE, SILENCE, VOICE, codec="flac" if container == "ogg" else "aac"))
    assert waveform.track == 3 and codes(waveform) == ["several_tracks", "track_skipped"]
    assert pitch_hz(waveform) == pytest.approx(220, abs=5)


def test_a_track_with_sound_is_found_behind_many_silent_ones() -> None:
    maps = [*["-map", "0"] * 40, "-map", "1"]
    waveform = decode(encode(*source(SILENCE, VOICE), *maps, "-c:a", "aac", "-f", "matroska"))
    assert (waveform.num_tracks, waveform.track) == (41, 41)
    assert codes(waveform) == ["several_tracks", "track_skipped"]
    assert pitch_hz(waveform) == pytest.approx(220, abs=5)


def test_silent_tracks_alone_are_silence_and_not_an_error() -> None:
    waveform = decode(tracks("mp4", SILENCE, SILENCE))
    assert waveform.track == 1 and waveform.quality.silence_ratio == 1.0 and codes(waveform) == ["several_tracks"]


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_track_chooses_and_is_refused_where_there_is_none(container: str) -> None:
    data = tracks(container, VOICE, OTHER)
    chosen = decode(data, track=2)
    assert pitch_hz(chosen) == pytest.approx(700, abs=5) and codes(chosen) == [] and chosen.num_tracks == 2
    for track in (0, 3, -1):
        with pytest.raises(InvalidAudioError) as caught:
            decode(data, track=track)
        assert (caught.value.code, caught.value.limit, caught.value.actual) == ("no_such_track", 2, track)
    with pytest.raises(InvalidAudioError) as caught:
        decode(encode(*source(VOICE), "-f", "wav"), track=2)
    assert caught.value.code == "no_such_track"


def test_a_track_that_was_chosen_is_used_although_it_is_silent() -> None:
    assert decode(tracks("mp4", SILENCE, VOICE), track=1).quality.silence_ratio == 1.0


def test_a_track_in_an_unknown_codec_does_not_refuse_the_other_one() -> None:
    maps = ["-map", "0", "-map", "1", "-c:a:0", "ac3", "-c:a:1", "aac"]
    data = encode(*source(OTHER, VOICE), *maps, "-f", "matroska")
    assert pitch_hz(decode(data)) == pytest.approx(220, abs=5)
    with pytest.raises(UnsupportedAudioError) as caught:
        decode(data, track=1)
    assert caught.value.actual == "ac3"


def test_hundreds_of_tracks_are_counted() -> None:
    data = encode(*source(VOICE, seconds=0.5), *["-map", "0"] * 300, "-c:a", "pcm_s16le", "-f", "matroska")
    waveform = decode(data)
    assert (waveform.num_tracks, waveform.track, waveform.duration_s) == (300, 1, pytest.approx(0.5, abs=0.02))


# --- What else a container holds is not sound, and changes nothing ---------------------------------------------------


def beside(folder: Path) -> dict[str, bytes]:
    """Write clips with pictures, subtitles, attachments, chapters, tags and timecodes beside the sound."""
    words, font, chapters, cover = (folder / name for name in ("words.srt", "font.ttf", "chapters.txt", "cover.png"))
    words.write_text("1\n00:00:00,000 --> 00:00:01,000\nécoute\n")
    font.write_bytes(bytes(range(256)) * 8)
    chapters.write_text(";FFMETADATA1\ntitle=\u2028été\n[CHAPTER]\nTIMEBASE=1/1000\nSTART=0\nEND=500\ntitle=один\n")
    cover.write_bytes(encode(*source("testsrc=d={}:s=64x64"), "-frames:v", "1", "-f", "image2", "-c:v", "png"))
    video = source(VOICE, "testsrc=d={}:s=32x32:r=5")
    both = ["-map", "0", "-map", "1"]
    return {
        "video": encode(*video, *both, "-c:v", "mpeg4", "-f", "mp4"),
        "video first": encode(*video, "-map", "1", "-map", "0", "-c:v", "mpeg4", "-f", "matroska"),
        "subtitles": encode(*source(VOICE), "-i", str(words), *both, "-c:s", "mov_text", "-f", "mp4"),
        "subtitles in mkv": encode(*source(VOICE), "-i", str(words), *both, "-c:s", "ass", "-f", "matroska"),
        "attachment": encode(
            *source(VOICE), "-attach", str(font), "-metadata:s:t", "mimetype=font/ttf", "-f", "matroska"
        ),
        "chapters": encode(*source(VOICE), "-i", str(chapters), "-map", "0", "-map_metadata", "1", "-f", "mp4"),
        "timecode": encode(*video, *both, "-c:v", "mpeg4", "-timecode", "01:00:00:00", "-f", "mov"),
        "cover art": encode(
            *source(VOICE), "-i", str(cover), *both, "-c:v", "copy", "-disposition:v", "attached_pic", "-f", "mp3"
        ),
        "cover art in flac": encode(
            *source(VOICE), "-i", str(cover), *both, "-c:v", "copy", "-disposition:v", "attached_pic", "-f", "flac"
        ),
    }


def test_what_is_beside_the_sound_changes_nothing(tmp_path: Path) -> None:
    for name, data in beside(tmp_path).items():
        waveform = decode(data)
        assert waveform.duration_s == pytest.approx(2.0, abs=0.08), name
        assert pitch_hz(waveform) == pytest.approx(220, abs=5), name
        assert waveform.warnings == (), name


def test_a_sandboxed_decoder_reads_odd_files_too(tmp_path: Path) -> None:
    """Modules and libraries cannot be opened inside the sandbox, so all of them must be loaded before."""
    files = beside(tmp_path) | {
        "silent first": tracks("mp4", SILENCE, VOICE),
        "hundreds of tracks": encode(*source(VOICE), *["-map", "0"] * 200, "-c:a", "pcm_s16le", "-f", "matroska"),
        "out of phase": wav(np.stack([speech(), -speech()], axis=1)),
        "a call": wav(call()),
    }
    deaths: list[WorkerFailure] = []

    async def work() -> None:
        pool = DecoderPool(AudioLimits(), memory_bytes=256 * 2**20, on_death=deaths.append)
        await pool.start()
        try:
            for name, data in files.items():
                inside, outside = await pool.decode(data), decode(data)
                assert inside.sha256 == outside.sha256, name
                assert (inside.warnings, inside.track, inside.num_tracks, inside.missing_s) == (
                    outside.warnings,
                    outside.track,
                    outside.num_tracks,
                    outside.missing_s,
                ), name
            chosen = await pool.decode(tracks("mp4", VOICE, OTHER), track=2)
            assert pitch_hz(chosen) == pytest.approx(700, abs=5) and chosen.track == 2
            right = await pool.decode(wav(call()), channel="right")
            assert right.sha256 == decode(wav(call()), channel="right").sha256
        finally:
            await pool.stop()

    asyncio.run(work())
    assert deaths == []


# --- The mean of channels cancels where one is inverted --------------------------------------------------------------


def wav(samples_SC: NDArray[np.float32], rate_hz: int = SAMPLE_RATE_HZ) -> bytes:
    """Write 16-bit samples, float32 [S, C] in [-1, 1]."""
    channels = samples_SC.shape[1]
    body = np.rint(samples_SC * 32767).astype("<i2").tobytes()
    head = struct.pack("<HHIIHH", 1, channels, rate_hz, rate_hz * channels * 2, channels * 2, 16)
    return (
        b"RIFF"
        + struct.pack("<I", 36 + len(body))
        + b"WAVEfmt "
        + struct.pack("<I", 16)
        + head
        + b"data"
        + struct.pack("<I", len(body))
        + body
    )


@functools.cache
def speech(number: int = 0) -> NDArray[np.float32]:
    """Return the samples of one of the clips, float32 [S]."""
    paths = sorted(path for path in CLIPS.iterdir() if path.suffix in (".wav", ".flac", ".mp3", ".ogg", ".m4a"))
    return decode(paths[number].read_bytes()).samples_S


def rms(samples_S: NDArray[np.float32]) -> float:
    return float(np.sqrt(np.mean(np.square(samples_S, dtype=np.float64))))


def out_of_phase() -> dict[str, NDArray[np.float32]]:
    """Make recordings of one voice with inverted channels, float32 [S, C]."""
    voice_S = speech()
    noise_S = np.random.default_rng(0).normal(0, 0.002, len(voice_S)).astype(np.float32)
    half = len(voice_S) // 2
    sign_S = np.where(np.arange(len(voice_S)) < half, 1, -1).astype(np.float32)
    quiet_S = 0.3 * voice_S
    return {
        "exact": np.stack([voice_S, -voice_S], axis=1),
        "with noise of each microphone": np.stack([voice_S + noise_S, -voice_S - noise_S[::-1]], axis=1),
        "one channel weaker": np.stack([voice_S, -0.7 * voice_S], axis=1),
        "for half of the time": np.stack([voice_S, sign_S * voice_S], axis=1),
        "four channels": np.stack([voice_S, -voice_S, voice_S, -voice_S], axis=1),
        "quiet": np.stack([quiet_S, -quiet_S], axis=1),
    }


@pytest.mark.parametrize("name", out_of_phase())
def test_channels_out_of_phase_are_mixed_so_that_they_do_not_cancel(name: str) -> None:
    samples_SC = out_of_phase()[name]
    waveform = decode(wav(samples_SC))
    assert "channels_out_of_phase" in codes(waveform)
    assert "out of phase" in waveform.warnings[0].message and (waveform.warnings[0].seconds or 0) > 0.5
    # The mean would keep almost nothing of it.
    assert rms(waveform.samples_S) > 0.6 * rms(samples_SC[:, 0])


def test_ordinary_stereo_is_still_the_mean_without_a_warning() -> None:
    voice_S = speech()
    delayed_S = np.concatenate([np.zeros(5, np.float32), voice_S[:-5]])
    room_S = np.convolve(voice_S, np.exp(-np.arange(800) / 150) * np.random.default_rng(1).normal(0, 0.3, 800))
    for name, samples_SC in {
        "the same twice": np.stack([voice_S, voice_S], axis=1),
        "one side": np.stack([voice_S, np.zeros_like(voice_S)], axis=1),
        "panned": np.stack([voice_S, 0.3 * voice_S], axis=1),
        "a delay": np.stack([voice_S, delayed_S], axis=1),
        "a room": np.stack([voice_S, room_S[: len(voice_S)].astype(np.float32)], axis=1) * 0.5,
    }.items():
        waveform = decode(wav(samples_SC))
        assert waveform.warnings == (), name
        assert np.allclose(waveform.samples_S, samples_SC.mean(axis=1), atol=1e-4), name


# --- Two channels hold two recordings --------------------------------------------------------------------------------


def call() -> NDArray[np.float32]:
    """Lay one speaker on each channel, one after the other, float32 [S, C]."""
    first_S, second_S = speech(0), speech(1)
    gap_S = np.zeros(len(first_S), np.float32)
    left_S = np.concatenate([first_S, np.zeros(len(second_S), np.float32)])
    return np.stack([left_S, np.concatenate([gap_S, second_S])], axis=1)


def test_a_call_with_a_speaker_on_each_channel_suggests_channel() -> None:
    together = min(len(speech(0)), len(speech(1)))
    at_once = np.stack([speech(0)[:together], speech(1)[:together]], axis=1)
    for name, samples_SC in {
        "in turn": call(),
        "at once": at_once,
        "the second louder": call() * np.array([0.3, 1.0], np.float32),
    }.items():
        waveform = decode(wav(samples_SC))
        assert codes(waveform) == ["channels_differ"], name
        assert "channel" in waveform.warnings[0].message
        for number, channel in enumerate(("left", "right")):
            chosen = decode(wav(samples_SC), channel=channel)
            assert np.allclose(chosen.samples_S, samples_SC[:, number], atol=1e-4) and chosen.warnings == ()


def test_channel_of_a_clip_of_one_channel_is_that_channel() -> None:
    data = wav(speech()[:, None])
    assert decode(data, channel="right").sha256 == decode(data).sha256


# --- Codec delay and padding are not sound ---------------------------------------------------------------------------

THIRTY_S = {
    "m4a, 44.1 kHz": ("-ar", "44100", "-c:a", "aac", "-f", "ipod"),
    "m4a, 16 kHz": ("-ar", "16000", "-c:a", "aac", "-f", "ipod"),
    "m4a, 8 kHz": ("-ar", "8000", "-c:a", "aac", "-f", "ipod"),
    "adts": ("-ar", "44100", "-c:a", "aac", "-f", "adts"),
    "adts, 16 kHz": ("-ar", "16000", "-c:a", "aac", "-f", "adts"),
    "amr": ("-ar", "8000", "-c:a", "libopencore_amrnb", "-f", "amr"),
    "fragmented mp4": ("-c:a", "aac", "-f", "mp4", "-movflags", "frag_keyframe+empty_moov"),
    "fragmented mp4, 48 kHz": ("-ar", "48000", "-c:a", "aac", "-f", "mp4", "-movflags", "frag_keyframe+empty_moov"),
    "mkv": ("-c:a", "aac", "-f", "matroska"),
    "mkv, mp3": ("-ar", "44100", "-c:a", "libmp3lame", "-f", "matroska"),
    "mp3 without Info": ("-ar", "44100", "-c:a", "libmp3lame", "-write_xing", "0", "-f", "mp3"),
    "mp3 without Info, 16 kHz": ("-ar", "16000", "-c:a", "libmp3lame", "-write_xing", "0", "-f", "mp3"),
    "mp3": ("-ar", "44100", "-c:a", "libmp3lame", "-f", "mp3"),
    "webm": ("-ar", "48000", "-c:a", "libopus", "-f", "webm"),
    "wma": ("-ar", "44100", "-c:a", "wmav2", "-f", "asf"),
    "3gp": ("-ar", "8000", "-c:a", "libopencore_amrnb", "-f", "3gp"),
    "mp2": ("-ar", "44100", "-c:a", "mp2", "-f", "mp2"),
}


@pytest.mark.parametrize("name", THIRTY_S)
def test_thirty_seconds_fit_a_window_in_every_codec(name: str) -> None:
    data = encode(*source(VOICE, seconds=30.0), *THIRTY_S[name])
    # A service with single windows has the same limit.
    waveform = decode(data, AudioLimits(max_duration_s=30.0))
    require_single_window(waveform)
    assert waveform.duration_s == pytest.approx(30.0, abs=0.06)


def test_a_clip_that_is_longer_by_its_own_samples_is_refused_in_figures_that_differ() -> None:
    for num_samples in (480_001, 480_100, 481_600, 484_800):
        waveform = decode(wav(np.zeros((num_samples, 1), np.float32)))
        with pytest.raises(AudioTooLongError) as caught:
            require_single_window(waveform)
        stated = caught.value.message.split("lasts ")[1].split(" s")[0]
        assert float(stated) > 30.0, caught.value.message
    with pytest.raises(AudioTooLongError):
        require_single_window(decode(encode(*source(VOICE, seconds=30.3), *THIRTY_S["m4a, 16 kHz"])))


@pytest.mark.parametrize("codec", ["aac", "libmp3lame", "libopus", "alac"])
def test_delay_and_padding_of_an_mp4_are_taken_off(codec: str) -> None:
    data = encode(*source(VOICE, seconds=1.234), "-c:a", codec, "-f", "mp4")
    assert decode(data).duration_s == pytest.approx(1.234, abs=0.02)


# --- Sizes that were never patched, or are wrong ---------------------------------------------------------------------

PLAIN = {
    "wav": (("-c:a", "pcm_s16le", "-f", "wav"), b"data", 4, "<I"),
    "wav, 8 bits": (("-c:a", "pcm_u8", "-f", "wav"), b"data", 4, "<I"),
    "wav, mu-law": (("-c:a", "pcm_mulaw", "-f", "wav"), b"data", 4, "<I"),
    "wav, adpcm": (("-c:a", "adpcm_ms", "-f", "wav"), b"data", 4, "<I"),
    "rf64": (("-c:a", "pcm_s16le", "-f", "wav", "-rf64", "always"), b"ds64", 16, "<Q"),
    "w64": (("-c:a", "pcm_s16le", "-f", "w64"), b"data\xf3\xac\xd3\x11", 16, "<Q"),
    "aiff": (("-c:a", "pcm_s16be", "-f", "aiff"), b"SSND", 4, ">I"),
    "au": (("-c:a", "pcm_s16be", "-f", "au"), b".snd", 8, ">I"),
    "caf": (("-c:a", "pcm_s16le", "-f", "caf"), b"data", 4, ">Q"),
}


def restated(name: str, size: int | None, share: float = 0.0) -> bytes:
    """Write a clip of 2 s with another size of its samples in the header, or a share of the true one."""
    arguments, magic, offset, kind = PLAIN[name]
    data = encode(*source(VOICE), *arguments)
    place = data.index(magic) + offset
    true = struct.unpack_from(kind, data, place)[0]
    stated = struct.pack(kind, int(true * share) // 2 * 2 if size is None else size)
    return data[:place] + stated + data[place + len(stated) :]


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("size", [0, 2_000_000_000, 0x7FFF_FFFF, 0xFFFF_FFFF, 0x8000_0000, 30_000_000])
def test_samples_behind_a_placeholder_last_to_the_end_of_the_file(name: str, size: int) -> None:
    waveform = decode(restated(name, size))
    assert waveform.duration_s == pytest.approx(2.0, abs=0.05)
    assert pitch_hz(waveform) == pytest.approx(220, abs=5)
    assert codes(waveform) == ["size_mismatch"] and waveform.missing_s == 0


@pytest.mark.parametrize("name", PLAIN)
def test_samples_that_a_header_leaves_out_are_decoded_with_a_warning(name: str) -> None:
    for share in (0.25, 0.5, 0.9):
        waveform = decode(restated(name, None, share))
        assert waveform.duration_s == pytest.approx(2.0, abs=0.05), share
        assert codes(waveform) == ["size_mismatch"], share
        assert waveform.warnings[0].seconds == pytest.approx(2.0 * (1 - share), abs=0.05), share


@pytest.mark.parametrize("name", PLAIN)
def test_samples_that_a_header_invents_are_reported_as_missing(name: str) -> None:
    waveform = decode(restated(name, None, 2.0))
    assert waveform.duration_s == pytest.approx(2.0, abs=0.05)
    assert waveform.missing_s == pytest.approx(2.0, abs=0.1) and codes(waveform) == ["audio_missing"]


def riff(*chunks: tuple[bytes, bytes, int | None]) -> bytes:
    """Write a RIFF file of chunks, each with its bytes and its stated size."""
    body = b"".join(
        name + struct.pack("<I", len(data) if size is None else size) + data + b"\0" * (len(data) % 2)
        for name, data, size in chunks
    )
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WAVE" + body


FORMAT = (b"fmt ", struct.pack("<HHIIHH", 1, 1, 16_000, 32_000, 2, 16), None)
SECOND = (np.sin(np.arange(16_000) * 0.2) * 8000).astype("<i2").tobytes()


def test_chunks_around_the_samples_of_a_wav_are_no_sound_and_hide_none() -> None:
    tags = (b"LIST", b"INFOICMT" + bytes(20), None)
    longer = {
        "tags before": (FORMAT, tags, (b"data", SECOND, None)),
        "tags behind": (FORMAT, (b"data", SECOND, None), tags),
        "tags behind that state too much": (FORMAT, (b"data", SECOND, None), (b"LIST", bytes(20), 5_000)),
        "tags before that state too much": (FORMAT, (b"LIST", bytes(20), 10**6), (b"data", SECOND, None)),
        "a chunk of odd size": (FORMAT, (b"bext", bytes(7), None), (b"data", SECOND, None)),
        "two chunks of samples": (FORMAT, (b"data", SECOND[:16_000], None), tags, (b"data", SECOND[16_000:], None)),
    }
    for name, chunks in longer.items():
        waveform = decode(riff(*chunks))
        assert waveform.num_samples == 16_000 and waveform.warnings == (), name
    tail = riff(FORMAT, (b"data", SECOND, None))
    for name, behind in {"zeros": bytes(3000), "a tag": b"TAG" + b"x" * 125, "a few bytes": b"\n\n\n"}.items():
        assert decode(tail + behind).num_samples == 16_000, name


def test_joined_files_are_decoded_whole_or_reported() -> None:
    for name in ("wav", "rf64", "w64", "aiff"):
        one = encode(*source(VOICE), *PLAIN[name][0])
        waveform = decode(one + one)
        assert waveform.duration_s == pytest.approx(4.0, abs=0.01) and waveform.warnings == (), name
    other = encode(*source(OTHER), "-ar", "8000", "-c:a", "pcm_s16le", "-f", "wav")
    waveform = decode(encode(*source(VOICE), *PLAIN["wav"][0]) + other)
    assert waveform.duration_s == 2.0 and codes(waveform) == ["unused_sound"]
    for arguments in (("-c:a", "aac", "-f", "mp4"), ("-c:a", "alac", "-f", "caf"), ("-c:a", "wmav2", "-f", "asf")):
        one = encode(*source(VOICE), *arguments)
        assert codes(decode(one + one)) == ["unused_sound"], arguments
    for arguments in (
        ("-c:a", "libvorbis", "-f", "ogg"),
        ("-c:a", "libopus", "-f", "webm"),
        ("-f", "flac"),
        ("-f", "mp3"),
        ("-c:a", "aac", "-f", "adts"),
        ("-ar", "8000", "-c:a", "libopencore_amrnb", "-f", "amr"),
    ):
        one = encode(*source(VOICE), *arguments)
        assert decode(one + one).duration_s == pytest.approx(2 * decode(one).duration_s, abs=0.15), arguments


def test_lengths_that_a_compressed_header_states_do_not_cut_the_clip() -> None:
    flac = encode(*source(VOICE), "-f", "flac")
    packed = int.from_bytes(flac[18:26])
    for share, expected in ((0, []), (0.3, []), (5, ["audio_missing"]), (900, ["size_mismatch"])):
        total = int((packed & (2**36 - 1)) * share)
        waveform = decode(flac[:18] + (packed >> 36 << 36 | total).to_bytes(8) + flac[26:])
        assert waveform.duration_s == pytest.approx(2.0, abs=0.01) and codes(waveform) == expected, share
    mkv = encode(*source(VOICE), "-c:a", "libopus", "-f", "matroska")
    place = mkv.index(b"\x44\x89\x88") + 3
    for seconds, expected in ((0.1, []), (20, ["audio_missing"]), (90_000, ["size_mismatch"])):
        waveform = decode(mkv[:place] + struct.pack(">d", 1000 * seconds) + mkv[place + 8 :])
        assert waveform.duration_s == pytest.approx(2.0, abs=0.03) and codes(waveform) == expected, seconds
    mp3 = encode(*source(VOICE), "-f", "mp3")
    place = mp3.index(b"Info") + 8
    (frames,) = struct.unpack_from(">I", mp3, place)
    for share, expected in ((0.2, []), (3, ["audio_missing"])):
        waveform = decode(mp3[:place] + struct.pack(">I", int(frames * share)) + mp3[place + 4 :])
        assert waveform.duration_s == pytest.approx(2.0, abs=0.1) and codes(waveform) == expected, share


def test_an_edit_list_is_applied_and_says_how_much_it_leaves_out() -> None:
    m4a = encode(*source(VOICE), "-c:a", "aac", "-f", "ipod")
    place = m4a.index(b"elst") + 12
    (true,) = struct.unpack_from(">I", m4a, place)
    waveform = decode(m4a[:place] + struct.pack(">I", true // 2) + m4a[place + 4 :])
    assert waveform.duration_s == pytest.approx(1.0, abs=0.1)
    assert codes(waveform) == ["edit_list_applied"] and waveform.warnings[0].seconds == pytest.approx(1.0, abs=0.1)
    waveform = decode(m4a[:place] + struct.pack(">I", 0) + m4a[place + 4 :])
    assert waveform.duration_s == pytest.approx(2.0, abs=0.1) and codes(waveform) == ["edit_list_applied"]


# --- Junk in front of the first frame --------------------------------------------------------------------------------

JUNK = {
    "ten zeros": bytes(10),
    "a page of zeros": bytes(4096),
    "half a megabyte of zeros": bytes(500_000),
    "a line break": b"\r\n",
    "HTTP headers": b"HTTP/1.1 200 OK\r\ncontent-type: audio/mpeg\r\n\r\n",
    "a tag": b"ID3\x04\x00\x00\x00\x00\x01\x00" + bytes(128),
    "two tags": (b"ID3\x04\x00\x00\x00\x00\x01\x00" + bytes(128)) * 2,
    "a tag that states too much": b"ID3\x03\x00\x00\x7f\x7f\x7f\x7f" + bytes(64),
    "a tag that states too little": b"ID3\x03\x00\x00\x00\x00\x00\x10" + b"TIT2" + b"x" * 300,
    "a byte order mark": b"\xef\xbb\xbf",
    "an old tag": b"TAG" + b"x" * 125,
    "an APE tag": b"APETAGEX" + struct.pack("<IIII8x", 2000, 64, 1, 0xA000_0000) + b"y" * 32,
}
BEHIND_JUNK = {
    "mp3": ("-f", "mp3", "-id3v2_version", "0"),
    "mp3, 8 kHz": ("-ar", "8000", "-f", "mp3", "-id3v2_version", "0"),
    "mp2": ("-c:a", "mp2", "-f", "mp2"),
    "adts": ("-c:a", "aac", "-f", "adts"),
    "wav": ("-c:a", "pcm_s16le", "-f", "wav"),
    "flac": ("-f", "flac"),
    "ogg": ("-c:a", "libopus", "-f", "ogg"),
    "m4a": ("-c:a", "aac", "-f", "ipod"),
    "webm": ("-c:a", "libopus", "-f", "webm"),
    "amr": ("-ar", "8000", "-c:a", "libopencore_amrnb", "-f", "amr"),
    "aiff": ("-f", "aiff"),
    "au": ("-f", "au"),
}


@pytest.mark.parametrize("name", BEHIND_JUNK)
def test_junk_in_front_is_skipped(name: str) -> None:
    clean = encode(*source(VOICE), *BEHIND_JUNK[name])
    expected = decode(clean)
    for junk_name, junk in JUNK.items():
        waveform = decode(junk + clean)
        assert waveform.duration_s == pytest.approx(expected.duration_s, abs=0.06), junk_name
        assert pitch_hz(waveform) == pytest.approx(220, abs=5), junk_name
        is_tag = junk_name in ("a tag", "two tags")
        assert codes(waveform) == ([] if is_tag else ["junk_skipped"]), junk_name


@pytest.mark.parametrize("name", ["mp3", "mp3, 8 kHz", "mp2", "adts"])
def test_a_stream_that_was_joined_midway_is_decoded(name: str) -> None:
    clean = encode(*source(VOICE), *BEHIND_JUNK[name])
    for cut in (101, 333, 1001, len(clean) // 2):
        waveform = decode(clean[cut:])
        assert waveform.duration_s == pytest.approx(2.0 * (1 - cut / len(clean)), abs=0.3)
        assert pitch_hz(waveform) == pytest.approx(220, abs=8)


def test_junk_behind_is_left_out() -> None:
    for name, arguments in BEHIND_JUNK.items():
        clean = encode(*source(VOICE), *arguments)
        expected_s = decode(clean).duration_s
        for behind in (bytes(5000), b"TAG" + b"x" * 125):
            waveform = decode(clean + behind)
            # The samples of AU end with the file; 125 bytes are 2 ms of them.
            assert waveform.duration_s == pytest.approx(expected_s, abs=0.06), name


# --- Errors name the true cause --------------------------------------------------------------------------------------


def later_webm() -> bytes:
    """Return a WebM without its first part, as sent by a page that uploads each piece of a recording separately."""
    data = encode(*source(VOICE), "-c:a", "libopus", "-f", "webm")
    return data[data.index(b"\x1f\x43\xb6\x75") :]


def test_a_description_behind_the_samples_is_read() -> None:
    one = encode(*source(VOICE), *PLAIN["aiff"][0])
    comm = one.index(b"COMM")
    moved = one[:comm] + one[comm + 26 :] + one[comm : comm + 26]
    assert decode(moved).sha256 == decode(one).sha256
    body = riff((b"data", SECOND, None), FORMAT)
    assert decode(body).num_samples == 16_000


ENCRYPTION = (
    *("-encryption_scheme", "cenc-aes-ctr", "-encryption_key", "76a6c65c5ea762046bd749a2e632ccbb"),
    *("-encryption_kid", "a7e61c373e219033c21091fa607bf3b8"),
)


def test_an_error_names_the_true_cause() -> None:
    video = encode(*source("testsrc=d={}:s=32x32"), "-c:v", "mpeg4", "-f", "mp4")
    mp4 = encode(*source(VOICE), "-c:a", "aac", "-f", "mp4")
    for data, code, words in (
        (video, "no_audio_stream", "no audio"),
        (mp4[: len(mp4) // 3], "truncated_audio", "index"),
        (b"PK\x03\x04" + mp4, "unsupported_audio", "ZIP archive"),
        (b"%PDF-1.7\n" + mp4, "unsupported_audio", "PDF"),
        (b"\x1f\x8b\x08\x00" + bytes(100), "unsupported_audio", "gzip"),
        (encode(*source(VOICE), "-c:a", "libmp3lame", "-f", "avi"), "unsupported_audio", "AVI"),
        (encode(*source(VOICE), "-c:a", "libmp3lame", "-f", "mpegts"), "unsupported_audio", "transport stream"),
        (encode(*source(VOICE), "-c:a", "libmp3lame", "-ar", "44100", "-f", "flv"), "unsupported_audio", "FLV"),
        (encode(*source(VOICE), "-c:a", "mp2", "-f", "vob"), "unsupported_audio", "program stream"),
        (later_webm(), "unsupported_audio", "later part of a WebM"),
        (encode(*source(VOICE), "-c:a", "ac3", "-f", "mp4"), "unsupported_codec", "codec"),
        (encode(*source(VOICE), "-c:a", "aac", *ENCRYPTION, "-f", "mp4"), "unsupported_codec", "encrypted"),
        (b"", "empty_audio", "empty"),
        (riff(FORMAT, (b"data", b"", None)), "audio_too_short", "0.000 s"),
    ):
        with pytest.raises(AudioError) as caught:
            decode(data)
        assert caught.value.code == code and words in caught.value.message, caught.value.message


# --- Sound around speech: a model with the faults of a small one gets clips that it can transcribe -------------------

SINGLE_PASS_S = 10.0


def forgetful_script(clips: Sequence[Clip], tokenizer: TraceTokenizer) -> list[int]:
    """Write the words of a clip with the faults that small models have.

    Silence in front of speech costs the transcript, silence behind it and very short clips add words, and the words
    after the fourth of a long clip are repetitions.
    """
    samples_S = np.concatenate(clips)
    words = words_of(samples_S)
    loud_S = np.flatnonzero(np.abs(samples_S) > 0.1)
    if len(loud_S):
        is_late = loud_S[0] > 2 * SAMPLE_RATE_HZ
        is_early = len(samples_S) - loud_S[-1] > 2 * SAMPLE_RATE_HZ
        if len(samples_S) > SINGLE_PASS_S * SAMPLE_RATE_HZ:
            words = [*words[:4], *words[3:4] * 4]
        words = [] if is_late else [*words, *(["invented"] if is_early else [])]
    if len(loud_S) < 0.3 * SAMPLE_RATE_HZ:
        words = [*words, "invented", "words"]
    text = " ".join(words)
    trace = Trace("p", "quiet", (Speaker("S1", "voice", (text,)),) if text else (), text, "r", text, text, text)
    return [*tokenizer.encode_trace(render(trace)), tokenizer.im_end_id]


@pytest.fixture(scope="module")
def forgetful() -> Iterator[Live]:
    """Run a service whose model has these faults."""
    engine = ToneEngine()
    engine.script = forgetful_script
    with running(scripted(), engine) as live:
        checkpoint = live.service.answerer.checkpoint
        audio = checkpoint.manifest.audio.model_copy(update={"single_pass_s": SINGLE_PASS_S})
        manifest = checkpoint.manifest.model_copy(update={"audio": audio})
        live.service.answerer.checkpoint = dataclasses.replace(checkpoint, manifest=manifest)
        yield live


def spoken(*words: str, gap_s: float = 0.4) -> NDArray[np.float32]:
    """Return a clip of words, each a tone of half a second, with gaps between and around them."""
    places = [(gap_s + number * (gap_s + 0.5), word) for number, word in enumerate(words)]
    return recording(gap_s + len(words) * (gap_s + 0.5), places)


def quiet(kind: str, seconds: float) -> NDArray[np.float32]:
    """Return silence as devices record it."""
    num_samples = round(seconds * SAMPLE_RATE_HZ)
    times_S = np.arange(num_samples) / SAMPLE_RATE_HZ
    noise_S = np.random.default_rng(3).normal(0, 1, num_samples)
    match kind:
        case "noise at -60 dBFS":
            return (1e-3 * noise_S).astype(np.float32)
        case "noise at -85 dBFS":
            return (5e-5 * noise_S).astype(np.float32)
        case "hum":
            return (0.01 * np.sin(2 * np.pi * 50 * times_S)).astype(np.float32)
        case "an offset":
            return np.full(num_samples, 0.03, np.float32)
        case "zeros, then noise":
            return np.where(times_S < seconds / 2, 0, 1e-3 * noise_S).astype(np.float32)
        case _:
            return np.zeros(num_samples, np.float32)


QUIET_KINDS = ("zeros", "noise at -60 dBFS", "noise at -85 dBFS", "hum", "an offset", "zeros, then noise")
PLACES: dict[str, tuple[float, float, float]] = {
    "2 s before": (2, 0, 0),
    "5 s before": (5, 0, 0),
    "10 s before": (10, 0, 0),
    "15 s before": (15, 0, 0),
    "4 s between": (0, 4, 0),
    "12 s between": (0, 12, 0),
    "5 s behind": (0, 0, 5),
    "15 s behind": (0, 0, 15),
    "everywhere": (6, 6, 6),
}


def transcript(reply: dict[str, Any]) -> str:
    """Return the words without the marks between pieces."""
    return reply["perception"]["transcript"].replace(".", "")


def clip_codes(reply: dict[str, Any]) -> list[str]:
    return [warning["code"] for warning in reply["audio"][0]["warnings"]]


@pytest.mark.parametrize("kind", QUIET_KINDS)
@pytest.mark.parametrize("where", PLACES)
def test_silence_around_speech_changes_neither_words_nor_answer(forgetful: Live, where: str, kind: str) -> None:
    first_S, second_S = spoken("alpha", "bravo"), spoken("charlie", "delta")
    plain = forgetful.ask(wav(np.concatenate([first_S, second_S])[:, None])).json()
    assert transcript(plain) == "alpha bravo charlie delta" and clip_codes(plain) == []
    before_s, between_s, behind_s = PLACES[where]
    parts = [quiet(kind, before_s), first_S, quiet(kind, between_s), second_S, quiet(kind, behind_s)]
    reply = forgetful.ask(wav(np.concatenate(parts)[:, None])).json()
    assert (transcript(reply), reply["answer"]["text"]) == (transcript(plain), plain["answer"]["text"])
    audio = reply["audio"][0]
    assert clip_codes(reply) == ["silence_trimmed"]
    assert audio["used_s"] + audio["warnings"][0]["seconds"] == pytest.approx(audio["duration_s"], abs=0.01)
    # The parts are places of the clip as it was sent.
    for word_s in (before_s + 0.5, before_s + len(first_S) / SAMPLE_RATE_HZ + between_s + 0.5):
        assert any(part["start_s"] <= word_s < part["end_s"] for part in audio["parts"]), audio["parts"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("-f", "mp3"),
        ("-c:a", "libopus", "-f", "ogg"),
        ("-ar", "44100", "-ac", "2", "-c:a", "aac", "-f", "ipod"),
        ("-ar", "8000", "-c:a", "libopencore_amrnb", "-f", "amr"),
        ("-c:a", "pcm_u8", "-f", "wav"),
    ],
    ids=["mp3", "opus", "aac", "amr", "8 bits"],
)
def test_silence_is_left_out_in_every_codec(forgetful: Live, arguments: tuple[str, ...], tmp_path: Path) -> None:
    """A codec adds noise to silence, and 8 bits round it."""
    source_path = tmp_path / "source.wav"
    source_path.write_bytes(wav(np.concatenate([quiet("zeros", 10), spoken("alpha", "bravo")])[:, None]))
    reply = forgetful.ask(encode("-i", str(source_path), *arguments)).json()
    assert transcript(reply) == "alpha bravo" and "silence_trimmed" in clip_codes(reply)


def test_a_very_short_clip_has_no_words(forgetful: Live) -> None:
    word_S = spoken("alpha", gap_s=0.01)
    stereo_SC = np.stack([word_S[:3200], word_S[:3200]], axis=1)
    for name, samples_SC in {
        **{f"{seconds} s": word_S[: int(seconds * SAMPLE_RATE_HZ), None] for seconds in (0.1, 0.15, 0.2, 0.25, 0.3)},
        "0.2 s in 8 s of silence": np.concatenate([quiet("zeros", 4), word_S[:3200], quiet("zeros", 4)])[:, None],
        "0.2 s in a room": np.concatenate([quiet(QUIET_KINDS[1], 5), word_S[:3200], quiet(QUIET_KINDS[1], 5)])[:, None],
        "0.2 s of stereo": stereo_SC,
        "0.1 s in 8 s of silence": np.concatenate([quiet("zeros", 4), word_S[:1600], quiet("zeros", 4)])[:, None],
        "a click": np.pad(np.full(40, 0.8, np.float32), (8000, 8000))[:, None],
    }.items():
        reply = forgetful.ask(wav(samples_SC)).json()
        assert transcript(reply) == "" and "too_short_for_words" in clip_codes(reply), name
        assert reply["perception"]["speakers"] == [], name
    whole = forgetful.ask(wav(np.concatenate([word_S, word_S, word_S])[:, None])).json()
    assert transcript(whole).startswith("alpha")


@pytest.mark.parametrize("num_clips", [2, 3, 4])
@pytest.mark.parametrize("silence_s", [0.0, 0.3, 0.9, 2.0])
def test_joined_clips_are_transcribed_as_each_alone(forgetful: Live, num_clips: int, silence_s: float) -> None:
    clips = [
        spoken("alpha", "bravo", "charlie", "delta", "echo", "foxtrot"),
        spoken("foxtrot", "echo", "delta", "bravo"),
    ]
    clips = [clips[number % 2] for number in range(num_clips)]
    if num_clips == 2:
        clips.append(spoken("charlie", "alpha"))
    alone = " ".join(transcript(forgetful.ask(wav(clip_S[:, None])).json()) for clip_S in clips)
    joined_S = np.concatenate([part for clip_S in clips for part in (clip_S, quiet("zeros", silence_s))])
    reply = forgetful.ask(wav(joined_S[:, None])).json()
    assert transcript(reply) == alone
    assert "heard_in_pieces" in clip_codes(reply)
    assert [speaker["id"] for speaker in reply["perception"]["speakers"]] == ["S1"]


def test_a_model_without_this_limit_and_a_clip_within_it_are_asked_once(forgetful: Live) -> None:
    words = ("alpha", "bravo", "charlie", "delta") * 3
    with running(scripted(), ToneEngine()) as live:
        reply = live.ask(wav(spoken(*words)[:, None])).json()
        assert transcript(reply) == " ".join(words) and clip_codes(reply) == []
    short = forgetful.ask(wav(spoken(*words[:8])[:, None])).json()
    assert "heard_in_pieces" not in clip_codes(short)
