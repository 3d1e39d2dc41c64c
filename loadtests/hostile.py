"""Generate hostile uploads: clips in every format, broken in ten thousand ways, reproducible by seed.

An ffmpeg program writes the formats; everything else is written here. This module depends on no service.
"""

from __future__ import annotations

import gzip
import io
import itertools
import random
import shutil
import struct
import subprocess
import zipfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

TONE = ["-f", "lavfi", "-i", "aevalsrc=0.5*sin(2*PI*440*t)|0.25*sin(2*PI*1000*t):s=22050:d=0.6"]
FORMATS: dict[str, tuple[str, ...]] = {
    "wav": ("-c:a", "pcm_s16le", "-f", "wav"),
    "wav float": ("-c:a", "pcm_f32le", "-f", "wav"),
    "wav adpcm": ("-c:a", "adpcm_ms", "-f", "wav"),
    "flac": ("-f", "flac"),
    "mp3": ("-c:a", "libmp3lame", "-f", "mp3"),
    "vorbis": ("-c:a", "libvorbis", "-f", "ogg"),
    "opus": ("-c:a", "libopus", "-ar", "48000", "-f", "ogg"),
    "m4a": ("-c:a", "aac", "-f", "ipod"),
    "alac": ("-c:a", "alac", "-f", "ipod"),
    "webm": ("-c:a", "libopus", "-ar", "48000", "-f", "webm"),
    "aac": ("-c:a", "aac", "-f", "adts"),
    "aiff": ("-c:a", "pcm_s16be", "-f", "aiff"),
    "caf": ("-c:a", "pcm_s16le", "-f", "caf"),
    "w64": ("-c:a", "pcm_s16le", "-f", "w64"),
    "wma": ("-c:a", "wmav2", "-f", "asf"),
    "mp4 with a picture": (
        *("-f", "lavfi", "-i", "testsrc=d=0.6:s=32x32:r=5", "-map", "0", "-map", "1"),
        *("-c:v", "mpeg4", "-c:a", "aac", "-f", "mp4"),
    ),
}
EXTREMES = (
    b"\0",
    b"\xff",
    b"\x7f",
    b"\x80",
    b"\0\0\0\0",
    b"\xff" * 4,
    b"\x7f\xff\xff\xff",
    b"\xff\xff\xff\x7f",
    b"\xff" * 8,
)


@cache
def ffmpeg() -> str:
    """Return the ffmpeg program on PATH, else the one of imageio-ffmpeg."""
    if path := shutil.which("ffmpeg"):
        return path
    import imageio_ffmpeg

    return cast(Any, imageio_ffmpeg).get_ffmpeg_exe()


def clips(folder: Path) -> dict[str, bytes]:
    """Encode 0.6 s of a tone in every format; AMR is written here, since few builds of ffmpeg encode it."""
    encoded = {"amr": b"#!AMR\n" + (bytes([0x3C]) + bytes(range(31))) * 30}
    for name, arguments in FORMATS.items():
        path = folder / name.replace(" ", "-")
        subprocess.run([ffmpeg(), "-v", "error", "-y", *TONE, *arguments, str(path)], check=True)
        encoded[name] = path.read_bytes()
    return encoded


def mutants(good: dict[str, bytes], count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Yield `count` broken clips with reproducible names."""
    names = sorted(good)
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        name = names[number % len(names)]
        clip = bytearray(good[name])
        for _ in range(rng.randint(1, 8)):
            blow(clip, good, rng)
        yield f"{name}, seed {seed}, number {number}", bytes(clip)


def blow(clip: bytearray, good: dict[str, bytes], rng: random.Random) -> None:
    """Break a clip in one place; half of the changes hit the header, the main input of parsers."""
    place = rng.randrange(min(200, len(clip)) if rng.random() < 0.5 else len(clip)) if clip else 0
    match rng.randrange(8):
        case 0:
            clip[place : place + 1] = bytes([rng.randrange(256)])
        case 1:
            if clip:
                clip[place] ^= 1 << rng.randrange(8)
        case 2:
            extreme = rng.choice(EXTREMES)
            clip[place : place + len(extreme)] = extreme
        case 3:
            clip[place:place] = rng.randbytes(rng.randint(1, 64))
        case 4:
            del clip[place : place + rng.randint(1, 256)]
        case 5:
            del clip[max(1, place) :]
        case 6:
            clip[place:place] = clip[place : place + rng.randint(1, 4096)]
        case _:
            other = good[rng.choice(sorted(good))]
            start = rng.randrange(len(other))
            clip[place:] = other[start : start + rng.randint(1, 8192)]


MAGICS: dict[str, bytes] = {
    "nothing": b"",
    "wav": b"RIFF\x24\x00\x00\x00WAVE",
    "ogg": b"OggS",
    "id3": b"ID3\x03\x00\x00\x00\x00\x00\x00",
    "mp3": b"\xff\xfb\x90\x00",
    "m4a": b"\x00\x00\x00\x18ftypM4A ",
    "webm": b"\x1a\x45\xdf\xa3",
    "flac": b"fLaC",
    "aiff": b"FORM\x00\x00\x00\x00AIFF",
    "caf": b"caff\x00\x01\x00\x00",
    "amr": b"#!AMR\n",
    "wma": b"\x30\x26\xb2\x75\x8e\x66\xcf\x11",
}


PCM, FLOAT = 1, 3
RATES_HZ = (0, 1, 7, 999, 8_001, 22_050, 192_000, 655_350, 2**31 - 1, 2**32 - 1)
CHANNELS = (0, 1, 3, 8, 9, 255, 1024, 65_535)
BITS = (0, 1, 7, 8, 12, 16, 24, 32, 33, 64, 65_535)
SIZES = (0, 1, 3, 2**31 - 1, 2**31, 2**32 - 1)
MAX_FLAC_SAMPLES = 2**36 - 1


def riff(*chunks: tuple[bytes, bytes], form: bytes = b"WAVE", size: int | None = None) -> bytes:
    """Build a RIFF file from chunks; `size` overrides the size in its header."""
    body = b"".join(name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2) for name, data in chunks)
    return b"RIFF" + struct.pack("<I", len(body) + 4 if size is None else size) + form + body


def wave(
    data: bytes, *, form: int = PCM, channels: int = 1, rate_hz: int = 16_000, bits: int = 16, align: int | None = None
) -> bytes:
    """Build a WAV file with arbitrary header fields."""
    align = channels * bits // 8 % 65_536 if align is None else align
    head = struct.pack("<HHIIHH", form, channels, rate_hz, rate_hz * align % 2**32, align, bits)
    return riff((b"fmt ", head), (b"data", data))


def inventions(good: dict[str, bytes]) -> Iterator[tuple[str, bytes]]:
    """Yield files out of reach of mutation: false sizes, decompression bombs, non-finite numbers, nested files."""
    noise = random.Random(1).randbytes(6_400)
    for rate_hz in RATES_HZ:
        yield f"wav of {rate_hz} Hz", wave(noise, rate_hz=rate_hz)
    for channels in CHANNELS:
        yield f"wav of {channels} channels", wave(noise, channels=channels)
    for bits, form in itertools.product(BITS, (PCM, FLOAT)):
        yield f"wav of {bits} bits, form {form}", wave(noise, bits=bits, form=form)
    for align in (0, 1, 3, 65_535):
        yield f"wav in blocks of {align}", wave(noise, align=align)
    for form in (0, 2, 6, 7, 17, 49, 85, 353, 65_534, 65_535):
        yield f"wav of form {form}", wave(noise, form=form)
    for size in SIZES:
        whole = wave(noise)
        yield f"wav that says {size} bytes", whole[:4] + struct.pack("<I", size) + whole[8:]
        yield f"wav whose data says {size} bytes", whole[:40] + struct.pack("<I", size) + whole[44:]
        yield f"wav with a chunk of {size} bytes", whole[:36] + b"junk" + struct.pack("<I", size) + whole[36:]
    # Read at 1 Hz, a small file would last six hours.
    yield "wav of 1 Hz, six hours", wave(bytes(2 * 21_600), rate_hz=1)
    yield "wav of 24 MiB of silence", wave(bytes(24 * 2**20), rate_hz=44_100, channels=2)
    yield "wav of 1000 Hz, three hours", wave(bytes(2 * 1000 * 10_800), rate_hz=1000)
    yield "wav of 100,000 chunks", riff((b"fmt ", wave(b"")[20:36]), *[(b"junk", b"")] * 100_000, (b"data", noise))
    yield "wav of two heads", riff((b"fmt ", wave(b"")[20:36]), (b"fmt ", bytes(16)), (b"data", noise))
    yield "wav without a head", riff((b"data", noise))
    yield "wav without data", riff((b"fmt ", wave(b"")[20:36]))
    for name, value in NUMBERS.items():
        for kind, bits in (("<f", 32), ("<d", 64)):
            packed = struct.pack(kind, value if bits == 64 or abs(value) < 1e38 or value != value else float("inf"))
            yield f"wav of {name}, {bits} bits", wave(packed * 1600, form=FLOAT, bits=bits)
            samples_with_one = packed + struct.pack(kind, 0.25) * 1600
            yield f"wav with one {name}, {bits} bits", wave(samples_with_one, form=FLOAT, bits=bits)
    for rate_hz, channels, samples in itertools.product((1, 44_100, 655_350), (1, 8), (0, MAX_FLAC_SAMPLES)):
        yield f"flac that says {samples} samples, {rate_hz} Hz, {channels}", flac_head(rate_hz, channels, samples)
        yield (
            f"the same before sound, {rate_hz} Hz, {channels}, {samples}",
            (flac_head(rate_hz, channels, samples) + good["flac"][42:]),
        )
    for name, clip in sorted(good.items()):
        yield from wrapped(name, clip)


NUMBERS = {
    "not a number": float("nan"),
    "infinity": float("inf"),
    "minus infinity": float("-inf"),
    "the largest": 1.7e308,
    "the least": 5e-324,
    "a million": 1e6,
}


def flac_head(rate_hz: int, channels: int, samples: int) -> bytes:
    """Build the first block of a FLAC file, with its declared length."""
    packed = rate_hz << 44 | (channels - 1) << 41 | 15 << 36 | samples
    return b"fLaC\x80\0\0\x22" + struct.pack(">HH6x", 4096, 4096) + struct.pack(">Q", packed) + bytes(16)


def wrapped(name: str, clip: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield a clip inside, after and before other data, and repeated."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        # A fixed date keeps the file reproducible.
        file.writestr(zipfile.ZipInfo("clip"), clip, zipfile.ZIP_DEFLATED)
    tag = b"ID3\x03\0\0" + bytes((0, 0, 0x1F, 0x7F))
    yield f"{name} in a zip", archive.getvalue()
    yield f"{name} in gzip", gzip.compress(clip, mtime=0)
    yield f"{name} in gzip in gzip", gzip.compress(gzip.compress(clip, mtime=0), mtime=0)
    yield f"{name} in a wav", wave(clip)
    yield f"{name} in a chunk", riff((b"junk", clip), (b"data", clip))
    yield f"{name} behind a tag", tag + bytes(4095) + clip
    yield f"{name} behind a tag that says more", tag + clip
    yield f"{name} behind nothing", bytes(64) + clip
    yield f"{name} before text", clip + b"#EXTM3U\nhttp://127.0.0.1:9/\n"
    yield f"{name} twice", clip + clip
    yield f"{name} backwards", clip[::-1]
    yield f"{name} in capitals", clip[:64].upper() + clip[64:]
    yield f"{name} as text", clip.hex().encode()
    for num_bytes in (1, 4, 12, 32, 64, len(clip) // 2, len(clip) - 1):
        yield f"{name}, its first {num_bytes} bytes", clip[:num_bytes]
        yield f"{name}, its first {num_bytes} bytes and nothing", clip[:num_bytes] + bytes(100_000)


SILENCES: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "flac, 8 channels of 192 kHz": ("r=192000:cl=7.1", 100, ("-c:a", "flac", "-f", "flac")),
    "flac, an hour": ("r=8000:cl=mono", 3600, ("-c:a", "flac", "-f", "flac")),
    "flac, ten minutes": ("r=48000:cl=mono", 599, ("-c:a", "flac", "-f", "flac")),
    "m4a, ten minutes": ("r=8000:cl=mono", 599, ("-c:a", "aac", "-f", "ipod")),
    "alac, eleven minutes": ("r=44100:cl=stereo", 660, ("-c:a", "alac", "-f", "ipod")),
    "mp3, eleven minutes": ("r=8000:cl=mono", 660, ("-c:a", "libmp3lame", "-b:a", "8k", "-f", "mp3")),
    "vorbis, eleven minutes": ("r=8000:cl=mono", 660, ("-c:a", "libvorbis", "-f", "ogg")),
    "opus, eleven minutes": (
        *("r=48000:cl=mono", 660),
        ("-c:a", "libopus", "-b:a", "6k", "-compression_level", "0", "-f", "ogg"),
    ),
}


def silences(folder: Path, names: Sequence[str] = tuple(SILENCES)) -> Iterator[tuple[str, bytes]]:
    """Yield long silences, small until decoded."""
    for name in names:
        source, seconds, arguments = SILENCES[name]
        path = folder / name.replace(" ", "-").replace(",", "")
        command = [ffmpeg(), "-v", "error", "-y", "-f", "lavfi", "-i", f"anullsrc={source}", "-t", str(seconds)]
        subprocess.run([*command, *arguments, str(path)], check=True)
        yield f"silence as {name}", path.read_bytes()


def playlists(port: int, secret: Path) -> Iterator[tuple[str, bytes]]:
    """Yield texts that make some decoder fetch from a port or read a file, behind every format's first bytes."""
    url = f"http://127.0.0.1:{port}/clip.ts"
    hls = "#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\n{}\n#EXT-X-ENDLIST\n"
    texts = {
        "hls": hls.format(url),
        "hls of a file": hls.format(secret),
        "hls of concat": hls.format(f"concat:{secret}"),
        "ffconcat of a file": f"ffconcat version 1.0\nfile '{secret}'\n",
        "ffconcat of an address": f"ffconcat version 1.0\nfile {url}\n",
        "ffconcat of a name": f"ffconcat version 1.0\nfile {secret.name}\n",
        "sdp": f"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio {port} RTP/AVP 0\n",
        "dash": f'<?xml version="1.0"?><MPD><Period><BaseURL>{url}</BaseURL></Period></MPD>',
        "pls": f"[playlist]\nFile1={url}\n",
        "xspf": f'<?xml version="1.0"?><playlist><trackList><track><location>{url}</location></track></trackList>',
        "asx": f'<asx version="3.0"><entry><ref href="{url}"/></entry></asx>',
        "asf reference": f"[Reference]\r\nRef1={url}?MSWMExt=.asf\r\n",
        "smil": f'<smil><body><audio src="file://{secret}"/></body></smil>',
        "rtsp": f"rtsptext\nrtsp://127.0.0.1:{port}/clip\n",
        "cue": f'FILE "{secret}" WAVE\n  TRACK 01 AUDIO\n    INDEX 01 00:00:00\n',
        "xml entity": f'<!DOCTYPE a [<!ENTITY b SYSTEM "file://{secret}">]><MPD>&b;</MPD>',
        "subfile": f"subfile,,start,0,end,0,,:{secret}",
    }
    for magic, head in MAGICS.items():
        for text, body in texts.items():
            yield f"{text} as {magic}", head + body.encode()


def references(port: int, secret: Path) -> Iterator[tuple[str, bytes]]:
    """Yield well-formed MP4s with samples in another file or at an address, as QuickTime allows."""

    def atom(name: bytes, *parts: bytes) -> bytes:
        body = b"".join(parts)
        return struct.pack(">I4s", 8 + len(body), name) + body

    for kind, target in (
        ("a file", str(secret)),
        ("an address", f"http://127.0.0.1:{port}/a"),
        ("a name", secret.name),
    ):
        reference = atom(b"dref", bytes(4), struct.pack(">I", 1), atom(b"url ", bytes(4), target.encode() + b"\0"))
        description = struct.pack(">I4s6xH8xHH4xI", 36, b"sowt", 1, 1, 16, 8000 << 16)
        table = atom(
            b"stbl",
            atom(b"stsd", bytes(4), struct.pack(">I", 1), description),
            atom(b"stts", bytes(4), struct.pack(">III", 1, 8000, 1)),
            atom(b"stsc", bytes(4), struct.pack(">IIII", 1, 1, 8000, 1)),
            atom(b"stsz", bytes(4), struct.pack(">II", 2, 8000)),
            atom(b"stco", bytes(4), struct.pack(">II", 1, 0)),
        )
        media = atom(
            b"mdia",
            atom(b"mdhd", bytes(12), struct.pack(">II", 8000, 8000), bytes(4)),
            atom(b"hdlr", bytes(8), b"soun", bytes(13)),
            atom(b"minf", atom(b"smhd", bytes(8)), atom(b"dinf", reference), table),
        )
        header = atom(b"tkhd", b"\0\0\0\1", bytes(8), struct.pack(">I", 1), bytes(68))
        movie = atom(
            b"moov", atom(b"mvhd", bytes(12), struct.pack(">II", 8000, 8000), bytes(80)), atom(b"trak", header, media)
        )
        yield f"mp4 that refers to {kind}", atom(b"ftyp", b"qt  ", bytes(4)) + movie


def traps(port: int, secret: Path) -> list[tuple[str, bytes]]:
    """Return all files that make some decoder call a port or read a file."""
    return [*playlists(port, secret), *references(port, secret)]


def files(
    good: dict[str, bytes],
    folder: Path,
    port: int,
    secret: Path,
    num: int,
    seed: int,
    *,
    has_silences: bool = True,
) -> Iterator[tuple[str, bytes]]:
    """Yield `num` hostile files: traps, long silences and inventions, then mutated clips and traps.

    If the fixed files exceed half of `num`, only a random sample is used. A short run then has every kind.

    Args:
        folder: Folder for the long silences.
        port: Port called by traps.
        secret: File read by traps.
        has_silences: Generate long silences (about a minute of work).
    """
    set_traps = traps(port, secret)
    by_hand = [*set_traps, *(silences(folder) if has_silences else ()), *inventions(good)]
    if len(by_hand) > num // 2:
        by_hand = random.Random(seed).sample(by_hand, num // 2)
    yield from by_hand
    left = num - len(by_hand)
    num_broken_traps = left // 10
    yield from mutants(good, left - num_broken_traps, seed)
    yield from mutants(dict(set_traps), num_broken_traps, seed)
