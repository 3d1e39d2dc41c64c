"""The web page at `/`, its static files, and the API documentation page at `/docs`.

The page speaks the public API only. Every file comes from this server, under a content security policy without inline
scripts and styles.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping

from fastapi import APIRouter, Request, Response

from server.errors import RequestError
from server.page import HTML_FILES, STATIC_FILES, page_file

router = APIRouter(include_in_schema=False)

NONCE_MARK = b"STYLE_NONCE"
"""Stands in an HTML file for the nonce. wavesurfer.js writes one style element into its shadow root and needs it."""

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self' 'nonce-{nonce}'",
        "img-src 'self' data:",  # swagger-ui.css holds its icons as data
        "connect-src 'self'",
        "media-src 'self' blob:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)

HEADERS: Mapping[str, str] = {
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "microphone=(self), camera=(), geolocation=(), display-capture=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


@router.api_route("/", methods=["GET", "HEAD"])
def page() -> Response:
    """Send the page that records, sends and shows a clip."""
    return html(HTML_FILES["/"])


@router.api_route("/docs", methods=["GET", "HEAD"])
def docs() -> Response:
    """Send the API documentation page; it reads `/openapi.json`."""
    return html(HTML_FILES["/docs"])


@router.api_route("/static/{name:path}", methods=["GET", "HEAD"])
def static(request: Request, name: str) -> Response:
    """Send a file of the page, or 304 if the browser has it.

    Raises:
        RequestError: `not_found` if the page has no such file.
    """
    if f"/static/{name}" not in STATIC_FILES:
        raise RequestError("not_found", "There is no such file; the page is at /.")
    file = page_file(name)
    headers = {**HEADERS, "cache-control": "no-cache", "etag": file.etag, "vary": "accept-encoding"}
    headers["content-security-policy"] = "default-src 'none'; frame-ancestors 'none'"
    if request.headers.get("if-none-match") == file.etag:
        return Response(status_code=304, headers=headers)
    body = file.body
    if accepts_gzip(request.headers.get("accept-encoding", "")):
        headers["content-encoding"] = "gzip"
        body = file.compressed
    return Response(body, media_type=file.media_type, headers=headers)


def html(name: str) -> Response:
    """Return an HTML file with a fresh nonce in its body and its policy."""
    nonce = secrets.token_urlsafe(18)
    file = page_file(name)
    headers = {
        **HEADERS,
        "cache-control": "no-store",
        "content-security-policy": POLICY.format(nonce=nonce),
    }
    return Response(file.body.replace(NONCE_MARK, nonce.encode()), media_type=file.media_type, headers=headers)


def accepts_gzip(header: str) -> bool:
    """Return whether an Accept-Encoding header names gzip without refusing it."""
    for item in header.lower().split(","):
        coding, _, quality = item.replace(" ", "").partition(";q=")
        if coding == "gzip":
            return quality.strip("0.") != "" if quality else True
    return False
