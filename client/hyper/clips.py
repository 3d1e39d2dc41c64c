"""Clips as callers give them: a path, bytes, or an open file."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import stat
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeAlias

Clip: TypeAlias = "str | os.PathLike[str] | bytes | BinaryIO"
"""A path, the bytes of an audio file, or a binary file object."""


@dataclass(frozen=True)
class LoadedClip:
    """A clip that can be sent more than once. Its file name is not sent; the bytes tell the format.

    Attributes:
        source: The path of a regular file, else the bytes.
        sha256: Digest of the bytes, in hexadecimal.
    """

    source: Path | bytes
    sha256: str

    @contextlib.contextmanager
    def open(self) -> Generator[BinaryIO]:
        """Open the clip at its first byte."""
        with io.BytesIO(self.source) if isinstance(self.source, bytes) else self.source.open("rb") as file:
            yield file


def load_clip(clip: Clip) -> LoadedClip:
    """Compute the digest of a clip. Pipes and file objects are read to memory, regular files are not.

    Raises:
        OSError: The file cannot be read.
        TypeError: The clip is a file object in text mode, or has another type.
    """
    if isinstance(clip, (str, os.PathLike)):
        path = Path(clip)
        with path.open("rb") as file:
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return LoadedClip(path, hashlib.file_digest(file, "sha256").hexdigest())
            # A pipe, for example of a shell's <(command), can be read only once.
            return _from_bytes(file.read())
    if isinstance(clip, bytes):
        return _from_bytes(clip)
    if not hasattr(clip, "read"):
        raise TypeError(f"clip is a path, bytes or a binary file, not {type(clip).__name__}")
    data = clip.read()
    if not isinstance(data, bytes):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError("clip is a file in text mode; open it with mode 'rb'")
    return _from_bytes(data)


def _from_bytes(data: bytes) -> LoadedClip:
    return LoadedClip(data, hashlib.sha256(data).hexdigest())
