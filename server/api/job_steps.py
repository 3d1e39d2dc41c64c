"""The work of jobs: each step is a question, answered as a request of the class `batch`.

A step passes the same admission, decoder and limiter as a request. If the service is full or its engine is restarting,
the step waits; every other error ends it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from server.api.job_types import JobOptions, QuestionResult, QuestionResults, error_of
from server.api.lifecycle import Handler
from server.api.qa import AudioQa
from server.api.stream import discard
from server.api.types import QaOptions, QaReply
from server.errors import RequestError, to_request_error
from server.jobs.records import Ending, Job, StepOutcome
from server.quotas import Tenant
from server.recordings.cutter import EARLIEST_CUT_S
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

    async def perform(self, job: Job, index: int, clip: bytes | None) -> StepOutcome:
        """Answer one question; every error is an outcome."""
        try:
            tenant = self.tenant_of(job)
        except RequestError as error:
            return outcome_of(error)

        async def answer(context: RequestContext) -> dict[str, Any]:
            return await self.answer(context, question_of(job, index), clip or b"", job.audio_s)

        try:
            return {"reply": await self.patiently(job, index, tenant, answer)}
        except RequestError as error:
            return outcome_of(error)

    async def patiently(
        self, job: Job, index: int, tenant: Tenant | None, answer: Callable[[RequestContext], Awaitable[Reply]]
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
                return await answer(context)
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

    async def answer(self, context: RequestContext, options: QaOptions, clip: bytes, audio_s: float) -> dict[str, Any]:
        """Answer one question, and return its reply as JSON. The timeout of a recording grows with its windows.

        Args:
            audio_s: Length of the clip or recording.

        Raises:
            Exception: Each exception of a request; see `server.errors.to_request_error`.
        """
        handler = AudioQa(self.service, context, options, clip)
        # A job takes any number of windows.
        handler.max_windows = None
        timeout_s = (options.timeout_ms or self.service.settings.default_timeout_ms) / 1000
        if options.long_audio == "chunk":
            timeout_s *= max(1, math.ceil(audio_s / EARLIEST_CUT_S))
        reply = await self.run(context, handler, timeout_s)
        return reply.model_dump(mode="json")

    async def run(self, context: RequestContext, handler: Handler[Reply], timeout_s: float) -> Reply:
        """Run a handler as the service runs a request, without a client.

        Raises:
            Exception: Each exception of a request; see `server.errors.to_request_error`.
        """
        async with self.service.admission.admit(context):
            try:
                async with asyncio.timeout(timeout_s):
                    context.phase = "decode"
                    await handler.prepare(time.monotonic() + timeout_s)
                    return await handler.answer(discard)
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
