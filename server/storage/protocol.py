"""The interface to stored files. Endpoints and jobs use it, and never a database or a path.

Another implementation (PostgreSQL with an object folder, for several replicas) needs one class with these methods and
one line in `server.storage.file_store`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import BinaryIO, Literal, Protocol

ClipPurpose = Literal["user_data", "assistants"]
UploadPurpose = Literal["user_data", "assistants", "batch"]
Purpose = Literal["user_data", "assistants", "batch", "batch_output"]
"""Purposes of a file, a part of OpenAI's. The first two are clips; the service itself writes `batch_output`."""


@dataclass(frozen=True)
class StoredFile:
    """Description of a stored file.

    Attributes:
        id: Unguessable name, `file-` and 32 hexadecimal digits.
        filename: The name from its owner, for display alone.
        created_at_s: Seconds since 1970; `expires_at_s` too.
    """

    id: str
    filename: str
    purpose: Purpose
    num_bytes: int
    created_at_s: int
    expires_at_s: int


@dataclass(frozen=True)
class FilePage:
    """Part of a listing."""

    files: Sequence[StoredFile]
    has_more: bool


@dataclass(frozen=True)
class StorageUsage:
    """Stored files of all tenants, and the number that the last sweep removed."""

    num_files: int
    num_bytes: int
    num_removed: int = 0


class FileStore(Protocol):
    """Files of tenants. A tenant is the name of an API key; "" without keys.

    A file of another tenant does not exist for a caller. Every method can raise `RequestError` 503
    `storage_unavailable`, if the storage cannot be used.
    """

    async def start(self) -> None:
        """Open the storage.

        Raises:
            HyperError: If it cannot be used.
        """
        ...

    async def stop(self) -> None:
        """Close the storage."""
        ...

    async def add(
        self, tenant: str, content: BinaryIO, *, filename: str, purpose: Purpose, lifetime_s: int
    ) -> StoredFile:
        """Store a file whole, or not at all.

        Args:
            content: Seekable; read from its beginning to its end, in another thread.
            lifetime_s: Seconds until it expires.

        Raises:
            RequestError: 429 `file_quota_exceeded` for a tenant with too many bytes or files, but never for a
                `batch_output`; 503 `storage_full`.
        """
        ...

    async def get(self, tenant: str, file_id: str) -> StoredFile:
        """Return the description of a file.

        Raises:
            RequestError: 404 `unknown_file`, or `file_expired`.
        """
        ...

    async def list(
        self,
        tenant: str,
        *,
        purpose: str | None = None,
        after: str | None = None,
        limit: int = 10_000,
        is_ascending: bool = False,
    ) -> FilePage:
        """Return files in the order of their creation, the newest first.

        Args:
            purpose: Return only files of this purpose.
            after: Return the files behind this one. It may have been deleted in the meantime.
            limit: Maximum number.
            is_ascending: Return the oldest first.

        Raises:
            RequestError: 400, if `after` is the id of no file.
        """
        ...

    def chunks(self, tenant: str, file_id: str) -> AsyncGenerator[bytes]:
        """Yield the content. Errors of `get` come before the first chunk. A later deletion does not end the reading."""
        ...

    async def read(self, tenant: str, file_id: str) -> bytes:
        """Return the whole content; for files of bounded size.

        Raises:
            RequestError: As `get`.
        """
        ...

    async def delete(self, tenant: str, file_id: str) -> None:
        """Remove a file and its content.

        Raises:
            RequestError: As `get`.
        """
        ...

    async def sweep(self) -> StorageUsage:
        """Remove expired files and leftovers of a crash, and return the usage after it."""
        ...
