"""Stored files in a folder, described in SQLite; several processes of one machine may share them.

`files.sqlite3` has one row per file. The contents lie in the folder `files`, under random names that no reply contains.
A content without a row is a leftover of a crash; `sweep` removes it after an hour. A row outlives its content by a
week. So an expired file has an error of its own, and a listing can continue behind a deleted file.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import re
import secrets
import sqlite3
import threading
import time
from collections.abc import AsyncGenerator, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar

from hyper_model.errors import HyperError
from server.errors import RequestError
from server.storage.protocol import FilePage, Purpose, StorageUsage, StoredFile

logger = logging.getLogger("hyper.server")

Result = TypeVar("Result")

CHUNK_BYTES = 1024 * 1024
NUM_THREADS = 4
BUSY_TIMEOUT_S = 10.0
ORPHAN_AGE_S = 3600.0
ROW_AGE_S = 7 * 86_400
SCHEMA_VERSION = 1

SCHEMA = """
CREATE TABLE files (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    tenant TEXT NOT NULL,
    filename TEXT NOT NULL,
    purpose TEXT NOT NULL,
    num_bytes INTEGER NOT NULL,
    created_at_s INTEGER NOT NULL,
    expires_at_s INTEGER NOT NULL,
    content TEXT,
    removed_at_s INTEGER,
    is_expired INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX files_of_tenant ON files (tenant, number) WHERE content IS NOT NULL;
CREATE INDEX files_by_expiry ON files (expires_at_s) WHERE content IS NOT NULL;
CREATE INDEX files_by_content ON files (content) WHERE content IS NOT NULL;
"""
FILE_ID = re.compile(r"file-[0-9a-f]{32}")
COLUMNS = "id, filename, purpose, num_bytes, created_at_s, expires_at_s"


@dataclass(frozen=True)
class TenantLimits:
    """Maximum of stored bytes and files of one tenant."""

    num_bytes: int
    num_files: int


class SqliteFileStore:
    """Files below one folder; see `server.storage.protocol.FileStore`.

    Args:
        folder: Folder of the database and the contents; created if it is missing.
        limits: Quota of each tenant.
        now_s: Clock of creation and expiry, in seconds since 1970.
    """

    def __init__(self, folder: Path, limits: TenantLimits, now_s: Callable[[], float] = time.time) -> None:
        self.folder = folder
        self.contents = folder / "files"
        self.limits = limits
        self.now_s = now_s
        self.pool: ThreadPoolExecutor | None = None
        self.connection: sqlite3.Connection | None = None
        self.lock = threading.Lock()

    async def start(self) -> None:
        """Create the folder and the tables where they are missing.

        Raises:
            HyperError: If the folder cannot be used, or a newer release has written it.
        """
        self.pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="hyper-files")
        try:
            await self._in_pool(self._open)
        except (OSError, sqlite3.Error) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise HyperError(
                f"the folder {self.folder} of stored files cannot be used: {reason}; set HYPER_STATE_DIR to another one"
            ) from None

    async def stop(self) -> None:
        """Close the database after the work in progress."""
        if self.pool is not None:
            pool, self.pool = self.pool, None
            await asyncio.to_thread(pool.shutdown, wait=True)
        connection, self.connection = self.connection, None
        if connection is not None:
            connection.close()

    async def add(
        self, tenant: str, content: BinaryIO, *, filename: str, purpose: Purpose, lifetime_s: int
    ) -> StoredFile:
        """Write the content, then its row; see the protocol."""
        return await self._in_pool(self._add, tenant, content, filename, purpose, lifetime_s)

    async def get(self, tenant: str, file_id: str) -> StoredFile:
        """Return the description of a file; see the protocol."""
        return (await self._in_pool(self._find, tenant, file_id))[0]

    async def list(
        self,
        tenant: str,
        *,
        purpose: str | None = None,
        after: str | None = None,
        limit: int = 10_000,
        is_ascending: bool = False,
    ) -> FilePage:
        """Return files in the order of their creation; see the protocol."""
        return await self._in_pool(self._list, tenant, purpose, after, limit, is_ascending)

    async def chunks(self, tenant: str, file_id: str) -> AsyncGenerator[bytes]:
        """Yield the content from its open file, which a deletion leaves readable; see the protocol."""
        file = await self._in_pool(self._open_content, tenant, file_id)
        try:
            while chunk := await self._in_pool(file.read, CHUNK_BYTES):
                yield chunk
        finally:
            file.close()

    async def read(self, tenant: str, file_id: str) -> bytes:
        """Return the whole content; see the protocol."""

        def read() -> bytes:
            with self._open_content(tenant, file_id) as file:
                return file.read()

        return await self._in_pool(read)

    async def delete(self, tenant: str, file_id: str) -> None:
        """Remove a file; see the protocol."""
        await self._in_pool(self._delete, tenant, file_id)

    async def sweep(self) -> StorageUsage:
        """Remove expired files, old rows and leftovers; see the protocol."""
        return await self._in_pool(self._sweep)

    async def _in_pool(self, function: Callable[..., Result], *args: Any) -> Result:
        if self.pool is None:
            raise unavailable()
        return await asyncio.get_running_loop().run_in_executor(self.pool, functools.partial(function, *args))

    def _open(self) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.contents.mkdir(mode=0o700, exist_ok=True)
        # An unwritable folder must be an error of the start, not of the first upload.
        probe = self.contents / f".probe-{secrets.token_hex(8)}"
        probe.touch()
        probe.unlink()
        # Autocommit: `_transaction` begins and ends each transaction itself.
        connection = sqlite3.connect(
            self.folder / "files.sqlite3", timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
        )
        with contextlib.ExitStack() as undo:
            undo.callback(connection.close)
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("BEGIN IMMEDIATE")
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version > SCHEMA_VERSION:
                raise HyperError(
                    f"{self.folder} was written by a newer release (files format {version}; this release reads up to "
                    f"{SCHEMA_VERSION}); use that release, or set HYPER_STATE_DIR to another folder"
                )
            if version == 0:
                for statement in filter(str.strip, SCHEMA.split(";")):
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            connection.execute("COMMIT")
            undo.pop_all()
        self.connection = connection

    @contextlib.contextmanager
    def _transaction(self, begin: Literal["DEFERRED", "IMMEDIATE"] = "IMMEDIATE") -> Generator[sqlite3.Connection]:
        """Hold the connection, and commit at the end of the block or undo all of it.

        Args:
            begin: IMMEDIATE for writing; DEFERRED reads alone, also on a full disk.
        """
        with self.lock:
            connection = self.connection
            if connection is None:
                raise unavailable()
            try:
                connection.execute(f"BEGIN {begin}")
                yield connection
                connection.execute("COMMIT")
            except sqlite3.Error as error:
                # The database's message may contain paths.
                logger.error("the database of files failed", exc_info=error)
                raise (full() if error.sqlite_errorname == "SQLITE_FULL" else unavailable()) from None
            finally:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")

    def _add(self, tenant: str, content: BinaryIO, filename: str, purpose: Purpose, lifetime_s: int) -> StoredFile:
        num_bytes = content.seek(0, os.SEEK_END)
        content.seek(0)
        now_s = int(self.now_s())
        stored = StoredFile(
            id=f"file-{secrets.token_hex(16)}",
            filename=filename,
            purpose=purpose,
            num_bytes=num_bytes,
            created_at_s=now_s,
            expires_at_s=now_s + lifetime_s,
        )
        # Before the write: a tenant above its quota costs no disk.
        with self._transaction() as connection:
            self._require_quota(connection, tenant, stored)
        name = secrets.token_hex(16)
        path = self.contents / name
        with contextlib.ExitStack() as undo:
            undo.callback(self._unlink, name)
            try:
                write(path, content)
                with self._transaction() as connection:
                    self._require_quota(connection, tenant, stored)
                    connection.execute(
                        f"INSERT INTO files (tenant, content, {COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                        (tenant, name, stored.id, filename, purpose, num_bytes, now_s, stored.expires_at_s),
                    )
            except OSError as error:
                # The system's message contains paths.
                logger.error("a file cannot be stored", exc_info=error)
                raise full() from None
            undo.pop_all()
        return stored

    def _require_quota(self, connection: sqlite3.Connection, tenant: str, stored: StoredFile) -> None:
        if stored.purpose == "batch_output":
            # The size of a batch's results follows from its input, which was counted. Without them its work is lost.
            return
        row = connection.execute(
            "SELECT count(*), coalesce(sum(num_bytes), 0), min(expires_at_s) FROM files "
            "WHERE tenant = ? AND content IS NOT NULL AND expires_at_s > ?",
            (tenant, stored.created_at_s),
        ).fetchone()
        num_files, num_bytes, first_expiry_s = row
        retry_after_s = max(1, (first_expiry_s or 0) - stored.created_at_s)
        if num_files >= self.limits.num_files:
            message = f"The stored files reach their maximum number of {self.limits.num_files}."
            raise over_quota(message, self.limits.num_files, num_files + 1, retry_after_s)
        if num_bytes + stored.num_bytes > self.limits.num_bytes:
            message = (
                f"The file has {stored.num_bytes} bytes, and {num_bytes} are stored; together at most "
                f"{self.limits.num_bytes} may be."
            )
            raise over_quota(message, self.limits.num_bytes, num_bytes + stored.num_bytes, retry_after_s)

    def _find(self, tenant: str, file_id: str) -> tuple[StoredFile, str]:
        """Return a file and the name of its content."""
        if not FILE_ID.fullmatch(file_id):
            raise not_found()
        with self._transaction("DEFERRED") as connection:
            row = connection.execute(
                f"SELECT {COLUMNS}, content, is_expired FROM files WHERE id = ? AND tenant = ?", (file_id, tenant)
            ).fetchone()
        if row is None:
            raise not_found()
        stored, content, is_expired = StoredFile(*row[:6]), row[6], row[7]
        if is_expired or (content is not None and stored.expires_at_s <= self.now_s()):
            raise expired()
        if content is None:
            raise not_found()
        return stored, content

    def _list(self, tenant: str, purpose: str | None, after: str | None, limit: int, is_ascending: bool) -> FilePage:
        condition, values = "", list[Any]()
        with self._transaction("DEFERRED") as connection:
            if purpose is not None:
                condition += " AND purpose = ?"
                values.append(purpose)
            if after is not None:
                query = "SELECT number FROM files WHERE id = ? AND tenant = ?"
                row = connection.execute(query, (after, tenant)).fetchone() if FILE_ID.fullmatch(after) else None
                if row is None:
                    message = "`after` is the id of no file of this key."
                    hint = "Send the id of the last file of the page before."
                    raise RequestError("invalid_parameter", message, param="after", hint=hint)
                condition += f" AND number {'>' if is_ascending else '<'} ?"
                values.append(row[0])
            rows = connection.execute(
                f"SELECT {COLUMNS} FROM files WHERE tenant = ? AND content IS NOT NULL AND expires_at_s > ?"
                f"{condition} ORDER BY number {'ASC' if is_ascending else 'DESC'} LIMIT ?",
                (tenant, self.now_s(), *values, limit + 1),
            ).fetchall()
        return FilePage([StoredFile(*row) for row in rows[:limit]], has_more=len(rows) > limit)

    def _open_content(self, tenant: str, file_id: str) -> BinaryIO:
        _, content = self._find(tenant, file_id)
        try:
            return (self.contents / content).open("rb")
        except FileNotFoundError:
            # Deleted since the row was read, or by hand.
            raise not_found() from None
        except OSError as error:
            logger.error("a stored file cannot be read", exc_info=error)
            raise unavailable() from None

    def _delete(self, tenant: str, file_id: str) -> None:
        _, content = self._find(tenant, file_id)
        with self._transaction() as connection:
            connection.execute(
                "UPDATE files SET content = NULL, filename = '', removed_at_s = ? WHERE id = ?",
                (int(self.now_s()), file_id),
            )
        self._unlink(content)

    def _sweep(self) -> StorageUsage:
        now_s = int(self.now_s())
        with self._transaction() as connection:
            rows = connection.execute(
                "SELECT content FROM files WHERE content IS NOT NULL AND expires_at_s <= ?", (now_s,)
            ).fetchall()
            connection.execute(
                "UPDATE files SET content = NULL, filename = '', removed_at_s = ?, is_expired = 1 "
                "WHERE content IS NOT NULL AND expires_at_s <= ?",
                (now_s, now_s),
            )
            connection.execute("DELETE FROM files WHERE removed_at_s <= ?", (now_s - ROW_AGE_S,))
            num_files, num_bytes = connection.execute(
                "SELECT count(*), coalesce(sum(num_bytes), 0) FROM files WHERE content IS NOT NULL"
            ).fetchone()
        for (content,) in rows:
            self._unlink(content)
        self._remove_unreferenced()
        return StorageUsage(num_files, num_bytes, num_removed=len(rows))

    def _remove_unreferenced(self) -> None:
        """Remove old contents without a row; new ones stay, because an upload writes its row last."""
        newest_s = time.time() - ORPHAN_AGE_S
        old: set[str] = set()
        try:
            for entry in os.scandir(self.contents):
                with contextlib.suppress(FileNotFoundError):
                    if entry.stat().st_mtime < newest_s:
                        old.add(entry.name)
        except OSError as error:
            logger.error("the folder of stored files cannot be read", exc_info=error)
            raise unavailable() from None
        with self._transaction("DEFERRED") as connection:
            rows = connection.execute("SELECT content FROM files WHERE content IS NOT NULL").fetchall()
        for content in old - {content for (content,) in rows}:
            self._unlink(content)

    def _unlink(self, content: str) -> None:
        try:
            (self.contents / content).unlink(missing_ok=True)
        except OSError as error:
            # The row is gone, so nobody can read the content; a later sweep tries again.
            logger.error("the content of a removed file stays on disk", exc_info=error)


def write(path: Path, content: BinaryIO) -> None:
    """Write a new file, readable by its owner alone, and wait until it is on disk."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "wb") as file:
        while chunk := content.read(CHUNK_BYTES):
            file.write(chunk)
        file.flush()
        os.fsync(descriptor)


def not_found() -> RequestError:
    """Return the error of an id without a file; the same for a file of another tenant."""
    return RequestError("unknown_file", "No file of this key has this id.", param="file_id")


def expired() -> RequestError:
    """Return the error of a file after its expiry."""
    hint = "Upload the file again, with a later expiry in `expires_after`."
    return RequestError("file_expired", "The file has expired.", param="file_id", hint=hint)


def over_quota(message: str, limit: int, actual: int, retry_after_s: int) -> RequestError:
    """Return the error of a tenant with too much in store."""
    return RequestError(
        "file_quota_exceeded",
        message,
        param="file",
        limit=limit,
        actual=actual,
        retry_after_s=retry_after_s,
        hint="Delete files (DELETE /v1/files/{file_id}); the first one expires after the Retry-After time.",
    )


def full() -> RequestError:
    """Return the error of a disk without space."""
    return RequestError(
        "storage_full", "The service has no disk space for the file.", hint="Retry after the Retry-After time."
    )


def unavailable() -> RequestError:
    """Return the error of a storage that is not open or failed."""
    return RequestError(
        "storage_unavailable", "The service cannot store or read files now.", hint="Retry after the Retry-After time."
    )
