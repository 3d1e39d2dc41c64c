"""Any text passes through server-sent events unchanged, in any chunks."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hyper_model.sse import EventReader, read_events, read_events_async, to_json, write_event

ODD_TEXTS = (
    "\u2028\u2029\u0085\x0b\x0c\x1c\x1d\x1e",
    "\0\x01\x07\x1b[31m\x7f\x80\x9f",
    "\ud800 lone \udfff",
    "a\r\nb\rc\n\n\nd",
    "العربية עברית 日本語 한국어 हिन्दी ไทย ქართული",
    "\ufeffbom \u200b\u200e\u202e\u2060",
    "👩‍👩‍👧 𝔘𝔫𝔦 \U0010ffff \ufffe",
    "data: x\n\nevent: done\ndata: {}\n\n",
    ": comment",
    "",
    " leading and trailing ",
)


@pytest.mark.parametrize("text", ODD_TEXTS)
@pytest.mark.parametrize("size", [1, 2, 3, 7, 10_000])
def test_odd_texts_pass_unchanged_in_chunks_of_any_size(text: str, size: int) -> None:
    stream = write_event("section.delta", {"text": text}) + b": ping\n\n" + write_event("done", {text: [text]})
    chunks = [stream[start : start + size] for start in range(0, len(stream), size)]
    events = [(name, json.loads(data)) for name, data in read_events(chunks)]
    assert events == [("section.delta", {"text": text}), ("done", {text: [text]})]


@settings(max_examples=300, deadline=None, database=None)
@given(st.lists(st.text(st.characters(), max_size=20), max_size=5), st.integers(1, 50))
def test_any_text_passes_unchanged(texts: list[str], size: int) -> None:
    stream = b"".join(write_event("e", text) for text in texts)

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(stream), size):
            yield stream[start : start + size]

    async def read() -> list[str]:
        return [json.loads(data) async for _, data in read_events_async(chunks())]

    assert asyncio.run(read()) == texts


@settings(max_examples=200, deadline=None, database=None)
@given(st.text(st.characters(), max_size=30))
def test_json_is_one_line_for_every_reader_and_fits_utf_8(text: str) -> None:
    line = to_json({"text": text})
    assert line.splitlines() == [line] and json.loads(line.encode().decode()) == {"text": text}


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_every_line_end_of_the_standard_is_read(end: str) -> None:
    lines = ["\ufeffid: 7", "event:a", "data: 1", "data:2", "", ": comment", "retry: 5", "data", "", "data: last"]
    stream = end.join(lines).encode()
    expected = [("a", "1\n2"), ("message", ""), ("message", "last")]
    for size in (1, 2, 1000):
        assert list(read_events(stream[start : start + size] for start in range(0, len(stream), size))) == expected


def test_an_event_is_yielded_as_soon_as_it_is_whole() -> None:
    reader = EventReader()
    assert list(reader.feed(b"event: a\ndata: 1\n")) == []
    assert list(reader.feed(b"\nevent: b\n")) == [("a", "1")]
