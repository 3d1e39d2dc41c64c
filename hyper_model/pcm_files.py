"""Find the samples of uncompressed audio files, regardless of the sizes in their headers.

WAV (RIFF, RIFX, RF64, BW64), Wave64, AIFF, AU and CAF hold plain samples behind a header. Writers that stream or crash
leave sizes of zero, placeholders or too small a number in it. The samples then last to the end of the file. A size
different from the file's is reported, and never shortens the sound.

Sources: Microsoft RIFF (1991), EBU Tech 3306 (RF64), Sony Wave64, Apple AIFF-C and CAF specifications.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

# Sizes left by writers unable to return to the header: 2**31 less a little, or 2**32 - 1.
_PLACEHOLDER_BYTES = 0x7FFF_0000
_MAX_CHUNKS = 200_000
# A trailing piece shorter than this is padding or a remainder, not sound.
_MIN_TAIL_BYTES = 8
_WAVE_PCM, _WAVE_FLOAT, _WAVE_ALAW, _WAVE_ULAW, _WAVE_EXTENSIBLE = 1, 3, 6, 7, 0xFFFE
_W64_RIFF = b"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb\x04\xc1\x00\x00"
_W64_TAIL = b"\xf3\xac\xd3\x11\x8c\xd1\x00\xc0\x4f\x8e\xdb\x8a"
_KNOWN_CHUNKS = frozenset(
    name.ljust(4).encode()
    for name in (
        "LIST id3 ID3 cue smpl bext iXML _PMX JUNK junk FLLR PAD fact PEAK acid inst afsp DISP cart axml chna umid "
        "minf elm1 regn ovwf slnt data NAME AUTH (c) ANNO MARK COMT INST APPL AESD MIDI SAUR uuid info free peak mark "
        "strg kuki chan pakt"
    ).split()
)
# The head of a second file, joined to the first one.
_JOINED_FILES = (b"RIFF", b"RIFX", b"RF64", b"BW64", b"FORM", b"caff")
_FLOATS = {4: ("FLOAT", "pcm_f32"), 8: ("DOUBLE", "pcm_f64")}


@dataclass(frozen=True)
class SampleFormat:
    """Coding of plain samples.

    Attributes:
        subtype: libsndfile's name, such as "PCM_16".
        codec: FFmpeg's name, such as "pcm_s16le".
        is_big_endian: Order of the bytes of a sample.
        num_bytes: Bytes of one sample of one channel.
    """

    subtype: str
    codec: str
    is_big_endian: bool
    num_bytes: int


@dataclass(frozen=True)
class PcmFile:
    """Format of a file of plain samples and their places.

    Attributes:
        sample_format: Coding of the samples.
        rate_hz: Sample rate in the header.
        channels: Number of channels in the header.
        spans: Places of the samples in the file, each from its first byte to behind its last.
        stated_bytes: Bytes of samples by the header.
        is_placeholder: Whether the stated size is a placeholder of an unfinished writer.
        unread_bytes: Bytes of a joined second file with samples of another format.
    """

    sample_format: SampleFormat
    rate_hz: int
    channels: int
    spans: tuple[tuple[int, int], ...]
    stated_bytes: int
    is_placeholder: bool
    unread_bytes: int = 0

    @property
    def num_bytes(self) -> int:
        """Return the number of bytes of samples."""
        return sum(end - start for start, end in self.spans)

    @property
    def frame_bytes(self) -> int:
        """Return the bytes of one sample of all channels."""
        return self.sample_format.num_bytes * self.channels

    @property
    def is_size_wrong(self) -> bool:
        """Return whether the stated size differs from the samples by more than a frame or a pad byte."""
        return abs(self.stated_bytes - self.num_bytes) > max(self.frame_bytes, 2)


# Coding of the samples, sample rate and number of channels.
_Format = tuple[SampleFormat, int, int]


@dataclass
class _Extent:
    """Places of samples and their stated sizes, collected while reading."""

    spans: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    stated_bytes: int = 0
    is_placeholder: bool = False
    unread_bytes: int = 0


def find_samples(data: bytes, container: str, max_bytes: int) -> PcmFile | None:
    """Find the samples of a file of plain samples.

    Args:
        data: The whole file, from its header on.
        container: One of "wav", "w64", "aiff", "au" and "caf".
        max_bytes: Size of the largest accepted file; a larger stated size is a placeholder.

    Returns:
        None if the samples are compressed or the header is incomplete.
    """
    try:
        return _PARSERS[container](data, max_bytes)
    except (struct.error, OverflowError):
        return None


def with_true_size(data: bytes) -> tuple[bytes, float]:
    """Return a RIFF file of compressed samples with the true size in its data chunk.

    Also return the stated size as a multiple of the true one; 1 if it is right.
    """
    position = 12
    for _ in range(_MAX_CHUNKS):
        if position + 8 > len(data):
            break
        name, size = data[position : position + 4], int.from_bytes(data[position + 4 : position + 8], "little")
        if name == b"data":
            end = _end_of(data, position + 8, size, "little")[0]
            true_size = end - position - 8
            if true_size == size or not true_size:
                break
            head = data[: position + 4] + true_size.to_bytes(4, "little")
            return head + data[position + 8 : end], size / true_size
        position += 8 + size + size % 2
    return data, 1.0


def _end_of(data: bytes, start: int, size: int, order: str, *, max_bytes: int = 0) -> tuple[int, bool]:
    """Return the end of samples from `start`, and whether the stated size is a placeholder."""
    rest = len(data) - start
    is_placeholder = size >= _PLACEHOLDER_BYTES or (0 < max_bytes < size)
    if size > rest:
        return len(data), is_placeholder
    tail = start + size
    if data[tail : tail + 4] in _JOINED_FILES or data[tail + size % 2 :][:4] in _JOINED_FILES:
        return tail, False
    if size == rest or (_has_chunks(data, tail + size % 2, order) or _has_chunks(data, tail, order)):
        return tail, False
    if _is_padding(data[tail:]):
        return tail, False
    return len(data), size == 0


def _is_padding(tail: bytes) -> bool:
    """Return whether the bytes after the stated samples are not sound: few bytes, zeros, or a tag of another format."""
    return len(tail) < _MIN_TAIL_BYTES or tail.startswith((b"TAG", b"ID3", b"APETAGEX")) or not tail.strip(b"\0")


def _has_chunks(data: bytes, position: int, order: str) -> bool:
    """Return whether chunks follow, up to the end of the file."""
    num_chunks = 0
    while position + 8 <= len(data) and num_chunks < _MAX_CHUNKS:
        name = data[position : position + 4]
        size = int.from_bytes(data[position + 4 : position + 8], "little" if order == "little" else "big")
        if not all(0x20 <= byte < 0x7F for byte in name):
            return False
        if position + 8 + size > len(data) + 1:
            return name in _KNOWN_CHUNKS
        position += 8 + size + size % 2
        num_chunks += 1
    return num_chunks > 0 or position >= len(data)


def _add(extent: _Extent, data: bytes, start: int, size: int, order: str, max_bytes: int, stated: int) -> int:
    """Add the samples from `start`, and return the place behind them."""
    end, is_placeholder = _end_of(data, start, size, order, max_bytes=max_bytes)
    extent.spans.append((start, end))
    extent.stated_bytes += stated
    extent.is_placeholder |= is_placeholder
    return end


def _is_same_format(extent: _Extent, found: _Format | None, stated: _Format | None, rest_bytes: int) -> bool:
    """Return whether reading can continue at a header; record the rest of a joined file in another format."""
    # A description may follow the samples.
    if extent.spans and found is not None and stated != found:
        extent.unread_bytes = rest_bytes
    return stated is not None and not extent.unread_bytes


def _wav(data: bytes, max_bytes: int) -> PcmFile | None:
    is_big_endian = data[:4] == b"RIFX"
    order, sign = ("big", ">") if is_big_endian else ("little", "<")
    sizes_64: list[int] = []
    extent = _Extent()
    found: _Format | None = None
    position = 12
    for _ in range(_MAX_CHUNKS):
        if position + 8 > len(data):
            break
        name = data[position : position + 4]
        (size,) = struct.unpack_from(sign + "I", data, position + 4)
        start = position + 8
        if name == b"ds64" and len(data) >= start + 16:
            sizes_64 = [struct.unpack_from("<Q", data, start + 8)[0]]
        elif name == b"fmt ":
            stated_format = _wave_format(data, start, size, sign)
            if not _is_same_format(extent, found, stated_format, len(data) - position):
                break
            found = found or stated_format
        elif name == b"LIST" and data[start : start + 4] == b"wavl":
            position = start + 4
            continue
        elif name == b"data":
            stated = sizes_64.pop() if size == 0xFFFF_FFFF and sizes_64 else size
            position = _add(extent, data, start, stated, order, max_bytes, stated)
            position += (position - start) % 2
            continue
        elif name in _JOINED_FILES and data[start : start + 4] == b"WAVE":
            # Two files joined end to end: the chunks of the second follow.
            position = start + 4
            continue
        elif start + size > len(data) + 1:
            # A chunk before the samples with a size beyond the file must not hide them.
            position = data.find(b"data", start)
            if position < 0 or found is None:
                break
            continue
        position = start + size + size % 2
    return _pcm_file(found, extent)


def _wave_format(data: bytes, start: int, size: int, sign: str) -> _Format | None:
    """Read a `fmt ` chunk; return None if it is cut or describes compressed samples."""
    tag, channels, rate_hz, _, align, bits = struct.unpack_from(sign + "HHIIHH", data, start)
    if tag == _WAVE_EXTENSIBLE and size >= 26:
        (tag,) = struct.unpack_from(sign + "H", data, start + 24)
    width = align // channels if channels and align % channels == 0 else 0
    if not width or width * 8 < bits or not bits:
        # In a contradictory header the number of bits decides, if it is a usual one.
        width = bits // 8 if bits % 8 == 0 else 0
    is_big = sign == ">"
    if tag == _WAVE_PCM and width in (1, 2, 3, 4):
        return _integers(width, is_big, is_unsigned=width == 1), rate_hz, channels
    if tag == _WAVE_FLOAT and width in _FLOATS:
        return _floats(width, is_big), rate_hz, channels
    if tag in (_WAVE_ALAW, _WAVE_ULAW) and width == 1:
        return _law("ALAW" if tag == _WAVE_ALAW else "ULAW"), rate_hz, channels
    return None


def _w64(data: bytes, max_bytes: int) -> PcmFile | None:
    extent = _Extent()
    found: _Format | None = None
    position = 40
    for _ in range(_MAX_CHUNKS):
        if position + 24 > len(data):
            break
        name, tail = data[position : position + 4], data[position + 4 : position + 16]
        (size,) = struct.unpack_from("<Q", data, position + 16)
        start = position + 24
        if tail == _W64_TAIL and name == b"fmt ":
            stated_format = _wave_format(data, start, max(0, size - 24), "<")
            if not _is_same_format(extent, found, stated_format, len(data) - position):
                break
            found = found or stated_format
        elif data[position : position + 16] == _W64_RIFF:
            position += 40
            continue
        elif tail == _W64_TAIL and name == b"data":
            stated = max(0, size - 24)
            end = start + stated
            # Chunks of Wave64 are aligned to 8 bytes and named by 16; other following bytes are sound.
            follows = data[(end + 7) // 8 * 8 :]
            is_whole = end <= len(data) and (
                _is_padding(follows) or follows[4:16] == _W64_TAIL or follows[:16] == _W64_RIFF
            )
            extent.spans.append((start, end if is_whole else len(data)))
            extent.stated_bytes += stated
            extent.is_placeholder |= not is_whole and (stated == 0 or stated > min(max_bytes, _PLACEHOLDER_BYTES))
            position = extent.spans[-1][1]
            position += -position % 8
            continue
        if size < 24:
            break
        position += size + -size % 8
    return _pcm_file(found, extent)


def _aiff(data: bytes, max_bytes: int) -> PcmFile | None:
    extent = _Extent()
    found: _Format | None = None
    position = 12
    for _ in range(_MAX_CHUNKS):
        if position + 8 > len(data):
            break
        name = data[position : position + 4]
        (size,) = struct.unpack_from(">I", data, position + 4)
        start = position + 8
        if name == b"COMM":
            stated_format = _aiff_format(data, start, size)
            if not _is_same_format(extent, found, stated_format, len(data) - position):
                break
            found = found or stated_format
        elif name == b"FORM" and data[start : start + 3] == b"AIF":
            position = start + 4
            continue
        elif name == b"SSND" and start + 8 <= len(data):
            (offset,) = struct.unpack_from(">I", data, start)
            first = start + 8 + (offset if start + 8 + offset < len(data) else 0)
            stated = max(0, size - (first - start))
            position = _add(extent, data, first, stated, "big", max_bytes, stated)
            position += (position - start) % 2
            continue
        elif start + size > len(data) + 1:
            position = data.find(b"SSND", start)
            if position < 0:
                break
            continue
        position = start + size + size % 2
    return _pcm_file(found, extent)


def _aiff_format(data: bytes, start: int, size: int) -> _Format | None:
    channels, _, bits, exponent, mantissa = struct.unpack_from(">HIHHQ", data, start)
    shift = (exponent & 0x7FFF) - 16383 - 63
    rate_hz = mantissa >> -shift if -64 < shift <= 0 else 0
    kind = data[start + 18 : start + 22] if size >= 22 and data[8:12] == b"AIFC" else b"NONE"
    width = (bits + 7) // 8
    if kind in (b"NONE", b"twos", b"sowt", b"in24", b"in32") and width in (1, 2, 3, 4):
        return _integers(width, kind != b"sowt", is_unsigned=False), rate_hz, channels
    if kind == b"raw " and width == 1:
        return _integers(1, is_big_endian=True, is_unsigned=True), rate_hz, channels
    if kind.lower() in (b"fl32", b"fl64"):
        return _floats(4 if kind.lower() == b"fl32" else 8, is_big_endian=True), rate_hz, channels
    if kind.lower() in (b"ulaw", b"alaw"):
        return _law(kind.upper().decode()), rate_hz, channels
    return None


def _au(data: bytes, max_bytes: int) -> PcmFile | None:
    start, size, encoding, rate_hz, channels = struct.unpack_from(">IIIII", data, 4)
    formats = {
        1: _law("ULAW"),
        2: _integers(1, is_big_endian=True, is_unsigned=False),
        3: _integers(2, is_big_endian=True, is_unsigned=False),
        4: _integers(3, is_big_endian=True, is_unsigned=False),
        5: _integers(4, is_big_endian=True, is_unsigned=False),
        6: _floats(4, is_big_endian=True),
        7: _floats(8, is_big_endian=True),
        27: _law("ALAW"),
    }
    if encoding not in formats or not 24 <= start <= len(data):
        return None
    rest = len(data) - start
    is_whole = 0 < size <= rest and _is_padding(data[start + size :])
    extent = _Extent([(start, start + size if is_whole else len(data))], size)
    extent.is_placeholder = size == 0 or size >= _PLACEHOLDER_BYTES or size > max(max_bytes, rest)
    return _pcm_file((formats[encoding], rate_hz, channels), extent)


def _caf(data: bytes, max_bytes: int) -> PcmFile | None:
    extent = _Extent()
    found: _Format | None = None
    position = 8
    for _ in range(_MAX_CHUNKS):
        if position + 12 > len(data):
            break
        name = data[position : position + 4]
        if name == b"caff":
            position += 8
            continue
        (size,) = struct.unpack_from(">q", data, position + 4)
        start = position + 12
        if name == b"desc":
            rate, kind, flags, _, _, channels, bits = struct.unpack_from(">d4sIIIII", data, start)
            width = (bits + 7) // 8
            rate_hz = int(rate) if 0 <= rate < 2**32 else 0
            is_big = not flags & 2
            stated_format = None
            if kind == b"lpcm" and flags & 1 and width in _FLOATS:
                stated_format = _floats(width, is_big), rate_hz, channels
            elif kind == b"lpcm" and not flags & 1 and width in (1, 2, 3, 4):
                stated_format = _integers(width, is_big, is_unsigned=False), rate_hz, channels
            elif kind in (b"ulaw", b"alaw"):
                stated_format = _law(kind.upper().decode()), rate_hz, channels
            if not _is_same_format(extent, found, stated_format, len(data) - position):
                break
            found = found or stated_format
        elif name == b"data":
            first, stated = start + 4, size - 4
            end = first + stated
            follows = data[end:] if 0 <= end <= len(data) else b""
            is_whole = 0 < stated <= len(data) - first and (
                _is_padding(follows) or all(0x20 <= byte < 0x7F for byte in follows[:4])
            )
            extent.spans.append((first, end if is_whole else len(data)))
            # A size of -1 is the format's own value for an unknown size.
            extent.stated_bytes += extent.spans[-1][1] - first if size == -1 else max(0, stated)
            extent.is_placeholder |= not is_whole and (stated <= 0 or stated > min(max_bytes, _PLACEHOLDER_BYTES))
            position = extent.spans[-1][1]
            continue
        if size < 0:
            break
        position = start + size
    return _pcm_file(found, extent)


def _pcm_file(found: _Format | None, extent: _Extent) -> PcmFile | None:
    if found is None or not extent.spans:
        return None
    return PcmFile(*found, tuple(extent.spans), extent.stated_bytes, extent.is_placeholder, extent.unread_bytes)


def _integers(width: int, is_big_endian: bool, *, is_unsigned: bool) -> SampleFormat:
    if width == 1:
        return SampleFormat("PCM_U8" if is_unsigned else "PCM_S8", "pcm_u8" if is_unsigned else "pcm_s8", False, 1)
    name = f"pcm_s{8 * width}{'be' if is_big_endian else 'le'}"
    return SampleFormat(f"PCM_{8 * width}", name, is_big_endian, width)


def _floats(width: int, is_big_endian: bool) -> SampleFormat:
    subtype, name = _FLOATS[width]
    return SampleFormat(subtype, name + ("be" if is_big_endian else "le"), is_big_endian, width)


def _law(subtype: str) -> SampleFormat:
    return SampleFormat(subtype, "pcm_mulaw" if subtype == "ULAW" else "pcm_alaw", False, 1)


_PARSERS = {"wav": _wav, "w64": _w64, "aiff": _aiff, "au": _au, "caf": _caf}
PCM_CONTAINERS: Sequence[str] = tuple(_PARSERS)
