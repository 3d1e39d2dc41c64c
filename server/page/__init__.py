"""The files of the web page, read from this folder. `server.api.page` serves them."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

DIRECTORY = Path(__file__).parent

MEDIA_TYPES: Mapping[str, str] = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}
"""The kinds of files that the page consists of. Other files of the folder are not served."""

HTML_FILES: Mapping[str, str] = {"/": "index.html", "/docs": "docs.html"}
"""HTML files by path."""

STATIC_FILES: Mapping[str, str] = {
    f"/static/{name}": name
    for path in sorted(DIRECTORY.rglob("*"))
    if path.suffix in MEDIA_TYPES and (name := path.relative_to(DIRECTORY).as_posix()) not in HTML_FILES.values()
}
"""All other files by path."""

PAGE_PATHS = frozenset({*HTML_FILES, *STATIC_FILES})
"""Every path of the page. They are public: a browser cannot send a key when it opens an address."""


@dataclass(frozen=True)
class PageFile:
    """A file of the page, as read from disk and as compressed."""

    body: bytes
    compressed: bytes
    media_type: str
    etag: str


@cache
def page_file(name: str) -> PageFile:
    """Read and compress a file of the page once."""
    path = DIRECTORY / name
    body = path.read_bytes()
    return PageFile(
        body=body,
        compressed=gzip.compress(body, mtime=0),
        media_type=MEDIA_TYPES[path.suffix],
        etag=f'"{hashlib.sha256(body).hexdigest()[:32]}"',
    )
