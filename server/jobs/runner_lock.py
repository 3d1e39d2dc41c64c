"""Lock on a runner's id: of two processes with one id, one runs jobs and the other waits to replace it."""

from __future__ import annotations

import fcntl
import hashlib
import os
from pathlib import Path
from typing import Protocol

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError


class RunnerLock(Protocol):
    """A lock that the system releases if its process dies."""

    def acquire(self) -> bool:
        """Acquire or keep the lock; return whether this process has it.

        Raises:
            sqlalchemy.exc.SQLAlchemyError: If the database cannot be reached, so that nobody can have it now.
        """
        ...

    def release(self) -> None:
        """Release the lock, if this process has it."""
        ...


class FileLock:
    """Lock of a file beside a SQLite database."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor: int | None = None

    def acquire(self) -> bool:
        """Acquire or keep the lock; return whether this process has it."""
        if self.descriptor is not None:
            return True
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            return False
        self.descriptor = descriptor
        return True

    def release(self) -> None:
        """Release the lock, if this process has it."""
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None


class AdvisoryLock:
    """Advisory lock of PostgreSQL, held by one connection."""

    def __init__(self, engine: sa.Engine, runner_id: str) -> None:
        self.engine = engine
        digest = hashlib.sha256(f"hyper-jobs {runner_id}".encode()).digest()
        self.key = int.from_bytes(digest[:8], signed=True)
        self.connection: sa.Connection | None = None

    def acquire(self) -> bool:
        """Acquire or keep the lock; return whether this process has it."""
        if self.connection is not None:
            try:
                self.connection.execute(sa.text("SELECT 1"))
                return True
            except SQLAlchemyError:
                self.release()
                # The server may be back already; another process may have been faster.
        connection = self.engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        try:
            is_ours = connection.execute(sa.text("SELECT pg_try_advisory_lock(:key)"), {"key": self.key}).scalar()
        except SQLAlchemyError:
            connection.invalidate()
            connection.close()
            raise
        if not is_ours:
            connection.close()
            return False
        # Not returned to the pool: the lock lives as long as this connection.
        connection.detach()
        self.connection = connection
        return True

    def release(self) -> None:
        """Release the lock, if this process has it."""
        if self.connection is not None:
            connection, self.connection = self.connection, None
            connection.close()
