"""Stored files in SQLite and a folder: owners, quotas, expiry, listings, crashes and a full disk."""

from __future__ import annotations

import asyncio
import io
import os
import sqlite3
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from hyper_model.errors import HyperError
from server.errors import RequestError
from server.storage import sqlite_files
from server.storage.protocol import Purpose, StoredFile
from server.storage.sqlite_files import CHUNK_BYTES, ORPHAN_AGE_S, ROW_AGE_S, SqliteFileStore, TenantLimits

LIMITS = TenantLimits(num_bytes=10_000, num_files=5)


class Clock:
    """Wall clock of a store, set by the test."""

    def __init__(self) -> None:
        self.s = 1_800_000_000.0

    def __call__(self) -> float:
        return self.s


def with_store(folder: Path, work: Callable[[SqliteFileStore, Clock], Awaitable[None]], **limits: int) -> None:
    """Run work with an open store."""

    async def run() -> None:
        clock = Clock()
        store = SqliteFileStore(folder, TenantLimits(**{**vars(LIMITS), **limits}), clock)
        await store.start()
        try:
            await work(store, clock)
        finally:
            await store.stop()

    asyncio.run(run())


def add(
    store: SqliteFileStore,
    content: bytes | BinaryIO = b"sound",
    *,
    tenant: str = "anna",
    purpose: Purpose = "user_data",
    lifetime_s: int = 60,
) -> Awaitable[StoredFile]:
    file = io.BytesIO(content) if isinstance(content, bytes) else content
    return store.add(tenant, file, filename="clip.wav", purpose=purpose, lifetime_s=lifetime_s)


async def refusal(work: Awaitable[object]) -> RequestError:
    with pytest.raises(RequestError) as caught:
        await work
    return caught.value


def contents(folder: Path) -> list[Path]:
    return sorted((folder / "files").iterdir())


def test_a_file_is_read_as_it_was_stored_also_after_a_restart(tmp_path: Path) -> None:
    data = os.urandom(2 * CHUNK_BYTES + 7)
    found: list[StoredFile] = []

    async def store_it(store: SqliteFileStore, clock: Clock) -> None:
        found.append(await add(store, data))

    async def read_it(store: SqliteFileStore, clock: Clock) -> None:
        (stored,) = found
        assert await store.get("anna", stored.id) == stored
        assert await store.read("anna", stored.id) == data
        assert b"".join([chunk async for chunk in store.chunks("anna", stored.id)]) == data
        assert (stored.num_bytes, stored.expires_at_s - stored.created_at_s) == (len(data), 60)

    with_store(tmp_path, store_it, num_bytes=10**8)
    with_store(tmp_path, read_it)
    (content,) = contents(tmp_path)
    assert content.stat().st_mode & 0o077 == 0
    assert found[0].id not in content.name


def test_a_file_of_another_tenant_does_not_exist(tmp_path: Path) -> None:
    async def work(store: SqliteFileStore, clock: Clock) -> None:
        stored = await add(store)
        missing = await refusal(store.get("anna", "file-" + "0" * 32))
        for attempt in (store.get, store.read, store.delete):
            fault = await refusal(attempt("ben", stored.id))
            assert (fault.code, fault.body("r")) == ("unknown_file", missing.body("r"))
        assert (await store.list("ben")).files == []
        assert (await refusal(store.list("ben", after=stored.id))).param == "after"
        assert await store.read("anna", stored.id) == b"sound"

    with_store(tmp_path, work)


def test_an_expired_file_says_so_before_and_after_the_sweep(tmp_path: Path) -> None:
    async def work(store: SqliteFileStore, clock: Clock) -> None:
        stored = await add(store, lifetime_s=60)
        kept = await add(store, lifetime_s=600)
        clock.s += 60
        for _ in range(2):
            for attempt in (store.get, store.read, store.delete):
                assert (await refusal(attempt("anna", stored.id))).code == "file_expired"
            assert [file.id for file in (await store.list("anna")).files] == [kept.id]
            await store.sweep()
        assert len(contents(tmp_path)) == 1
        clock.s += ROW_AGE_S
        usage = await store.sweep()
        assert (usage.num_files, usage.num_bytes, usage.num_removed) == (0, 0, 1)
        assert (await refusal(store.get("anna", stored.id))).code == "unknown_file"

    with_store(tmp_path, work)


def test_a_deleted_file_is_gone_with_its_content_and_its_name(tmp_path: Path) -> None:
    async def work(store: SqliteFileStore, clock: Clock) -> None:
        stored = await add(store, b"x" * (CHUNK_BYTES + 1))
        chunks = store.chunks("anna", stored.id)
        assert len(await anext(chunks)) == CHUNK_BYTES
        await store.delete("anna", stored.id)
        assert (await refusal(store.delete("anna", stored.id))).code == "unknown_file"
        # A reader in the middle of the content gets the rest.
        assert [chunk async for chunk in chunks] == [b"x"]

    with_store(tmp_path, work, num_bytes=10**8)
    assert contents(tmp_path) == []
    with sqlite3.connect(tmp_path / "files.sqlite3") as connection:
        assert connection.execute("SELECT filename, content FROM files").fetchall() == [("", None)]
    connection.close()


def test_files_are_listed_in_pages_in_both_orders_and_by_purpose(tmp_path: Path) -> None:
    async def work(store: SqliteFileStore, clock: Clock) -> None:
        purposes: list[Purpose] = ["user_data", "batch", "user_data", "assistants", "user_data"]
        ids = [(await add(store, purpose=purpose)).id for purpose in purposes]

        async def listed(**fields: Any) -> tuple[list[str], bool]:
            page = await store.list("anna", **fields)
            return [file.id for file in page.files], page.has_more

        assert await listed() == (ids[::-1], False)
        assert await listed(is_ascending=True, limit=2) == (ids[:2], True)
        assert await listed(is_ascending=True, limit=3, after=ids[1]) == (ids[2:], False)
        assert await listed(limit=2, after=ids[3]) == ([ids[2], ids[1]], True)
        assert await listed(purpose="user_data", limit=2) == ([ids[4], ids[2]], True)
        # A client that deletes each file as it lists them continues behind a deleted one.
        await store.delete("anna", ids[2])
        assert await listed(after=ids[2]) == ([ids[1], ids[0]], False)

    with_store(tmp_path, work)


def test_bytes_and_files_of_a_tenant_are_bounded(tmp_path: Path) -> None:
    async def work(store: SqliteFileStore, clock: Clock) -> None:
        first = await add(store, b"x" * 6000, lifetime_s=100)
        fault = await refusal(add(store, b"x" * 4001))
        assert (fault.code, fault.status, fault.retry_after_s) == ("file_quota_exceeded", 429, 100)
        assert (fault.limit, fault.actual) == (10_000, 10_001)
        await add(store, b"x" * 4000)
        await add(store, b"x" * 9000, tenant="ben")
        # The results of a batch are not lost for their size.
        await add(store, b"x" * 4001, purpose="batch_output")
        await store.delete("anna", first.id)
        for _ in range(3):
            await add(store, b"x")
        fault = await refusal(add(store, b"x"))
        assert (fault.limit, fault.actual) == (5, 6)
        clock.s += 60
        await add(store, b"x")

    with_store(tmp_path, work)


def test_many_uploads_at_once_respect_the_quota(tmp_path: Path) -> None:
    async def work(store: SqliteFileStore, clock: Clock) -> None:
        replies = await asyncio.gather(*(add(store) for _ in range(30)), return_exceptions=True)
        stored = [reply for reply in replies if isinstance(reply, StoredFile)]
        assert len({file.id for file in stored}) == LIMITS.num_files == len(contents(tmp_path))
        refused = [reply.code for reply in replies if isinstance(reply, RequestError)]
        assert refused == ["file_quota_exceeded"] * 25

    with_store(tmp_path, work)


class BrokenDisk(io.BytesIO):
    """Content whose copy fails in the middle, as on a full disk."""

    def read(self, size: int | None = -1, /) -> bytes:
        if self.tell():
            raise OSError(28, "No space left on device")
        return super().read(size)


def test_a_full_disk_has_its_own_error_and_leaves_no_half_file(tmp_path: Path) -> None:
    async def work(store: SqliteFileStore, clock: Clock) -> None:
        fault = await refusal(add(store, BrokenDisk(b"x" * (CHUNK_BYTES + 1))))
        assert (fault.code, fault.status, fault.kind.retryable) == ("storage_full", 503, True)
        assert contents(tmp_path) == [] and (await store.list("anna")).files == []
        await add(store)

    with_store(tmp_path, work, num_bytes=10**8)


def test_a_database_without_space_leaves_no_content_and_stays_readable(tmp_path: Path) -> None:
    async def work(store: SqliteFileStore, clock: Clock) -> None:
        first = await add(store)
        assert store.connection is not None
        (pages,) = store.connection.execute("PRAGMA page_count").fetchone()
        store.connection.execute(f"PRAGMA max_page_count = {pages}")
        codes: set[str] = set()
        while "storage_full" not in codes:
            try:
                await store.add("anna", io.BytesIO(b"x"), filename="n" * 500, purpose="user_data", lifetime_s=60)
            except RequestError as fault:
                codes.add(fault.code)
        assert codes == {"storage_full"}
        assert len(contents(tmp_path)) == len((await store.list("anna")).files)
        assert await store.read("anna", first.id) == b"sound"

    with_store(tmp_path, work, num_files=10_000)


def test_the_leftover_of_a_crash_is_removed_after_an_hour(tmp_path: Path) -> None:
    async def work(store: SqliteFileStore, clock: Clock) -> None:
        stored = await add(store)
        (kept,) = contents(tmp_path)
        orphan, recent = tmp_path / "files/orphan", tmp_path / "files/recent"
        for path in (orphan, recent):
            path.write_bytes(b"x")
        old_s = time.time() - ORPHAN_AGE_S - 1
        for path in (orphan, kept):
            os.utime(path, (old_s, old_s))
        await store.sweep()
        assert set(contents(tmp_path)) == {kept, recent}
        assert await store.read("anna", stored.id) == b"sound"

    with_store(tmp_path, work)


def test_two_processes_share_a_folder(tmp_path: Path) -> None:
    async def work(store: SqliteFileStore, clock: Clock) -> None:
        other = SqliteFileStore(tmp_path, LIMITS, clock)
        await other.start()
        stored = await asyncio.gather(*(add(each) for each in (store, other, store, other)))
        assert {file.id for file in (await other.list("anna")).files} == {file.id for file in stored}
        await other.stop()

    with_store(tmp_path, work)


def test_a_content_removed_by_hand_makes_its_file_unknown(tmp_path: Path) -> None:
    async def work(store: SqliteFileStore, clock: Clock) -> None:
        stored = await add(store)
        contents(tmp_path)[0].unlink()
        assert (await refusal(store.read("anna", stored.id))).code == "unknown_file"
        await store.delete("anna", stored.id)

    with_store(tmp_path, work)


def test_a_closed_storage_says_so(tmp_path: Path) -> None:
    async def work(store: SqliteFileStore, clock: Clock) -> None:
        await store.stop()
        assert (await refusal(store.list("anna"))).code == "storage_unavailable"

    with_store(tmp_path, work)


def test_an_unusable_folder_and_a_newer_format_are_errors_of_the_start(tmp_path: Path) -> None:
    def start(folder: Path) -> None:
        with_store(folder, lambda store, clock: asyncio.sleep(0))

    (tmp_path / "file").touch()
    with pytest.raises(HyperError, match="HYPER_STATE_DIR"):
        start(tmp_path / "file" / "state")
    start(tmp_path / "state")
    with sqlite3.connect(tmp_path / "state/files.sqlite3") as connection:
        connection.execute(f"PRAGMA user_version = {sqlite_files.SCHEMA_VERSION + 1}")
    connection.close()
    with pytest.raises(HyperError, match="newer release"):
        start(tmp_path / "state")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/files.sqlite3").write_bytes(b"not a database " * 100)
    with pytest.raises(HyperError, match="HYPER_STATE_DIR"):
        start(tmp_path / "damaged")
