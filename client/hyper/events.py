"""Typed events of a streamed answer, and the iterators that yield them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, ClassVar, Generic, Self, TypeAlias, TypeVar

import httpx

from hyper.errors import UnexpectedReplyError
from hyper.protocol import connection_error, not_ours, parse, parse_json, service_error
from hyper_model.sse import read_events, read_events_async
from server.api.types import Answer, QaListReply, QaReply, Usage

__all__ = [
    "AnswerDelta",
    "AnswerDone",
    "AsyncEventStream",
    "AsyncListEventStream",
    "Done",
    "Event",
    "EventStream",
    "ListDone",
    "ListEvent",
    "ListEventStream",
    "Pause",
    "QuestionEvent",
    "SectionDelta",
    "SectionEnd",
    "SectionStart",
    "UsageReport",
    "WindowDone",
]


@dataclass(frozen=True)
class SectionStart:
    """A section of the trace begins, for example `REASONING`."""

    name: ClassVar[str] = "section.start"
    section: str


@dataclass(frozen=True)
class SectionDelta:
    """The next text of a section."""

    name: ClassVar[str] = "section.delta"
    section: str
    text: str


@dataclass(frozen=True)
class SectionEnd:
    """A section of the trace ends."""

    name: ClassVar[str] = "section.end"
    section: str


@dataclass(frozen=True)
class Pause:
    """The model paused for so many latent tokens, inside a section or between two."""

    name: ClassVar[str] = "pause"
    section: str | None
    latent_tokens: int


@dataclass(frozen=True)
class WindowDone:
    """A window of a recording is finished; `done` counts the finished ones of all."""

    name: ClassVar[str] = "window.done"
    index: int
    status: str
    done: int
    of: int


@dataclass(frozen=True)
class AnswerDelta:
    """The next text of the answer."""

    name: ClassVar[str] = "answer.delta"
    text: str


@dataclass(frozen=True)
class AnswerDone:
    """The whole answer, with the probabilities of the choices."""

    name: ClassVar[str] = "answer.done"
    answer: Answer


@dataclass(frozen=True)
class UsageReport:
    """The tokens of the request."""

    name: ClassVar[str] = "usage"
    usage: Usage


@dataclass(frozen=True)
class Done:
    """The last event: the whole reply."""

    name: ClassVar[str] = "done"
    reply: QaReply


Event: TypeAlias = (
    SectionStart | SectionDelta | SectionEnd | Pause | WindowDone | AnswerDelta | AnswerDone | UsageReport | Done
)


@dataclass(frozen=True)
class QuestionEvent:
    """An event of one of several questions; `index` is the place of the question."""

    index: int
    event: Event

    @property
    def name(self) -> str:
        """Name of the event, for example `answer.done`."""
        return self.event.name


@dataclass(frozen=True)
class ListDone:
    """The last event of several questions: all replies."""

    name: ClassVar[str] = "done"
    reply: QaListReply


ListEvent: TypeAlias = QuestionEvent | ListDone

EventT = TypeVar("EventT")
ReplyT = TypeVar("ReplyT", QaReply, QaListReply)

_READERS: Mapping[str, Callable[[Mapping[str, Any]], Event]] = {
    "section.start": lambda data: SectionStart(str(data["section"])),
    "section.delta": lambda data: SectionDelta(str(data["section"]), str(data["text"])),
    "section.end": lambda data: SectionEnd(str(data["section"])),
    "pause": lambda data: Pause(data["section"], int(data["latent_tokens"])),
    "window.done": lambda data: WindowDone(int(data["index"]), str(data["status"]), int(data["done"]), int(data["of"])),
    "answer.delta": lambda data: AnswerDelta(str(data["text"])),
    "answer.done": lambda data: AnswerDone(parse(Answer, data)),
    "usage": lambda data: UsageReport(parse(Usage, data)),
    "done": lambda data: Done(parse(QaReply, data)),
}


def read_event(name: str, text: str) -> Event | None:
    """Return the typed event; None for a name that this release does not know.

    Raises:
        ServiceError: The event is an error.
        UnexpectedReplyError: The event's data has another form.
    """
    if name != "error" and name not in _READERS:
        return None
    data = parse_json(text)
    if name == "error":
        raise service_error(data)
    try:
        return _READERS[name](data)
    except (LookupError, TypeError, ValueError) as error:
        raise UnexpectedReplyError(f"The event {name!r} of the stream has an unknown form.") from error


def read_list_event(name: str, text: str) -> ListEvent | None:
    """Return the typed event of several questions; None for a name that this release does not know.

    Raises:
        ServiceError: The event is an error.
        UnexpectedReplyError: The event's data has another form.
    """
    if name == "done":
        return ListDone(parse(QaListReply, parse_json(text)))
    if name != "error" and name not in _READERS:
        return None
    data = parse_json(text)
    if name == "error":
        raise service_error(data)
    try:
        index = int(data.pop("index"))
        return QuestionEvent(index, _READERS[name](data))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UnexpectedReplyError(f"The event {name!r} of the stream has an unknown form.") from error


class _Progress(ABC, Generic[EventT, ReplyT]):
    """Common part of all streams: the address, and the reply after its arrival."""

    def __init__(self, response: httpx.Response, url: str) -> None:
        self._response = response
        self._url = url
        self._reply: ReplyT | None = None

    @property
    def reply(self) -> ReplyT:
        """The whole reply, after the last event.

        Raises:
            UnexpectedReplyError: The last event has not been read.
        """
        if self._reply is None:
            raise UnexpectedReplyError("the stream has no reply before its last event.")
        return self._reply

    @abstractmethod
    def _parse(self, name: str, text: str) -> tuple[EventT | None, ReplyT | None]:
        """Return the typed event, and the reply of the last one."""

    def _take(self, name: str, text: str) -> EventT | None:
        try:
            event, reply = self._parse(name, text)
        except UnexpectedReplyError as error:
            raise not_ours(self._url) from error
        self._reply = self._reply if reply is None else reply
        return event

    def _require_end(self) -> None:
        if self._reply is None:
            cause = "The connection broke, or the service is not `hyper serve`."
            raise UnexpectedReplyError(f"the stream from {self._url} ended before its last event. {cause}")


class _OneAnswer(_Progress[Event, QaReply]):
    def _parse(self, name: str, text: str) -> tuple[Event | None, QaReply | None]:
        event = read_event(name, text)
        return event, event.reply if isinstance(event, Done) else None


class _Answers(_Progress[ListEvent, QaListReply]):
    def _parse(self, name: str, text: str) -> tuple[ListEvent | None, QaListReply | None]:
        event = read_list_event(name, text)
        return event, event.reply if isinstance(event, ListDone) else None


class _Stream(_Progress[EventT, ReplyT]):
    """Iterates over events."""

    def __init__(self, response: httpx.Response, url: str) -> None:
        super().__init__(response, url)
        self._events = self._read()

    def _read(self) -> Iterator[EventT]:
        try:
            for name, text in read_events(self._response.iter_bytes()):
                event = self._take(name, text)
                if event is not None:
                    yield event
            self._require_end()
        except httpx.HTTPError as error:
            raise connection_error(error, self._url) from error
        finally:
            self.close()

    def __iter__(self) -> Iterator[EventT]:
        return self._events

    def __next__(self) -> EventT:
        return next(self._events)

    def until_done(self) -> ReplyT:
        """Read the remaining events and return the whole reply."""
        for _ in self:
            pass
        return self.reply

    def close(self) -> None:
        """Close the connection; the service stops an unfinished answer."""
        self._response.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class _AsyncStream(_Progress[EventT, ReplyT]):
    """Iterates over events, for asyncio."""

    def __init__(self, response: httpx.Response, url: str) -> None:
        super().__init__(response, url)
        self._events = self._read()

    async def _read(self) -> AsyncIterator[EventT]:
        try:
            async for name, text in read_events_async(self._response.aiter_bytes()):
                event = self._take(name, text)
                if event is not None:
                    yield event
            self._require_end()
        except httpx.HTTPError as error:
            raise connection_error(error, self._url) from error
        finally:
            await self.aclose()

    def __aiter__(self) -> AsyncIterator[EventT]:
        return self._events

    async def __anext__(self) -> EventT:
        return await anext(self._events)

    async def until_done(self) -> ReplyT:
        """Read the remaining events and return the whole reply."""
        async for _ in self:
            pass
        return self.reply

    async def aclose(self) -> None:
        """Close the connection; the service stops an unfinished answer."""
        await self._response.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()


class EventStream(_OneAnswer, _Stream[Event, QaReply]):
    """Iterates over the events of one answer. Leaving the `with` block early cancels the question.

    Errors of the service, also those in the middle of a stream, are raised as exceptions.
    """


class AsyncEventStream(_OneAnswer, _AsyncStream[Event, QaReply]):
    """The same as `EventStream`, for `async for` and `async with`."""


class ListEventStream(_Answers, _Stream[ListEvent, QaListReply]):
    """Iterates over the events of several answers, which arrive in any order; see `EventStream`."""


class AsyncListEventStream(_Answers, _AsyncStream[ListEvent, QaListReply]):
    """The same as `ListEventStream`, for `async for` and `async with`."""
