"""Write files whole or not at all, and compute their checksums."""

from __future__ import annotations

import hashlib
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path, partial: Path | None = None) -> Generator[Path]:
    """Yield a path to write to; its file replaces `path` at the end of the block.

    A reader of `path` gets the old file or the whole new one. After an error the old file stays.

    Args:
        partial: Path to write to, in the same file system; `path` with the suffix ".partial" if None.
    """
    partial = path.with_name(f"{path.name}.partial") if partial is None else partial
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write text (UTF-8) or bytes as a whole file, replacing an older one."""
    with replacing(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
