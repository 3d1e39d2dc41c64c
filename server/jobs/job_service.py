"""Jobs of the service: taking, reading, cancelling and deleting them, and the runner that works on them.

Any process takes jobs and reads them. The process with the lock of its runner id also runs them: `DurableRuntime` calls
the steps here, and they run on the service's event loop. A sweep ends what cannot end by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

from sqlalchemy.exc import DatabaseError, InterfaceError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from hyper_model.errors import HyperError
from server.errors import RequestError
from server.jobs import webhooks
from server.jobs.clock import CautiousClock
from server.jobs.durable import UNFINISHED, DurableRuntime, webhook_id
from server.jobs.records import (
    STATUSES,
    Delivery,
    Ending,
    Job,
    JobKind,
    JobStatus,
    ReadClip,
    StepOutcome,
    WebhookSecret,
    new_id,
)
from server.jobs.runner_lock import AdvisoryLock, FileLock, RunnerLock
from server.jobs.spool import Spool, pack
from server.jobs.store import JobStore, KeyTakenError, is_full, open_engine
from server.settings import Settings
from server.telemetry.metrics import Metrics

logger = logging.getLogger("hyper.jobs")

Result = TypeVar("Result")

NUM_THREADS = 8
TICK_S = 0.5
FAULT_WAIT_S = 5.0
SWEEP_INTERVAL_S = 2.0
CLEANING_INTERVAL_S = 60.0
PROGRESS_INTERVAL_S = 0.2
MAX_PATIENCE_S = 5.0
STORING_S = 30.0
"""Time to store a job, after the deadline of its request."""

SECRET_OVERLAP_S = 24 * 3600.0
"""Time for receivers to change to a new secret; both are valid meanwhile."""

COME_BACK = "Retry after the Retry-After time."


class Steps(Protocol):
    """The work of jobs, given by the API's layer."""

    def stages(self, job: Job) -> Sequence[int]:
        """Return the number of steps of each stage; the steps of one stage may run at the same time."""
        ...

    def places(self, job: Job, index: int) -> asyncio.Semaphore:
        """Return the places that bound the steps of this kind at the same time."""
        ...

    async def perform(self, job: Job, index: int, read_clip: ReadClip, earlier: Sequence[StepOutcome]) -> StepOutcome:
        """Do one step; every error of a request is an outcome.

        Args:
            read_clip: Reads the clip of the job, or the line of the step.
            earlier: Outcomes of all steps of the stages before.

        Raises:
            OSError: If the clip cannot be read.
        """
        ...

    def forget(self, job_id: str) -> None:
        """Drop what is kept for later steps of a job that has ended."""
        ...

    async def assemble(self, job: Job, outcomes: Sequence[StepOutcome]) -> Ending:
        """Return the end of a job from the outcomes of all its steps."""
        ...

    def failure(self) -> dict[str, Any]:
        """Return the error object of a job that the service could not complete."""
        ...


class JobService:
    """Jobs in a database and a spool folder.

    Args:
        folder: Folder of the spool and, without a database URL, of the SQLite database.
        steps: The work of jobs.

    Raises:
        HyperError: If the folder or the database URL cannot be used.
    """

    def __init__(self, settings: Settings, folder: Path, metrics: Metrics, steps: Steps) -> None:
        self.settings = settings
        self.metrics = metrics
        self.steps = steps
        self.clock = CautiousClock()
        try:
            self.spool = Spool(folder / "clips")
        except OSError as error:
            raise HyperError(f"HYPER_JOBS_FOLDER={folder} cannot be used: {error.strerror}.") from None
        url = settings.jobs_database_url or f"sqlite:///{folder / 'jobs.sqlite'}"
        try:
            self.engine = open_engine(url)
        except SQLAlchemyError:
            # The error's text may contain the password.
            raise HyperError(
                "HYPER_JOBS_DATABASE_URL is not valid; write postgresql://user:password@host/database."
            ) from None
        self.store = JobStore(self.engine)
        self.durable = DurableRuntime(self.engine, url, settings.jobs_runner_id, settings.jobs_concurrency)
        self.lock: RunnerLock = (
            FileLock(folder / f"{settings.jobs_runner_id}.lock")
            if self.engine.dialect.name == "sqlite"
            else AdvisoryLock(self.engine, settings.jobs_runner_id)
        )
        self.pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="hyper-jobs")
        self.allowed_hosts = settings.webhook_allowed_host_list
        self.retry_delays_s = settings.webhook_retry_delays
        self.is_open = False
        self.is_runner = False
        self.loop: asyncio.AbstractEventLoop | None = None
        self.keeper: asyncio.Task[None] | None = None
        self.known: dict[str, Job] = {}
        self.progress: dict[str, tuple[int, float]] = {}
        self.suspects: set[str] = set()
        self.tasks: dict[str, set[asyncio.Task[StepOutcome]]] = {}

    # Life of the process

    async def start(self) -> None:
        """Connect and run jobs from now on, also if the database appears later."""
        self.loop = asyncio.get_running_loop()
        self.keeper = asyncio.create_task(self.keep())

    async def stop(self) -> None:
        """Stop; jobs in progress continue at the next start, after their last finished step."""
        if self.keeper is not None:
            self.keeper.cancel()
            await asyncio.gather(self.keeper, return_exceptions=True)
        # In a thread: the steps are cancelled on this event loop.
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """Release everything."""
        self.durable.close()
        with contextlib.suppress(SQLAlchemyError):
            self.lock.release()
        self.pool.shutdown(wait=True, cancel_futures=True)
        self.engine.dispose()

    async def keep(self) -> None:
        """Connect, hold the runner's lock and sweep, until cancelled; an unreachable database is tried again."""
        next_sweep_s = next_cleaning_s = 0.0
        while True:
            try:
                if not self.is_open:
                    await self.in_pool(self.open)
                await self.in_pool(self.hold_lock)
                now_s = time.monotonic()
                if now_s >= next_sweep_s:
                    next_sweep_s = now_s + SWEEP_INTERVAL_S
                    await self.in_pool(self.sweep)
                if now_s >= next_cleaning_s:
                    next_cleaning_s = now_s + CLEANING_INTERVAL_S
                    await self.in_pool(self.clean)
                self.metrics.jobs_database_up.set(1)
            except (SQLAlchemyError, OSError) as error:
                self.metrics.jobs_database_up.set(0)
                logger.warning("the database of jobs is not available: %s", type(error).__name__)
            except Exception as error:
                # The last resort, as in the engine's supervisor: without this loop every job would wait in silence.
                logger.error("the keeper of jobs failed", exc_info=error)
                await asyncio.sleep(FAULT_WAIT_S)
            await asyncio.sleep(TICK_S)

    def open(self) -> None:
        """Create the tables that are missing."""
        self.store.create_tables()
        self.durable.open()
        self.is_open = True

    def hold_lock(self) -> None:
        """Run jobs while this process has the lock of its runner id."""
        has_lock = self.lock.acquire()
        if has_lock and not self.durable.is_launched and self.durable.has_work():
            # Not before there is work: workers poll the database several times per second.
            self.durable.launch(self)
            logger.info("running jobs", extra={"runner": self.settings.jobs_runner_id})
        elif not has_lock and self.durable.is_launched:
            logger.error("another process runs jobs under this id", extra={"runner": self.settings.jobs_runner_id})
            self.durable.shut_down()
        self.is_runner = has_lock
        self.metrics.jobs_runner.labels(self.settings.jobs_runner_id).set(has_lock)

    def sweep(self) -> None:
        """Report the gauges; as a runner also resume, fail and expire jobs that cannot end by themselves."""
        counts = self.store.counts()
        for status in STATUSES:
            self.metrics.jobs.labels(status).set(counts.get(status, 0))
        active = self.store.active()
        self.metrics.job_age.set(max((self.clock.age_s(created_s) for _, _, created_s, _ in active), default=0.0))
        if not self.is_runner:
            return
        abandoned = self.durable.abandoned()
        for workflow_id in abandoned & self.suspects:
            logger.warning("resuming a job", extra={"job": workflow_id})
            self.durable.resume(workflow_id)
        # Twice in a row: a workflow is marked as running a moment before it runs.
        self.suspects = abandoned
        # Ended or deleted by another process.
        for job_id in {*self.tasks} - {job_id for job_id, *_ in active}:
            if self.loop is not None:
                self.loop.call_soon_threadsafe(self.stop_steps, job_id)
        statuses = self.durable.statuses([job_id for job_id, *_ in active])
        for job_id, _, created_s, _ in active:
            job = self.store.get(job_id)
            if job is None or not job.is_active:
                continue
            if statuses.get(job_id) not in UNFINISHED:
                logger.error("a job has ended without a result", extra={"job": job_id, "status": statuses.get(job_id)})
                self.end(job, Ending("failed", error=self.steps.failure()))
            elif self.clock.age_s(created_s) > self.settings.jobs_max_age_s:
                self.end(job, Ending("expired"))
                self.durable.cancel(job_id)

    def clean(self) -> None:
        """Delete what is beyond its retention, as a runner."""
        if not self.is_runner:
            return
        now_s = self.clock.now_s()
        while expired := self.store.expired(now_s):
            self.delete_all(expired)
        self.store.forget_keys(now_s)
        self.spool.delete_orphans({clip for *_, clip in self.store.active() if clip is not None})

    def delete_all(self, job_ids: Sequence[str]) -> None:
        """Delete jobs with everything that is stored about them."""
        num_attempts = len(self.retry_delays_s) + 1
        attempts = [webhook_id(job_id, attempt) for job_id in job_ids for attempt in range(1, num_attempts + 1)]
        self.durable.delete([*job_ids, *attempts])
        self.store.delete(job_ids)

    def end(self, job: Job, ending: Ending, num_done: int | None = None) -> bool:
        """End a job once: store the end, enqueue its webhook in the same transaction, and delete its clip."""
        with self.store.transaction() as connection:
            is_ended = self.store.end(
                connection, job.id, ending.status, result=ending.result, error=ending.error, num_done=num_done
            )
            if is_ended and job.webhook_url is not None:
                self.durable.enqueue(connection, "webhook", webhook_id(job.id, 1), job.id, new_id("evt"), 1)
        self.spool.delete(job.clip)
        if is_ended:
            self.metrics.jobs_ended.labels(ending.status).inc()
            logger.info("job ended", extra={"job": job.id, "status": ending.status, "key": job.tenant})
        return is_ended

    # Requests of callers

    async def claim_key(self, tenant: str, key: str, fingerprint: str) -> Job | None:
        """Claim an idempotency key; return the job of an equal request before, or None.

        Raises:
            RequestError: 422 for another request with this key, 409 while the first one is being stored.
        """
        lease_s = self.settings.default_timeout_ms / 1000 + STORING_S
        found = await self.call(self.store.claim_key, tenant, key, fingerprint, self.clock.now_s(), lease_s)
        if found is None:
            return None
        first, job_id = found
        if first != fingerprint:
            message = "This Idempotency-Key belongs to another request of the last 24 hours."
            raise RequestError("idempotency_mismatch", message, hint="Use a new key for each new request.")
        job = None if job_id is None else await self.call(self.store.get, job_id, tenant)
        if job is None:
            raise in_progress()
        return job

    async def release_key(self, tenant: str, key: str) -> None:
        """Release a key whose job was not taken; at worst it is free after its lease."""
        with contextlib.suppress(RequestError):
            await self.call(self.store.release_key, tenant, key)

    async def take(self, job: Job, clip: bytes | None, idempotency_key: str | None = None) -> Job:
        """Store a new job with its clip and enqueue it, all or nothing.

        Raises:
            RequestError: 429 for too many unfinished jobs, 503 if it cannot be stored.
        """
        return await self.call(self.store_job, job, clip, idempotency_key)

    async def take_parts(self, job: Job, parts: Sequence[bytes]) -> Job:
        """Store and enqueue a batch, whose steps read one part each.

        Raises:
            RequestError: As `take`.
        """
        return await self.call(lambda: self.store_job(job, pack(parts), None))

    def store_job(self, job: Job, clip: bytes | None, idempotency_key: str | None) -> Job:
        """Store and enqueue a job in one transaction."""
        limit = self.settings.jobs_max_active
        if (num_active := self.store.num_active_of(job.tenant)) >= limit:
            message = f"This caller is limited to {limit} unfinished jobs."
            hint = "Wait for a job to end, or cancel one."
            raise RequestError("too_many_jobs", message, limit=limit, actual=num_active, hint=hint)
        if clip is not None:
            job = dataclasses.replace(job, clip=self.spool.write(clip))
        with contextlib.ExitStack() as undo:
            undo.callback(self.spool.delete, job.clip)
            with self.store.transaction() as connection:
                try:
                    self.store.insert(connection, job, idempotency_key)
                except KeyTakenError:
                    raise in_progress() from None
                self.durable.enqueue(connection, "job", job.id, job.id)
            undo.pop_all()
        return job

    async def get(self, tenant: str, job_id: str, kind: JobKind = "qa") -> Job:
        """Return a job of a tenant and a kind.

        Raises:
            RequestError: 404, also for jobs of others.
        """
        job = await self.call(self.store.get, job_id, tenant)
        if job is None or job.kind != kind:
            name, path = ("batch", "/v1/batches") if kind == "batch" else ("job", "/v1/jobs")
            raise RequestError("not_found", f"There is no such {name}.", hint=f"GET {path} lists the caller's own.")
        return job

    async def list_jobs(
        self,
        tenant: str,
        *,
        limit: int,
        after: str | None = None,
        statuses: Sequence[JobStatus] = (),
        kind: JobKind = "qa",
    ) -> list[Job]:
        """Return a tenant's jobs, newest first; of questions without results."""
        return await self.call(self.store.list_jobs, tenant, limit=limit, after=after, statuses=statuses, kind=kind)

    async def cancel(self, tenant: str, job_id: str, kind: JobKind = "qa") -> Job:
        """Cancel a job; one that has ended stays as it is.

        Raises:
            RequestError: 404.
        """
        job = await self.get(tenant, job_id, kind)
        if job.is_active:
            await self.call(self.cancel_now, job)
            self.stop_steps(job_id)
        return await self.get(tenant, job_id, kind)

    def cancel_now(self, job: Job) -> None:
        """End a job as cancelled, and its workflow."""
        if self.end(job, Ending("cancelled")):
            self.durable.cancel(job.id)

    async def delete(self, tenant: str, job_id: str) -> None:
        """Delete a job with its clip, result and log; cancel it before if needed.

        Raises:
            RequestError: 404.
        """
        job = await self.get(tenant, job_id)

        def delete_now() -> None:
            with self.store.transaction() as connection:
                self.store.end(connection, job.id, "cancelled")
            self.durable.cancel(job.id)
            self.spool.delete(job.clip)
            self.delete_all([job.id])

        await self.call(delete_now)
        self.stop_steps(job_id)

    async def deliveries(self, tenant: str, job_id: str) -> list[Delivery]:
        """Return the attempts to deliver a job's webhook.

        Raises:
            RequestError: 404.
        """
        await self.get(tenant, job_id)
        return await self.call(self.store.deliveries_of, job_id)

    async def rotate_secret(self, tenant: str) -> WebhookSecret:
        """Create a webhook secret; the one before stays valid for a day."""
        return await self.call(
            self.store.rotate_secret, tenant, webhooks.new_secret(), SECRET_OVERLAP_S, self.clock.now_s()
        )

    async def secrets_of(self, tenant: str) -> list[WebhookSecret]:
        """Return the valid webhook secrets of a tenant, newest first."""
        return await self.call(self.store.secrets_of, tenant, self.clock.now_s())

    async def delete_secret(self, tenant: str, secret_id: str) -> None:
        """Delete a webhook secret.

        Raises:
            RequestError: 404.
        """
        if not await self.call(self.store.delete_secret, tenant, secret_id):
            raise RequestError("not_found", "There is no such webhook secret.")

    # Work of the runner, on the event loop of DBOS

    async def begin(self, job_id: str) -> list[int]:
        """Mark a job as running; return the number of steps of each stage, or none if it has ended."""
        job = await self.patiently(self.store.start, job_id)
        return [] if job is None else list(self.steps.stages(job))

    async def perform(self, job_id: str, index: int, earlier: Sequence[StepOutcome]) -> StepOutcome:
        """Do one step on the service's event loop."""
        assert self.loop is not None
        work = asyncio.run_coroutine_threadsafe(self.perform_here(job_id, index, earlier), self.loop)
        return await asyncio.wrap_future(work)

    async def perform_here(self, job_id: str, index: int, earlier: Sequence[StepOutcome]) -> StepOutcome:
        """Do one step as a task that `stop_steps` can cancel."""
        task = asyncio.create_task(self.perform_in_place(job_id, index, earlier))
        tasks = self.tasks.setdefault(job_id, set())
        tasks.add(task)
        try:
            return await task
        finally:
            task.cancel()
            tasks.discard(task)
            if not tasks:
                self.tasks.pop(job_id, None)

    def stop_steps(self, job_id: str) -> None:
        """Cancel the steps in progress of a job that has ended, on the service's event loop."""
        for task in self.tasks.get(job_id, ()):
            task.cancel()
        self.steps.forget(job_id)

    async def perform_in_place(self, job_id: str, index: int, earlier: Sequence[StepOutcome]) -> StepOutcome:
        """Do one step when a place is free."""
        job = self.known.get(job_id) or await self.patiently(self.store.get, job_id)
        if job is None:
            # Deleted a moment ago; the workflow is cancelled too.
            return {"error": self.steps.failure()}
        self.known[job_id] = job
        async with self.steps.places(job, index):
            try:
                outcome = await self.steps.perform(
                    job, index, functools.partial(self.in_pool, self.read_clip, job, index), earlier
                )
            except OSError as error:
                logger.error("a job's clip cannot be read", exc_info=error, extra={"job": job_id})
                outcome: StepOutcome = {"error": self.steps.failure()}
        self.metrics.job_steps.labels("failed" if "error" in outcome else "done").inc()
        logger.info("job step", extra={"job": job_id, "step": index, "is_done": "error" not in outcome})
        return outcome

    def read_clip(self, job: Job, index: int) -> bytes:
        """Return the clip of a job, or of a batch the line of a step.

        Raises:
            OSError: If it cannot be read.
        """
        if job.clip is None:
            return b""
        return self.spool.read_part(job.clip, index) if job.kind == "batch" else self.spool.read(job.clip)

    async def record_progress(self, job_id: str, num_done: int, num_failed: int) -> None:
        """Store the numbers of finished and failed steps, a few times per second."""
        num_stored, at_s = self.progress.get(job_id, (0, 0.0))
        now_s = time.monotonic()
        if num_done > num_stored and now_s - at_s >= PROGRESS_INTERVAL_S:
            self.progress[job_id] = (num_done, now_s)
            await self.patiently(self.store.record_progress, job_id, num_done, num_failed)

    async def finish(self, job_id: str, outcomes: Sequence[StepOutcome]) -> None:
        """Store the result."""
        job = await self.patiently(self.store.get, job_id)
        if job is not None:
            assert self.loop is not None
            work = asyncio.run_coroutine_threadsafe(self.steps.assemble(job, outcomes), self.loop)
            ending = await asyncio.wrap_future(work)
            await self.patiently(self.end, job, ending, len(outcomes))
        self.forget(job_id)

    async def fail(self, job_id: str) -> None:
        """End a job after a fault of the service."""
        job = await self.patiently(self.store.get, job_id)
        if job is not None:
            await self.patiently(self.end, job, Ending("failed", error=self.steps.failure()))
        self.forget(job_id)

    def forget(self, job_id: str) -> None:
        """Drop the memory of a job."""
        self.known.pop(job_id, None)
        self.progress.pop(job_id, None)
        assert self.loop is not None
        self.loop.call_soon_threadsafe(self.steps.forget, job_id)

    async def deliver(self, job_id: str, event_id: str, attempt: int) -> float | None:
        """Try to deliver a webhook; return the delay until the next attempt, or None if there is none."""
        job = await self.patiently(self.store.get, job_id)
        if job is None or job.webhook_url is None:
            return None
        found = await self.patiently(self.store.secrets_of, job.tenant, self.clock.now_s())
        body = webhooks.event_body(job, event_id, f"job.{job.status}")
        headers = webhooks.signed_headers([each.secret for each in found], event_id, body)
        at_s, started_s = time.time(), time.monotonic()
        if found:
            result = await webhooks.attempt(job.webhook_url, headers, body, self.allowed_hosts)
        else:
            result = webhooks.Attempt(None, "this key has no webhook secret", is_final=False)
        delays_s = self.retry_delays_s
        delay_s = None if result.is_final or attempt > len(delays_s) else delays_s[attempt - 1]
        delivery = Delivery(
            job_id=job_id,
            event_id=event_id,
            attempt=attempt,
            at_s=at_s,
            seconds=time.monotonic() - started_s,
            status_code=result.status_code,
            error=result.error,
            next_at_s=None if delay_s is None else at_s + delay_s,
        )
        await self.patiently(self.store.record_delivery, delivery)
        outcome = "delivered" if result.error is None else "retried" if delay_s is not None else "abandoned"
        self.metrics.webhook_attempts.labels(outcome).inc()
        facts = {"job": job_id, "attempt": attempt, "status": result.status_code, "outcome": outcome}
        logger.info("webhook", extra=facts)
        return delay_s

    # Threads

    async def in_pool(self, function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
        """Run a blocking function in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, functools.partial(function, *args, **kwargs))

    async def call(self, function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
        """Run a function of the store for a caller.

        Raises:
            RequestError: 503 if the database is not available or the disk is full.
        """
        if not self.is_open:
            raise unavailable()
        try:
            return await self.in_pool(function, *args, **kwargs)
        except OSError as error:
            logger.error("a job cannot be stored", exc_info=error)
            raise full() from None
        except SQLAlchemyError as error:
            logger.error("the database of jobs refused a statement", exc_info=error)
            raise (full() if is_full(error) else unavailable()) from None

    async def patiently(self, function: Callable[..., Result], *args: Any) -> Result:
        """Run a function of the store for the runner, and repeat it until the database is available again."""
        delay_s = 0.1
        while True:
            try:
                return await self.in_pool(function, *args)
            except (DatabaseError, InterfaceError, PoolTimeoutError) as error:
                logger.warning("the runner waits for the database of jobs: %s", type(error).__name__)
                await asyncio.sleep(delay_s)
                delay_s = min(MAX_PATIENCE_S, delay_s * 2)


def in_progress() -> RequestError:
    """Return the error while another request with the same key stores its job."""
    message = "An equal request with this Idempotency-Key is in progress."
    return RequestError("idempotency_in_progress", message, hint=COME_BACK)


def unavailable() -> RequestError:
    """Return the error if the database cannot be reached."""
    return RequestError("storage_unavailable", "The database of jobs is not available.", hint=COME_BACK)


def full() -> RequestError:
    """Return the error for a full disk."""
    return RequestError("storage_full", "The service has no disk space for the job.", hint=COME_BACK)
