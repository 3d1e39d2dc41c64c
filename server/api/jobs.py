"""`/v1/jobs`: questions that are answered after the request, and survive a restart of the service.

A job is taken when its clip is decoded, charged and stored. It runs as a request of the class `batch`. Jobs of other
keys do not exist for a caller.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import re
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive

from hyper_model.audio import Channel
from server.api.forms import read_clip_request
from server.api.job_types import (
    DeliveryList,
    DeliveryReply,
    JobBody,
    JobDeleted,
    JobForm,
    JobList,
    JobOptions,
    JobProgress,
    JobReply,
    JobStatus,
    Webhook,
    error_of,
)
from server.api.lifecycle import decode_clip, respond, wait_for_disconnect
from server.api.openapi import ANYWHERE, Responses, event_stream, form_and_json, responses_of, takes_body
from server.api.qa_list import questions_of
from server.api.questions import asked_of, check_bounds, plan, require_window, write_prompt
from server.api.recordings import check_place, open_recording, part_from
from server.api.stream import Emit, EventStream, ServerSentEvent
from server.errors import ERRORS, RequestError
from server.jobs.address_guard import ForbiddenAddressError, check_url
from server.jobs.records import Job, new_id
from server.request_context import RequestContext
from server.service import Service

if TYPE_CHECKING:
    from server.jobs.job_service import JobService

IDEMPOTENCY_KEY = re.compile(r"[!-~]{1,255}")
EVENT_POLL_S = 0.25
MAX_QUESTIONS = 100
MAX_LIMIT = 100

EVENTS = "job.progress job.succeeded job.failed job.cancelled job.expired".split()

STORED = responses_of(("jobs_disabled", "not_found", "storage_unavailable", "storage_full"))
TAKING: Responses = responses_of(
    code for code in ERRORS if code not in ("client_closed_request", "not_found", "method_not_allowed")
)

JobId = Annotated[str, Path(description="Id of the job.")]

router = APIRouter(responses=ANYWHERE)


@router.post("/v1/jobs", summary="Ask later", status_code=202, response_model=JobReply, responses=TAKING)
@takes_body(form_and_json(JobForm, JobBody))
async def create_job(request: Request) -> Response:
    """Take a question, or several ones, about a clip; the reply names the job at once.

    With the header `Idempotency-Key`, a repeated request returns the same job for 24 hours.
    """
    jobs_of(request)
    return await respond(request, TakeJob.read)


@router.get("/v1/jobs", summary="Jobs, newest first", responses=STORED)
async def list_jobs(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=MAX_LIMIT)] = 20,
    after: Annotated[str | None, Query(description="Id of the last job of the page before.")] = None,
    status: Annotated[JobStatus | None, Query()] = None,
) -> JobList:
    """List the caller's jobs without their results."""
    statuses = () if status is None else (status,)
    found = await jobs_of(request).list_jobs(tenant_of(request), limit=limit + 1, after=after, statuses=statuses)
    return JobList(data=[reply_of(job) for job in found[:limit]], has_more=len(found) > limit)


@router.get("/v1/jobs/{id}", summary="One job", responses=STORED)
async def get_job(request: Request, id: JobId) -> JobReply:
    """Return a job with its progress, and after its end with its result or error."""
    return reply_of(await jobs_of(request).get(tenant_of(request), id))


@router.get(
    "/v1/jobs/{id}/events",
    summary="Progress as server-sent events",
    response_class=Response,
    responses={200: event_stream(EVENTS, "Each step's progress, then the end with the whole job.")} | STORED,
)
async def job_events(request: Request, id: JobId) -> Response:
    """Report each finished step and the end, for a caller who waits.

    Every event has an id. After a lost connection, the header `Last-Event-ID` continues behind that event.
    """
    jobs, tenant = jobs_of(request), tenant_of(request)
    await jobs.get(tenant, id)
    service: Service = request.app.state.service
    events = JobEvents(service, jobs, tenant, id, last_event_of(request))
    context = RequestContext.of(request.scope)
    return EventStream(events.stream, context, ping_interval_s=service.settings.ping_interval_s)


@router.post("/v1/jobs/{id}/cancel", summary="Cancel a job", responses=STORED)
async def cancel_job(request: Request, id: JobId) -> JobReply:
    """Cancel a job. One that has ended stays as it is."""
    return reply_of(await jobs_of(request).cancel(tenant_of(request), id))


@router.delete("/v1/jobs/{id}", summary="Delete a job", responses=STORED)
async def delete_job(request: Request, id: JobId) -> JobDeleted:
    """Delete a job at once, with its clip, its result and its log; a job in progress is cancelled."""
    await jobs_of(request).delete(tenant_of(request), id)
    return JobDeleted(id=id)


@router.get("/v1/jobs/{id}/deliveries", summary="Webhook log of a job", responses=STORED)
async def job_deliveries(request: Request, id: JobId) -> DeliveryList:
    """List the attempts to deliver the webhook of a job."""
    found = await jobs_of(request).deliveries(tenant_of(request), id)
    return DeliveryList(
        data=[
            DeliveryReply(
                event_id=each.event_id,
                attempt=each.attempt,
                at=int(each.at_s),
                seconds=round(each.seconds, 3),
                status_code=each.status_code,
                error=each.error,
                next_at=None if each.next_at_s is None else int(each.next_at_s),
            )
            for each in found
        ]
    )


def jobs_of(request: Request) -> JobService:
    """Return the jobs of the service.

    Raises:
        RequestError: 404 if jobs are off, 503 until they have started.
    """
    service: Service = request.app.state.service
    if not service.settings.jobs:
        raise RequestError("jobs_disabled", "This service takes no jobs.", hint="The operator can set HYPER_JOBS=true.")
    if request.app.state.jobs is None:
        message = "The storage of jobs is not available."
        raise RequestError("storage_unavailable", message, hint="Retry after the Retry-After time.")
    return request.app.state.jobs


def tenant_of(request: Request) -> str:
    """Return the name of the caller's key; empty if the service is open to all."""
    return RequestContext.of(request.scope).tenant_name


def reply_of(job: Job) -> JobReply:
    """Write a job in the API's format."""

    def whole(moment_s: float | None) -> int | None:
        return None if moment_s is None else int(moment_s)

    return JobReply(
        id=job.id,
        status=job.status,
        progress=JobProgress(done=job.num_done, of=job.num_steps),
        created_at=int(job.created_s),
        started_at=whole(job.started_s),
        ended_at=whole(job.ended_s),
        expires_at=whole(job.expires_s),
        webhook=None if job.webhook_url is None else Webhook(url=job.webhook_url),
        result=job.result,
        error=None if job.error is None else error_of(job.error),
    )


def last_event_of(request: Request) -> int:
    """Return the number of the last event that the caller has received; 0 without one."""
    text = request.headers.get("last-event-id", "").strip()
    if not text:
        return 0
    if not text.isdecimal() or len(text) > 9:
        message = "`Last-Event-ID` is not an id of this stream."
        raise RequestError("invalid_parameter", message, param="last-event-id", hint="Leave it out to begin again.")
    return int(text)


class TakeJob:
    """Takes a job; see `server.api.lifecycle.Handler`."""

    is_stream = False

    def __init__(
        self, service: Service, jobs: JobService, context: RequestContext, options: JobOptions, data: bytes
    ) -> None:
        self.service = service
        self.jobs = jobs
        self.context = context
        self.options = options
        self.data = data
        self.timeout_ms: int | None = None
        self.idempotency_key: str | None = None
        self.earlier: Job | None = None
        self.audio_s = 0.0
        self.num_windows = 0

    @classmethod
    async def read(cls, request: Request, service: Service, context: RequestContext) -> TakeJob:
        """Read and check the body."""
        options, data = await read_clip_request(request, service, form=JobForm, body=JobBody)
        check_options(service, options)
        taken = cls(service, jobs_of(request), context, options, data)
        key = request.headers.get("idempotency-key")
        if key is not None:
            if not IDEMPOTENCY_KEY.fullmatch(key):
                message = "`Idempotency-Key` must have 1 to 255 visible ASCII characters."
                raise RequestError("invalid_parameter", message, param="idempotency-key")
            taken.idempotency_key = key
        if options.webhook is not None:
            await taken.check_webhook(options.webhook)
        return taken

    async def check_webhook(self, webhook: Webhook) -> None:
        """Refuse an address that may not be called, and a webhook without a secret to sign it.

        Raises:
            RequestError: 400.
        """
        try:
            check_url(webhook.url, self.jobs.allowed_hosts)
        except ForbiddenAddressError as error:
            raise RequestError("invalid_parameter", error.message, param="webhook.url") from None
        if not await self.jobs.secrets_of(self.context.tenant_name):
            message = "This key has no secret to sign webhooks."
            hint = "Create one with POST /v1/webhooks/secrets."
            raise RequestError("invalid_parameter", message, param="webhook", hint=hint)

    async def prepare(self, deadline_s: float) -> None:
        """Check the questions, decode the clip and charge it: a job that cannot succeed is refused at once."""
        if self.idempotency_key is not None:
            fingerprint = await self.service.in_pool(fingerprint_of, self.options, self.data)
            self.earlier = await self.jobs.claim_key(self.context.tenant_name, self.idempotency_key, fingerprint)
            if self.earlier is not None:
                return
        async with contextlib.AsyncExitStack() as undo:
            undo.push_async_callback(self.release_key)
            await self.check_questions(deadline_s)
            undo.pop_all()

    async def check_questions(self, deadline_s: float) -> None:
        """Prepare each question as for an answer, and drop the result."""
        options = self.options
        asked = [asked_of(options, options.question, options.choices)]
        if options.questions:
            asked = questions_of(options, MAX_QUESTIONS)
        elif "question" not in options.model_fields_set:
            raise RequestError("missing_parameter", "`question` is required.", param="question")
        prompts = [await write_prompt(self.service, self.context, each) for each in asked]
        if options.long_audio != "error":
            await self.check_recording(options.start_s)
            return
        # `check_options` has refused `each`.
        channel: Channel = "mix" if options.channel == "each" else options.channel
        waveform = await decode_clip(self.service, self.context, self.data, track=options.track, channel=channel)
        require_window(waveform)
        for each, prompt_token_ids in zip(asked, prompts, strict=True):
            plan(self.service.answerer, each, prompt_token_ids, waveform, deadline_s - time.monotonic())
        self.audio_s = waveform.duration_s

    async def check_recording(self, start_s: float | None) -> None:
        """Decode the recording, charge it and drop its samples."""
        options = self.options
        channel: Channel = "mix" if options.channel == "each" else options.channel
        recording = await open_recording(self.service, self.context, self.data, track=options.track, channel=channel)
        try:
            self.audio_s = recording.duration_s
            if options.long_audio == "chunk" and len(recording.spans) > 1:
                self.num_windows = len(recording.spans)
            if options.long_audio == "window":
                part_from(recording, start_s or 0.0, self.service.recording_limits.min_duration_s)
        finally:
            recording.close()

    async def answer(self, emit: Emit) -> Job:
        """Store the job, or return the one of an equal request before."""
        if self.earlier is not None:
            return self.earlier
        options = self.options
        job = Job(
            id=new_id("job"),
            tenant=self.context.tenant_name,
            kind="qa",
            request=options.model_dump(mode="json", include={*JobOptions.model_fields}),
            num_steps=self.num_windows + (len(options.questions) or 1),
            keep_s=options.keep_s or self.service.settings.jobs_keep_s,
            audio_s=self.audio_s,
            webhook_url=None if options.webhook is None else options.webhook.url,
        )
        async with contextlib.AsyncExitStack() as undo:
            undo.push_async_callback(self.release_key)
            taken = await self.jobs.take(job, self.data, self.idempotency_key)
            undo.pop_all()
        return taken

    async def release_key(self) -> None:
        """Let the next request with this key store its job."""
        if self.idempotency_key is not None:
            await self.jobs.release_key(self.context.tenant_name, self.idempotency_key)

    def response(self, reply: Job) -> Response:
        """Return the job with its address."""
        self.context.facts["job"] = reply.id
        headers = {"location": f"/v1/jobs/{reply.id}"}
        if self.earlier is not None:
            headers["idempotent-replayed"] = "true"
        return JSONResponse(reply_of(reply).model_dump(mode="json"), status_code=202, headers=headers)

    def last_events(self, reply: Job) -> Iterable[ServerSentEvent]:
        """Return no event: a job is never streamed."""
        return ()

    def error_event(self, body: dict[str, Any]) -> ServerSentEvent:
        """Write an error as an event."""
        return ServerSentEvent(body, "error")

    def partial(self) -> dict[str, Any] | None:
        """Return no partial answer."""
        return None


def check_options(service: Service, options: JobOptions) -> None:
    """Check what the types cannot express.

    Raises:
        RequestError: 400, with the field.
    """
    check_bounds(service, max_tokens=options.max_tokens, timeout_ms=options.timeout_ms, pause=options.pause)
    check_place(options.long_audio, options.start_s)
    if options.stream:
        message = "A job has no stream; its events are at /v1/jobs/{id}/events."
        raise RequestError("invalid_parameter", message, param="stream")
    if options.channel == "each":
        message = "A job does not support `channel=each`; use one job with `left` and one with `right`."
        raise RequestError("invalid_parameter", message, param="channel")
    limit_s = service.settings.jobs_keep_s
    if options.keep_s is not None and options.keep_s > limit_s:
        message = f"`keep_s` exceeds the limit of {limit_s:g}."
        raise RequestError("invalid_parameter", message, param="keep_s", limit=limit_s, actual=options.keep_s)


def fingerprint_of(options: JobOptions, data: bytes) -> str:
    """Return the digest of a request: its fields and its clip."""
    fields = json.dumps(options.model_dump(mode="json", include={*JobOptions.model_fields}), sort_keys=True)
    return hashlib.sha256(fields.encode() + b"\0" + hashlib.sha256(data).digest()).hexdigest()


class JobEvents:
    """Events of one job for one caller.

    The number of an event follows from the job alone: event n is the n-th finished step, and the end has the number
    after the last step. A caller therefore gets the same events from every process, in any number of connections.
    """

    def __init__(self, service: Service, jobs: JobService, tenant: str, job_id: str, last: int) -> None:
        self.service = service
        self.jobs = jobs
        self.tenant = tenant
        self.job_id = job_id
        self.num_sent = last

    async def stream(self, emit: Emit, receive: Receive) -> ServerSentEvent | None:
        """Emit events until the job's end, or until the service stops; return the event of an error, or None."""
        gone = asyncio.create_task(wait_for_disconnect(receive))
        try:
            while self.service.state not in ("draining", "stopped"):
                try:
                    job = await self.jobs.get(self.tenant, self.job_id)
                except RequestError as error:
                    if error.code == "not_found":
                        return ServerSentEvent(error.body(""), "error")
                    # The database is away; the caller keeps the connection.
                else:
                    if await self.emit_new(job, emit):
                        return None
                await asyncio.wait({gone}, timeout=EVENT_POLL_S)
                if gone.done():
                    raise ClientDisconnect
            return None
        finally:
            gone.cancel()
            await asyncio.gather(gone, return_exceptions=True)

    async def emit_new(self, job: Job, emit: Emit) -> bool:
        """Emit what is new, and return whether the job has ended."""
        for number in range(self.num_sent + 1, job.num_done + 1):
            data = {"id": job.id, "status": "running", "progress": {"done": number, "of": job.num_steps}}
            await emit(ServerSentEvent(data, "job.progress", str(number)))
            self.num_sent = number
        if job.is_active:
            return False
        data = reply_of(job).model_dump(mode="json")
        await emit(ServerSentEvent(data, f"job.{job.status}", str(job.num_steps + 1)))
        return True
