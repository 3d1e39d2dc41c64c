"""Make ordinary but odd audio files: every possible combination of container, track layout and header lie.

These files are no attacks. Recorders crash before they patch a header, editors leave stale counts, video editors add
tracks, tags and attachments. The service's decoder and an ffmpeg program decode the same files, and their durations are
compared.

This module depends on no service. An ffmpeg program writes the files, and their bytes are then edited here.
"""

from __future__ import annotations

import array
import itertools
import random
import struct
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loadtests.hostile import ffmpeg

DURATION_S = 1.5
RATE_HZ = 16_000
MIN_LOST_S = 0.15
"""Minimum difference in duration for a loss, above the delay and padding of any codec in use."""

_VOICE = f"aevalsrc=0.4*sin(2*PI*220*t)*(0.6+0.4*sin(2*PI*3*t)):s=44100:d={DURATION_S}"
_OTHER_VOICE = f"aevalsrc=0.4*sin(2*PI*330*t)*(0.6+0.4*cos(2*PI*2*t)):s=44100:d={DURATION_S}"
_SILENCE = f"anullsrc=r=44100:cl=mono:d={DURATION_S}"
_VIDEO = f"testsrc=d={DURATION_S}:s=32x32:r=5"
_SUBTITLES = "1\n00:00:00,000 --> 00:00:01,000\nécoute \u2028 ça\n"
_CHAPTERS = ";FFMETADATA1\ntitle=été\n[CHAPTER]\nTIMEBASE=1/1000\nSTART=0\nEND=500\ntitle=один\n"


@dataclass(frozen=True)
class Container:
    """A container with its ffmpeg options.

    Attributes:
        name: Name in reports.
        arguments: Output format and its options.
        codecs: Permitted audio codecs.
        has_tracks: True if several audio tracks are possible.
        has_video: True if a video track is possible.
        suffix: Suffix of the file's name.
    """

    name: str
    arguments: tuple[str, ...]
    codecs: tuple[str, ...]
    has_tracks: bool = False
    has_video: bool = False
    suffix: str = ""


CONTAINERS = (
    Container("mp4", ("-f", "mp4"), ("aac", "alac", "libopus", "libmp3lame"), True, True),
    Container("mp4 fragmented", ("-f", "mp4", "-movflags", "frag_keyframe+empty_moov"), ("aac", "flac"), True, True),
    Container("mp4 index first", ("-f", "mp4", "-movflags", "+faststart"), ("aac",), True, True),
    Container("mov", ("-f", "mov"), ("aac", "pcm_s16le", "pcm_s24be", "alac"), True, True),
    Container("m4a", ("-f", "ipod"), ("aac", "alac"), True),
    Container(
        "mkv", ("-f", "matroska"), ("aac", "libopus", "libvorbis", "flac", "pcm_s16le", "libmp3lame"), True, True
    ),
    Container("mkv live", ("-f", "matroska", "-live", "1"), ("libopus", "aac"), True, True),
    Container("webm", ("-f", "webm"), ("libopus", "libvorbis"), True),
    Container("ogg", ("-f", "ogg"), ("libvorbis", "libopus", "flac"), True),
    Container("asf", ("-f", "asf"), ("wmav2", "wmav1", "libmp3lame"), True, True),
    Container("mp3", ("-f", "mp3"), ("libmp3lame",)),
    Container("mp3 without Info", ("-f", "mp3", "-write_xing", "0"), ("libmp3lame",)),
    Container("mp3 without tags", ("-f", "mp3", "-id3v2_version", "0"), ("libmp3lame",)),
    Container("mp2", ("-f", "mp2"), ("mp2",)),
    Container("adts", ("-f", "adts"), ("aac",)),
    Container("flac", ("-f", "flac"), ("flac",)),
    Container("wav", ("-f", "wav"), ("pcm_s16le", "pcm_u8", "pcm_s24le", "pcm_f32le", "pcm_mulaw", "adpcm_ms")),
    Container("rf64", ("-f", "wav", "-rf64", "always"), ("pcm_s16le", "pcm_f32le")),
    Container("w64", ("-f", "w64"), ("pcm_s16le", "pcm_f32le")),
    Container("aiff", ("-f", "aiff"), ("pcm_s16be", "pcm_s24be")),
    Container("au", ("-f", "au"), ("pcm_s16be", "pcm_mulaw")),
    Container("caf", ("-f", "caf"), ("pcm_s16le", "pcm_f32be", "alac")),
    Container("amr", ("-f", "amr", "-ar", "8000", "-ac", "1"), ("libopencore_amrnb",)),
    Container("3gp", ("-f", "3gp", "-ar", "8000", "-ac", "1"), ("libopencore_amrnb",), True, True),
)
LAYOUTS = (
    "one track",
    "stereo",
    "channels out of phase",
    "two tracks",
    "second is default",
    "first is silent",
    "with video",
    "with subtitles",
    "with cover art",
    "with chapters and tags",
    "with an attachment",
    "with a timecode",
    "first codec is unknown",
    "forty tracks",
)


def layout_arguments(layout: str, container: Container, folder: Path) -> list[str] | None:
    """Return ffmpeg's inputs and maps for a layout, or None if the container does not support it."""
    voice, other, silence = (["-f", "lavfi", "-i", source] for source in (_VOICE, _OTHER_VOICE, _SILENCE))
    is_matroska, is_mp4 = container.name.startswith("mkv"), container.name.startswith(("mp4", "mov"))
    match layout:
        case "one track":
            return voice
        case "stereo":
            return None if "-ac" in container.arguments else [*voice, "-af", "pan=stereo|c0=c0|c1=0.5*c0"]
        case "channels out of phase":
            return None if "-ac" in container.arguments else [*voice, "-af", "pan=stereo|c0=c0|c1=-1*c0"]
        case "two tracks" if container.has_tracks:
            return [*voice, *other, "-map", "0", "-map", "1"]
        case "second is default" if container.has_tracks:
            return [*voice, *other, *"-map 0 -map 1 -disposition:a:0 0 -disposition:a:1 default".split()]
        case "first is silent" if container.has_tracks:
            return [*silence, *voice, "-map", "0", "-map", "1"]
        case "with video" if container.has_video:
            return [*voice, "-f", "lavfi", "-i", _VIDEO, "-map", "1", "-map", "0", "-c:v", "mpeg4"]
        case "with subtitles" if is_matroska or is_mp4:
            (folder / "words.srt").write_text(_SUBTITLES)
            codec = "srt" if is_matroska else "mov_text"
            return [*voice, "-i", str(folder / "words.srt"), "-map", "0", "-map", "1", "-c:s", codec]
        case "with cover art" if container.name in ("m4a", "mp3", "flac", "mp4", "aiff"):
            cover = folder / "cover.png"
            make = [ffmpeg(), "-v", "error", "-y", "-f", "lavfi", "-i", "testsrc=d=1:s=400x400", "-frames:v", "1"]
            subprocess.run([*make, str(cover)], check=True)
            maps = "-map 0 -map 1 -c:v copy -disposition:v attached_pic".split()
            return [*voice, "-i", str(cover), *maps]
        case "with chapters and tags":
            (folder / "chapters.txt").write_text(_CHAPTERS)
            return [
                *voice,
                "-i",
                str(folder / "chapters.txt"),
                "-map",
                "0",
                "-map_metadata",
                "1",
                "-metadata",
                "a=\u2028",
            ]
        case "with an attachment" if is_matroska:
            (folder / "notes.ttf").write_bytes(random.Random(1).randbytes(5_000))
            attach = ["-attach", str(folder / "notes.ttf"), "-metadata:s:t", "mimetype=application/x-truetype-font"]
            return [*voice, *attach]
        case "with a timecode" if container.name in ("mov", "mp4"):
            video = ["-f", "lavfi", "-i", _VIDEO, "-map", "0", "-map", "1", "-c:v", "mpeg4"]
            return [*voice, *video, "-timecode", "01:00:00:00"]
        case "first codec is unknown" if container.has_tracks and (is_matroska or is_mp4):
            return [*other, *voice, "-map", "0", "-map", "1", "-c:a:0", "ac3"]
        case "forty tracks" if container.name in ("mkv", "mp4", "mp4 fragmented", "mov"):
            return [*voice, *other, *itertools.chain.from_iterable([["-map", str(n % 2)] for n in range(40)])]
        case _:
            return None


def clips(folder: Path) -> Iterator[tuple[str, Container, bytes]]:
    """Yield a file for every container, codec and layout supported by ffmpeg."""
    for number, (container, layout) in enumerate(itertools.product(CONTAINERS, LAYOUTS)):
        inputs = layout_arguments(layout, container, folder)
        if inputs is None:
            continue
        # Every codec occurs with the plain layout, and one with each of the others.
        codecs = container.codecs if layout == "one track" else (container.codecs[number % len(container.codecs)],)
        for codec in codecs:
            codec_arguments = ["-c:a:1" if layout == "first codec is unknown" else "-c:a", codec]
            if "-ac" in container.arguments and layout == "first codec is unknown":
                continue
            path = folder / "clip"
            command = [ffmpeg(), "-v", "quiet", "-y", *inputs, *codec_arguments, *container.arguments, str(path)]
            if subprocess.run(command, check=False).returncode == 0:
                yield f"{container.name}, {codec}, {layout}", container, path.read_bytes()


Edit = Callable[[bytes], bytes | None]


def _set_size(magic: bytes, offset: int, kind: str, value: float) -> Edit:
    """Return an edit of the size after a magic word: to a value, or to a share (below 10) of the true size."""

    def edit(data: bytes) -> bytes | None:
        place = data.find(magic)
        if place < 0 or place + offset + struct.calcsize(kind) > len(data):
            return None
        (true,) = struct.unpack_from(kind, data, place + offset)
        size = int(true * value) if 0 < value < 10 and true < 2**31 else int(value)
        head, tail = data[: place + offset], data[place + offset + struct.calcsize(kind) :]
        return head + struct.pack(kind, size) + tail

    return edit


_SIZE_VALUES: Mapping[str, float] = {
    "zero": 0,
    "2e9": 2_000_000_000,
    "0xFFFFFFFF": 0xFFFF_FFFF,
    "0x7FFFFFFF": 0x7FFF_FFFF,
    "half": 0.5,
    "double": 2,
}
_SIZE_FIELDS: Mapping[str, tuple[bytes, int, str]] = {
    "wav": (b"data", 4, "<I"),
    "aiff": (b"SSND", 4, ">I"),
    "au": (b".snd", 8, ">I"),
    "w64": (b"data\xf3\xac\xd3\x11", 16, "<Q"),
    "caf": (b"data", 4, ">Q"),
}
_DS64_FIELD = (b"ds64", 16, "<Q")
_FRAME_COUNTS: Mapping[str, tuple[bytes, int, str]] = {"mp3": (b"Info", 8, ">I"), "aiff": (b"COMM", 10, ">I")}


def _flac_total(share: float) -> Edit:
    def edit(data: bytes) -> bytes | None:
        if data[:4] != b"fLaC":
            return None
        packed = int.from_bytes(data[18:26])
        total = int((packed & (2**36 - 1)) * share)
        return data[:18] + (packed >> 36 << 36 | total).to_bytes(8) + data[26:]

    return edit


def _matroska_duration(seconds: float) -> Edit:
    def edit(data: bytes) -> bytes | None:
        place = data.find(b"\x44\x89\x88")
        if place < 0:
            return None
        return data[: place + 3] + struct.pack(">d", 1000 * seconds) + data[place + 11 :]

    return edit


def _mp4_duration(box: bytes, offset: int, share: float) -> Edit:
    return _set_size(box, offset, ">I", share)


def lies(container: Container) -> dict[str, Edit]:
    """Return the applicable edits of a container, by name."""
    noise = random.Random(7).randbytes(700).replace(b"\xff", b"\x00")
    id3 = b"ID3\x04\x00\x00\x00\x00\x0f\x76" + bytes(2038)
    lying_id3 = b"ID3\x03\x00\x00\x7f\x7f\x7f\x7f" + bytes(300)
    edits: dict[str, Edit] = {
        "ten zeros first": lambda data: bytes(10) + data,
        "four thousand zeros first": lambda data: bytes(4000) + data,
        "noise first": lambda data: noise + data,
        "a line break first": lambda data: b"\r\n" + data,
        "HTTP headers first": lambda data: b"HTTP/1.1 200 OK\r\nContent-Type: audio/x\r\n\r\n" + data,
        "a tag first": lambda data: id3 + data,
        "two tags first": lambda data: id3 + id3 + data,
        "a tag of a wrong size first": lambda data: lying_id3 + data,
        "zeros behind": lambda data: data + bytes(5000),
        "a tag behind": lambda data: data + b"TAG" + b"x" * 125,
        "noise behind": lambda data: data + noise,
        "twice": lambda data: data + data,
    }
    name = container.name
    for values_name, value in _SIZE_VALUES.items():
        if name in _SIZE_FIELDS:
            edits[f"size {values_name}"] = _set_size(*_SIZE_FIELDS[name], value)
        if name == "rf64":
            edits[f"size {values_name}"] = _set_size(*_DS64_FIELD, value)
        if name in _FRAME_COUNTS:
            edits[f"count {values_name}"] = _set_size(*_FRAME_COUNTS[name], value)
    if name == "flac":
        edits |= {f"total times {share}": _flac_total(share) for share in (0, 0.3, 3, 400)}
    if name.startswith(("mkv", "webm")):
        edits |= {f"duration of {seconds} s": _matroska_duration(seconds) for seconds in (0, 0.1, 30, 40_000)}
    if name.startswith(("mp4", "mov", "m4a", "3gp")):
        for share in (0, 0.3, 3, 0xFFFF_FFFF):
            edits[f"movie length times {share}"] = _mp4_duration(b"mvhd", 20, share)
            edits[f"media length times {share}"] = _mp4_duration(b"mdhd", 20, share)
            edits[f"edit length times {share}"] = _mp4_duration(b"elst", 12, share)
    if name.startswith(("mp3", "mp2", "adts")):
        edits["from the middle"] = lambda data: data[len(data) // 3 :]
    return edits


def files(folder: Path, num: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Yield at least `num` odd files: every unchanged layout, then header lies, drawn evenly over the containers."""
    plain: dict[str, list[tuple[str, Container, bytes]]] = {}
    num_plain = 0
    for name, container, data in clips(folder):
        plain.setdefault(container.name, []).append((name, container, data))
        num_plain += 1
        yield name, data
    rng = random.Random(seed)
    edited: list[list[tuple[str, bytes]]] = []
    for made in plain.values():
        _, container, data = made[0]
        edited_files: list[tuple[str, bytes]] = []
        for lie, edit in lies(container).items():
            chosen = made[0] if lie.startswith(("size", "count")) else rng.choice(made)
            if (odd := edit(chosen[2])) is not None and odd != chosen[2]:
                edited_files.append((f"{chosen[0]}, {lie}", odd))
        edited.append(edited_files)
    left = max(num - num_plain, 0)
    for file in itertools.chain.from_iterable(itertools.zip_longest(*edited)):
        if file is not None:
            left -= 1
            yield file
    if left > 0:
        raise ValueError(f"only {num - left} odd files can be made; {num} were asked for")


@dataclass(frozen=True)
class Reference:
    """An ffmpeg program's result for a file.

    Attributes:
        duration_s: Decoded seconds of a track; 0 without any decoded audio.
        is_silent: True if all of it is below -50 dBFS.
    """

    duration_s: float
    is_silent: bool


def reference(path: Path, track: int) -> Reference:
    """Decode one audio track of a file, counted from 1, with an ffmpeg program outside of any sandbox."""
    command = [ffmpeg(), "-nostdin", "-v", "quiet", "-i", str(path), "-map", f"0:a:{track - 1}"]
    command += ["-af", "pan=mono|c0=c0", "-ar", str(RATE_HZ), "-f", "s16le", "-"]
    raw = subprocess.run(command, capture_output=True, timeout=60, check=False).stdout
    samples = array.array("h", raw[: len(raw) // 2 * 2])
    peak = max(max(samples, default=0), -min(samples, default=0))
    return Reference(len(samples) / RATE_HZ, peak < 104)


LOSS_CODES = frozenset(
    ("audio_missing", "edit_list_applied", "damage_skipped", "padding_trimmed", "size_mismatch", "track_skipped")
)
"""Warnings about certainly or possibly unused audio."""


def is_lost(duration_s: float, is_silent: bool, codes: Sequence[str], true: Reference) -> bool:
    """Return True if a decoded file lost audio without a warning."""
    if LOSS_CODES & set(codes):
        return False
    return true.duration_s - duration_s > MIN_LOST_S or (is_silent and not true.is_silent)
