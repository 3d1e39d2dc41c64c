"""`Client` and `AsyncClient`: questions about clips, over HTTP."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Any, Literal, Self, Unpack, overload

import httpx

from hyper.clips import Clip, load_clip
from hyper.errors import Error
from hyper.events import AsyncEventStream, AsyncListEventStream, EventStream, ListEventStream
from hyper.files import AsyncFiles, Files
from hyper.jobs import AsyncJobs, Jobs
from hyper.protocol import (
    DEFAULT_TIMEOUT_S,
    INFO_PATH,
    AskOptions,
    Options,
    Question,
    QuestionItem,
    connection_error,
    error_of,
    read_reply,
    require_usable_proxy,
    retry_delay_s,
)
from hyper.webhooks import AsyncWebhooks, Webhooks
from hyper_model.proxies import is_local
from server.api.types import FileDeleted, FileList, FileObject, InfoReply, QaListReply, QaReply

__all__ = [
    "AskOptions",
    "AsyncClient",
    "Client",
    "Clip",
    "FileDeleted",
    "FileList",
    "FileObject",
    "InfoReply",
    "QaListReply",
    "QaReply",
]


class Client:
    """A client of one service. Threads may share it.

    Args:
        base_url: Address of the service; else HYPER_URL, else http://127.0.0.1:8000.
        api_key: API key; else HYPER_API_KEY.
        timeout_s: Maximum silence of the service; None for no limit.
        max_retries: Retries of a request after a lost connection or a retryable error.
        max_retry_after_s: Longest Retry-After that the client obeys. A longer one raises the error at once.

    Raises:
        ValueError: The address or the key is not valid.
        ConnectionFailedError: The environment names a proxy that cannot be used.
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        timeout_s: float | None = DEFAULT_TIMEOUT_S,
        max_retries: int = 2,
        max_retry_after_s: float = 30.0,
    ) -> None:
        self._options = Options.resolve(base_url, api_key, timeout_s, max_retries, max_retry_after_s)
        require_usable_proxy(self._options.url)
        # No proxy reaches an address of this machine.
        trust_env = not is_local(self._options.url)
        self._http = httpx.Client(headers=self._options.headers, trust_env=trust_env)
        self.files = Files(self._call, self._options.url)
        self.jobs = Jobs(self._call, self._open, self._submit, self._options)
        self.webhooks = Webhooks(self._call, self._options.url)

    @overload
    def ask(
        self,
        clip: Clip | None = None,
        question: str = ...,
        *,
        file_id: str | None = None,
        choices: Sequence[str] = (),
        stream: Literal[False] = False,
        **options: Unpack[AskOptions],
    ) -> QaReply: ...

    @overload
    def ask(
        self,
        clip: Clip | None = None,
        question: str = ...,
        *,
        file_id: str | None = None,
        choices: Sequence[str] = (),
        stream: Literal[True],
        **options: Unpack[AskOptions],
    ) -> EventStream: ...

    @overload
    def ask(
        self,
        clip: Clip | None = None,
        *,
        file_id: str | None = None,
        questions: Sequence[QuestionItem],
        stream: Literal[False] = False,
        **options: Unpack[AskOptions],
    ) -> QaListReply: ...

    @overload
    def ask(
        self,
        clip: Clip | None = None,
        *,
        file_id: str | None = None,
        questions: Sequence[QuestionItem],
        stream: Literal[True],
        **options: Unpack[AskOptions],
    ) -> ListEventStream: ...

    def ask(
        self,
        clip: Clip | None = None,
        question: str | None = None,
        *,
        file_id: str | None = None,
        questions: Sequence[QuestionItem] = (),
        choices: Sequence[str] = (),
        stream: bool = False,
        **options: Unpack[AskOptions],
    ) -> QaReply | QaListReply | EventStream | ListEventStream:
        """Ask a question about a clip, or several.

        Args:
            clip: A path, the bytes of an audio file, or a binary file object.
            file_id: Id of a stored file, in place of the clip; see `files`.
            questions: Several questions in place of `question`, each a text or a mapping with `question` and `choices`.
            choices: None, or 2 to 26 different texts.
            stream: Return the events of the answer, or of all answers, instead of the reply.
            options: See `AskOptions`.

        Raises:
            ServiceError: The service refused or ended the request; each code has its own subclass.
            ConnectionFailedError: There is no reply.
            UnexpectedReplyError: The reply is not one of a HyPeR service.
            OSError: The file cannot be read.
        """
        loaded = None if clip is None else load_clip(clip)
        sent = Question.build(loaded, question, choices, file_id=file_id, questions=questions, stream=stream, **options)
        response = self._submit(sent)
        if stream:
            streamed = ListEventStream if questions else EventStream
            return streamed(response, self._options.url)
        kind = QaListReply if questions else QaReply
        return read_reply(self._read(response), kind, self._options.url)

    def info(self) -> InfoReply:
        """Return the checkpoint, the limits, the formats and the pause settings of the service.

        Raises:
            ServiceError: The service refused the request.
            ConnectionFailedError: There is no reply.
            UnexpectedReplyError: The reply is not one of a HyPeR service.
        """
        return read_reply(self._read(self._answered(lambda: self._get(INFO_PATH))), InfoReply, self._options.url)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _post(self, question: Question) -> httpx.Response:
        with question.parts() as parts:
            request = self._http.build_request(
                "POST",
                self._options.url + question.path,
                headers=question.headers,
                timeout=self._options.timeout(question.timeout_ms),
                **parts,
            )
            return self._http.send(request, stream=True)

    def _get(self, path: str) -> httpx.Response:
        return self._send("GET", path)

    def _send(self, method: str, path: str, **parts: Any) -> httpx.Response:
        request = self._http.build_request(method, self._options.url + path, timeout=self._options.timeout(), **parts)
        return self._http.send(request, stream=True)

    def _call(self, method: str, path: str, **parts: Any) -> httpx.Response:
        """Send a request until it succeeds, and read the reply."""
        return self._read(self._open(method, path, **parts))

    def _open(self, method: str, path: str, *, once: bool = False, **parts: Any) -> httpx.Response:
        """Send a request until it succeeds, or once, and return the reply unread."""
        return self._answered(lambda: self._send(method, path, **parts), once=once)

    def _submit(self, question: Question) -> httpx.Response:
        """Send a question until it succeeds, and return the reply unread."""
        return self._answered(lambda: self._post(question))

    def _answered(self, send: Callable[[], httpx.Response], *, once: bool = False) -> httpx.Response:
        """Send a request until it succeeds, or once, and return the reply unread."""
        num_tries = 0
        while True:
            num_tries += 1
            response: httpx.Response | None = None
            error: Error
            try:
                response = send()
                if response.is_success:
                    return response
                response.read()
                error = error_of(response, self._options.url)
            except httpx.HTTPError as failure:
                error = connection_error(failure, self._options.url)
            delay_s = None if once else retry_delay_s(self._options, num_tries, error, response)
            if delay_s is None:
                raise error
            time.sleep(delay_s)

    def _read(self, response: httpx.Response) -> httpx.Response:
        try:
            response.read()
        except httpx.HTTPError as error:
            raise connection_error(error, self._options.url) from error
        return response


class AsyncClient:
    """A client of one service for asyncio; see `Client` for arguments and errors."""

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        timeout_s: float | None = DEFAULT_TIMEOUT_S,
        max_retries: int = 2,
        max_retry_after_s: float = 30.0,
    ) -> None:
        self._options = Options.resolve(base_url, api_key, timeout_s, max_retries, max_retry_after_s)
        require_usable_proxy(self._options.url)
        trust_env = not is_local(self._options.url)
        self._http = httpx.AsyncClient(headers=self._options.headers, trust_env=trust_env)
        self.files = AsyncFiles(self._call, self._options.url)
        self.jobs = AsyncJobs(self._call, self._open, self._submit, self._options)
        self.webhooks = AsyncWebhooks(self._call, self._options.url)

    @overload
    async def ask(
        self,
        clip: Clip | None = None,
        question: str = ...,
        *,
        file_id: str | None = None,
        choices: Sequence[str] = (),
        stream: Literal[False] = False,
        **options: Unpack[AskOptions],
    ) -> QaReply: ...

    @overload
    async def ask(
        self,
        clip: Clip | None = None,
        question: str = ...,
        *,
        file_id: str | None = None,
        choices: Sequence[str] = (),
        stream: Literal[True],
        **options: Unpack[AskOptions],
    ) -> AsyncEventStream: ...

    @overload
    async def ask(
        self,
        clip: Clip | None = None,
        *,
        file_id: str | None = None,
        questions: Sequence[QuestionItem],
        stream: Literal[False] = False,
        **options: Unpack[AskOptions],
    ) -> QaListReply: ...

    @overload
    async def ask(
        self,
        clip: Clip | None = None,
        *,
        file_id: str | None = None,
        questions: Sequence[QuestionItem],
        stream: Literal[True],
        **options: Unpack[AskOptions],
    ) -> AsyncListEventStream: ...

    async def ask(
        self,
        clip: Clip | None = None,
        question: str | None = None,
        *,
        file_id: str | None = None,
        questions: Sequence[QuestionItem] = (),
        choices: Sequence[str] = (),
        stream: bool = False,
        **options: Unpack[AskOptions],
    ) -> QaReply | QaListReply | AsyncEventStream | AsyncListEventStream:
        """Ask a question about a clip; see `Client.ask`. The file is read in another thread."""
        loaded = None if clip is None else await asyncio.to_thread(load_clip, clip)
        sent = Question.build(loaded, question, choices, file_id=file_id, questions=questions, stream=stream, **options)
        response = await self._submit(sent)
        if stream:
            streamed = AsyncListEventStream if questions else AsyncEventStream
            return streamed(response, self._options.url)
        kind = QaListReply if questions else QaReply
        return read_reply(await self._read(response), kind, self._options.url)

    async def info(self) -> InfoReply:
        """Return the checkpoint, the limits, the formats and the pause settings; see `Client.info`."""
        response = await self._read(await self._answered(lambda: self._get(INFO_PATH)))
        return read_reply(response, InfoReply, self._options.url)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _post(self, question: Question) -> httpx.Response:
        with question.parts() as parts:
            request = self._http.build_request(
                "POST",
                self._options.url + question.path,
                headers=question.headers,
                timeout=self._options.timeout(question.timeout_ms),
                **parts,
            )
            return await self._http.send(request, stream=True)

    async def _get(self, path: str) -> httpx.Response:
        return await self._send("GET", path)

    async def _send(self, method: str, path: str, **parts: Any) -> httpx.Response:
        request = self._http.build_request(method, self._options.url + path, timeout=self._options.timeout(), **parts)
        return await self._http.send(request, stream=True)

    async def _call(self, method: str, path: str, **parts: Any) -> httpx.Response:
        """Send a request until it succeeds, and read the reply."""
        return await self._read(await self._open(method, path, **parts))

    async def _open(self, method: str, path: str, *, once: bool = False, **parts: Any) -> httpx.Response:
        """Send a request until it succeeds, or once, and return the reply unread."""
        return await self._answered(lambda: self._send(method, path, **parts), once=once)

    async def _submit(self, question: Question) -> httpx.Response:
        """Send a question until it succeeds, and return the reply unread."""
        return await self._answered(lambda: self._post(question))

    async def _answered(self, send: Callable[[], Awaitable[httpx.Response]], *, once: bool = False) -> httpx.Response:
        """Send a request until it succeeds, or once, and return the reply unread."""
        num_tries = 0
        while True:
            num_tries += 1
            response: httpx.Response | None = None
            error: Error
            try:
                response = await send()
                if response.is_success:
                    return response
                await response.aread()
                error = error_of(response, self._options.url)
            except httpx.HTTPError as failure:
                error = connection_error(failure, self._options.url)
            delay_s = None if once else retry_delay_s(self._options, num_tries, error, response)
            if delay_s is None:
                raise error
            await asyncio.sleep(delay_s)

    async def _read(self, response: httpx.Response) -> httpx.Response:
        try:
            await response.aread()
        except httpx.HTTPError as error:
            raise connection_error(error, self._options.url) from error
        return response
