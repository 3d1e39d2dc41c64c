"""The page's files over HTTP: headers, caching, names, vendored files."""

from __future__ import annotations

import gzip
import hashlib
import json
import re

import httpx
import pytest

from server import page
from tests.serving import Live, assert_error

HTML_PATHS = ("/", "/docs")


def policy_of(reply: httpx.Response) -> dict[str, str]:
    directives = (directive.partition(" ") for directive in reply.headers["content-security-policy"].split("; "))
    return {name: sources for name, _, sources in directives}


@pytest.mark.parametrize("path", HTML_PATHS)
def test_the_policy_allows_no_inline_script_and_no_other_host(live: Live, path: str) -> None:
    reply = live.client.get(path)
    assert reply.status_code == 200 and reply.headers["content-type"] == "text/html; charset=utf-8"
    policy = policy_of(reply)
    assert policy["default-src"] == "'none'" and policy["script-src"] == "'self'"
    assert not re.search(r"unsafe|https?:|\*", reply.headers["content-security-policy"])
    assert reply.headers["permissions-policy"].startswith("microphone=(self)")
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert reply.headers["cache-control"] == "no-store"
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)|https?://", reply.text)


def test_each_reply_has_its_own_nonce(live: Live) -> None:
    nonces: set[str] = set()
    for _ in range(2):
        reply = live.client.get("/")
        (nonce,) = re.findall(r'data-style-nonce="([\w-]{20,})"', reply.text)
        assert f"'nonce-{nonce}'" in policy_of(reply)["style-src"]
        nonces.add(nonce)
    assert len(nonces) == 2


@pytest.mark.parametrize("path", HTML_PATHS)
def test_every_file_that_the_page_names_is_served(live: Live, path: str) -> None:
    pending = set(re.findall(r'(?:src|href)="(static/[^"]+)"', live.client.get(path).text))
    assert pending
    seen: set[str] = set()
    while pending:
        name = pending.pop()
        seen.add(name)
        reply = live.client.get(f"/{name}")
        assert reply.status_code == 200, name
        if name.endswith(".js") and "/vendor/" not in name:
            assert reply.headers["content-type"].startswith("text/javascript")
            found = {
                str(httpx.URL(f"/{name}").join(each)).lstrip("/") for each in re.findall(r'from "(.+)"', reply.text)
            }
            pending |= found - seen


def test_a_file_is_compressed_and_not_sent_again(live: Live) -> None:
    path = "/static/app.js"
    plain = live.client.get(path, headers={"accept-encoding": "identity"})
    assert "content-encoding" not in plain.headers
    with live.client.stream("GET", path, headers={"accept-encoding": "br, gzip"}) as reply:
        assert reply.headers["content-encoding"] == "gzip"
        assert gzip.decompress(b"".join(reply.iter_raw())) == plain.content
    for refused in ("gzip;q=0", "gzip;q=0.0", "br"):
        assert "content-encoding" not in live.client.get(path, headers={"accept-encoding": refused}).headers
    again = live.client.get(path, headers={"if-none-match": plain.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert live.client.head("/").status_code == live.client.head(path).status_code == 200


@pytest.mark.parametrize(
    "name",
    ["none.js", "index.html", "__init__.py", "vendor", "vendor/", "vendor/vendored.json", "../app.py", "%2e%2e/app.py"],
)
def test_other_names_are_not_served(live: Live, name: str) -> None:
    request = live.client.build_request("GET", live.url)
    request.url = request.url.copy_with(raw_path=f"/static/{name}".encode())
    assert_error(live.client.send(request), 404, "not_found")


def test_vendored_files_are_the_released_ones_and_have_their_licences() -> None:
    folder = page.DIRECTORY / "vendor"
    packages = json.loads((folder / "vendored.json").read_text())
    named = {name: facts["sha256"] for package in packages for name, facts in package["files"].items()}
    assert named == {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in named}
    licences = {package["licence_file"] for package in packages}
    assert all((folder / name).stat().st_size > 500 for name in licences)
    others = {path.name for path in folder.iterdir()} - named.keys() - licences
    assert others == {"vendored.json", "swagger-ui-bundle.js.LICENSE.txt"}
