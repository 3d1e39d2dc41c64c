"""Makes what strangers send: clips in every format and a thousand ways to break them, the same ones every time."""

from __future__ import annotations

import random
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

from hyper_model.audio import find_ffmpeg

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


def clips(folder: Path) -> dict[str, bytes]:
    """Encodes 0.6 s of a tone in every format, and writes AMR by hand: few builds of ffmpeg can encode it."""
    found = {"amr": b"#!AMR\n" + (bytes([0x3C]) + bytes(range(31))) * 30}
    for name, arguments in FORMATS.items():
        path = folder / name.replace(" ", "-")
        subprocess.run([find_ffmpeg(), "-v", "error", "-y", *TONE, *arguments, str(path)], check=True)
        found[name] = path.read_bytes()
    return found


def mutants(good: dict[str, bytes], count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Yields so many broken clips, each with a name by which it can be made again."""
    names = sorted(good)
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        name = names[number % len(names)]
        clip = bytearray(good[name])
        for _ in range(rng.randint(1, 8)):
            blow(clip, good, rng)
        yield f"{name}, seed {seed}, number {number}", bytes(clip)


def blow(clip: bytearray, good: dict[str, bytes], rng: random.Random) -> None:
    """Breaks a clip in one place; half of the blows fall on the header, where parsers live."""
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


def playlists(port: int, secret: Path) -> Iterator[tuple[str, bytes]]:
    """Yields texts that make some decoder fetch from a port or read a file, behind every format's first bytes."""
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
        "subfile": f"subfile,,start,0,end,0,,:{secret}",
    }
    for magic, head in MAGICS.items():
        for text, body in texts.items():
            yield f"{text} as {magic}", head + body.encode()


def references(port: int, secret: Path) -> Iterator[tuple[str, bytes]]:
    """Yields well-formed MP4s whose samples lie in another file or at an address, as QuickTime allows."""

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
