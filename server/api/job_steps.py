"""The work of jobs: each step is a question or a window, answered as a request of the class `batch`.

The windows of a recording are the first stage of its job, and the questions the second. A step passes the same
admission, decoder and limiter as a request. If the service is full or its engine is restarting,
the step waits; every other error ends it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

from hyper_model.audio import Channel
from server.api.job_types import JobOptions, QuestionResult, QuestionResults, error_of
from server.api.lifecycle import Handler
from server.api.qa import AudioQa
from server.api.questions import asked_of
from server.api.recording_steps import OpenRecordings, answer, known_windows, perceive
from server.api.recordings import open_recording
from server.api.stream import discard
from server.api.types import QaOptions, QaReply
from server.errors import RequestError, to_request_error
from server.jobs.records import Ending, Job, ReadClip, StepOutcome
from server.quotas import Tenant
from server.recordings.perceptions import WindowPerception
from server.recordings.recording import Recording
from server.request_context import RequestContext
from server.service import Service

logger = logging.getLogger("hyper.jobs")

Reply = TypeVar("Reply")

WAITING = frozenset(
    {
        *("overloaded", "starting", "shutting_down", "engine_unavailable", "decoder_unavailable"),
        *("storage_full", "storage_unavailable"),
    }
)
"""Errors that pass without a change of the job. At a shutdown the step is cancelled while it waits."""

MIN_WAIT_S = 0.2
MAX_WAIT_S = 2.0

JOB_FIELDS = frozenset({"questions", "webhook", "keep_s"})
"""Fields of a job that a question does not have."""


class JobSteps:
    """Steps of jobs; see `server.jobs.job_service.Steps`."""

    def __init__(self, service: Service) -> None:
        self.service = service
        settings, max_batch = service.settings, service.admission.max_batch_in_flight
        self.question_places = asyncio.Semaphore(settings.jobs_concurrency)
        # Half of the places for batch requests stay free for them, unless more steps are wanted.
        num_windows = max(settings.jobs_concurrency, min(settings.max_num_seqs, max_batch // 2))
        self.window_places = asyncio.Semaphore(num_windows)
        self.recordings = OpenRecordings(settings.jobs_concurrency)

    def stages(self, job: Job) -> Sequence[int]:
        """Return the number of windows of a recording, if it has several, and the number of questions or lines."""
        num_windows = num_windows_of(job)
        return [num_windows, job.num_steps - num_windows] if num_windows else [job.num_steps]

    def places(self, job: Job, index: int) -> asyncio.Semaphore:
        """Return the places of windows or of questions."""
        return self.window_places if index < num_windows_of(job) else self.question_places

    async def perform(self, job: Job, index: int, read_clip: ReadClip, earlier: Sequence[StepOutcome]) -> StepOutcome:
        """Ask one window or answer one question; every error of a request is an outcome.

        Raises:
            OSError: If the clip cannot be read.
        """
        num_windows = num_windows_of(job)
        try:
            tenant = self.tenant_of(job)
            if index < num_windows:
                return await self.patiently(
                    job, index, tenant, lambda context: self.perceive(context, job, index, read_clip)
                )
            number = index - num_windows
            if num_windows:
                known = known_windows(earlier, with_counts=number == 0)
                reply = await self.patiently(
                    job, index, tenant, lambda context: self.answer_later(context, job, number, read_clip, known)
                )
            else:
                clip = await read_clip()
                reply = await self.patiently(
                    job, index, tenant, lambda context: self.answer(context, question_of(job, number), clip)
                )
        except RequestError as error:
            return outcome_of(error)
        return {"reply": reply.model_dump(mode="json")}

    def forget(self, job_id: str) -> None:
        """Drop the decoded recording of a job."""
        self.recordings.forget(job_id)

    async def patiently(
        self, job: Job, index: int, tenant: Tenant | None, work: Callable[[RequestContext], Awaitable[Reply]]
    ) -> Reply:
        """Do the work of a step, and repeat it while the service is full or its engine restarts.

        Raises:
            RequestError: Every other error, translated.
        """
        while True:
            context = RequestContext(
                request_id=f"{job.id}-{index}", is_body_complete=True, tenant=tenant, priority="batch"
            )
            context.received_s = time.monotonic()
            try:
                return await work(context)
            except Exception as error:
                # The last-resort handler of a step, as `server.error_handlers` is of a request.
                fault = to_request_error(error)
                if fault.code == "internal_error":
                    logger.error("job step failed", exc_info=error, extra={"job": job.id, "step": index})
            if fault.code not in WAITING:
                raise fault
            await asyncio.sleep(min(MAX_WAIT_S, max(MIN_WAIT_S, fault.retry_after_s or 0.0)))

    def tenant_of(self, job: Job) -> Tenant | None:
        """Return the account of a job's key, without limits: the job was charged when it was taken.

        Raises:
            RequestError: If the key was revoked since, or has expired.
        """
        if self.service.keys is None:
            return None
        for key in self.service.keys.keys:
            if key.name == job.tenant and not key.is_expired():
                unlimited = {"requests_per_minute": None, "concurrent": None, "audio_s_per_day": None}
                return Tenant(key.model_copy(update=unlimited))
        raise RequestError("invalid_api_key", "The API key of this job was revoked or has expired.")

    async def answer(self, context: RequestContext, options: QaOptions, clip: bytes) -> QaReply:
        """Answer one question about a clip, or about one window of a recording.

        Raises:
            Exception: Each exception of a request; see `server.errors.to_request_error`.
        """
        handler = AudioQa(self.service, context, options, clip)
        return await self.run(context, handler, self.timeout_s(options))

    async def perceive(self, context: RequestContext, job: Job, index: int, read_clip: ReadClip) -> StepOutcome:
        """Ask one window of a recording.

        Raises:
            Exception: Each exception of a request; see `server.errors.to_request_error`.
        """
        options = question_of(job, 0)
        timeout_s = self.timeout_s(options)
        recording = await self.recording_of(context, job, options, read_clip)
        async with self.admitted(context, timeout_s) as deadline_s:
            return await perceive(self.service, context, recording, index, deadline_s)

    async def answer_later(
        self,
        context: RequestContext,
        job: Job,
        number: int,
        read_clip: ReadClip,
        known: Sequence[WindowPerception],
    ) -> QaReply:
        """Answer one question about a recording from the perceptions of its windows.

        Raises:
            Exception: Each exception of a request; see `server.errors.to_request_error`.
        """
        options = question_of(job, number)
        recording = await self.recording_of(context, job, options, read_clip)
        # Windows without a perception are asked again.
        timeout_s = self.timeout_s(options) * len(recording.spans)
        async with self.admitted(context, timeout_s) as deadline_s:
            return await answer(
                self.service,
                context,
                asked_of(options, options.question, options.choices),
                recording,
                known,
                deadline_s=deadline_s,
                shows_reasoning=options.reasoning == "full",
            )

    async def recording_of(
        self, context: RequestContext, job: Job, options: QaOptions, read_clip: ReadClip
    ) -> Recording:
        """Return the decoded recording of a job.

        Raises:
            Exception: Each exception of a request; see `server.errors.to_request_error`.
        """

        async def decode() -> Recording:
            channel: Channel = "mix" if options.channel == "each" else options.channel
            timeout_s = self.timeout_s(options) * num_windows_of(job)
            async with self.admitted(context, timeout_s):
                data = await read_clip()
                return await open_recording(self.service, context, data, track=options.track, channel=channel)

        return await self.recordings.get(job.id, decode)

    def timeout_s(self, options: QaOptions) -> float:
        """Return the time of one question or window."""
        return (options.timeout_ms or self.service.settings.default_timeout_ms) / 1000

    async def run(self, context: RequestContext, handler: Handler[Reply], timeout_s: float) -> Reply:
        """Run a handler as the service runs a request, without a client.

        Raises:
            Exception: Each exception of a request; see `server.errors.to_request_error`.
        """
        async with self.admitted(context, timeout_s) as deadline_s:
            await handler.prepare(deadline_s)
            return await handler.answer(discard)

    @contextlib.asynccontextmanager
    async def admitted(self, context: RequestContext, timeout_s: float) -> AsyncGenerator[float]:
        """Hold a place for a request and bound its time; yield the deadline, a reading of `time.monotonic()`.

        Raises:
            RequestError: 503, if the service is full or not ready; 504, after the deadline.
        """
        async with self.service.admission.admit(context):
            try:
                async with asyncio.timeout(timeout_s):
                    context.phase = "decode"
                    yield time.monotonic() + timeout_s
            except TimeoutError:
                message = f"The answer was not complete after {round(timeout_s * 1000)} ms."
                hint = "Raise `timeout_ms`, or lower `max_tokens`."
                raise RequestError("deadline_exceeded", message, limit=timeout_s * 1000, hint=hint) from None

    async def assemble(self, job: Job, outcomes: Sequence[StepOutcome]) -> Ending:
        """Return the end of a job: the reply to its question, or a list with one entry per question."""
        return await self.service.in_pool(ending_of, job, outcomes)

    def failure(self) -> dict[str, Any]:
        """Return the error object of a job that the service could not complete."""
        return outcome_of(
            RequestError(
                "internal_error",
                "The service failed on this job.",
                hint="Send it again; if it fails again, report its id to the operator, who finds it in the log.",
            )
        )["error"]


def ending_of(job: Job, outcomes: Sequence[StepOutcome]) -> Ending:
    """Return the end of a job from the outcomes of all its steps."""
    questions = job.request.get("questions")
    outcomes = outcomes[num_windows_of(job) :]
    if not questions:
        outcome = outcomes[0]
        if "error" in outcome:
            return Ending("failed", error=outcome["error"])
        return Ending("succeeded", result=outcome["reply"])
    results = QuestionResults(
        data=[
            QuestionResult(
                question=question["question"],
                reply=QaReply.model_validate(outcome["reply"]) if "reply" in outcome else None,
                error=error_of(outcome["error"]) if "error" in outcome else None,
            )
            for question, outcome in zip(questions, outcomes, strict=True)
        ]
    )
    if all(each.error is not None for each in results.data):
        return Ending("failed", result=results.model_dump(mode="json"), error=outcomes[0]["error"])
    return Ending("succeeded", result=results.model_dump(mode="json"))


def num_windows_of(job: Job) -> int:
    """Return the number of steps that ask a window: the steps of a job beyond its questions."""
    return 0 if job.kind == "batch" else job.num_steps - (len(job.request.get("questions") or ()) or 1)


def question_of(job: Job, index: int) -> QaOptions:
    """Return the question of a step."""
    options = JobOptions.model_validate(job.request)
    fields = options.model_dump(exclude=set(JOB_FIELDS)) | {"stream": False}
    if options.questions:
        fields |= options.questions[index].model_dump()
    return QaOptions.model_validate(fields)


def outcome_of(fault: RequestError) -> StepOutcome:
    """Return an error as the outcome of a step."""
    error = fault.body("")["error"]
    del error["request_id"]
    return {"error": error}
