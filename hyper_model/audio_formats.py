"""Name the format of a clip by its bytes, and find the place where its audio begins.

File names and content types are a client's word only. Tags, zeros, HTTP headers and other junk may precede the audio;
an MP3 or AAC recording may begin midway in a frame. Text, archives, documents and pictures are refused by name.

Source of the frame tables: ISO 11172-3, 13818-3 and 13818-7.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

from hyper_model.errors import InvalidAudioError, UnsupportedAudioError

DEMUXERS = {
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
    "au": "au",
}
"""Container as we name it -> FFmpeg's demuxer. FFmpeg is given its name and tries no other."""

FORMATS = tuple(DEMUXERS)

MAX_JUNK_BYTES = 2**20
"""Number of bytes searched for the first frame or header."""

_URL_SAFE = bytes.maketrans(b"-_", b"+/")

_MP4_BOXES = frozenset((b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot", b"styp", b"sidx", b"moof"))
# Beginnings of files that contain, describe or merely resemble audio. They are not searched for audio inside.
_OTHER_FILES = (
    (b"PK\x03\x04", "a ZIP archive"),
    (b"PK\x05\x06", "an empty ZIP archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"BZh", "a bzip2 archive"),
    (b"\xfd7zXZ\x00", "an xz archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"Rar!\x1a\x07", "a RAR archive"),
    (b"%PDF", "a PDF document"),
    (b"\x89PNG\r\n\x1a\n", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"GIF8", "a GIF picture"),
    (b"MThd", "a MIDI file, which holds notes and no sound"),
    (b"\x7fELF", "a program"),
    (b"MZ", "a program"),
    (b"FLV\x01", "an FLV video"),
    (b"\x00\x00\x01\xba", "an MPEG program stream"),
    (b"\x00\x00\x01\xb3", "an MPEG video"),
    (b"MAC ", "Monkey's Audio"),
    (b"wvpk", "WavPack audio"),
    (b"TTA1", "TTA audio"),
    (b"MPCK", "Musepack audio"),
    (b"DSD ", "DSD audio"),
    (b"FRM8", "DSD audio"),
    (b"#!SILK", "SILK audio of a messenger"),
    (b"\x02#!SILK", "SILK audio of a messenger"),
    (b"ADIF", "AAC in an ADIF header"),
    (b"\x0b\x77", "AC-3 audio"),
    (b".RMF", "RealMedia audio"),
    (b"\x1f\x43\xb6\x75", "a later part of a WebM recording, without the header of its first part"),
    (b"SQLite format 3\0", "a database"),
)
_TEXT_HEAD_BYTES = 512
_MIN_FILE_BYTES = 64
# Headers found behind junk: long enough to exclude a chance match.
_BURIED_HEADERS: tuple[tuple[re.Pattern[bytes], str], ...] = (
    (re.compile(rb"(?:RIFF|RIFX|RF64|BW64).{4}WAVE", re.DOTALL), "wav"),
    (re.compile(rb"fLaC[\x00\x80]\x00\x00\x22", re.DOTALL), "flac"),
    (re.compile(rb"OggS\x00[\x02\x03\x06\x07]", re.DOTALL), "ogg"),
    (re.compile(rb"\x00\x00\x00[\x10-\x60]ftyp[ -~]{4}", re.DOTALL), "m4a"),
    (re.compile(rb"\x1a\x45\xdf\xa3[\x80-\xff\x01]", re.DOTALL), "webm"),
    (re.compile(rb"FORM.{4}AIF[FC]", re.DOTALL), "aiff"),
    (re.compile(rb"caff\x00\x01\x00\x00desc", re.DOTALL), "caf"),
    (re.compile(rb"#!AMR(?:-WB)?\n", re.DOTALL), "amr"),
    (re.compile(rb"\x30\x26\xb2\x75\x8e\x66\xcf\x11\xa6\xd9", re.DOTALL), "wma"),
    (re.compile(rb"riff\x2e\x91\xcf\x11\xa5\xd6", re.DOTALL), "w64"),
    (re.compile(rb"\.snd\x00\x00.{6}\x00\x00\x00[\x01-\x1b]\x00[\x00-\x05]..\x00\x00\x00", re.DOTALL), "au"),
)
_NUM_FRAMES_IN_A_ROW = 3
# Beginnings of frames: sync word, version, layer, and for MPEG a bit rate neither free nor reserved.
_MPEG_SYNC = re.compile(rb"\xff[\xe2-\xe7\xf2-\xf7\xfa-\xff][\x10-\xef]", re.DOTALL)
_ADTS_SYNC = re.compile(rb"\xff[\xf0\xf1\xf8\xf9]", re.DOTALL)
# Bound of the search in bytes made to resemble frames.
_MAX_CANDIDATES = 20_000

_MPEG_1_KBPS = {
    1: (0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    2: (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    3: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
}
_MPEG_2_KBPS = {
    1: (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    2: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    3: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_RATES_HZ = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}


def sniff(data: bytes) -> str:
    """Return the container by the clip's bytes, one of FORMATS.

    Raises:
        InvalidAudioError: If there are no bytes.
        UnsupportedAudioError: If it is anything else: text, playlists, session descriptions, pictures, archives.
    """
    return locate(data)[0]


def locate(data: bytes) -> tuple[str, int]:
    """Return the container, and the place of its first byte behind tags and junk.

    Raises:
        InvalidAudioError: If there are no bytes.
        UnsupportedAudioError: If the file holds no audio in a supported format.
    """
    if not data:
        raise InvalidAudioError(
            "The clip is empty (0 bytes).",
            code="empty_audio",
            limit=1,
            actual=0,
            hint="Send the bytes of an audio file.",
        )
    if (container := _by_magic(data, 0)) is not None:
        return container, 0
    start = 0
    # A tag may follow a tag.
    while (behind := skip_id3(data, start)) > start and behind < len(data):
        start = behind
    is_tagged = data[:3] == b"ID3"
    if start and (container := _by_magic(data, start)) is not None:
        return container, start
    for magic, name in _OTHER_FILES:
        if data.startswith(magic):
            _refuse(f"This is {name}, not audio that we decode.", "unknown")
    if data[:4] == b"RIFF" and data[8:12] in (b"AVI ", b"RMID", b"WEBP", b"AMV "):
        _refuse(f"This is a RIFF file of type {data[8:12].decode().strip()}, not audio that we decode.", "unknown")
    if all(data[place : place + 1] == b"\x47" for place in (0, 188, 376, 564)):
        _refuse("This is an MPEG transport stream, not audio that we decode.", "unknown")
    if (encoding := _text_encoding(data)) is not None:
        raise UnsupportedAudioError(
            f"This is audio written as {encoding}; send the bytes themselves, not text.",
            actual="text",
            hint="Decode the text before you send the file.",
        )
    if _looks_like_text(data[:_TEXT_HEAD_BYTES]) and _looks_like_text(data[:MAX_JUNK_BYTES]):
        _refuse("This is not audio that we decode.", "text")
    found = [place for search in (_find_header, _find_mpeg, _find_adts) if (place := search(data)) is not None]
    if found:
        return min(found, key=lambda place: place[1])
    if is_tagged:
        return "mp3", start if start < len(data) else 0
    _refuse("This is not audio that we decode.", "text" if _looks_like_text(data[:_TEXT_HEAD_BYTES]) else "unknown")


def _text_encoding(data: bytes) -> str | None:
    """Name the encoding of a text that contains a file of a known format; None if it is no such text."""
    text = data[:_TEXT_HEAD_BYTES].strip().removeprefix(b"b'").strip(b"\"'")
    if text[:5].lower() == b"data:":
        return "a data URL"
    for name, decode in (("base64", base64.b64decode), ("hexadecimal digits", bytes.fromhex)):
        head = b"".join(text.split())[:256]
        with contextlib.suppress(ValueError):
            begin = decode(head.translate(_URL_SAFE).decode("ascii"))
            if _by_magic(begin, 0) is not None or begin[:3] == b"ID3":
                return name
    return None


def _refuse(message: str, kind: str) -> NoReturn:
    raise UnsupportedAudioError(
        f"{message} We decode {', '.join(FORMATS)}.",
        actual=kind,
        hint="Send the audio file itself instead of a playlist, a link or an archive.",
    )


def _by_magic(data: bytes, start: int) -> str | None:
    """Name the container whose header begins exactly at `start`."""
    head = data[start : start + 64]
    kind = head[8:12]
    if (head[:4] in (b"RIFF", b"RIFX", b"RF64", b"BW64")) and kind == b"WAVE":
        return "wav"
    if head[:4] == b"FORM" and kind in (b"AIFF", b"AIFC"):
        return "aiff"
    if head[4:8] in _MP4_BOXES:
        return "m4a"
    for magic, container in (
        (b"fLaC", "flac"),
        (b"OggS", "ogg"),
        (b"\x1a\x45\xdf\xa3", "webm"),
        (b"caff", "caf"),
        (b"#!AMR", "amr"),
        (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "wma"),
        (b"riff\x2e\x91\xcf\x11", "w64"),
        (b".snd\x00\x00", "au"),
    ):
        if head.startswith(magic):
            return container
    if len(head) >= 4 and head[0] == 0xFF:
        if head[1] & 0xF6 == 0xF0:
            return "aac"
        # Sync word, MPEG 1 / 2 / 2.5, layer III, and neither a reserved bit rate nor a reserved sample rate.
        if head[1] & 0xE6 == 0xE2 and head[1] & 0x18 != 0x08 and head[2] & 0xF0 != 0xF0 and head[2] & 0x0C != 0x0C:
            return "mp3"
        if head[1] & 0xE0 == 0xE0 and _count_frames(data, start, mpeg_frame_bytes) == _NUM_FRAMES_IN_A_ROW:
            return "mp3"
    return None


def _find_header(data: bytes) -> tuple[str, int] | None:
    """Find the header of a container behind junk."""
    places = [
        (container, match.start())
        for pattern, container in _BURIED_HEADERS
        if (match := pattern.search(data, 0, MAX_JUNK_BYTES)) is not None
    ]
    return min(places, key=lambda place: place[1]) if places else None


def find_joined(data: bytes, container: str) -> int | None:
    """Return the place of a second file of the same format joined to the first, or None."""
    for pattern, name in _BURIED_HEADERS:
        if name == container and (match := pattern.search(data, _MIN_FILE_BYTES)) is not None:
            return match.start()
    return None


def _find_mpeg(data: bytes) -> tuple[str, int] | None:
    """Find the first of several MPEG audio frames in a row."""
    start = _find_frames(data, _MPEG_SYNC, mpeg_frame_bytes)
    return None if start is None else ("mp3", start)


def _find_adts(data: bytes) -> tuple[str, int] | None:
    """Find the first of several AAC frames in a row."""
    start = _find_frames(data, _ADTS_SYNC, _adts_frame_bytes)
    return None if start is None else ("aac", start)


def _find_frames(data: bytes, sync: re.Pattern[bytes], frame_bytes: Callable[[bytes, int], int]) -> int | None:
    for match in itertools.islice(sync.finditer(data, 0, MAX_JUNK_BYTES), _MAX_CANDIDATES):
        if _count_frames(data, match.start(), frame_bytes) == _NUM_FRAMES_IN_A_ROW:
            return match.start()
    return None


def _count_frames(data: bytes, position: int, frame_bytes: Callable[[bytes, int], int]) -> int:
    """Count frames in a row from a place on, up to three; the file may end behind the last."""
    count = 0
    first = data[position + 1 : position + 2]
    while count < _NUM_FRAMES_IN_A_ROW:
        size = frame_bytes(data, position)
        # The version and the layer stay the same.
        if not size or data[position + 1 : position + 2] != first:
            return count
        position += size
        count += 1
    return count


def mpeg_frame_bytes(data: bytes, position: int) -> int:
    """Return the size of the MPEG audio frame at a place; 0 without a frame or a stated size."""
    head = data[position : position + 4]
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return 0
    version, layer = head[1] >> 3 & 3, 4 - (head[1] >> 1 & 3)
    rate_index, kbps_index = head[2] >> 2 & 3, head[2] >> 4
    if version == 1 or layer == 4 or rate_index == 3 or kbps_index in (0, 15):
        return 0
    rate_hz = _RATES_HZ[version][rate_index]
    bits_per_s = 1000 * (_MPEG_1_KBPS if version == 3 else _MPEG_2_KBPS)[layer][kbps_index]
    padding = head[2] >> 1 & 1
    if layer == 1:
        return (12 * bits_per_s // rate_hz + padding) * 4
    return (144 if version == 3 or layer == 2 else 72) * bits_per_s // rate_hz + padding


def _adts_frame_bytes(data: bytes, position: int) -> int:
    """Return the size of the ADTS frame at a place; 0 without a frame."""
    head = data[position : position + 7]
    if len(head) < 7 or head[0] != 0xFF or head[1] & 0xF6 != 0xF0 or head[2] >> 2 & 15 > 12:
        return 0
    size = (head[3] & 3) << 11 | head[4] << 3 | head[5] >> 5
    return size if size > 7 else 0


_AMR_FRAME_BYTES: Mapping[bytes, Sequence[int]] = {
    b"#!AMR\n": (13, 14, 16, 18, 20, 21, 27, 32, 6, 0, 0, 0, 0, 0, 0, 1),
    b"#!AMR-WB\n": (18, 24, 33, 37, 41, 47, 51, 59, 61, 6, 0, 0, 0, 0, 1, 1),
}
"""Bytes of a frame by its type, its header included (RFC 4867, 3GPP TS 26.101 and 26.201)."""


def clean_amr(data: bytes) -> tuple[bytes, int]:
    """Return an AMR file of whole frames only, without joined headers and bytes after the last frame.

    Also return the number of bytes left out after the last frame, possibly a cut one.
    """
    for magic, sizes in _AMR_FRAME_BYTES.items():
        if not data.startswith(magic):
            continue
        parts = [magic]
        position = start = len(magic)
        # Padding of zeros would decode to frames.
        end = len(data.rstrip(b"\0"))
        while position < end:
            if data.startswith(magic, position):
                parts.append(data[start:position])
                position = start = position + len(magic)
                continue
            size = sizes[data[position] >> 3 & 15]
            # The bits around the type are zero in every frame.
            if not size or data[position] & 0x83:
                break
            position += size
        parts.append(data[start:position])
        left_out = len(data) - position
        # A frame may end in zeros.
        return b"".join(parts), left_out if left_out > 0 and (position < end or left_out >= max(sizes)) else 0
    return data, 0


def skip_id3(data: bytes, start: int = 0) -> int:
    """Return the place behind an ID3v2 tag at `start`, or `start` without a tag."""
    if len(data) < start + 10 or data[start : start + 3] != b"ID3":
        return start
    size = 0
    for byte in data[start + 6 : start + 10]:
        size = size << 7 | byte & 0x7F
    return start + 10 + size + (10 if data[start + 5] & 0x10 else 0)


def _looks_like_text(head: bytes) -> bool:
    text = head.decode("utf-8", "replace").rstrip("\ufffd")
    return bool(text) and "\0" not in text and text.translate({9: None, 10: None, 13: None}).isprintable()
