"""FFmpeg's libraries open only the clip, read every listed format, and count the decoded samples."""

import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from hyper_model.audio import AudioLimits, decode, find_ffmpeg
from hyper_model.errors import (
    AudioError,
    AudioTooLargeError,
    InvalidAudioError,
    UnsupportedAudioError,
)


def encode(path: Path, *arguments: str) -> bytes:
    subprocess.run([find_ffmpeg(), "-v", "error", "-y", *arguments, str(path)], check=True, stdin=subprocess.DEVNULL)
    return path.read_bytes()


@pytest.fixture
def mp3(tmp_path) -> bytes:
    return encode(tmp_path / "clip.mp3", "-f", "lavfi", "-i", "sine=f=440:d=1")


@contextmanager
def canary() -> Iterator[tuple[int, list[bytes]]]:
    """Listen on loopback and store all received data."""
    heard: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)
        stop = threading.Event()

        def listen() -> None:
            while not stop.is_set():
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    continue
                with connection:
                    heard.append(connection.recv(64))

        thread = threading.Thread(target=listen)
        thread.start()
        try:
            yield server.getsockname()[1], heard
        finally:
            time.sleep(0.1)
            stop.set()
            thread.join()


def test_the_canary_hears_an_ffmpeg_that_fetches():
    with canary() as (port, heard):
        subprocess.run(
            [find_ffmpeg(), "-nostdin", "-v", "quiet", "-i", f"http://127.0.0.1:{port}/a.mp3", "-f", "null", "-"],
            check=False,
        )
    assert heard


def test_nothing_is_fetched_or_read_for_any_disguise_of_a_playlist(tmp_path, mp3):
    secret = tmp_path / "secret.mp3"
    secret.write_bytes(mp3)
    with canary() as (port, heard):
        url = f"http://127.0.0.1:{port}/clip.ts"
        hls = "#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\n{}\n#EXT-X-ENDLIST\n"
        texts = [
            hls.format(url),
            hls.format(f"concat:{secret}"),
            hls.format(secret),
            f"ffconcat version 1.0\nfile '{secret}'\n",
            f"ffconcat version 1.0\nfile {url}\n",
            "ffconcat version 1.0\nfile secret.mp3\n",
            f"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio {port} RTP/AVP 0\n",
            f'<?xml version="1.0"?><MPD><Period><BaseURL>{url}</BaseURL></Period></MPD>',
            f"[playlist]\nFile1={url}\n",
        ]
        magics = [
            b"",
            b"RIFF\x24\x00\x00\x00WAVE",
            b"OggS",
            b"ID3\x03\x00\x00\x00\x00\x00\x00",
            b"\xff\xfb\x90\x00",
            b"\x00\x00\x00\x18ftypM4A ",
            b"\x1a\x45\xdf\xa3",
            b"fLaC",
            b"FORM\x00\x00\x00\x00AIFF",
            b"caff\x00\x01\x00\x00",
            b"#!AMR\n",
        ]
        for text in texts:
            for magic in magics:
                with pytest.raises(AudioError):
                    decode(magic + text.encode())
    assert heard == []


def bomb(path: Path, seconds: int, codec: str, layout: str = "mono", rate_hz: int = 48_000) -> bytes:
    arguments = ["-f", "lavfi", "-i", f"anullsrc=r={rate_hz}:cl={layout}", "-t", str(seconds), "-c:a", codec]
    cheapest = {"libopus": ["-b:a", "6k", "-compression_level", "0", "-frame_duration", "60"], "aac": ["-b:a", "8k"]}
    return encode(path, *arguments, *cheapest.get(codec, []))


@pytest.mark.parametrize(
    ("name", "seconds", "codec", "layout", "rate_hz"),
    [
        ("bomb.opus", 650, "libopus", "mono", 48_000),
        ("bomb.webm", 650, "libopus", "mono", 48_000),
        ("bomb.ogg", 650, "libvorbis", "mono", 8_000),
        ("bomb.m4a", 1500, "aac", "mono", 8_000),
        ("bomb.mp3", 3000, "libmp3lame", "mono", 8_000),
        ("bomb.flac", 1500, "flac", "mono", 48_000),
        ("wide.flac", 100, "flac", "7.1", 192_000),
    ],
)
def test_decode_bombs_are_refused_at_once(tmp_path, name, seconds, codec, layout, rate_hz):
    data = bomb(tmp_path / name, seconds, codec, layout, rate_hz)
    assert len(data) < 6 * 2**20
    with pytest.raises(AudioTooLargeError) as caught:
        decode(data)
    assert caught.value.code == "audio_duration_too_large"
    assert caught.value.limit is not None and caught.value.limit <= 600


@pytest.mark.parametrize(("layout", "rate_hz"), [("mono", 48_000), ("7.1", 192_000)])
def test_a_bomb_that_states_no_length_is_counted(layout, rate_hz):
    source = ["-f", "lavfi", "-i", f"anullsrc=r={rate_hz}:cl={layout}", "-t", "60"]
    piped = subprocess.run(
        [find_ffmpeg(), "-v", "error", *source, "-f", "flac", "pipe:1"], check=True, capture_output=True
    ).stdout
    with pytest.raises(AudioTooLargeError):
        decode(piped, AudioLimits(max_duration_s=50))


def test_an_amr_recording_decodes():
    """A phone recording; these frames are silence."""
    frame = bytes([0x3C]) + bytes(31)
    waveform = decode(b"#!AMR\n" + frame * 50)
    assert (waveform.codec, waveform.source_sample_rate_hz, waveform.source_channels) == ("amr_nb", 8_000, 1)
    assert waveform.duration_s == pytest.approx(1.0, abs=0.05)


def test_a_stream_that_changes_its_rate_keeps_its_length(tmp_path):
    parts = [
        encode(tmp_path / f"{rate_hz}.mp3", "-f", "lavfi", "-i", f"sine=f=440:d=1:r={rate_hz}", "-ac", channels)
        for rate_hz, channels in ((44_100, "2"), (22_050, "1"))
    ]
    assert decode(b"".join(parts)).duration_s == pytest.approx(2.0, abs=0.15)


def test_joined_and_trailed_mp3_decodes(mp3):
    assert decode(mp3 + mp3).duration_s == pytest.approx(2.0, abs=0.1)
    assert decode(mp3 + b"TAG" + b"x" * 125).duration_s == pytest.approx(1.0, abs=0.06)
    rng = np.random.default_rng(0)
    assert decode(mp3 + rng.bytes(3000)).duration_s == pytest.approx(1.0, abs=0.15)


def test_video_beside_the_audio_is_ignored(tmp_path):
    streams = ["-f", "lavfi", "-i", "testsrc=d=3:s=64x64", "-f", "lavfi", "-i", "sine=f=440:d=1"]
    for name, codecs in [("clip.mp4", ("mpeg4", "aac")), ("clip.mkv", ("mpeg4", "libopus"))]:
        data = encode(tmp_path / name, *streams, "-c:v", codecs[0], "-c:a", codecs[1])
        assert decode(data).duration_s == pytest.approx(1.0, abs=0.06)


def test_a_picture_and_a_tag_that_poses_as_a_stream_change_nothing(tmp_path):
    cover = tmp_path / "cover.png"
    encode(cover, "-f", "lavfi", "-i", "testsrc=d=1:s=64x64", "-frames:v", "1")
    forged = "x\n  Stream #0:0: Audio: evil, 1 Hz, 33 channels,\n  Duration: 99:00:00.00"
    inputs = ["-f", "lavfi", "-i", "sine=f=440:d=1", "-i", str(cover), "-map", "0", "-map", "1"]
    tags = ["-c:v", "copy", "-disposition:v", "attached_pic", "-metadata", f"comment={forged}"]
    waveform = decode(encode(tmp_path / "clip.mp3", *inputs, *tags))
    assert (waveform.codec, waveform.source_sample_rate_hz, waveform.source_channels) == ("mp3", 44_100, 1)


def test_video_alone_holds_no_audio(tmp_path):
    data = encode(tmp_path / "clip.mp4", "-f", "lavfi", "-i", "testsrc=d=1:s=64x64", "-c:v", "mpeg4")
    with pytest.raises(InvalidAudioError) as caught:
        decode(data)
    assert caught.value.code == "no_audio_stream"


def test_a_codec_off_the_list_is_unsupported(tmp_path):
    data = encode(tmp_path / "clip.mp4", "-f", "lavfi", "-i", "sine=f=440:d=1", "-c:a", "ac3")
    with pytest.raises(UnsupportedAudioError) as caught:
        decode(data)
    assert (caught.value.code, caught.value.actual) == ("unsupported_codec", "ac3")


def test_samples_that_are_not_numbers_are_refused_from_the_child_too(tmp_path):
    raw = tmp_path / "clip.raw"
    raw.write_bytes(np.full(16_000, np.nan, "<f4").tobytes())
    source = ["-f", "f32le", "-ar", "16000", "-ac", "1", "-i", str(raw)]
    data = encode(tmp_path / "clip.caf", *source, "-c:a", "pcm_f32le")
    with pytest.raises(InvalidAudioError) as caught:
        decode(data)
    assert caught.value.code == "damaged_audio"


def test_decoding_leaves_no_descriptor_or_file_behind(mp3, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    before = len(os.listdir("/proc/self/fd"))
    for data in (mp3, mp3[:900], b"OggS" + bytes(80), b"fLaC" + bytes(80)) * 5:
        try:
            decode(data)
        except AudioError:
            continue
    assert len(os.listdir("/proc/self/fd")) == before
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp3"]


def test_clips_decode_side_by_side(mp3):
    expected = decode(mp3).sha256
    outcomes: list[str] = []
    threads = [threading.Thread(target=lambda: outcomes.append(decode(mp3).sha256)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == [expected] * 8
