"""Write and read server-sent events, so that any text passes unchanged.

Lines end at CR, LF or both, and nowhere else (WHATWG HTML, section 9.2). Python's `str.splitlines`, and clients built
on it, also split at U+0085, U+2028, U+2029 and some control characters. The writer therefore escapes these in JSON, and
the reader never splits at them.

Depends on the standard library only.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from typing import Any

# Line ends of other readers, and halves of surrogate pairs, impossible in UTF-8. JSON escapes those below U+0020.
_UNSAFE = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_LINE_END = re.compile("\r\n|\r|\n")


def to_json(value: Any) -> str:
    """Return a value as JSON on one line by any reader's rules, with only characters valid in UTF-8."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def write_event(name: str, data: Any) -> bytes:
    """Return one event with a value as JSON data."""
    return f"event: {name}\ndata: {to_json(data)}\n\n".encode()


class EventReader:
    """Reader of a stream of events in chunks of any size."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("replace")
        self._rest = ""
        self._name = ""
        self._data: list[str] = []

    def feed(self, chunk: bytes) -> Iterator[tuple[str, str]]:
        """Yield (name, data) of each event completed by a chunk, without comments."""
        self._rest += self._decoder.decode(chunk)
        # A CR at the end may be half of a line end.
        usable = len(self._rest) - self._rest.endswith("\r")
        start = 0
        for match in _LINE_END.finditer(self._rest, 0, usable):
            event = self._read_line(self._rest[start : match.start()])
            start = match.end()
            if event is not None:
                yield event
        self._rest = self._rest[start:]

    def finish(self) -> Iterator[tuple[str, str]]:
        """Yield the last event of a stream without a final blank line."""
        yield from self.feed(b"\n\n")

    def _read_line(self, line: str) -> tuple[str, str] | None:
        if not line:
            event = (self._name or "message", "\n".join(self._data)) if self._data else None
            self._name, self._data = "", []
            return event
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "event":
            self._name = value
        elif field == "data":
            self._data.append(value)
        return None


def read_events(chunks: Iterable[bytes]) -> Iterator[tuple[str, str]]:
    """Yield (name, data) of each event in a stream of bytes, without comments."""
    reader = EventReader()
    for chunk in chunks:
        yield from reader.feed(chunk)
    yield from reader.finish()


async def read_events_async(chunks: AsyncIterable[bytes]) -> AsyncIterator[tuple[str, str]]:
    """Yield (name, data) of each event in a stream of bytes, without comments."""
    reader = EventReader()
    async for chunk in chunks:
        for event in reader.feed(chunk):
            yield event
    for event in reader.finish():
        yield event
