"""Durable execution of jobs and webhook deliveries on DBOS; the only module that imports it.

A job is a workflow with the job's id, in a queue of the database. Its steps form stages, one after the other. Each step
is recorded when it is done. After a crash, a runner with the same id runs the workflow again: recorded steps return
their record, and the others run.
Webhook attempts are workflows too, enqueued with a delay. Arguments and records are JSON, never pickle.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import dbos
import sqlalchemy as sa
from dbos import DBOS, DBOSClient, DBOSPortableJSONSerializer
from sqlalchemy.exc import SQLAlchemyError

from hyper_model.errors import HyperError
from server.jobs.records import StepOutcome

logger = logging.getLogger("hyper.jobs")

Result = TypeVar("Result")
Procedure = Literal["job", "webhook"]

APPLICATION = "hyper"
APPLICATION_VERSION = "hyper-jobs-2"
"""Version of the stored workflows. A runner resumes only those of its own version, so it outlives releases; it must
change if the order or the meaning of the steps changes."""

QUEUES: dict[Procedure, str] = {"job": "hyper-jobs", "webhook": "hyper-webhooks"}
POLLING_INTERVAL_S = 0.2
WEBHOOKS_AT_ONCE = 8
STEPS_AT_ONCE = 128
"""Steps of one job that run or wait for a place of the runner."""

MAX_RECOVERIES = 50
"""Restarts of a job before it fails: a job that ends its process each time must not do so forever."""

UNFINISHED = ("PENDING", "ENQUEUED", "DELAYED")
STEP: dbos.StepOptions = {"preemptible": True}


class Work(Protocol):
    """Steps of jobs and webhooks. They are called on the event loop of DBOS, not of the service."""

    async def begin(self, job_id: str) -> Sequence[int]:
        """Mark a job as running; return the number of steps of each stage, or none if it has ended."""
        ...

    async def perform(self, job_id: str, index: int, earlier: Sequence[StepOutcome]) -> StepOutcome:
        """Do one step; errors are outcomes.

        Args:
            earlier: Outcomes of all steps of the stages before.
        """
        ...

    async def record_progress(self, job_id: str, num_done: int, num_failed: int) -> None:
        """Report the numbers of finished steps and of those with an error, recorded ones included."""
        ...

    async def finish(self, job_id: str, outcomes: Sequence[StepOutcome]) -> None:
        """Store the result of a job, and let its webhook begin."""
        ...

    async def fail(self, job_id: str) -> None:
        """End a job after a fault of the service."""
        ...

    async def deliver(self, job_id: str, event_id: str, attempt: int) -> float | None:
        """Try to deliver a webhook; return the delay until the next attempt, or None if there is none."""
        ...


class DurableRuntime:
    """Queues in the database, and in a runner their workers.

    Only one runtime can run in a process, because DBOS keeps its state in global variables. Any number can enqueue.

    Args:
        engine: Connections to the database, shared with our own tables.
        url: The database's URL.
        runner_id: Fixed id of this runner; its unfinished workflows resume when it starts again.
        concurrency: Maximum number of jobs that run at the same time.
    """

    launched: ClassVar[DurableRuntime | None] = None

    def __init__(self, engine: sa.Engine, url: str, runner_id: str, concurrency: int) -> None:
        self.engine = engine
        self.url = url
        self.runner_id = runner_id
        self.concurrency = concurrency
        self.serializer = DBOSPortableJSONSerializer()
        self.client: DBOSClient | None = None
        self.running: set[str] = set()
        self.work: Work | None = None

    def open(self) -> None:
        """Create the tables of DBOS if they are missing, and connect.

        Raises:
            sqlalchemy.exc.SQLAlchemyError: If the database cannot be reached.
        """
        configure_log()
        DBOS.migrate(self.url)
        self.client = DBOSClient(
            system_database_engine=self.engine,
            serializer=self.serializer,
            application_name=APPLICATION,
            retry_connection_errors=False,
        )

    def enqueue(
        self, connection: sa.Connection, procedure: Procedure, workflow_id: str, *args: Any, delay_s: float = 0.0
    ) -> None:
        """Enqueue a workflow in the caller's transaction; a known id has no effect."""
        options: dbos.EnqueueOptions = {
            "workflow_name": procedure,
            "queue_name": QUEUES[procedure],
            "workflow_id": workflow_id,
            "app_version": APPLICATION_VERSION,
        }
        if delay_s > 0:
            options["delay_seconds"] = delay_s
        self._client.enqueue_in_transaction(connection, options, *args)

    def cancel(self, workflow_id: str) -> None:
        """Cancel a workflow; a running step is cancelled within seconds."""
        self._client.cancel_workflow(workflow_id)

    def delete(self, workflow_ids: Sequence[str]) -> None:
        """Delete workflows with the records of their steps."""
        self._client.delete_workflows(list(workflow_ids))

    def statuses(self, workflow_ids: Collection[str]) -> dict[str, str]:
        """Return DBOS's status of each workflow; unknown ones are missing."""
        if not workflow_ids:
            return {}
        found = self._client.list_workflows(workflow_ids=list(workflow_ids), load_input=False, load_output=False)
        return {status.workflow_id: status.status for status in found}

    def has_work(self) -> bool:
        """Return whether any workflow waits, is delayed or counts as running."""
        return bool(self._client.list_workflows(status=list(UNFINISHED), limit=1, load_input=False, load_output=False))

    def abandoned(self) -> set[str]:
        """Return this runner's workflows that count as running and do not run, such as after a full disk."""
        found = self._client.list_workflows(
            status="PENDING", executor_id=self.runner_id, load_input=False, load_output=False
        )
        return {status.workflow_id for status in found} - self.running

    def resume(self, workflow_id: str) -> None:
        """Run an abandoned workflow again."""
        procedure: Procedure = "webhook" if workflow_id.startswith("webhook-") else "job"
        self._client.resume_workflow(workflow_id, queue_name=QUEUES[procedure])

    def launch(self, work: Work) -> None:
        """Start the workers; workflows left by an earlier process with this id resume.

        Raises:
            HyperError: If another runtime runs in this process.
        """
        if DurableRuntime.launched is not None:
            raise HyperError("Only one runner of jobs can run in a process.")
        DurableRuntime.launched = self
        self.work = work
        register(self)
        DBOS(
            config={
                "name": APPLICATION,
                "system_database_url": self.url,
                "system_database_engine": self.engine,
                "executor_id": self.runner_id,
                "application_version": APPLICATION_VERSION,
                "serializer": self.serializer,
                "run_migrations": False,
                "use_listen_notify": False,
                "enable_otlp": False,
                "log_level": "WARNING",
            }
        )
        DBOS.launch()
        for name, concurrency in ((QUEUES["job"], self.concurrency), (QUEUES["webhook"], WEBHOOKS_AT_ONCE)):
            DBOS.register_queue(
                name,
                worker_concurrency=concurrency,
                polling_interval_sec=POLLING_INTERVAL_S,
                on_conflict="always_update",
            )

    def shut_down(self) -> None:
        """Stop the workers. Steps in progress are cancelled without a record, so they run again at the next start."""
        if self.is_launched:
            # The second lets the workers hand over what they have taken from the queues.
            DBOS.destroy(destroy_registry=True, workflow_completion_timeout_sec=1)
            DurableRuntime.launched = None
            self.running.clear()

    def close(self) -> None:
        """Close the connections."""
        self.shut_down()
        if self.client is not None:
            self.client.destroy()
            self.client = None

    @property
    def is_launched(self) -> bool:
        """Whether the workers of this runtime run."""
        return DurableRuntime.launched is self

    @property
    def _client(self) -> DBOSClient:
        assert self.client is not None
        return self.client

    @property
    def _work(self) -> Work:
        assert self.work is not None
        return self.work

    async def run_job(self, job_id: str) -> None:
        """Run the workflow of a job."""
        await self._alive(job_id, self._job_steps(job_id), lambda: self._work.fail(job_id))

    async def _job_steps(self, job_id: str) -> None:
        stages: Sequence[int] = await DBOS.run_step_async({"name": "begin"}, self._work.begin, job_id)
        if not stages:
            return
        num_done = num_failed = 0
        outcomes: list[StepOutcome] = []
        # A batch has up to 50,000 steps; each one past this gate has tasks and a place in a thread pool.
        gate = asyncio.Semaphore(max(STEPS_AT_ONCE, self.concurrency))

        async def one(index: int, place: Any, earlier: Sequence[StepOutcome]) -> StepOutcome:
            nonlocal num_done, num_failed
            async with gate:
                outcome = await place.run_async({"name": "step", **STEP}, self._work.perform, job_id, index, earlier)
            num_done += 1
            num_failed += "error" in outcome
            await self._work.record_progress(job_id, num_done, num_failed)
            return outcome

        for num_steps in stages:
            earlier, first = tuple(outcomes), len(outcomes)
            # Step ids in the order of the steps, whatever the order in which they end.
            places = [DBOS.reserve_step() for _ in range(num_steps)]
            outcomes += await all_or_none([one(first + index, place, earlier) for index, place in enumerate(places)])
        await DBOS.run_step_async({"name": "finish"}, self._work.finish, job_id, outcomes)

    async def run_webhook(self, job_id: str, event_id: str, attempt: int) -> None:
        """Run the workflow of one attempt to deliver a webhook."""
        await self._alive(webhook_id(job_id, attempt), self._webhook_steps(job_id, event_id, attempt), None)

    async def _webhook_steps(self, job_id: str, event_id: str, attempt: int) -> None:
        delay_s: float | None = await DBOS.run_step_async(
            {"name": "deliver"}, self._work.deliver, job_id, event_id, attempt
        )
        if delay_s is None:
            return

        def enqueue_next() -> None:
            with self.engine.begin() as connection:
                next_id = webhook_id(job_id, attempt + 1)
                self.enqueue(connection, "webhook", next_id, job_id, event_id, attempt + 1, delay_s=delay_s)

        await DBOS.run_step_async({"name": "next"}, enqueue_next)

    async def _alive(
        self, workflow_id: str, steps: Awaitable[None], on_fault: Callable[[], Awaitable[None]] | None
    ) -> None:
        """Run the steps of a workflow, and list it as running meanwhile.

        If the database refuses a record, such as on a full disk, the workflow stops without an outcome. It then counts
        as abandoned and resumes later, with the steps recorded so far.
        """
        self.running.add(workflow_id)
        try:
            await steps
        except SQLAlchemyError as error:
            logger.error("a job stopped: the database refused a record", exc_info=error, extra={"job": workflow_id})
            raise asyncio.CancelledError from error
        except Exception as error:
            logger.error("a job failed", exc_info=error, extra={"job": workflow_id})
            if on_fault is not None:
                await DBOS.run_step_async({"name": "fail"}, on_fault)
        finally:
            self.running.discard(workflow_id)


def register(runtime: DurableRuntime) -> None:
    """Register the workflows of a runtime; DBOS accepts functions and no bound methods."""

    @DBOS.workflow(name="job", max_recovery_attempts=MAX_RECOVERIES)
    async def run_job(job_id: str) -> None:  # pyright: ignore[reportUnusedFunction]
        await runtime.run_job(job_id)

    @DBOS.workflow(name="webhook", max_recovery_attempts=MAX_RECOVERIES)
    async def run_webhook(job_id: str, event_id: str, attempt: int) -> None:  # pyright: ignore[reportUnusedFunction]
        await runtime.run_webhook(job_id, event_id, attempt)


def webhook_id(job_id: str, attempt: int) -> str:
    """Return the id of the workflow of an attempt."""
    return f"webhook-{job_id}-{attempt}"


async def all_or_none(works: Sequence[Awaitable[Result]]) -> list[Result]:
    """Return all results in order; after an exception, cancel the others and raise it."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        # Finished tasks stay as they are.
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def configure_log() -> None:
    """Pass DBOS's records on to our own handlers; with a handler of its own it would add another to stderr."""
    dbos_logger = logging.getLogger("dbos")
    if not dbos_logger.handlers:
        dbos_logger.addHandler(logging.NullHandler())
    dbos_logger.setLevel(logging.WARNING)
