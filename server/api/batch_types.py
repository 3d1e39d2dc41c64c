"""Wire types of `/v1/batches`, in OpenAI's shape."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from server.api.types import Wire

MAX_METADATA = 16

BatchEndpoint = Literal["/v1/audio/qa", "/v1/chat/completions"]
BatchStatus = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]
MetadataName = Annotated[str, StringConstraints(min_length=1, max_length=64)]
MetadataText = Annotated[str, StringConstraints(max_length=512)]


class BatchBody(Wire):
    """A batch: a stored file of requests."""

    input_file_id: str = Field(max_length=64, description="Id of a file with the purpose `batch`.")
    endpoint: BatchEndpoint = Field(description="Endpoint of every line.")
    completion_window: Literal["24h"]
    metadata: dict[MetadataName, MetadataText] | None = Field(default=None, max_length=MAX_METADATA)


class BatchQuery(Wire):
    """The query parameters of a listing."""

    after: str | None = Field(default=None, max_length=64, description="Id of the last batch of the page before.")
    limit: int = Field(default=20, ge=1, le=100, description="Maximum number of batches in a page.")


class RequestCounts(Wire):
    """Lines of a batch: all, those with a reply, and those with an error."""

    total: int
    completed: int
    failed: int


class BatchError(Wire):
    """Error that ended a batch."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None


class BatchErrors(Wire):
    """Errors that ended a batch."""

    object: Literal["list"] = "list"
    data: list[BatchError]


class BatchReply(Wire):
    """A batch; times are seconds since 1970."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: BatchEndpoint
    input_file_id: str
    completion_window: Literal["24h"] = "24h"
    status: BatchStatus
    output_file_id: str | None = Field(default=None, description="File of the replies, after the end.")
    error_file_id: str | None = Field(default=None, description="File of the failed lines, after the end.")
    errors: BatchErrors | None = None
    request_counts: RequestCounts
    metadata: dict[str, str] | None = None
    created_at: int
    in_progress_at: int | None = None
    expires_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None


class BatchList(Wire):
    """Batches, newest first."""

    object: Literal["list"] = "list"
    data: list[BatchReply]
    first_id: str | None
    last_id: str | None
    has_more: bool
