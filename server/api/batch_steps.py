"""The work of jobs and batches: each line of a batch is a request of the class `batch`, and its end writes files."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Sequence
from typing import Any

from server.api.batch_lines import (
    BrokenLineError,
    Line,
    broken_line,
    failed_line,
    joined,
    read_line,
    result_line,
)
from server.api.chat import Chat
from server.api.job_steps import MAX_WAIT_S, WAITING, JobSteps
from server.api.lifecycle import Handler
from server.api.qa import qa_of_json
from server.errors import RequestError
from server.jobs.records import Ending, Job, ReadClip, StepOutcome
from server.quotas import Tenant
from server.request_context import RequestContext

CHAT = "/v1/chat/completions"


class ChargedTenant(Tenant):
    """Account of a batch: no limit of requests, and the seconds of audio of the key's own account."""

    def __init__(self, account: Tenant) -> None:
        unlimited = {"requests_per_minute": None, "concurrent": None, "audio_s_per_day": None}
        super().__init__(account.key.model_copy(update=unlimited))
        self.account = account

    async def charge(self, audio_s: float) -> None:
        """Deduct the seconds of a clip.

        Raises:
            RequestError: 429, if too few seconds are left.
        """
        await self.account.charge(audio_s)


class BatchSteps(JobSteps):
    """Steps of jobs and of batches; see `server.jobs.job_service.Steps`."""

    async def perform(self, job: Job, index: int, read_clip: ReadClip, earlier: Sequence[StepOutcome]) -> StepOutcome:
        """Do a step of a job, or a line of a batch; every error of a request is an outcome.

        Raises:
            OSError: If the clip or the line cannot be read.
        """
        if job.kind == "qa":
            return await super().perform(job, index, read_clip, earlier)
        return await self.perform_line(job, index, await read_clip())

    async def perform_line(self, job: Job, index: int, text: bytes) -> StepOutcome:
        """Do one line of a batch."""
        request_id = f"{job.id}-{index}"
        endpoint: str = job.request["endpoint"]
        try:
            line = await self.service.in_pool(read_line, text, endpoint)
        except BrokenLineError as error:
            return {"error": {"code": "invalid_request"}, "line": broken_line(request_id, index, error)}

        async def answer(context: RequestContext) -> Any:
            return await self.answer_line(context, endpoint, line)

        try:
            body = await self.patiently(job, index, self.tenant_of(job), answer)
        except RequestError as fault:
            written = result_line(request_id, line.custom_id, fault.status, fault.body(request_id))
            return {"error": {"code": fault.code}, "line": written}
        return {"line": result_line(request_id, line.custom_id, 200, body)}

    def tenant_of(self, job: Job) -> Tenant | None:
        """Return the account of a job's key; a batch is charged line by line.

        Raises:
            RequestError: If the key was revoked since, or has expired.
        """
        tenant = super().tenant_of(job)
        if tenant is None or job.kind == "qa" or self.service.keys is None:
            return tenant
        key = next(key for key in self.service.keys.keys if key.name == job.tenant)
        return ChargedTenant(self.service.quotas.of(key))

    async def answer_line(self, context: RequestContext, endpoint: str, line: Line) -> Any:
        """Answer the request of a line, and return the JSON of its reply.

        Raises:
            Exception: Each exception of a request; see `server.errors.to_request_error`.
        """
        service = self.service
        content = json.dumps(line.body).encode()
        handler: Handler[Any]
        if endpoint == CHAT:
            handler = await Chat.of_json(service, context, content)
        else:
            handler = await qa_of_json(service, context, content)
        timeout_s = (handler.timeout_ms or service.settings.default_timeout_ms) / 1000
        reply = await self.run(context, handler, timeout_s)
        return json.loads(bytes(handler.response(reply).body))

    async def assemble(self, job: Job, outcomes: Sequence[StepOutcome]) -> Ending:
        """Return the end of a job; the end of a batch names its files."""
        if job.kind == "qa":
            return await super().assemble(job, outcomes)
        replies = [each["line"] for each in outcomes if "error" not in each]
        failures = [line_of(job, index, each) for index, each in enumerate(outcomes) if "error" in each]
        result = {
            "num_failed": len(failures),
            "output_file_id": await self.store(job, "output", replies),
            "error_file_id": await self.store(job, "error", failures),
        }
        return Ending("succeeded", result=result)

    async def store(self, job: Job, name: str, lines: Sequence[str]) -> str | None:
        """Store a result file and return its id; wait while the storage is full or away. No lines make no file."""
        if not lines:
            return None
        content = await self.service.in_pool(joined, lines)
        settings = self.service.settings
        lifetime_s = min(settings.files_default_lifetime_s, settings.files_max_lifetime_s)
        while True:
            try:
                stored = await self.service.files.add(
                    job.tenant,
                    io.BytesIO(content),
                    filename=f"{job.id}_{name}.jsonl",
                    purpose="batch_output",
                    lifetime_s=lifetime_s,
                )
            except RequestError as error:
                if error.code not in WAITING:
                    raise
                await asyncio.sleep(MAX_WAIT_S)
            else:
                return stored.id


def line_of(job: Job, index: int, outcome: StepOutcome) -> str:
    """Return the line of a failed step; a step that the service failed on has none of its own."""
    if "line" in outcome:
        return outcome["line"]
    return failed_line(f"{job.id}-{index}", index, None, outcome["error"])
