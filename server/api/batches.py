"""`/v1/batches`: files of requests, done later, in OpenAI's shape.

A batch is a job of the kind `batch`, and each line of its file is a step. Batches of other keys do not exist for a
caller.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request

from server.api.batch_lines import split_lines
from server.api.batch_types import (
    BatchBody,
    BatchError,
    BatchErrors,
    BatchList,
    BatchQuery,
    BatchReply,
    BatchStatus,
    RequestCounts,
)
from server.api.forms import parse_json, refuse_query, validate
from server.api.jobs import jobs_of, tenant_of
from server.api.lifecycle import receiving
from server.api.openapi import ANYWHERE, json_only, responses_of, takes_body
from server.api.types import NoQuery
from server.errors import RequestError
from server.jobs.records import Job, new_id
from server.request_context import RequestContext
from server.service import Service

READ_CODES = (
    *("jobs_disabled", "not_found", "invalid_parameter", "unknown_parameter", "storage_unavailable", "storage_full"),
)
TAKE_CODES = (
    *READ_CODES,
    *("invalid_json", "invalid_request", "missing_parameter", "unknown_file", "file_expired", "too_many_jobs"),
    *("upload_timeout", "overloaded", "starting", "shutting_down", "engine_unavailable"),
    *("rate_limit_exceeded", "too_many_in_flight", "audio_quota_exceeded"),
)
STATUSES: dict[str, BatchStatus] = {"queued": "validating", "succeeded": "completed"}
"""OpenAI's words for statuses of jobs; the others are equal."""

BatchId = Annotated[str, Path(description="Id of the batch.")]

router = APIRouter(responses=ANYWHERE)


@router.post(
    "/v1/batches", summary="Do a file of requests", response_model=BatchReply, responses=responses_of(TAKE_CODES)
)
@takes_body(json_only(BatchBody))
async def create_batch(request: Request) -> BatchReply:
    """Take a file of requests. A broken line fails alone; a file with a fault as a whole is refused."""
    jobs = jobs_of(request)
    service: Service = request.app.state.service
    context = RequestContext.of(request.scope)
    async with service.admission.admit(context):
        refuse_query(request, BatchBody)
        with receiving(service, context):
            body = validate(BatchBody, parse_json(await request.body()), strict=True)
        lines = await read_lines(service, context, body.input_file_id)
        job = Job(
            id=new_id("batch"),
            tenant=context.tenant_name,
            kind="batch",
            request=body.model_dump(mode="json"),
            num_steps=len(lines),
            keep_s=service.settings.jobs_keep_s,
        )
        job = await jobs.take_parts(job, lines)
        context.facts["job"] = job.id
        return reply_of(job, service.settings.jobs_max_age_s)


@router.get("/v1/batches", summary="Batches, newest first", responses=responses_of(READ_CODES))
async def list_batches(request: Request, query: Annotated[BatchQuery, Query()]) -> BatchList:
    """List the caller's batches."""
    found = await jobs_of(request).list_jobs(tenant_of(request), limit=query.limit + 1, after=query.after, kind="batch")
    data = [reply_of(job, max_age_of(request)) for job in found[: query.limit]]
    first_id, last_id = (data[0].id, data[-1].id) if data else (None, None)
    return BatchList(data=data, first_id=first_id, last_id=last_id, has_more=len(found) > query.limit)


@router.get("/v1/batches/{id}", summary="One batch", responses=responses_of(READ_CODES))
async def get_batch(request: Request, id: BatchId) -> BatchReply:
    """Return a batch with its counts, and after its end with its files."""
    refuse_query(request, NoQuery)
    return reply_of(await jobs_of(request).get(tenant_of(request), id, "batch"), max_age_of(request))


@router.post("/v1/batches/{id}/cancel", summary="Cancel a batch", responses=responses_of(READ_CODES))
async def cancel_batch(request: Request, id: BatchId) -> BatchReply:
    """Cancel a batch at once. One that has ended stays as it is."""
    refuse_query(request, NoQuery)
    return reply_of(await jobs_of(request).cancel(tenant_of(request), id, "batch"), max_age_of(request))


def max_age_of(request: Request) -> float:
    """Return the seconds until a batch expires."""
    service: Service = request.app.state.service
    return service.settings.jobs_max_age_s


async def read_lines(service: Service, context: RequestContext, file_id: str) -> list[bytes]:
    """Return the lines of a stored file.

    Raises:
        RequestError: 404, if the caller has no such file; 400, if it is no batch.
    """
    stored = await service.files.get(context.tenant_name, file_id)
    if stored.purpose != "batch":
        message = f"The file has the purpose `{stored.purpose}`; a batch needs `batch`."
        raise RequestError("invalid_parameter", message, param="input_file_id")
    data = await service.files.read(context.tenant_name, file_id)
    return await service.in_pool(split_lines, data)


def reply_of(job: Job, max_age_s: float) -> BatchReply:
    """Write a batch in OpenAI's shape."""

    def whole(moment_s: float | None) -> int | None:
        return None if moment_s is None else int(moment_s)

    result: dict[str, Any] = job.result or {}
    num_failed: int = result.get("num_failed", 0)
    status = STATUSES.get(job.status, "in_progress")
    if job.status in ("failed", "cancelled", "expired"):
        status = job.status
    elif job.status == "running" and job.num_done == job.num_steps:
        status = "finalizing"
    ended = whole(job.ended_s)
    errors = None
    if job.error is not None:
        errors = BatchErrors(data=[BatchError(code=job.error["code"], message=job.error["message"])])
    return BatchReply(
        id=job.id,
        endpoint=job.request["endpoint"],
        input_file_id=job.request["input_file_id"],
        status=status,
        output_file_id=result.get("output_file_id"),
        error_file_id=result.get("error_file_id"),
        errors=errors,
        request_counts=RequestCounts(total=job.num_steps, completed=job.num_done - num_failed, failed=num_failed),
        metadata=job.request["metadata"],
        created_at=int(job.created_s),
        in_progress_at=whole(job.started_s),
        expires_at=int(job.created_s + max_age_s),
        finalizing_at=ended if status == "completed" else None,
        completed_at=ended if status == "completed" else None,
        failed_at=ended if status == "failed" else None,
        expired_at=ended if status == "expired" else None,
        cancelling_at=ended if status == "cancelled" else None,
        cancelled_at=ended if status == "cancelled" else None,
    )
