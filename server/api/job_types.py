"""Wire types of jobs, their events and their webhooks."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from server.api.types import QaBody, QaForm, QaOptions, QaReply, Wire

MIN_KEEP_S = 60

JobStatus = Literal["queued", "running", "succeeded", "failed", "cancelled", "expired"]


class Webhook(Wire):
    """Address that is called when the job ends."""

    url: str = Field(description="https address; it gets a signed POST with the job's id and status.")


class JobOptions(QaOptions):
    """A job: one question, or several ones, about one clip."""

    webhook: Webhook | None = Field(default=None, description="In a form: `webhook[url]`.")
    keep_s: float | None = Field(
        default=None, ge=MIN_KEEP_S, description="Seconds to keep the result, at most the service's default."
    )


class JobForm(JobOptions, QaForm):
    """Form of a job: the options, and the clip as `file` or as the id of a stored one."""


class JobBody(JobOptions, QaBody):
    """JSON body of a job: the options and the clip."""


class JobProgress(Wire):
    """Finished steps, and all steps."""

    done: int
    of: int


class JobError(Wire):
    """Error of a failed step or job; the same members as an error reply, without a request."""

    type: str
    code: str
    message: str
    param: str | None = None
    retryable: bool = False
    limit: float | None = None
    actual: float | str | None = None
    hint: str | None = None


class QuestionResult(Wire):
    """Result of one of several questions: a reply or an error."""

    question: str
    reply: QaReply | None = None
    error: JobError | None = None


class QuestionResults(Wire):
    """Results of several questions, in their order."""

    object: Literal["list"] = "list"
    data: list[QuestionResult]


class JobReply(Wire):
    """A job. `result` is the reply of `/v1/audio/qa` for one question, else a list with one entry per question."""

    id: str
    object: Literal["job"] = "job"
    status: JobStatus
    progress: JobProgress
    created_at: int
    started_at: int | None = None
    ended_at: int | None = None
    expires_at: int | None = Field(default=None, description="Time of deletion, set at the end of the job.")
    webhook: Webhook | None = None
    result: QaReply | QuestionResults | None = None
    error: JobError | None = None


class JobList(Wire):
    """Jobs, newest first, without results."""

    object: Literal["list"] = "list"
    data: list[JobReply]
    has_more: bool


class JobDeleted(Wire):
    """Reply to a deletion."""

    id: str
    object: Literal["job"] = "job"
    deleted: Literal[True] = True


class DeliveryReply(Wire):
    """One attempt to deliver a webhook; `status_code` is the receiver's reply."""

    event_id: str
    attempt: int
    at: int
    seconds: float
    status_code: int | None
    error: str | None
    next_at: int | None


class DeliveryList(Wire):
    """Attempts to deliver the webhook of a job, in order."""

    object: Literal["list"] = "list"
    data: list[DeliveryReply]


class WebhookJob(Wire):
    """The job of a delivery."""

    id: str
    status: JobStatus


class WebhookEvent(Wire):
    """Body of a delivery; it contains no part of the answer."""

    id: str
    object: Literal["event"] = "event"
    type: str = Field(description="`job.` and the status of the job.")
    created_at: int
    timestamp: str
    data: WebhookJob


class SecretReply(Wire):
    """A webhook secret; `secret` is shown once, when it is created."""

    id: str
    object: Literal["webhook.secret"] = "webhook.secret"
    created_at: int
    expires_at: int | None
    secret: str | None = None


class SecretList(Wire):
    """The valid webhook secrets, newest first, without their values."""

    object: Literal["list"] = "list"
    data: list[SecretReply]


def error_of(error: dict[str, Any]) -> JobError:
    """Return the error of a job from an error object."""
    return JobError.model_validate({name: error[name] for name in JobError.model_fields if name in error})
