"""Early ends of work: clients that disconnect, deadlines, overload, draining, and a dying engine."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import ExitStack, suppress
from typing import Any

import httpx
import pytest

from hyper_model.audio import Waveform
from server.api import stream
from server.api.lifecycle import decode_clip
from server.engines.protocol import ScriptedEngine
from server.request_context import RequestContext
from tests.serving import QUESTION, Live, assert_error, mp3, parse_events, running, scripted, slow_down, tone, wait_for


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_client_that_leaves_ends_the_work(slow: Live, is_stream: bool) -> None:
    before = slow.metric("hyper_aborted_total", phase="generate", by="client")
    thread = threading.Thread(target=leave_early, args=(slow, is_stream))
    thread.start()
    wait_for(lambda: slow.service.engine.num_in_flight == 1)
    thread.join()
    slow.wait_until_idle(2.0)
    assert slow.metric("hyper_aborted_total", phase="generate", by="client") == before + 1


def leave_early(service: Live, is_stream: bool) -> None:
    """Send a question, and close the connection while the engine writes."""
    clip = {"file": ("clip", tone())}
    fields = {"question": QUESTION, "stream": str(is_stream).lower()}
    with (
        suppress(httpx.ReadTimeout),
        httpx.Client(base_url=service.url, timeout=0.5) as client,
        client.stream("POST", "/v1/audio/qa", data=fields, files=clip) as response,
    ):
        for _ in zip(range(3), response.iter_lines(), strict=False):
            pass


def test_a_client_that_leaves_in_the_upload_is_counted(live: Live) -> None:
    before = live.metric("hyper_aborted_total", phase="upload", by="client")
    address = live.server.servers[0].sockets[0].getsockname()
    with socket.create_connection(address) as connection:
        head = (
            b"POST /v1/audio/qa HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 999\r\n\r\n{"
        )
        connection.sendall(head)
        wait_for(lambda: live.service.num_in_flight == 1)
    live.wait_until_idle()
    assert live.metric("hyper_aborted_total", phase="upload", by="client") == before + 1


def test_decoding_ends_with_its_request(live: Live) -> None:
    clip = mp3(500.0)

    def decoding(data: bytes) -> Coroutine[Any, Any, Waveform]:
        return decode_clip(live.service, RequestContext("x", is_body_complete=True), data)

    async def give_up() -> float:
        tasks = [asyncio.create_task(decoding(clip)) for _ in range(8)]
        await asyncio.sleep(0.1)
        assert not any(task.done() for task in tasks)
        for task in tasks:
            task.cancel()
        started_s = time.monotonic()
        await asyncio.gather(*tasks, return_exceptions=True)
        # The places of decoding and waiting requests are free.
        await decoding(tone())
        return time.monotonic() - started_s

    before = live.metric("hyper_decoder_deaths_total")
    assert live.run(give_up()) < 0.5
    assert live.metric("hyper_decode_in_flight") == 0
    assert live.metric("hyper_decoder_deaths_total") == before, "a client that leaves is no death"


def test_a_deadline_gives_504_with_what_there_is(slow: Live) -> None:
    reply = slow.ask(timeout_ms=1000)
    assert_error(reply, 504, "deadline_exceeded")
    partial = reply.json()["partial"]
    assert partial["trace"]["raw"].startswith("<THINK><PLANNING>M") and partial["reasoning"]["planning"]
    slow.wait_until_idle()
    name, data = slow.events(timeout_ms=1000)[-1]
    assert (name, data["error"]["code"]) == ("error", "deadline_exceeded") and data["partial"]["trace"]["raw"]


def test_a_deadline_before_the_first_token_has_no_words(live: Live) -> None:
    reply = live.ask(timeout_ms=1)
    assert_error(reply, 504, "deadline_exceeded")


@pytest.mark.parametrize("reads", [0, 3])
@pytest.mark.parametrize("is_drained", [False, True])
def test_a_client_that_stops_reading_does_not_keep_its_place(
    monkeypatch: pytest.MonkeyPatch, reads: int, is_drained: bool
) -> None:
    """The place is freed by its deadline, or by a drain: the last bytes have a time limit too."""
    monkeypatch.setattr(stream, "LAST_EVENT_TIMEOUT_S", 0.2)
    with running(scripted(scripted_token_interval_s=0.001, ping_interval_s=0.1, drain_timeout_s=0.2)) as service:
        request = httpx.Request(
            "POST",
            "http://x/v1/audio/qa",
            data={"question": QUESTION, "stream": "true", "timeout_ms": "60000" if is_drained else "2000"},
            files={"file": ("clip", tone())},
        )
        task = asyncio.run_coroutine_threadsafe(stop_reading(service, request, reads), service.loop)
        wait_for(lambda: service.service.engine.num_in_flight == 1)
        if is_drained:
            # The server itself would not wait for a request sent around it.
            asyncio.run_coroutine_threadsafe(service.service.drain(), service.loop)
        assert task.result(10) == reads
        assert service.service.num_in_flight == 0


async def stop_reading(service: Live, request: httpx.Request, num_reads: int) -> int:
    """Send a request as an ASGI server whose client reads some pieces of the reply and then stops."""
    headers = [(name.lower(), value) for name, value in request.headers.raw]
    scope = {"type": "http", "method": "POST", "path": "/v1/audio/qa", "query_string": b"", "headers": headers}
    bodies = iter([request.read()])
    num_sent = 0

    async def receive() -> dict[str, Any]:
        for body in bodies:
            return {"type": "http.request", "body": body, "more_body": False}
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Any) -> None:
        nonlocal num_sent
        if message["type"] == "http.response.body":
            if num_sent == num_reads:
                await asyncio.Event().wait()
            num_sent += 1

    app: Any = service.server.config.loaded_app
    await app(scope, receive, send)
    return num_sent


def test_silence_in_a_stream_is_broken_by_pings() -> None:
    with running(scripted(ping_interval_s=0.2)) as service:
        slow_down(service, 0.7)
        text = service.ask(stream="true", timeout_ms=2000).text
        assert text.count(": ping\n\n") >= 4
        assert parse_events(text)[-1][0] == "error"


def test_too_many_requests_get_503_and_a_time_to_come_back() -> None:
    with running(scripted(max_in_flight=2)) as service:
        slow_down(service, 0.01)
        threads = [threading.Thread(target=service.ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        wait_for(lambda: service.service.num_in_flight == 2)
        reply = service.ask()
        assert_error(reply, 503, "overloaded")
        assert reply.headers["retry-after"] == "1" and reply.json()["error"]["retryable"]
        assert service.client.get("/readyz").json() == {"ready": False, "reasons": ["overloaded"]}
        for thread in threads:
            thread.join()
        assert service.ask(max_tokens=10).status_code == 200


def test_draining_finishes_what_is_in_flight_and_refuses_the_rest() -> None:
    with running(scripted()) as service:
        slow_down(service, 0.005)
        replies: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: replies.append(service.ask()))
        thread.start()
        wait_for(lambda: service.service.engine.num_in_flight == 1)
        service.loop.call_soon_threadsafe(service.server.begin_drain)
        wait_for(lambda: service.service.state == "draining")
        assert_error(service.ask(), 503, "shutting_down")
        assert service.client.get("/readyz").json()["reasons"] == ["shutting_down"]
        assert service.client.get("/livez").status_code == 200
        thread.join()
        assert replies[0].status_code == 200 and replies[0].json()["termination"] == "complete"


@pytest.mark.parametrize(
    ("code", "end"),
    [
        ("shutting_down", lambda service: service.loop.call_soon_threadsafe(service.server.begin_drain)),
        ("engine_unavailable", lambda service: service.run(service.service.engine.stop())),
    ],
)
def test_what_cannot_be_finished_is_told_so(code: str, end: Callable[[Live], object]) -> None:
    """A drain timeout and a dying engine give a status without streaming, and an event with it."""
    with running(scripted(drain_timeout_s=0.3)) as service:
        slow_down(service, 0.1)
        found: list[Any] = []
        with ExitStack() as stack:
            for work in (service.ask, service.events):
                thread = threading.Thread(target=lambda work=work: found.append(work()))
                thread.start()
                stack.callback(thread.join, 10)
            wait_for(lambda: service.service.engine.num_in_flight == 2)
            end(service)
        reply = next(each for each in found if isinstance(each, httpx.Response))
        name, data = next(each for each in found if isinstance(each, list))[-1]
        assert_error(reply, 503, code)
        assert (name, data["error"]["code"], data["error"]["retryable"]) == ("error", code, True)


def test_a_dead_engine_is_503_and_not_ready() -> None:
    with running(scripted(max_engine_restarts=0)) as service:
        service.run(service.service.engine.stop())
        assert_error(service.ask(), 503, "engine_unavailable")
        ready = service.client.get("/readyz")
        assert (ready.status_code, ready.json()["reasons"]) == (503, ["engine_unavailable"])
        wait_for(lambda: service.service.failure is not None)


class BrokenStart(ScriptedEngine):
    """Engine with a failing start."""

    async def start(self) -> None:
        """Fail."""
        raise RuntimeError("no memory")


def test_an_engine_that_does_not_start_is_a_failure_of_the_service() -> None:
    from server.engines.scripted import scripted_checkpoint

    with (
        pytest.raises(AssertionError, match="no memory"),
        running(scripted(), BrokenStart(scripted_checkpoint().tokenizer)),
    ):
        pass
