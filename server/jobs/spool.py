"""Spool folder of jobs: clips under random names, deleted when their job ends."""

from __future__ import annotations

import contextlib
import os
import secrets
import struct
import time
from collections.abc import Collection, Sequence
from itertools import accumulate
from pathlib import Path

ORPHAN_AGE_S = 3600.0
"""Age of a file without a job before its deletion: its job may be about to be stored."""


OFFSET = struct.Struct("<Q")


def pack(parts: Sequence[bytes]) -> bytes:
    """Return a file of parts: their offsets, the offset of the end, and the parts."""
    begin = OFFSET.size * (len(parts) + 1)
    offsets = accumulate((len(part) for part in parts), initial=begin)
    return b"".join([*map(OFFSET.pack, offsets), *parts])


class Spool:
    """Clips of jobs as files; a lost power supply loses none of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def write(self, data: bytes) -> str:
        """Store a clip and return its name.

        Raises:
            OSError: If the file cannot be written, such as on a full disk; nothing is left behind.
        """
        name = secrets.token_hex(16)
        path = self.folder / name
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            folder = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError:
            self.delete(name)
            raise
        return name

    def read(self, name: str) -> bytes:
        """Return a clip.

        Raises:
            OSError: If it cannot be read.
        """
        return (self.folder / name).read_bytes()

    def read_part(self, name: str, index: int) -> bytes:
        """Return one part of a file of `pack`, without the others.

        Raises:
            OSError: If it cannot be read.
        """
        with open(self.folder / name, "rb") as file:
            file.seek(index * OFFSET.size)
            start, end = (OFFSET.unpack(file.read(OFFSET.size))[0] for _ in range(2))
            file.seek(start)
            return file.read(end - start)

    def delete(self, name: str | None) -> None:
        """Delete a clip, if it is there."""
        if name is not None:
            with contextlib.suppress(FileNotFoundError):
                (self.folder / name).unlink()

    def delete_orphans(self, used: Collection[str]) -> int:
        """Delete old files without a job, left by a process that died, and return their number."""
        num_deleted = 0
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if path.name not in used and time.time() - path.stat().st_mtime > ORPHAN_AGE_S:
                    path.unlink()
                    num_deleted += 1
        return num_deleted
