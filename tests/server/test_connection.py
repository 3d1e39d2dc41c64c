"""Connections before a request: heads that are late, too large, or not HTTP."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import time
from collections.abc import Iterable, Iterator

import httpx
import pytest

from tests.serving import Live, running, scripted, wait_for


@pytest.fixture(scope="module")
def strict() -> Iterator[Live]:
    """Service with short timeouts and few connections."""
    with running(scripted(head_timeout_s=0.4, upload_idle_timeout_s=0.4, max_connections=40)) as service:
        yield service


@contextlib.contextmanager
def connected(service: Live) -> Iterator[socket.socket]:
    address = service.server.servers[0].sockets[0].getsockname()
    with socket.create_connection(address, timeout=5) as connection:
        yield connection


def reply_to(service: Live, *parts: bytes, pause_s: float = 0.0) -> tuple[bytes, float]:
    """Send the parts; return everything until the connection closes, and the seconds it took."""
    started_s = time.monotonic()
    received = b""
    with connected(service) as connection, contextlib.suppress(ConnectionError):
        for part in parts:
            connection.sendall(part)
            time.sleep(pause_s)
        while part := connection.recv(65536):
            received += part
    return received, time.monotonic() - started_s


def error_of(received: bytes, status: int, code: str) -> None:
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status}".encode()), received[:200]
    error = json.loads(body)["error"]
    assert error["code"] == code
    assert f"x-request-id: {error['request_id']}".encode() in head and b"connection: close" in head


def test_a_connection_that_says_nothing_is_closed(strict: Live) -> None:
    received, seconds = reply_to(strict)
    assert received == b"" and seconds > 0.3


def test_half_a_head_gets_408(strict: Live) -> None:
    for part in (b"G", b"GET /livez HTTP/1.1\r\n", b"GET /livez HTTP/1.1\r\nhost: x\r\n"):
        received, _ = reply_to(strict, part)
        error_of(received, 408, "head_timeout")


def test_a_head_that_drips_gets_408(strict: Live) -> None:
    started_s = time.monotonic()
    with connected(strict) as connection:
        received = b""
        connection.settimeout(0.05)
        while not received and time.monotonic() - started_s < 5:
            connection.sendall(b"a")
            with contextlib.suppress(TimeoutError):
                received = connection.recv(65536)
    error_of(received, 408, "head_timeout")


def test_the_second_head_of_a_connection_has_its_own_time(strict: Live) -> None:
    with connected(strict) as connection:
        for _ in range(3):
            connection.sendall(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n")
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
            time.sleep(0.3)
        connection.sendall(b"GET /livez")
        received = b""
        while part := connection.recv(65536):
            received += part
    error_of(received, 408, "head_timeout")


def test_a_slow_answer_is_no_slow_head(strict: Live) -> None:
    assert strict.ask(timeout_ms=2000).status_code == 200
    reply = strict.client.get("/livez")
    time.sleep(0.6)
    assert reply.status_code == strict.client.get("/livez").status_code == 200


def test_heads_beyond_every_bound(strict: Live) -> None:
    for head in (
        b"GET /livez HTTP/1.1\r\nx: " + b"a" * 100_000,
        b"GET /" + b"a" * 100_000,
        b"GET /livez HTTP/1.1\r\n" + b"x: y\r\n" * 20_000,
    ):
        received, _ = reply_to(strict, head)
        error_of(received, 431, "headers_too_large")
    many = b"GET /livez HTTP/1.1\r\nhost: x\r\n" + b"x: y\r\n" * 200 + b"connection: close\r\n\r\n"
    received, _ = reply_to(strict, many)
    assert received.startswith(b"HTTP/1.1 431") and b'"limit":100' in received
    assert strict.metric("hyper_rejected_total", code="431", reason="headers_too_large") == 4


NO_HTTP = {
    "garbage": b"\x00\x01\x02\xff\xfe\r\n\r\n",
    "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),
    "no version": b"GET /livez\r\n\r\n",
    "no host": b"GET /livez HTTP/1.1\r\n\r\n",
    "two hosts": b"GET /livez HTTP/1.1\r\nhost: x\r\nhost: y\r\n\r\n",
    "two lengths": b"POST /v1/audio/qa HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
    "a negative length": b"POST /v1/audio/qa HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
    "a long length": b"POST /v1/audio/qa HTTP/1.1\r\nhost: x\r\ncontent-length: " + b"9" * 5000 + b"\r\n\r\n",
    "a length in words": b"POST /v1/audio/qa HTTP/1.1\r\nhost: x\r\ncontent-length: ten\r\n\r\n",
    "a length with an underscore": b"POST /v1/audio/qa HTTP/1.1\r\nhost: x\r\ncontent-length: 1_0\r\n\r\n",
    "chunked and a length, chunks that are none": (
        b"POST /v1/audio/qa HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\ncontent-length: 3\r\n\r\nxyz\r\n"
    ),
    "an unknown coding": b"POST /v1/audio/qa HTTP/1.1\r\nhost: x\r\ntransfer-encoding: gzip\r\n\r\n",
    "a bare line feed in a value": b"GET /livez HTTP/1.1\r\nhost: x\r\nx: a\nb\r\n\r\n",
    "a NUL in a value": b"GET /livez HTTP/1.1\r\nhost: x\r\nx: a\0b\r\n\r\n",
    "a space in a name": b"GET /livez HTTP/1.1\r\nhost: x\r\nx y: z\r\n\r\n",
    "a path of bytes": b"GET /\xff\xfe HTTP/1.1\r\nhost: x\r\n\r\n",
    "the preface of HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a chunk of 2**64 bytes": (
        b"POST /v1/audio/qa HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        b"transfer-encoding: chunked\r\n\r\nffffffffffffffffff\r\n"
    ),
}


@pytest.mark.parametrize("name", NO_HTTP)
def test_what_is_no_http_is_a_bad_request_and_never_an_error_of_ours(strict: Live, name: str) -> None:
    received, _ = reply_to(strict, NO_HTTP[name])
    status = re.match(rb"HTTP/1.1 (\d{3})", received)
    assert status is None or 400 <= int(status[1]) < 500, received[:300]
    assert b"Traceback" not in received
    assert strict.client.get("/livez").status_code == 200


def num_closed(connections: Iterable[socket.socket]) -> int:
    """Return the number of connections closed by the service."""
    found = 0
    for connection in connections:
        connection.setblocking(False)
        try:
            found += connection.recv(1) == b""
        except BlockingIOError:
            pass
        except ConnectionError:
            found += 1
    return found


def test_connections_beyond_the_bound_are_dropped_and_the_others_served() -> None:
    # A long timeout: accepted connections must not be closed for a late head during the count.
    with running(scripted(max_connections=40)) as service:
        with contextlib.ExitStack() as stack:
            connections = [stack.enter_context(connected(service)) for _ in range(80)]
            wait_for(lambda: num_closed(connections) >= 38)
            wait_for(lambda: num_closed(connections) == service.metric("hyper_connections_dropped_total") <= 60)
        wait_for(lambda: is_served(service))


def is_served(service: Live) -> bool:
    try:
        return service.client.get("/livez").status_code == 200
    except httpx.TransportError:
        return False


def test_stalled_connections_do_not_slow_the_others_or_stay(strict: Live) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with contextlib.ExitStack() as stack:
        for _ in range(30):
            stack.enter_context(connected(strict)).sendall(b"GET /livez HT")
        assert strict.client.get("/livez").status_code == 200
    deadline_s = time.monotonic() + 3
    while len(os.listdir("/proc/self/fd")) > before + 1:
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
