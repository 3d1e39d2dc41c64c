"""`/v1/files`: files uploaded once and used by id, in OpenAI's shape.

A file belongs to the API key that uploaded it. An upload checks the size and the kind of a file, never its sound: only
the sandbox decodes clips, when a question names one.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Annotated, Any, BinaryIO
from urllib.parse import quote

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse

from hyper_model.audio_formats import sniff
from server.api.forms import UNNAMED, open_form, refuse_query, require_file, require_form
from server.api.lifecycle import receiving
from server.api.openapi import ANYWHERE, REQUEST_ID, Responses, form_only, responses_of, takes_body
from server.api.types import FileDeleted, FileForm, FileList, FileObject, FileQuery, NoQuery
from server.errors import RequestError
from server.request_context import RequestContext
from server.service import Service
from server.settings import Settings
from server.storage.protocol import StoredFile

DEFAULT_NAME = "file"
MAX_NAME_CHARS = 255
HEAD_BYTES = 1024 * 1024
"""Bytes of an upload that are looked at."""

QUOTA_CODES = ("rate_limit_exceeded", "too_many_in_flight", "audio_quota_exceeded", "storage_unavailable")
FILE_CODES = (*QUOTA_CODES, "unknown_file", "file_expired", "invalid_parameter", "unknown_parameter")
UPLOAD_CODES = (
    *QUOTA_CODES,
    *("invalid_parameter", "unknown_parameter", "missing_parameter", "invalid_multipart", "invalid_audio"),
    *("upload_timeout", "body_too_large", "audio_too_large", "unsupported_media_type", "unsupported_audio"),
    *("file_quota_exceeded", "storage_full", "overloaded", "starting", "shutting_down", "engine_unavailable"),
)
CONTENT: Responses = {
    200: {
        "description": "The bytes of the file.",
        "headers": REQUEST_ID,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}

router = APIRouter(responses=ANYWHERE)


@router.post("/v1/files", summary="Store a file", response_model=FileObject, responses=responses_of(UPLOAD_CODES))
@takes_body(form_only(FileForm))
async def create_file(request: Request) -> FileObject:
    """Store a file under a random id until it expires or is deleted."""
    service, context = parts_of(request)
    settings = service.settings
    async with service.admission.admit(context):
        refuse_query(request, FileForm)
        require_form(request)
        async with contextlib.AsyncExitStack() as stack:
            with receiving(service, context):
                form, file = await stack.enter_async_context(open_form(request, FileForm))
                upload = require_file(file)
                lifetime_s = lifetime_of(form, settings)
                await service.in_pool(check_content, upload.file, form.purpose, settings)
            stored = await service.files.add(
                context.tenant_name,
                upload.file,
                filename=display_name(upload.filename),
                purpose=form.purpose,
                lifetime_s=lifetime_s,
            )
    return file_object(stored)


@router.get("/v1/files", summary="List files", responses=responses_of(FILE_CODES))
async def list_files(request: Request, query: Annotated[FileQuery, Query()]) -> FileList:
    """List the files of the caller's key, page by page."""
    service, context = parts_of(request)
    async with counted(context):
        page = await service.files.list(
            context.tenant_name,
            purpose=query.purpose,
            after=query.after,
            limit=query.limit,
            is_ascending=query.order == "asc",
        )
    files = [file_object(stored) for stored in page.files]
    first_id, last_id = (files[0].id, files[-1].id) if files else (None, None)
    return FileList(data=files, first_id=first_id, last_id=last_id, has_more=page.has_more)


@router.get("/v1/files/{file_id}", summary="One file", responses=responses_of(FILE_CODES))
async def get_file(request: Request, file_id: str) -> FileObject:
    """Describe a file."""
    service, context = parts_of(request)
    async with counted(context):
        refuse_query(request, NoQuery)
        return file_object(await service.files.get(context.tenant_name, file_id))


@router.get(
    "/v1/files/{file_id}/content",
    summary="The bytes of a file",
    response_class=StreamingResponse,
    responses=CONTENT | responses_of(FILE_CODES),
)
async def get_content(request: Request, file_id: str) -> Response:
    """Return the bytes of a file as they were uploaded."""
    service, context = parts_of(request)
    async with counted(context):
        refuse_query(request, NoQuery)
        stored = await service.files.get(context.tenant_name, file_id)
        chunks = service.files.chunks(context.tenant_name, file_id)
        # An error of the storage still has a status here.
        first = await anext(chunks, b"")
    headers = {
        "content-length": str(stored.num_bytes),
        "content-disposition": f"attachment; filename*=UTF-8''{quote(stored.filename, safe='')}",
        "x-content-type-options": "nosniff",
        "cache-control": "no-store",
    }
    return StreamingResponse(joined(first, chunks), headers=headers, media_type="application/octet-stream")


@router.delete("/v1/files/{file_id}", summary="Delete a file", responses=responses_of(FILE_CODES))
async def delete_file(request: Request, file_id: str) -> FileDeleted:
    """Remove a file and its content."""
    service, context = parts_of(request)
    async with counted(context):
        refuse_query(request, NoQuery)
        await service.files.delete(context.tenant_name, file_id)
    return FileDeleted(id=file_id)


def parts_of(request: Request) -> tuple[Service, RequestContext]:
    """Return the service and the context of a request."""
    return request.app.state.service, RequestContext.of(request.scope)


@contextlib.asynccontextmanager
async def counted(context: RequestContext) -> AsyncGenerator[None]:
    """Count a request against the limits of its key; it needs no engine.

    Raises:
        RequestError: 429.
    """
    async with contextlib.AsyncExitStack() as stack:
        if context.tenant is not None:
            await stack.enter_async_context(context.tenant.enter())
        yield


def lifetime_of(form: FileForm, settings: Settings) -> int:
    """Return the seconds until the file expires.

    Raises:
        RequestError: 400, if `expires_after` has one of its two parts, or exceeds the maximum.
    """
    names = ("expires_after[anchor]", "expires_after[seconds]")
    missing = [name for name, value in zip(names, (form.expiry_anchor, form.expiry_s), strict=True) if value is None]
    if len(missing) == 1:
        message = f"`{missing[0]}` is required beside the other part of `expires_after`."
        raise RequestError("missing_parameter", message, param=missing[0])
    limit = settings.files_max_lifetime_s
    lifetime_s = form.expiry_s or min(settings.files_default_lifetime_s, limit)
    if lifetime_s > limit:
        message = f"`{names[1]}` exceeds the limit of {limit}."
        raise RequestError("invalid_parameter", message, param=names[1], limit=limit, actual=lifetime_s)
    return lifetime_s


def check_content(file: BinaryIO, purpose: str, settings: Settings) -> None:
    """Refuse a file that no later request could use, by its size and its first bytes.

    Raises:
        RequestError: 413 for its size; 400 for a batch without JSON Lines.
        AudioError: For another file without audio.
    """
    num_bytes = file.seek(0, 2)
    is_clip = purpose != "batch"
    limit = min(settings.max_audio_bytes, settings.files_max_bytes) if is_clip else settings.files_max_bytes
    if num_bytes > limit:
        message = f"The file has {num_bytes} bytes; the limit for `{purpose}` is {limit}."
        raise RequestError(
            "audio_too_large" if is_clip else "body_too_large",
            message,
            param="file",
            limit=limit,
            actual=num_bytes,
            hint="Send a shorter clip, or a compressed format." if is_clip else "Split the batch.",
        )
    file.seek(0)
    if is_clip:
        sniff(file.read(HEAD_BYTES))
    else:
        require_json_lines(file)


def require_json_lines(file: BinaryIO) -> None:
    """Refuse a file whose first line is no JSON object; the batch itself checks the other lines.

    Raises:
        RequestError: 400.
    """
    line = file.readline(HEAD_BYTES)
    try:
        found: Any = json.loads(line)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        message = f"Line 1 is not a JSON object of at most {HEAD_BYTES} bytes; a batch file is JSON Lines in UTF-8."
        hint = "Write one request per line: custom_id, method, url and body."
        raise RequestError("invalid_parameter", message, param="file", hint=hint)


def display_name(name: str | None) -> str:
    """Return the name of an upload without its folders and control characters."""
    if name is None or name == UNNAMED:
        return DEFAULT_NAME
    last = re.split(r"[/\\]", name)[-1]
    return "".join(filter(str.isprintable, last))[:MAX_NAME_CHARS].strip() or DEFAULT_NAME


def file_object(stored: StoredFile) -> FileObject:
    """Write a stored file in OpenAI's shape."""
    return FileObject(
        id=stored.id,
        bytes=stored.num_bytes,
        created_at=stored.created_at_s,
        expires_at=stored.expires_at_s,
        filename=stored.filename,
        purpose=stored.purpose,
    )


async def joined(first: bytes, chunks: AsyncGenerator[bytes]) -> AsyncIterator[bytes]:
    """Yield a chunk, then the others."""
    async with contextlib.aclosing(chunks):
        yield first
        async for chunk in chunks:
            yield chunk
