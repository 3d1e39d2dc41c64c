"""Clips are decoded to Waveforms of the recorded sound, and other files are refused."""

import contextlib
import hashlib
import math
import struct
import subprocess
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hyper_model.audio import (
    FORMATS,
    SAMPLE_RATE_HZ,
    AudioLimits,
    Quality,
    Waveform,
    decode,
    find_ffmpeg,
    mix,
    require_single_window,
    sniff,
)
from hyper_model.errors import (
    AudioError,
    AudioTooLargeError,
    AudioTooLongError,
    InvalidAudioError,
    UnsupportedAudioError,
)

TONE = ["-f", "lavfi", "-i", "aevalsrc=0.5*sin(2*PI*440*t)|0.25*sin(2*PI*1000*t):s=44100:d=1"]
ENCODINGS = {
    "wav": ("wav", "pcm_s16le"),
    "wav-24": ("wav", "pcm_s24le"),
    "wav-float": ("wav", "pcm_f32le"),
    "wav-alaw": ("wav", "pcm_alaw"),
    "wav-adpcm": ("wav", "adpcm_ms"),
    "flac": ("flac", "flac"),
    "mp3": ("mp3", "libmp3lame"),
    "ogg": ("ogg", "libvorbis"),
    "opus": ("ogg", "libopus"),
    "m4a": ("ipod", "aac"),
    "alac": ("ipod", "alac"),
    "webm": ("webm", "libopus"),
    "aac": ("adts", "aac"),
    "aiff": ("aiff", "pcm_s16be"),
    "caf": ("caf", "pcm_s16le"),
    "w64": ("w64", "pcm_s16le"),
    "wma": ("asf", "wmav2"),
}

# Sizes in the headers of these are often wrong, so they are no sign of damage.
PLAIN = ("wav", "wav-24", "wav-float", "wav-alaw", "wav-adpcm", "aiff", "caf", "w64")


def encode(*arguments: str) -> bytes:
    """Run ffmpeg with a real output file, so that its writer can return to the header."""
    with subprocess.Popen(
        [find_ffmpeg(), "-v", "error", "-y", *arguments], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL
    ) as process:
        data = process.communicate()[0]
    assert process.returncode == 0
    return data


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("clips")
    clips = {}
    for name, (container, codec) in ENCODINGS.items():
        encode(*TONE, "-c:a", codec, "-f", container, str(folder / name))
        clips[name] = (folder / name).read_bytes()
    return clips


def tone(frequency_hz: float, rate_hz: int, seconds: float = 1.0, amplitude: float = 0.5) -> Any:
    times_s = np.arange(round(seconds * rate_hz)) / rate_hz
    return (amplitude * np.sin(2 * np.pi * frequency_hz * times_s)).astype(np.float32)


def wav(samples_SC: np.ndarray, rate_hz: int = SAMPLE_RATE_HZ, *, channels=None, stated_bytes=None) -> bytes:
    """Write a WAV by hand, also with false headers: int16, or float32 unchanged."""
    samples_SC = samples_SC if samples_SC.ndim == 2 else samples_SC[:, None]
    kind, width = (3, 4) if samples_SC.dtype == np.float32 else (1, 2)
    channels = samples_SC.shape[1] if channels is None else channels
    body = samples_SC.astype("<f4" if kind == 3 else "<i2").tobytes()
    layout = struct.pack(
        "<HHIIHH", kind, channels, rate_hz, rate_hz * channels * width % 2**32, channels * width % 2**16, 8 * width
    )
    size = len(body) if stated_bytes is None else stated_bytes
    return (
        b"RIFF"
        + struct.pack("<I4s4sI", 36 + len(body), b"WAVE", b"fmt ", 16)
        + layout
        + b"data"
        + struct.pack("<I", size)
        + body
    )


def amplitude_at(samples_S: np.ndarray, frequency_hz: float) -> float:
    """Measure one frequency over the middle half, away from the codec's edges."""
    middle = samples_S[len(samples_S) // 4 : len(samples_S) * 3 // 4]
    turns = np.exp(-2j * np.pi * frequency_hz * np.arange(len(middle)) / SAMPLE_RATE_HZ)
    return float(2 * np.abs((middle * np.hanning(len(middle)) * 2 * turns).mean()))


@pytest.mark.parametrize("name", ENCODINGS)
def test_a_clip_sounds_the_same_in_every_format(clips, name):
    waveform = decode(clips[name])
    assert waveform.samples_S.dtype == np.float32 and waveform.samples_S.ndim == 1
    assert waveform.duration_s == pytest.approx(1.0, abs=0.06)
    # The mean of two channels halves each tone; encoders may take a twentieth off (LAME scales by 0.95).
    assert amplitude_at(waveform.samples_S, 440) == pytest.approx(0.25, rel=0.08)
    assert amplitude_at(waveform.samples_S, 1000) == pytest.approx(0.125, rel=0.08)
    assert waveform.source_channels == 2
    assert waveform.source_sample_rate_hz == (48_000 if "opus" in ENCODINGS[name][1] else 44_100)
    assert waveform.codec == ENCODINGS[name][1].removeprefix("lib").replace("mp3lame", "mp3")


def test_clips_written_to_a_pipe_decode_although_their_headers_state_no_length(clips):
    for container, codec in [("wav", "pcm_s16le"), ("flac", "flac"), ("mp3", "libmp3lame"), ("webm", "libopus")]:
        waveform = decode(encode(*TONE, "-c:a", codec, "-f", container, "pipe:1"))
        assert waveform.duration_s == pytest.approx(1.0, abs=0.06)
    fragmented = encode(*TONE, "-c:a", "aac", "-f", "mp4", "-movflags", "frag_keyframe+empty_moov", "pipe:1")
    assert decode(fragmented).duration_s == pytest.approx(1.0, abs=0.06)


@pytest.mark.parametrize("rate_hz", [8_000, 11_025, 16_000, 22_050, 44_100, 48_000, 96_000])
def test_resampling_keeps_frequency_amplitude_and_length(rate_hz):
    waveform = decode(wav(tone(1000, rate_hz), rate_hz))
    assert waveform.num_samples == pytest.approx(SAMPLE_RATE_HZ, abs=1)
    times_s = np.arange(waveform.num_samples) / SAMPLE_RATE_HZ
    expected = 0.5 * np.sin(2 * np.pi * 1000 * times_s)
    middle = slice(1600, -1600)
    assert np.abs(waveform.samples_S - expected)[middle].max() < 1e-3


def test_resampling_removes_what_16_khz_cannot_hold():
    assert np.abs(decode(wav(tone(11_000, 48_000), 48_000)).samples_S[800:-800]).max() < 1e-3


def test_wav_at_16_khz_passes_unchanged():
    samples = (np.random.default_rng(0).uniform(-1, 1, 16_000) * 32767).astype(np.int16)
    assert np.array_equal(decode(wav(samples)).samples_S, samples.astype(np.float32) / 32768)


@pytest.mark.parametrize("container", ["wav", "flac", "caf", "w64"])
@pytest.mark.parametrize("channels", [1, 2, 6])
def test_the_down_mix_is_the_mean_of_the_channels(container, channels, tmp_path):
    layout = {1: "mono", 2: "stereo", 6: "5.1"}[channels]
    tones = "|".join(f"{0.1 * (channel + 1)}*sin(2*PI*{300 * (channel + 1)}*t)" for channel in range(channels))
    source = f"aevalsrc={tones}:s=16000:d=1:c={layout}"
    codec = "flac" if container == "flac" else "pcm_s16le"
    encode("-f", "lavfi", "-i", source, "-c:a", codec, "-f", container, str(tmp_path / "clip"))
    waveform = decode((tmp_path / "clip").read_bytes())
    assert waveform.source_channels == channels
    for channel in range(channels):
        expected = 0.1 * (channel + 1) / channels
        assert amplitude_at(waveform.samples_S, 300 * (channel + 1)) == pytest.approx(expected, abs=1e-3)


def test_opposite_channels_do_not_cancel():
    left = tone(440, SAMPLE_RATE_HZ)
    waveform = decode(wav(np.stack([left, -left], axis=1)))
    assert np.array_equal(waveform.samples_S, left)
    assert [warning.code for warning in waveform.warnings] == ["channels_out_of_phase"]


def test_floats_beyond_full_scale_are_clipped_and_reported():
    waveform = decode(wav(4 * tone(440, SAMPLE_RATE_HZ)))
    assert np.abs(waveform.samples_S).max() == 1.0
    # |2 sin| >= 0.999 for two thirds of a turn.
    assert waveform.quality.clipping_ratio == pytest.approx(2 / 3, abs=0.01)
    assert np.abs(decode(wav(np.full(16_000, 3e38, np.float32))).samples_S).max() == 1.0


def refusal(data: bytes, limits: AudioLimits | None = None) -> AudioError:
    """Return the error for a clip; check that it is quick and free of a decoder's text."""
    with pytest.raises(AudioError) as caught:
        decode(data, limits)
    words = f"{caught.value.message} {caught.value.hint} {caught.value.code}".lower()
    leaks = ("ffmpeg", "libsndfile", "bytesio", "0x", "/", "errno", "invalid data", "header missing", "stream #")
    assert not [leak for leak in leaks if leak in words]
    return caught.value


TEXTS = {
    "prose": b"hello, this is not audio at all, whatever its name says",
    "one letter": b"R",
    "html": b"<!doctype html><audio src=x>",
    "json": b'{"audio": "UklGRg=="}',
    "m3u8": b"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n",
    "sdp": b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 5004 RTP/AVP 0\n",
    "ffconcat": b"ffconcat version 1.0\nfile clip.wav\n",
    "dash": b'<?xml version="1.0"?><MPD><BaseURL>http://127.0.0.1:9/</BaseURL></MPD>',
    "utf-8": "écoute ça\n".encode(),
}
NOT_AUDIO = {
    "png": b"\x89PNG\r\n\x1a\n" + bytes(60),
    "zip": b"PK\x03\x04" + bytes(60),
    "pdf": b"%PDF-1.7\n\x93\x8c\x8b\x9e\x00",
    "zeros": bytes(4000),
    "ones": b"\xff" * 4000,
    "midi": b"MThd\x00\x00\x00\x06\x00\x01\x00\x01\x00\x60",
    "riff but avi": b"RIFF\x00\x00\x00\x00AVI LIST",
}


@pytest.mark.parametrize("name", [*TEXTS, *NOT_AUDIO])
def test_what_is_not_audio_is_refused_with_the_list_of_formats(name):
    error = refusal(TEXTS.get(name) or NOT_AUDIO[name])
    assert type(error) is UnsupportedAudioError and error.code == "unsupported_audio"
    assert all(container in error.message for container in FORMATS)
    assert error.actual == ("text" if name in TEXTS else "unknown")


def test_empty_bytes_are_invalid():
    error = refusal(b"")
    assert type(error) is InvalidAudioError and error.code == "empty_audio"


@pytest.mark.parametrize("name", ENCODINGS)
def test_sniff_names_the_container(clips, name):
    container = ENCODINGS[name][0]
    assert sniff(clips[name]) == {"ipod": "m4a", "adts": "aac", "asf": "wma"}.get(container, container)


def test_a_clip_of_10_ms_is_too_short():
    error = refusal(wav(np.zeros(160, np.int16)))
    assert type(error) is InvalidAudioError
    assert (error.code, error.limit, error.actual) == ("audio_too_short", 0.1, 0.01)
    assert refusal(wav(np.zeros(0, np.int16))).code == "audio_too_short"


def test_a_clip_of_exactly_the_shortest_length_is_accepted():
    assert decode(wav(np.zeros(1600, np.int16))).duration_s == 0.1


def test_only_the_caller_that_wants_one_window_refuses_40_s():
    waveform = decode(wav(np.zeros(40 * 8000, np.int16), 8000))
    assert waveform.duration_s == 40.0
    with pytest.raises(AudioTooLongError) as caught:
        require_single_window(waveform)
    assert (caught.value.limit, caught.value.actual) == (30.0, 40.0)
    require_single_window(waveform.slice(0, 30))
    with pytest.raises(AudioTooLongError):
        require_single_window(Waveform(np.zeros(30 * SAMPLE_RATE_HZ + 1, np.float32)))


def test_limits_hold_to_the_byte_and_to_the_sample():
    data = wav(np.zeros(SAMPLE_RATE_HZ, np.int16))
    assert decode(data, AudioLimits(max_bytes=len(data), max_duration_s=1.0)).duration_s == 1.0
    error = refusal(data, AudioLimits(max_bytes=len(data) - 1))
    assert type(error) is AudioTooLargeError and (error.limit, error.actual) == (len(data) - 1, len(data))
    error = refusal(wav(np.zeros(SAMPLE_RATE_HZ + 1, np.int16)), AudioLimits(max_duration_s=1.0))
    assert type(error) is AudioTooLargeError and (error.code, error.limit) == ("audio_duration_too_large", 1.0)


@pytest.mark.parametrize("name", ["mp3", "ogg", "opus", "m4a", "webm", "aac", "w64", "caf"])
def test_decoded_length_is_limited_in_every_format(clips, name):
    error = refusal(clips[name], AudioLimits(max_duration_s=0.5))
    assert type(error) is AudioTooLargeError and error.code == "audio_duration_too_large"


# Bare AAC frames state no length, so a cut between two of them leaves no trace.
@pytest.mark.parametrize("name", [name for name in ENCODINGS if name not in (*PLAIN, "aac", "wma")])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
def test_a_clip_that_breaks_off_is_refused_not_shortened(clips, name, share):
    error = refusal(clips[name][: int(len(clips[name]) * share)])
    assert type(error) is InvalidAudioError and error.code in ("truncated_audio", "damaged_audio")


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
def test_a_clip_of_plain_samples_that_breaks_off_is_decoded_and_says_how_much_is_missing(clips, name, share):
    waveform = decode(clips[name][: int(len(clips[name]) * share)])
    assert waveform.duration_s == pytest.approx(share, abs=0.1)
    assert waveform.missing_s == pytest.approx(1 - share, abs=0.1)
    assert [(warning.code, warning.seconds) for warning in waveform.warnings] == [("audio_missing", waveform.missing_s)]


SECOND = np.zeros(SAMPLE_RATE_HZ, np.int16)
LIARS = {
    "65535 channels": wav(SECOND, channels=65_535),
    "1024 channels": wav(SECOND, channels=1024),
    "no channel": wav(SECOND, channels=0),
    "0 Hz": wav(SECOND, rate_hz=0),
    "1 Hz": wav(SECOND, rate_hz=1),
    "655350 Hz": wav(SECOND, rate_hz=655_350),
    "4 GHz": wav(SECOND, rate_hz=2**32 - 1),
    "not numbers": wav(np.full(16_000, np.nan, np.float32)),
    "infinite": wav(np.full(16_000, np.inf, np.float32)),
    "only a header": wav(SECOND)[:40],
    "only magic": b"RIFF\x24\x00\x00\x00WAVE",
    "flac: only a header": b"fLaC\x80\x00\x00\x22" + bytes(34),
}


@pytest.mark.parametrize("name", LIARS)
def test_lying_headers_are_invalid(name):
    assert type(refusal(LIARS[name])) is InvalidAudioError


def test_a_wav_written_to_a_pipe_holds_what_it_holds():
    assert decode(wav(SECOND, stated_bytes=2**32 - 1)).duration_s == 1.0


def test_a_flac_of_55_bytes_that_claims_50_days_allocates_nothing(clips):
    honest = clips["flac"]
    # STREAMINFO: the 36-bit number of samples ends the eight bytes that begin with the sample rate.
    liar = honest[:21] + bytes([honest[21] | 0x0F]) + b"\xff" * 4 + honest[26:]
    assert type(refusal(liar[:55])) is InvalidAudioError
    waveform = decode(liar)
    assert waveform.duration_s == pytest.approx(1.0, abs=0.01)
    assert [warning.code for warning in waveform.warnings] == ["size_mismatch"]


@settings(max_examples=200, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_mutated_clip_is_decoded_or_refused_and_nothing_else(clips, data):
    clip = bytearray(clips[data.draw(st.sampled_from(sorted(clips)))])
    for _ in range(data.draw(st.integers(1, 6))):
        # Half of the changes hit the header, the parsers' input.
        place = data.draw(st.one_of(st.integers(0, min(200, len(clip) - 1)), st.integers(0, len(clip) - 1)))
        how = data.draw(st.sampled_from(["set", "insert", "drop", "cut", "repeat", "extreme"]))
        if how == "set":
            clip[place] = data.draw(st.integers(0, 255))
        elif how == "insert":
            clip[place:place] = data.draw(st.binary(min_size=1, max_size=8))
        elif how == "drop":
            del clip[place : place + data.draw(st.integers(1, 64))]
        elif how == "cut":
            del clip[place + 1 :]
        elif how == "repeat":
            clip[place:place] = clip[place : place + data.draw(st.integers(1, 4096))]
        else:
            clip[place : place + 4] = data.draw(st.sampled_from([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff"]))
        if not clip:
            break
    limits = AudioLimits(max_duration_s=5.0)
    try:
        waveform = decode(bytes(clip), limits)
    except AudioError:
        return
    assert limits.min_duration_s <= waveform.duration_s <= limits.max_duration_s
    assert np.isfinite(waveform.samples_S).all() and np.abs(waveform.samples_S).max() <= 1.0


@settings(max_examples=100, deadline=None, database=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_sniffed_or_refused(data):
    with contextlib.suppress(AudioError):
        assert sniff(data) in FORMATS


@pytest.mark.parametrize("snr_db", [-10.0, 0.0, 5.0, 10.0, 40.0])
@pytest.mark.parametrize("background_s", [0.3, 1.0, 2.0])
def test_mix_has_exactly_the_ratio_asked_for(snr_db, background_s):
    speech, noise = 0.2 * tone(300, SAMPLE_RATE_HZ), 0.01 * tone(2000, SAMPLE_RATE_HZ, background_s)
    mixed = mix(speech, noise, snr_db)
    assert mixed.shape == speech.shape and mixed.dtype == np.float32
    # Removing the speech needs the scale applied to both at full scale; here it is 1 unless noise is loud.
    scale = amplitude_at(mixed, 300) / amplitude_at(speech, 300)
    added = mixed - scale * speech
    ratio_db = 10 * math.log10(
        np.mean((scale * speech.astype(np.float64)) ** 2) / np.mean(added.astype(np.float64) ** 2)
    )
    assert ratio_db == pytest.approx(snr_db, abs=0.01)


def test_mix_scales_down_what_would_clip_and_keeps_the_ratio():
    speech, noise = tone(300, SAMPLE_RATE_HZ, amplitude=0.9), tone(2000, SAMPLE_RATE_HZ, amplitude=0.9)
    mixed = mix(speech, noise, 0.0)
    assert np.abs(mixed).max() == pytest.approx(1.0)
    assert amplitude_at(mixed, 300) == pytest.approx(amplitude_at(mixed, 2000), rel=1e-4)
    assert np.abs(mix(speech, noise, 100.0) - speech).max() < 2e-5


def test_mix_refuses_silence():
    for speech, noise in [(np.zeros(100), np.ones(100)), (np.ones(100), np.zeros(100)), (np.ones(100), np.zeros(0))]:
        with pytest.raises(ValueError, match="silence"):
            mix(speech.astype(np.float32), noise.astype(np.float32), 10)


def test_quality_tells_silence_clipping_and_peak():
    half = np.concatenate([np.zeros(SAMPLE_RATE_HZ, np.float32), tone(440, SAMPLE_RATE_HZ)])
    quality = Waveform(half).quality
    assert quality.silence_ratio == pytest.approx(0.5, abs=0.01)
    assert quality.clipping_ratio == 0.0
    assert quality.peak_dbfs == pytest.approx(-6.02, abs=0.01)
    square = Waveform(np.where(tone(100, SAMPLE_RATE_HZ) >= 0, 1.0, -1.0).astype(np.float32))
    assert square.quality == Quality(silence_ratio=0.0, clipping_ratio=1.0, peak_dbfs=0.0)
    assert Waveform(np.zeros(5000, np.float32)).quality == Quality(1.0, 0.0, -120.0)
    assert Waveform(np.full(5000, 1e-9, np.float32)).quality.peak_dbfs == -120.0


def test_slice_cuts_to_the_sample_and_refuses_nothing():
    waveform = Waveform(np.linspace(0, 1, 32_000, dtype=np.float32), "mp3", 44_100, 2)
    part = waveform.slice(0.5, 1.0)
    assert np.array_equal(part.samples_S, waveform.samples_S[8000:16_000])
    assert (part.codec, part.source_sample_rate_hz, part.source_channels) == ("mp3", 44_100, 2)
    assert waveform.slice(1.5, 30).duration_s == 0.5
    for start_s, end_s in [(1.0, 1.0), (1.5, 1.0), (-1.0, 1.0), (2.0, 3.0)]:
        with pytest.raises(ValueError, match="no samples"):
            waveform.slice(start_s, end_s)


def test_sha256_names_the_sound_and_not_the_file(clips, tmp_path):
    waveform = decode(clips["wav"])
    assert waveform.sha256 == hashlib.sha256(waveform.samples_S.tobytes()).hexdigest()
    (tmp_path / "clip.wav").write_bytes(clips["wav"])
    encode("-i", str(tmp_path / "clip.wav"), str(tmp_path / "clip.flac"))
    assert decode((tmp_path / "clip.flac").read_bytes()).sha256 == waveform.sha256
    assert waveform.sha256 != waveform.slice(0, 0.5).sha256


def test_a_waveform_wants_mono_float32():
    wrongs: list[Any] = [np.zeros((2, 10), np.float32), np.zeros(10, np.float64), np.zeros(10, np.int16)]
    for wrong in wrongs:
        with pytest.raises(ValueError, match="float32"):
            Waveform(wrong)


def test_pydub_takes_and_gives_the_same_sound():
    waveform = Waveform(tone(440, SAMPLE_RATE_HZ, 0.5))
    segment = waveform.segment()
    assert (segment.frame_rate, segment.channels, segment.sample_width, len(segment)) == (16_000, 1, 2, 500)
    assert np.abs(Waveform.from_segment(segment).samples_S - waveform.samples_S).max() <= 0.5 / 32768 + 1e-9
    stereo = segment.set_frame_rate(44_100).set_channels(2).set_sample_width(4)
    back = Waveform.from_segment(stereo)
    assert (back.source_sample_rate_hz, back.source_channels) == (44_100, 2)
    assert amplitude_at(back.samples_S, 440) == pytest.approx(0.5, rel=0.02)


def test_full_scale_survives_the_way_to_16_bits():
    extremes = Waveform(np.array([1.0, -1.0, 0.0], np.float32))
    assert extremes.segment().get_array_of_samples().tolist() == [32767, -32768, 0]


def test_a_wav_file_holds_the_same_samples_of_16_bits():
    values = (np.arange(-32_768, 32_768, 7) / 32_768).astype(np.float32)
    clip = Waveform(values)
    assert np.array_equal(decode(clip.to_wav()).samples_S, clip.samples_S)
