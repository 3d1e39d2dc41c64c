"""Storage of files that outlive a request: the protocol, and the implementation on SQLite and a folder."""

from __future__ import annotations

from server.settings import Settings
from server.storage.protocol import FileStore
from server.storage.sqlite_files import SqliteFileStore, TenantLimits


def file_store(settings: Settings) -> FileStore:
    """Build the storage of files; `start` opens it."""
    limits = TenantLimits(settings.files_tenant_bytes, settings.files_tenant_count)
    return SqliteFileStore(settings.state_path, limits)
