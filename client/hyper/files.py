"""Stored files: upload once, ask often."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import httpx

from hyper.clips import Clip, LoadedClip, load_clip
from hyper.protocol import FILES_PATH, query, read_reply
from server.api.types import FileDeleted, FileList, FileObject

Purpose = Literal["user_data", "assistants", "batch"]
Order = Literal["asc", "desc"]


class Files:
    """The files of the caller's key; `Client.files`. Errors are those of `Client.ask`."""

    def __init__(self, call: Callable[..., httpx.Response], url: str) -> None:
        self._call = call
        self._url = url

    def create(
        self,
        file: Clip,
        *,
        purpose: Purpose = "user_data",
        filename: str | None = None,
        lifetime_s: int | None = None,
    ) -> FileObject:
        """Store a file.

        Args:
            file: A path, bytes, or a binary file object.
            filename: Name for display; that of a path by default.
            lifetime_s: Seconds until it expires; the service's default if None.
        """
        content = content_of(load_clip(file))
        parts = upload_parts(file, content, purpose, filename, lifetime_s)
        return read_reply(self._call("POST", FILES_PATH, **parts), FileObject, self._url)

    def list(
        self, *, after: str | None = None, limit: int | None = None, order: Order = "desc", purpose: str | None = None
    ) -> FileList:
        """List files, the newest first; `last_id` is the `after` of the next page."""
        params = query(after=after, limit=limit, order=order, purpose=purpose)
        return read_reply(self._call("GET", FILES_PATH, params=params), FileList, self._url)

    def retrieve(self, file_id: str) -> FileObject:
        """Describe a file."""
        return read_reply(self._call("GET", path_of(file_id)), FileObject, self._url)

    def content(self, file_id: str) -> bytes:
        """Return the bytes of a file."""
        return self._call("GET", f"{path_of(file_id)}/content").content

    def delete(self, file_id: str) -> FileDeleted:
        """Delete a file."""
        return read_reply(self._call("DELETE", path_of(file_id)), FileDeleted, self._url)


class AsyncFiles:
    """The files of the caller's key; `AsyncClient.files`. See `Files`."""

    def __init__(self, call: Callable[..., Awaitable[httpx.Response]], url: str) -> None:
        self._call = call
        self._url = url

    async def create(
        self,
        file: Clip,
        *,
        purpose: Purpose = "user_data",
        filename: str | None = None,
        lifetime_s: int | None = None,
    ) -> FileObject:
        """Store a file; see `Files.create`."""
        content = content_of(await asyncio.to_thread(load_clip, file))
        parts = upload_parts(file, content, purpose, filename, lifetime_s)
        return read_reply(await self._call("POST", FILES_PATH, **parts), FileObject, self._url)

    async def list(
        self, *, after: str | None = None, limit: int | None = None, order: Order = "desc", purpose: str | None = None
    ) -> FileList:
        """List files, the newest first; see `Files.list`."""
        params = query(after=after, limit=limit, order=order, purpose=purpose)
        return read_reply(await self._call("GET", FILES_PATH, params=params), FileList, self._url)

    async def retrieve(self, file_id: str) -> FileObject:
        """Describe a file."""
        return read_reply(await self._call("GET", path_of(file_id)), FileObject, self._url)

    async def content(self, file_id: str) -> bytes:
        """Return the bytes of a file."""
        return (await self._call("GET", f"{path_of(file_id)}/content")).content

    async def delete(self, file_id: str) -> FileDeleted:
        """Delete a file."""
        return read_reply(await self._call("DELETE", path_of(file_id)), FileDeleted, self._url)


def content_of(loaded: LoadedClip) -> bytes:
    """Return the bytes of a file, so that a retry sends them again."""
    with loaded.open() as file:
        return file.read()


def upload_parts(
    file: Clip, content: bytes, purpose: Purpose, filename: str | None, lifetime_s: int | None
) -> dict[str, Any]:
    """Return the form of an upload as arguments of httpx."""
    name = filename or (Path(file).name if isinstance(file, (str, os.PathLike)) else "file")
    fields = {"purpose": purpose}
    if lifetime_s is not None:
        fields |= {"expires_after[anchor]": "created_at", "expires_after[seconds]": str(lifetime_s)}
    return {"data": fields, "files": {"file": (name, content)}}


def path_of(file_id: str) -> str:
    """Return the path of a file; an id cannot lead to another path."""
    return f"{FILES_PATH}/{quote(file_id, safe='')}"
