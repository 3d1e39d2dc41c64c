"""Jobs: questions that are answered after the request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias, Unpack
from urllib.parse import quote

import httpx
from pydantic import PrivateAttr

from hyper.clips import Clip, load_clip
from hyper.errors import ConnectionFailedError, ReplyTimeoutError, UnexpectedReplyError, WaitTimeoutError
from hyper.protocol import (
    JOBS_PATH,
    AskOptions,
    Options,
    Question,
    QuestionItem,
    connection_error,
    not_ours,
    parse,
    parse_json,
    query,
    read_reply,
    retry_delay_s,
    service_error,
)
from hyper_model.sse import read_events, read_events_async
from server.api.job_types import (
    DeliveryList,
    DeliveryReply,
    JobDeleted,
    JobError,
    JobList,
    JobProgress,
    JobReply,
    JobStatus,
    QuestionResult,
    QuestionResults,
)

__all__ = [
    "AsyncJob",
    "DeliveryList",
    "DeliveryReply",
    "Job",
    "JobDeleted",
    "JobEnded",
    "JobError",
    "JobEvent",
    "JobList",
    "JobProgress",
    "JobProgressed",
    "JobReply",
    "QuestionResult",
    "QuestionResults",
]

POLL_S = 1.0
ENDED = frozenset({"succeeded", "failed", "cancelled", "expired"})


@dataclass(frozen=True)
class JobProgressed:
    """A step of a job is finished."""

    name: ClassVar[str] = "job.progress"
    id: str
    progress: JobProgress


@dataclass(frozen=True)
class JobEnded:
    """The last event: the whole job, with its result or error."""

    job: JobReply

    @property
    def name(self) -> str:
        """Name of the event, for example `job.succeeded`."""
        return f"job.{self.job.status}"


JobEvent: TypeAlias = JobProgressed | JobEnded


class Job(JobReply):
    """A job as the service reported it last, with a method to wait for its end."""

    _jobs: Jobs = PrivateAttr()

    def wait(self, *, timeout_s: float | None = None, poll_s: float = POLL_S) -> Job:
        """Wait for the end of the job and return it; a failed job is returned too.

        Args:
            timeout_s: Longest wait in seconds; None for no limit.
            poll_s: Seconds between two requests.

        Raises:
            WaitTimeoutError: The job did not end in time. It continues.
            ServiceError: The service refused a request, for example because the job is deleted.
            ConnectionFailedError: There is no reply.
        """
        waiting = _Wait(self.id, timeout_s, poll_s)
        job = self
        while job.status not in ENDED:
            time.sleep(waiting.next_s(job))
            job = self._jobs.get(self.id)
        return job

    def bind(self, jobs: Jobs) -> Job:
        """Set the client of later requests, and return the job."""
        self._jobs = jobs
        return self


class AsyncJob(JobReply):
    """A job as the service reported it last, for asyncio; see `Job`."""

    _jobs: AsyncJobs = PrivateAttr()

    async def wait(self, *, timeout_s: float | None = None, poll_s: float = POLL_S) -> AsyncJob:
        """Wait for the end of the job and return it; see `Job.wait`."""
        waiting = _Wait(self.id, timeout_s, poll_s)
        job = self
        while job.status not in ENDED:
            await asyncio.sleep(waiting.next_s(job))
            job = await self._jobs.get(self.id)
        return job

    def bind(self, jobs: AsyncJobs) -> AsyncJob:
        """Set the client of later requests, and return the job."""
        self._jobs = jobs
        return self


class _Wait:
    """Times of the requests of one wait."""

    def __init__(self, job_id: str, timeout_s: float | None, poll_s: float) -> None:
        if poll_s <= 0:
            raise ValueError(f"poll_s is {poll_s:g}; it must be above 0.")
        self._job_id = job_id
        self._timeout_s = timeout_s
        self._poll_s = poll_s
        self._start_s = time.monotonic()

    def next_s(self, job: JobReply) -> float:
        """Return the seconds until the next request.

        Raises:
            WaitTimeoutError: The time is over.
        """
        if self._timeout_s is None:
            return self._poll_s
        rest_s = self._start_s + self._timeout_s - time.monotonic()
        if rest_s <= 0:
            state = f"It is {job.status}, with {job.progress.done} of {job.progress.of} steps."
            message = f"the job {self._job_id} did not end within {self._timeout_s:g} s. {state}"
            raise WaitTimeoutError(f"{message} Raise timeout_s, or cancel the job.")
        return min(self._poll_s, rest_s)


class Jobs:
    """The jobs of the caller's key; `Client.jobs`. Errors are those of `Client.ask`.

    Args:
        call: Sends a request and returns the read reply.
        open_: Sends a request and returns the unread reply.
        submit: Sends a question and returns the unread reply.
    """

    def __init__(
        self,
        call: Callable[..., httpx.Response],
        open_: Callable[..., httpx.Response],
        submit: Callable[[Question], httpx.Response],
        options: Options,
    ) -> None:
        self._call = call
        self._open = open_
        self._submit = submit
        self._options = options
        self._url = options.url

    def create(
        self,
        clip: Clip | None = None,
        question: str | None = None,
        *,
        file_id: str | None = None,
        questions: Sequence[QuestionItem] = (),
        choices: Sequence[str] = (),
        webhook_url: str | None = None,
        keep_s: float | None = None,
        idempotency_key: str | None = None,
        **options: Unpack[AskOptions],
    ) -> Job:
        """Send a job; the service stores it and answers it later.

        Args:
            clip: A path, the bytes of an audio file, or a binary file object.
            file_id: Id of a stored file, in place of the clip.
            questions: Up to 100 questions in place of `question`; each is one step of the job.
            choices: None, or 2 to 26 different texts.
            webhook_url: Address of a delivery at the job's end; the key needs a webhook secret.
            keep_s: Seconds to keep the result, at least 60; the service's default if None.
            idempotency_key: Equal requests with one key are one job, for a day. Each call has its own key by default.
            options: See `AskOptions`.
        """
        loaded = None if clip is None else load_clip(clip)
        sent = Question.build(
            loaded, question, choices, file_id=file_id, questions=questions, caller="jobs.create()", **options
        ).as_job(webhook_url, keep_s, idempotency_key)
        response = self._submit(sent)
        try:
            response.read()
        except httpx.HTTPError as error:
            raise connection_error(error, self._url) from error
        return self._job(response)

    def get(self, job_id: str) -> Job:
        """Return a job; after its end with its result or error."""
        return self._job(self._call("GET", path_of(job_id)))

    def list(self, *, after: str | None = None, limit: int | None = None, status: JobStatus | None = None) -> JobList:
        """List jobs without results, the newest first; the last id of a page is the `after` of the next one."""
        params = query(after=after, limit=limit, status=status)
        return read_reply(self._call("GET", JOBS_PATH, params=params), JobList, self._url)

    def events(self, job_id: str, *, after: int = 0) -> Iterator[JobEvent]:
        """Yield an event per finished step, then the end.

        After a lost connection, the iterator continues behind the last event.

        Args:
            after: Number of finished steps without an event.
        """
        reading = _Reading(self._options, after)
        while not reading.has_ended:
            response = self._open("GET", f"{path_of(job_id)}/events", headers=reading.headers)
            failure: httpx.HTTPError | None = None
            try:
                for name, text in read_events(response.iter_bytes()):
                    event = reading.take(name, text)
                    if event is not None:
                        yield event
            except httpx.HTTPError as error:
                failure = error
            finally:
                response.close()
            if not reading.has_ended:
                time.sleep(reading.delay_s(failure))

    def cancel(self, job_id: str) -> Job:
        """Cancel a job; one that has ended stays as it is."""
        return self._job(self._call("POST", f"{path_of(job_id)}/cancel"))

    def delete(self, job_id: str) -> JobDeleted:
        """Delete a job with its clip, its result and its log."""
        return read_reply(self._call("DELETE", path_of(job_id)), JobDeleted, self._url)

    def deliveries(self, job_id: str) -> DeliveryList:
        """List the attempts to deliver the webhook of a job."""
        return read_reply(self._call("GET", f"{path_of(job_id)}/deliveries"), DeliveryList, self._url)

    def _job(self, response: httpx.Response) -> Job:
        return read_reply(response, Job, self._url).bind(self)


class AsyncJobs:
    """The jobs of the caller's key; `AsyncClient.jobs`. See `Jobs`."""

    def __init__(
        self,
        call: Callable[..., Awaitable[httpx.Response]],
        open_: Callable[..., Awaitable[httpx.Response]],
        submit: Callable[[Question], Awaitable[httpx.Response]],
        options: Options,
    ) -> None:
        self._call = call
        self._open = open_
        self._submit = submit
        self._options = options
        self._url = options.url

    async def create(
        self,
        clip: Clip | None = None,
        question: str | None = None,
        *,
        file_id: str | None = None,
        questions: Sequence[QuestionItem] = (),
        choices: Sequence[str] = (),
        webhook_url: str | None = None,
        keep_s: float | None = None,
        idempotency_key: str | None = None,
        **options: Unpack[AskOptions],
    ) -> AsyncJob:
        """Send a job; see `Jobs.create`. The file is read in another thread."""
        loaded = None if clip is None else await asyncio.to_thread(load_clip, clip)
        sent = Question.build(
            loaded, question, choices, file_id=file_id, questions=questions, caller="jobs.create()", **options
        ).as_job(webhook_url, keep_s, idempotency_key)
        response = await self._submit(sent)
        try:
            await response.aread()
        except httpx.HTTPError as error:
            raise connection_error(error, self._url) from error
        return self._job(response)

    async def get(self, job_id: str) -> AsyncJob:
        """Return a job; see `Jobs.get`."""
        return self._job(await self._call("GET", path_of(job_id)))

    async def list(
        self, *, after: str | None = None, limit: int | None = None, status: JobStatus | None = None
    ) -> JobList:
        """List jobs without results; see `Jobs.list`."""
        params = query(after=after, limit=limit, status=status)
        return read_reply(await self._call("GET", JOBS_PATH, params=params), JobList, self._url)

    async def events(self, job_id: str, *, after: int = 0) -> AsyncIterator[JobEvent]:
        """Yield an event per finished step, then the end; see `Jobs.events`."""
        reading = _Reading(self._options, after)
        while not reading.has_ended:
            response = await self._open("GET", f"{path_of(job_id)}/events", headers=reading.headers)
            failure: httpx.HTTPError | None = None
            try:
                async for name, text in read_events_async(response.aiter_bytes()):
                    event = reading.take(name, text)
                    if event is not None:
                        yield event
            except httpx.HTTPError as error:
                failure = error
            finally:
                await response.aclose()
            if not reading.has_ended:
                await asyncio.sleep(reading.delay_s(failure))

    async def cancel(self, job_id: str) -> AsyncJob:
        """Cancel a job; see `Jobs.cancel`."""
        return self._job(await self._call("POST", f"{path_of(job_id)}/cancel"))

    async def delete(self, job_id: str) -> JobDeleted:
        """Delete a job; see `Jobs.delete`."""
        return read_reply(await self._call("DELETE", path_of(job_id)), JobDeleted, self._url)

    async def deliveries(self, job_id: str) -> DeliveryList:
        """List the attempts to deliver the webhook; see `Jobs.deliveries`."""
        return read_reply(await self._call("GET", f"{path_of(job_id)}/deliveries"), DeliveryList, self._url)

    def _job(self, response: httpx.Response) -> AsyncJob:
        return read_reply(response, AsyncJob, self._url).bind(self)


class _Reading:
    """Events of one job over several connections."""

    def __init__(self, options: Options, after: int) -> None:
        self._options = options
        self._num_done = after
        self._num_lost = 0
        self.has_ended = False

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the next connection; an event's id is the number of finished steps."""
        return {"last-event-id": str(self._num_done)} if self._num_done else {}

    def take(self, name: str, text: str) -> JobEvent | None:
        """Return the typed event; None for a name that this release does not know.

        Raises:
            ServiceError: The event is an error.
            UnexpectedReplyError: The event's data has another form.
        """
        try:
            data: Any = parse_json(text)
            if name == "error":
                raise service_error(data)
            if name == JobProgressed.name:
                event = JobProgressed(str(data["id"]), parse(JobProgress, data["progress"]))
                self._num_done, self._num_lost = event.progress.done, 0
                return event
            if name.removeprefix("job.") not in ENDED:
                return None
            ended = JobEnded(parse(JobReply, data))
        except (UnexpectedReplyError, LookupError, TypeError) as error:
            raise not_ours(self._options.url) from error
        self.has_ended = True
        return ended

    def delay_s(self, failure: httpx.HTTPError | None) -> float:
        """Return the seconds until the next connection, after one without the end.

        Raises:
            ConnectionFailedError: Too many connections in a row brought no event.
        """
        self._num_lost += 1
        message = f"the events from {self._options.url} ended before the end of the job."
        error = ConnectionFailedError(message) if failure is None else connection_error(failure, self._options.url)
        delay_s = (
            None if isinstance(error, ReplyTimeoutError) else retry_delay_s(self._options, self._num_lost, error, None)
        )
        if delay_s is None:
            raise error from failure
        return delay_s


def path_of(job_id: str) -> str:
    """Return the path of a job; an id cannot lead to another path."""
    return f"{JOBS_PATH}/{quote(job_id, safe='')}"
