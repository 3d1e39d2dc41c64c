"""Tables of jobs, idempotency keys, webhook deliveries and webhook secrets, in SQLite or PostgreSQL.

Every change of a status is conditional, so that of two concurrent ends exactly one wins. All functions block; callers
run them in a thread.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, SQLAlchemyError

from hyper_model.errors import HyperError
from server.jobs.records import ACTIVE, Delivery, Job, JobStatus, WebhookSecret, new_id

POOL_SIZE = 10
SQLITE_BUSY_TIMEOUT_MS = 30_000
CONNECT_TIMEOUT_S = 5
IDEMPOTENCY_KEEP_S = 24 * 3600.0


class KeyTakenError(HyperError):
    """Error if two requests claimed one idempotency key one after the other, and the other one stored its job."""


metadata = sa.MetaData()
jobs = sa.Table(
    "hyper_jobs",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("tenant", sa.String(64), nullable=False),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("status", sa.String(16), nullable=False, index=True),
    sa.Column("request", sa.Text, nullable=False),
    sa.Column("clip", sa.String(64)),
    sa.Column("audio_s", sa.Double, nullable=False),
    sa.Column("webhook_url", sa.Text),
    sa.Column("num_steps", sa.Integer, nullable=False),
    sa.Column("num_done", sa.Integer, nullable=False),
    sa.Column("keep_s", sa.Double, nullable=False),
    sa.Column("created_s", sa.Double, nullable=False),
    sa.Column("started_s", sa.Double),
    sa.Column("ended_s", sa.Double),
    sa.Column("expires_s", sa.Double, index=True),
    sa.Column("result", sa.Text),
    sa.Column("error", sa.Text),
    sa.Index("hyper_jobs_by_tenant", "tenant", "created_s", "id"),
)
idempotency_keys = sa.Table(
    "hyper_idempotency_keys",
    metadata,
    sa.Column("tenant", sa.String(64), primary_key=True),
    sa.Column("key", sa.String(255), primary_key=True),
    sa.Column("fingerprint", sa.String(64), nullable=False),
    sa.Column("job_id", sa.String(64)),
    sa.Column("created_s", sa.Double, nullable=False),
)
deliveries = sa.Table(
    "hyper_deliveries",
    metadata,
    sa.Column("job_id", sa.String(64), primary_key=True),
    sa.Column("attempt", sa.Integer, primary_key=True),
    sa.Column("event_id", sa.String(64), nullable=False),
    sa.Column("at_s", sa.Double, nullable=False),
    sa.Column("seconds", sa.Double, nullable=False),
    sa.Column("status_code", sa.Integer),
    sa.Column("error", sa.Text),
    sa.Column("next_at_s", sa.Double),
)
webhook_secrets = sa.Table(
    "hyper_webhook_secrets",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("tenant", sa.String(64), nullable=False, index=True),
    sa.Column("secret", sa.Text, nullable=False),
    sa.Column("created_s", sa.Double, nullable=False),
    sa.Column("expires_s", sa.Double),
)


def open_engine(url: str) -> sa.Engine:
    """Return an engine for a database; it connects on first use.

    Raises:
        sqlalchemy.exc.ArgumentError: If the URL cannot be parsed or names another kind of database.
    """
    parsed = sa.make_url(url)
    if parsed.get_backend_name() == "sqlite":
        engine = sa.create_engine(parsed, pool_size=POOL_SIZE)

        @event.listens_for(engine, "connect")
        def prepare(connection: Any, record: Any) -> None:
            # DBOS's own settings, and a log beside the file: readers then never wait for the writer.
            connection.isolation_level = "IMMEDIATE"
            connection.execute(f"PRAGMA busy_timeout={SQLITE_BUSY_TIMEOUT_MS}")
            connection.execute("PRAGMA foreign_keys=ON")
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")

        return engine
    if parsed.get_backend_name() != "postgresql":
        raise ArgumentError("the scheme must be sqlite or postgresql")
    return sa.create_engine(
        parsed.set(drivername="postgresql+psycopg"),
        pool_size=POOL_SIZE,
        pool_pre_ping=True,
        connect_args={"connect_timeout": CONNECT_TIMEOUT_S},
    )


def is_full(error: SQLAlchemyError) -> bool:
    """Return whether a database has no space left on its disk."""
    text = str(error.orig if isinstance(error, DBAPIError) else error).lower()
    return "disk is full" in text or "no space left" in text or "disk i/o error" in text


class JobStore:
    """The tables, read and changed in short transactions."""

    def __init__(self, engine: sa.Engine) -> None:
        self.engine = engine

    def create_tables(self) -> None:
        """Create the tables that are missing."""
        metadata.create_all(self.engine)

    def transaction(self) -> AbstractContextManager[sa.Connection]:
        """Begin a transaction, which ends with the block."""
        return self.engine.begin()

    def insert(self, connection: sa.Connection, job: Job, idempotency_key: str | None = None) -> None:
        """Store a new job, and the job of an idempotency key that `claim_key` has returned.

        Raises:
            KeyTakenError: If the lease of the claim has ended, and another request has stored its job since.
        """
        values = {
            **{column.name: getattr(job, column.name) for column in jobs.columns},
            "request": json.dumps(job.request),
            "result": None,
            "error": None,
        }
        connection.execute(sa.insert(jobs).values(values))
        if idempotency_key is not None:
            table = idempotency_keys
            is_key = sa.and_(table.c.tenant == job.tenant, table.c.key == idempotency_key, table.c.job_id.is_(None))
            if connection.execute(sa.update(table).where(is_key).values(job_id=job.id)).rowcount != 1:
                raise KeyTakenError("Another request with this key has stored its job.")

    def get(self, job_id: str, tenant: str | None = None) -> Job | None:
        """Return a job, or None; with a tenant, only its own."""
        query = sa.select(jobs).where(jobs.c.id == job_id)
        if tenant is not None:
            query = query.where(jobs.c.tenant == tenant)
        with self.engine.connect() as connection:
            row = connection.execute(query).mappings().first()
        return None if row is None else job_of(row)

    def list_jobs(
        self, tenant: str, *, limit: int, after: str | None = None, statuses: Sequence[JobStatus] = (), kind: str = "qa"
    ) -> list[Job]:
        """Return a tenant's jobs, newest first; of questions without their results, which are long.

        Args:
            after: Id of the last job of the page before.
        """
        columns = [column for column in jobs.c if column.name != "result" or kind == "batch"]
        query = sa.select(*columns).where(jobs.c.tenant == tenant, jobs.c.kind == kind)
        if statuses:
            query = query.where(jobs.c.status.in_(statuses))
        with self.engine.connect() as connection:
            if after is not None:
                found = connection.execute(
                    sa.select(jobs.c.created_s).where(jobs.c.id == after, jobs.c.tenant == tenant)
                ).scalar()
                if found is None:
                    return []
                query = query.where(
                    sa.or_(jobs.c.created_s < found, sa.and_(jobs.c.created_s == found, jobs.c.id < after))
                )
            rows = connection.execute(query.order_by(jobs.c.created_s.desc(), jobs.c.id.desc()).limit(limit))
            return [job_of(row) for row in rows.mappings()]

    def active(self) -> list[tuple[str, JobStatus, float, str | None]]:
        """Return id, status, time of creation and clip of every job with work."""
        query = sa.select(jobs.c.id, jobs.c.status, jobs.c.created_s, jobs.c.clip).where(jobs.c.status.in_(ACTIVE))
        with self.engine.connect() as connection:
            return [(row[0], row[1], row[2], row[3]) for row in connection.execute(query)]

    def counts(self) -> dict[str, int]:
        """Return the number of jobs by status."""
        query = sa.select(jobs.c.status, sa.func.count()).group_by(jobs.c.status)
        with self.engine.connect() as connection:
            return {row[0]: row[1] for row in connection.execute(query)}

    def num_active_of(self, tenant: str) -> int:
        """Return the number of a tenant's jobs with work."""
        query = sa.select(sa.func.count()).where(jobs.c.tenant == tenant, jobs.c.status.in_(ACTIVE))
        with self.engine.connect() as connection:
            return connection.execute(query).scalar_one()

    def start(self, job_id: str) -> Job | None:
        """Mark a job as running and return it; None if it has ended."""
        with self.engine.begin() as connection:
            connection.execute(
                sa.update(jobs)
                .where(jobs.c.id == job_id, jobs.c.status == "queued")
                .values(status="running", started_s=time.time())
            )
        job = self.get(job_id)
        return job if job is not None and job.is_active else None

    def record_progress(self, job_id: str, num_done: int, num_failed: int) -> None:
        """Store the number of finished steps, which never decreases; of a batch also the number of failed ones."""
        counts = json.dumps({"num_failed": num_failed})
        with self.engine.begin() as connection:
            connection.execute(
                sa.update(jobs)
                .where(jobs.c.id == job_id, jobs.c.num_done < num_done, jobs.c.status.in_(ACTIVE))
                .values(num_done=num_done, result=sa.case((jobs.c.kind == "batch", counts), else_=None))
            )

    def end(
        self,
        connection: sa.Connection,
        job_id: str,
        status: JobStatus,
        *,
        result: Any = None,
        error: Mapping[str, Any] | None = None,
        num_done: int | None = None,
    ) -> bool:
        """End an active job; return whether this call has ended it."""
        now_s = time.time()
        values: dict[str, Any] = {
            "status": status,
            "ended_s": now_s,
            "expires_s": now_s + jobs.c.keep_s,
            "clip": None,
            "result": None if result is None else json.dumps(result),
            "error": None if error is None else json.dumps(error),
        }
        if num_done is not None:
            values["num_done"] = num_done
        changed = connection.execute(
            sa.update(jobs).where(jobs.c.id == job_id, jobs.c.status.in_(ACTIVE)).values(values)
        )
        return changed.rowcount > 0

    def delete(self, job_ids: Sequence[str]) -> None:
        """Delete jobs with their deliveries; their idempotency keys then name no job."""
        with self.engine.begin() as connection:
            connection.execute(sa.delete(deliveries).where(deliveries.c.job_id.in_(job_ids)))
            connection.execute(sa.delete(idempotency_keys).where(idempotency_keys.c.job_id.in_(job_ids)))
            connection.execute(sa.delete(jobs).where(jobs.c.id.in_(job_ids)))

    def expired(self, now_s: float, limit: int = 500) -> list[str]:
        """Return the ids of ended jobs beyond their retention."""
        query = sa.select(jobs.c.id).where(jobs.c.expires_s < now_s, jobs.c.status.not_in(ACTIVE)).limit(limit)
        with self.engine.connect() as connection:
            return list(connection.execute(query).scalars())

    def claim_key(
        self, tenant: str, key: str, fingerprint: str, now_s: float, lease_s: float
    ) -> tuple[str, str | None] | None:
        """Claim an idempotency key for a new job.

        Args:
            lease_s: Time of the first request to store its job; afterwards its process must have died.

        Returns:
            None if the caller may store its job; else the fingerprint of the first request, and the id of its job, or
            None while that is being stored.
        """
        table = idempotency_keys
        is_key = sa.and_(table.c.tenant == tenant, table.c.key == key)
        with self.engine.begin() as connection:
            connection.execute(
                sa.delete(table).where(
                    is_key,
                    sa.or_(
                        table.c.created_s < now_s - IDEMPOTENCY_KEEP_S,
                        sa.and_(table.c.job_id.is_(None), table.c.created_s < now_s - lease_s),
                    ),
                )
            )
        try:
            with self.engine.begin() as connection:
                row = {"tenant": tenant, "key": key, "fingerprint": fingerprint, "created_s": time.time()}
                connection.execute(sa.insert(table).values(row))
            return None
        except IntegrityError:
            with self.engine.connect() as connection:
                found = connection.execute(sa.select(table.c.fingerprint, table.c.job_id).where(is_key)).first()
            # Between the two statements the first request may have failed and released its key.
            return (fingerprint, None) if found is None else (found[0], found[1])

    def release_key(self, tenant: str, key: str) -> None:
        """Release a claimed key whose job was not stored."""
        table = idempotency_keys
        with self.engine.begin() as connection:
            connection.execute(
                sa.delete(table).where(table.c.tenant == tenant, table.c.key == key, table.c.job_id.is_(None))
            )

    def forget_keys(self, now_s: float) -> None:
        """Delete idempotency keys beyond their retention."""
        with self.engine.begin() as connection:
            connection.execute(
                sa.delete(idempotency_keys).where(idempotency_keys.c.created_s < now_s - IDEMPOTENCY_KEEP_S)
            )

    def record_delivery(self, delivery: Delivery) -> None:
        """Store an attempt to deliver a webhook; a repeated record of one attempt replaces the first."""
        with self.engine.begin() as connection:
            connection.execute(
                sa.delete(deliveries).where(
                    deliveries.c.job_id == delivery.job_id, deliveries.c.attempt == delivery.attempt
                )
            )
            connection.execute(sa.insert(deliveries).values(vars(delivery)))

    def deliveries_of(self, job_id: str) -> list[Delivery]:
        """Return the attempts to deliver a job's webhook, in order."""
        query = sa.select(deliveries).where(deliveries.c.job_id == job_id).order_by(deliveries.c.attempt)
        with self.engine.connect() as connection:
            return [Delivery(**row) for row in connection.execute(query).mappings()]

    def rotate_secret(self, tenant: str, secret: str, overlap_s: float, now_s: float) -> WebhookSecret:
        """Store a new secret of a tenant; the one before stays valid for the overlap, and older ones end."""
        table = webhook_secrets
        added = WebhookSecret(new_id("whs"), tenant, secret, now_s, None)
        with self.engine.begin() as connection:
            connection.execute(sa.delete(table).where(table.c.tenant == tenant, table.c.expires_s.is_not(None)))
            connection.execute(
                sa.update(table)
                .where(table.c.tenant == tenant, table.c.expires_s.is_(None))
                .values(expires_s=now_s + overlap_s)
            )
            connection.execute(sa.insert(table).values(vars(added)))
        return added

    def secrets_of(self, tenant: str, now_s: float) -> list[WebhookSecret]:
        """Return a tenant's valid secrets, the newest first."""
        table = webhook_secrets
        query = (
            sa.select(table)
            .where(table.c.tenant == tenant, sa.or_(table.c.expires_s.is_(None), table.c.expires_s > now_s))
            .order_by(table.c.expires_s.is_not(None), table.c.created_s.desc())
        )
        with self.engine.connect() as connection:
            return [WebhookSecret(**row) for row in connection.execute(query).mappings()]

    def delete_secret(self, tenant: str, secret_id: str) -> bool:
        """Delete a secret; return whether it was there."""
        table = webhook_secrets
        with self.engine.begin() as connection:
            return (
                connection.execute(sa.delete(table).where(table.c.tenant == tenant, table.c.id == secret_id)).rowcount
                > 0
            )


def job_of(row: Mapping[Any, Any]) -> Job:
    """Return the job of a row; a column that was not selected is None."""
    values = dict(row)
    values["request"] = json.loads(values["request"])
    for name in ("result", "error"):
        text = values.get(name)
        values[name] = None if text is None else json.loads(text)
    return Job(**values)
