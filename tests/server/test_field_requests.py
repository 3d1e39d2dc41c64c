"""Requests as proxies, browsers and HTTP libraries send them: addresses, lengths, idle connections and origins."""

from __future__ import annotations

import socket
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from server.app import create_app
from server.serving import uvicorn_config
from server.settings import Settings
from tests.process import post, serve_process
from tests.serving import QUESTION, Live, running, scripted, tone

ORIGIN = "https://app.example.com"


@pytest.mark.parametrize("path", ["/v1/audio/qa/", "/v1/audio/qa//"])
def test_a_slash_at_the_end_of_an_address_is_answered_and_not_redirected(live: Live, path: str) -> None:
    reply = live.client.post(path, data={"question": QUESTION}, files={"file": ("c", tone())})
    assert reply.status_code == 200 and not reply.history
    for other in ("/livez/", "/v1/info/", "/metrics/"):
        assert live.client.get(other).status_code == 200
    missing = live.client.get("/v1/audio/")
    assert missing.status_code == 404 and missing.json()["error"]["code"] == "not_found"


def test_a_slash_at_the_end_does_not_pass_the_keys(tmp_path: Any) -> None:
    from server import api_keys

    file = tmp_path / "keys.json"
    api_keys.add(file, name="a", scopes=("ask",), expires=None)
    with running(scripted(key_file=file)) as live:
        assert live.client.get("/livez/").status_code == 200
        for path in ("/v1/info/", "/v1/audio/qa/", "/metrics/", "/livez/x/"):
            assert live.client.get(path).status_code == 401, path


def test_two_lengths_are_refused_and_the_connection_is_closed(live: Live) -> None:
    host, port = live.url.removeprefix("http://").split(":")
    smuggled = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
    head = (
        b"POST /v1/audio/qa HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    )
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(head + smuggled)
        received = b""
        while part := connection.recv(65_536):
            received += part
    assert received.startswith(b"HTTP/1.1 400") and b"invalid_http" in received
    assert b"connection: close" in received.lower() and received.count(b"HTTP/1.1 ") == 1


def config_of(**settings: Any) -> Any:
    made = Settings(engine="scripted", **settings)
    return uvicorn_config(create_app(made), made)


def test_idle_connections_outlive_those_of_common_proxies() -> None:
    # nginx, Apache and AWS keep idle connections for 60 s, Traefik for 90 s, Caddy for 120 s, Azure for 240 s.
    assert config_of().timeout_keep_alive > 240
    assert config_of(keep_alive_s=620).timeout_keep_alive == 620
    with pytest.raises(ValidationError):
        Settings(keep_alive_s=0)


def test_an_idle_connection_is_closed_after_the_setting() -> None:
    with serve_process({"HYPER_ENGINE": "scripted", "HYPER_KEEP_ALIVE_S": "1"}) as (_, url):
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert connection.recv(65_536).startswith(b"HTTP/1.1 200")
            while connection.recv(65_536):
                pass
        assert post(url).status_code == 200


def test_forwarded_headers_are_taken_from_named_proxies_alone() -> None:
    assert config_of().proxy_headers is False
    trusted = config_of(forwarded_allow_ips="10.0.0.7, 192.168.0.0/16")
    assert trusted.proxy_headers is True and trusted.forwarded_allow_ips == "10.0.0.7, 192.168.0.0/16"
    for text in ("*", "proxy.local", "10.0.0.7;10.0.0.8"):
        with pytest.raises(ValidationError):
            Settings(forwarded_allow_ips=text)


def preflight(live: Live, origin: str) -> httpx.Response:
    headers = {
        "origin": origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization",
    }
    return live.client.options("/v1/audio/qa", headers=headers)


def test_pages_of_other_origins_are_refused_unless_they_are_listed(live: Live) -> None:
    assert "access-control-allow-origin" not in preflight(live, ORIGIN).headers
    with running(scripted(cors_origins=f"{ORIGIN}, http://localhost:3000/")) as open_live:
        for origin in (ORIGIN, "http://localhost:3000"):
            reply = preflight(open_live, origin)
            assert reply.status_code == 200 and reply.headers["access-control-allow-origin"] == origin
            reply = open_live.client.post(
                "/v1/audio/qa",
                data={"question": QUESTION},
                files={"file": ("c", tone())},
                headers={"origin": origin},
            )
            assert reply.status_code == 200 and reply.headers["access-control-allow-origin"] == origin
            assert "x-request-id" in reply.headers["access-control-expose-headers"]
        # An error must be readable for the page, too.
        wrong = open_live.client.post("/v1/audio/qa", headers={"origin": ORIGIN})
        assert wrong.status_code == 415 and wrong.headers["access-control-allow-origin"] == ORIGIN
        assert "access-control-allow-origin" not in preflight(open_live, "https://evil.example").headers
    for text in ("app.example.com", "https://app.example.com/path", "ftp://x"):
        with pytest.raises(ValidationError):
            Settings(cors_origins=text)
