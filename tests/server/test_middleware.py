"""The middleware: request ids, the body limit during upload, slow uploads, and the last-resort error."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import socket
import time
from collections.abc import AsyncGenerator, Iterator, Sequence

import httpx
import pytest

from server.engines.protocol import GenerationRequest, ScriptedEngine, TokenChunk
from server.engines.scripted import scripted_checkpoint
from server.telemetry.logs import JsonFormatter
from tests.serving import Live, running, scripted, tone, wait_for

MEBIBYTE = 1024 * 1024


@pytest.fixture(scope="module")
def small() -> Iterator[Live]:
    """Service with room for clips of 1 MiB, and short timeouts."""
    settings = scripted(max_audio_bytes=MEBIBYTE, upload_idle_timeout_s=0.3, upload_timeout_s=1.0)
    with running(settings) as service:
        yield service


def test_every_reply_has_a_request_id(live: Live) -> None:
    replies = [live.client.get(path) for path in ("/livez", "/nowhere", "/v1/audio/qa")] + [live.ask(b"no audio")]
    ids = [reply.headers["x-request-id"] for reply in replies]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"req_[0-9a-f]{32}", each) for each in ids)
    assert replies[-1].json()["error"]["request_id"] == ids[-1]


@pytest.mark.parametrize(
    ("offered", "is_taken"),
    [("trace-1.b_2", True), ("x" * 65, False), ("two words", False), ("a\tb", False), ("", False)],
)
def test_a_plain_request_id_of_the_client_is_kept(live: Live, offered: str, is_taken: bool) -> None:
    returned = live.client.get("/livez", headers={"x-request-id": offered}).headers["x-request-id"]
    assert (returned == offered) is is_taken


def test_a_body_announced_too_large_is_refused_before_it_is_read(small: Live) -> None:
    with raw_post(small, "content-length: 524288000") as connection:
        reply = connection.recv(65536).decode()
    assert reply.startswith("HTTP/1.1 413") and "connection: close" in reply
    error = json.loads(reply.partition("\r\n\r\n")[2])["error"]
    assert (error["code"], error["limit"], error["actual"]) == (
        "body_too_large",
        small.service.settings.max_body_bytes,
        524288000,
    )
    assert small.ask().status_code == 200


def test_a_client_that_sends_500_mb_gets_the_refusal(small: Live) -> None:
    head = b'--x\r\ncontent-disposition: form-data; name="file"; filename="clip"\r\n\r\n'
    block = bytes(MEBIBYTE)
    body = (block if number else head for number in range(500))
    headers = {"content-type": "multipart/form-data; boundary=x"}
    reply = httpx.post(f"{small.url}/v1/audio/qa", content=body, headers=headers)
    assert (reply.status_code, reply.json()["error"]["code"]) == (413, "body_too_large")
    assert small.ask().status_code == 200


def test_a_body_without_a_length_is_counted(small: Live) -> None:
    body = (bytes(MEBIBYTE) for _ in range(8))
    headers = {"content-type": "application/json"}
    reply = small.client.post("/v1/audio/qa", content=body, headers=headers)
    assert (reply.status_code, reply.json()["error"]["code"]) == (413, "body_too_large")


def test_the_clip_itself_has_a_limit_below_the_bodys(small: Live) -> None:
    reply = small.ask(tone(40.0))
    error = reply.json()["error"]
    assert (reply.status_code, error["code"], error["limit"]) == (413, "audio_too_large", MEBIBYTE)


def test_an_upload_that_stands_still_is_ended(small: Live) -> None:
    with raw_post(small, "content-length: 1000") as connection:
        connection.sendall(b"{")
        reply = connection.recv(65536).decode()
    assert reply.startswith("HTTP/1.1 408") and '"upload_timeout"' in reply
    small.wait_until_idle()


def test_an_upload_that_drips_is_ended(small: Live) -> None:
    started_s = time.monotonic()
    with raw_post(small, "content-length: 1000") as connection:
        connection.settimeout(0.1)
        reply = b""
        while not reply and time.monotonic() - started_s < 5:
            connection.sendall(b" ")
            with contextlib.suppress(TimeoutError):
                reply = connection.recv(65536)
    assert reply.startswith(b"HTTP/1.1 408")


def test_headers_without_end_are_refused(live: Live) -> None:
    with socket.create_connection(live.server.servers[0].sockets[0].getsockname(), timeout=5) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\n" + b"x-filler: " + b"a" * 100_000)
        head, _, body = connection.recv(4096).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 431") and b"x-request-id: req_" in head
    error = json.loads(body)["error"]
    assert (error["code"], error["limit"]) == ("headers_too_large", 16384)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("localhost:8000", 200),
        ("127.0.0.1:1", 200),
        ("[::1]:8000", 200),
        ("192.168.0.7", 200),
        ("hyper", 200),
        ("hyper.localhost", 200),
        ("[::ffff:127.0.0.1]:8000", 200),
        ("[::1", 200),
        ("evil.example", 403),
        ("[evil.example]", 403),
        ("evil.example:8000", 403),
        ("evil.example.", 403),
        ("127.0.0.1.evil.example", 403),
        ("evil.example/livez", 403),
        ("evil.example@127.0.0.1", 403),
        ("127.0.0.1@evil.example", 403),
    ],
)
def test_an_open_service_does_not_answer_to_a_domain(live: Live, host: str, status: int) -> None:
    """A page of such a domain would run in a browser on this machine."""
    assert live.client.get("/v1/info", headers={"host": host}).status_code == status


class BrokenEngine(ScriptedEngine):
    """Engine with an unexpected failure once `breaks` is set."""

    breaks = False

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk, None]:
        """Yield the script, or fail."""
        if self.breaks:
            raise ZeroDivisionError("secret: /srv/models/key")
        async for chunk in super().generate(request):
            yield chunk

    async def score(self, request: GenerationRequest, candidates: Sequence[Sequence[int]]) -> list[float]:
        """Score the candidates."""
        return await super().score(request, candidates)


def test_an_unforeseen_error_tells_the_client_nothing(caplog: pytest.LogCaptureFixture) -> None:
    engine = BrokenEngine(scripted_checkpoint().tokenizer)
    with running(scripted(), engine) as service:
        engine.breaks = True
        reply = service.ask()
        assert (reply.status_code, reply.json()["error"]["code"]) == (500, "internal_error")
        assert "secret" not in reply.text and "ZeroDivision" not in reply.text
        name, data = service.events()[-1]
        assert (name, data["error"]["code"]) == ("error", "internal_error") and "secret" not in str(data)
        engine.breaks = False
        assert service.ask().status_code == 200
    assert any(record.exc_info for record in caplog.records)


def test_the_log_has_one_json_line_a_request_and_no_words_of_it(live: Live, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        reply = live.ask(question="Where is the treasure buried?", choices=["under the oak", "in the cellar"])
        # It is written after the reply, so the client may be faster.
        wait_for(lambda: any(each.name == "hyper.access" for each in caplog.records))
    assert reply.status_code == 200
    lines = [json.loads(JsonFormatter().format(record)) for record in caplog.records]
    line = next(each for each in lines if each.get("request_id") == reply.headers["x-request-id"])
    assert (line["endpoint"], line["status"], line["outcome"]) == ("/v1/audio/qa", 200, "ok")
    assert {"duration_ms", "body_bytes", "audio_s", "completion_tokens", "termination"} <= set(line)
    assert not [word for word in ("treasure", "oak", "cellar", "loud sound") if word in json.dumps(lines)]


@contextlib.contextmanager
def raw_post(service: Live, *headers: str) -> Iterator[socket.socket]:
    """Open a connection and send the head of a POST."""
    address = service.server.servers[0].sockets[0].getsockname()
    head = ["POST /v1/audio/qa HTTP/1.1", "host: test", "content-type: application/json", *headers]
    with socket.create_connection(address, timeout=10) as connection:
        connection.sendall("\r\n".join([*head, "", ""]).encode())
        yield connection
