"""The limiter: order of requests, cancellation, and predicted waiting times."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import socket
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

import httpx
import pytest

from server.engines.protocol import ScriptedEngine
from server.limiter import PriorityLimiter
from server.telemetry.labels import Priority
from tests.serving import QUESTION, Live, assert_error, running, scripted, tone, wait_for


def run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(work(), 20))


def test_no_more_work_than_places_and_the_urgent_first() -> None:
    async def work() -> None:
        line, order, most = PriorityLimiter(2), list[str](), 0
        is_open = asyncio.Event()

        async def enter(name: str, priority: Priority) -> None:
            nonlocal most
            async with line.slot(priority):
                order.append(name)
                most = max(most, line.num_working)
                await is_open.wait()

        tasks: list[asyncio.Task[None]] = []
        for name in "abcdef":
            tasks.append(asyncio.create_task(enter(name, "interactive" if name in "df" else "batch")))
            await asyncio.sleep(0)
        assert order == ["a", "b"] and line.num_waiting == 4
        is_open.set()
        await asyncio.gather(*tasks)
        assert order == ["a", "b", "d", "f", "c", "e"] and most == 2
        assert (line.num_working, line.num_waiting) == (0, 0)

    run(work)


@pytest.mark.parametrize("seed", range(5))
def test_no_place_is_lost_whoever_leaves_when(seed: int) -> None:
    async def work() -> None:
        rng, line = random.Random(seed), PriorityLimiter(3)

        async def enter() -> None:
            async with line.slot(rng.choice(["interactive", "batch"])):
                assert line.num_working <= 3
                await asyncio.sleep(rng.random() / 100)
                if rng.random() < 0.2:
                    raise ZeroDivisionError

        tasks = [asyncio.create_task(enter()) for _ in range(300)]
        while not all(task.done() for task in tasks):
            await asyncio.sleep(0.001)
            for task in rng.sample(tasks, 5):
                if rng.random() < 0.5:
                    task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert (line.num_working, line.num_waiting) == (0, 0)
        async with asyncio.timeout(1), line.slot("batch"), line.slot("batch"), line.slot("batch"):
            assert line.num_working == 3

    run(work)


def test_a_place_that_is_given_to_somebody_who_leaves_goes_on() -> None:
    async def work() -> None:
        line = PriorityLimiter(1)
        await line.take("interactive")
        first = asyncio.create_task(line.take("interactive"))
        second = asyncio.create_task(line.take("interactive"))
        await asyncio.sleep(0)
        line.give()
        # The place is now the first one's, but its task has not run yet.
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        async with asyncio.timeout(1):
            await second
        line.give()
        assert line.num_working == 0

    run(work)


def test_a_wait_is_foretold_by_what_work_took() -> None:
    async def work() -> None:
        line = PriorityLimiter(4)
        assert line.wait_s(100) == 0.0, "nothing is known yet"
        line.work_s = 2.0
        assert line.wait_s(3) == 0.0
        assert line.wait_s(4) == pytest.approx(0.5)
        assert line.wait_s(11) == pytest.approx(4.0)

    run(work)


def test_work_that_was_cut_short_teaches_nothing() -> None:
    async def work() -> None:
        line = PriorityLimiter(1)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05), line.slot("batch"):
                await asyncio.sleep(1)
        assert line.work_s is None
        async with line.slot("batch"):
            await asyncio.sleep(0.05)
        assert line.work_s == pytest.approx(0.05, abs=0.04)

    run(work)


def test_a_request_that_would_wait_too_long_is_refused_before_its_body() -> None:
    with running(scripted(max_num_seqs=1, max_in_flight=32, max_queue_wait_s=5.0)) as service:
        with busy(service, 1):
            service.service.limiter.work_s = 30.0
            with socket.create_connection(service.server.servers[0].sockets[0].getsockname(), timeout=10) as connection:
                head = b"host: x\r\ncontent-type: application/json\r\ncontent-length: 9999\r\n\r\n"
                connection.sendall(b"POST /v1/audio/qa HTTP/1.1\r\n" + head)
                reply = connection.recv(65536).decode()
            assert reply.startswith("HTTP/1.1 503") and '"overloaded"' in reply
            # Thirty seconds of work less the five permitted, and a place's time, spread by a quarter.
            (retry_after,) = re.findall(r"retry-after: (\d+)\r", reply)
            assert 55 <= int(retry_after) <= 60
        service.service.limiter.work_s = 0.1
        assert ask(service).status_code == 200


def test_a_deadline_before_its_turn_is_refused_before_decoding() -> None:
    with running(scripted(max_num_seqs=1)) as service, busy(service, 1):
        service.service.limiter.work_s = 5.0
        decoded = service.metric("hyper_stage_seconds_count", stage="decode")
        reply = ask(service, timeout_ms=2000)
        assert_error(reply, 503, "overloaded")
        assert int(reply.headers["retry-after"]) >= 1
        # Its stages are counted after its reply.
        wait_for(lambda: service.metric("hyper_rejected_total", reason="overloaded") == 1)
        assert service.metric("hyper_stage_seconds_count", stage="decode") == decoded


def test_batch_leaves_room_for_the_interactive() -> None:
    with running(scripted(max_num_seqs=1, max_in_flight=4, max_batch_share=0.5)) as service, busy(service, 2):
        service.service.limiter.work_s = None
        reply = ask(service, headers={"x-hyper-priority": "batch"})
        assert_error(reply, 503, "overloaded")
        assert "batch" in reply.json()["error"]["message"]
        fast(service)
        assert ask(service).status_code == 200


def test_the_interactive_overtake_batch_in_the_engines_line() -> None:
    with running(scripted(max_num_seqs=1)) as service:
        ends: list[str] = []
        with busy(service, 1):
            threads: list[threading.Thread] = []
            for number, name in enumerate(["batch", "batch", "interactive", "interactive"]):
                thread = threading.Thread(
                    target=lambda name=name: (ask(service, headers={"x-hyper-priority": name}), ends.append(name))
                )
                thread.start()
                threads.append(thread)
                wait_for(lambda number=number: service.service.limiter.num_waiting == number + 1)
            # Fast, but slow enough to separate the clients in time.
            service.service.engine.token_interval_s = 0.005  # pyright: ignore
            for thread in threads:
                thread.join()
        assert ends == ["interactive", "interactive", "batch", "batch"]
        waits = service.metric("hyper_queue_wait_seconds_count")
        assert waits >= 5


def test_the_wait_counts_as_queue_and_against_the_deadline() -> None:
    with running(scripted(max_num_seqs=1)) as service, busy(service, 1):
        service.service.limiter.work_s = None
        before = service.metric("hyper_aborted_total", phase="queue", by="deadline")
        assert_error(ask(service, timeout_ms=500), 504, "deadline_exceeded")
        assert service.metric("hyper_aborted_total", phase="queue", by="deadline") == before + 1
        assert service.service.limiter.num_waiting == 0
        replies: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: replies.append(ask(service)))
        thread.start()
        wait_for(lambda: service.service.limiter.num_waiting == 1)
        time.sleep(0.3)
        fast(service)
        thread.join()
        assert replies[0].json()["timings_ms"]["queue"] >= 250


def test_a_client_that_leaves_the_line_leaves_no_trace() -> None:
    with running(scripted(max_num_seqs=1)) as service, busy(service, 1):
        service.service.limiter.work_s = None
        thread = threading.Thread(target=leave, args=(service,))
        thread.start()
        wait_for(lambda: service.service.limiter.num_waiting == 1)
        thread.join()
        wait_for(lambda: service.service.num_in_flight == 1)
        assert service.service.limiter.num_waiting == 0
        assert service.metric("hyper_aborted_total", phase="queue", by="client") == 1


def leave(service: Live) -> None:
    """Send a question, and close the connection half a second later."""
    with contextlib.suppress(httpx.ReadTimeout):
        ask(service, timeout_s=0.5)


def test_every_request_is_accounted_for_under_overload() -> None:
    """Clients and counters agree on refused, answered and cancelled requests."""
    with running(scripted(max_num_seqs=2, max_in_flight=6, scripted_token_interval_s=0.0005)) as service:
        statuses: list[int] = []
        refused_ms: list[float] = []

        def work(seed: int) -> None:
            rng = random.Random(seed)
            for _ in range(6):
                try:
                    reply = ask(service, timeout_s=rng.choice([0.1, 30, 30]))
                except httpx.TransportError:
                    statuses.append(499)
                    continue
                statuses.append(reply.status_code)
                if reply.status_code != 200:
                    assert reply.status_code == 503 and int(reply.headers["retry-after"]) >= 1
                    refused_ms.append(1000 * reply.elapsed.total_seconds())

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        service.wait_until_idle()
        counted = {200: outcome(service, "ok"), 503: outcome(service, "overloaded")}
        counted[499] = outcome(service, "client_closed_request")
        refused_ms.sort()
        print(
            f"\noverload: {len(statuses)} requests, {statuses.count(200)} answered, {len(refused_ms)} refused, ", end=""
        )
        print(
            f"overload_rejection_ms p50 {refused_ms[len(refused_ms) // 2]:.0f} p99 {refused_ms[-1]:.0f}, unaccounted 0"
        )
        # A client may leave just as its answer is being sent.
        assert sum(counted.values()) == len(statuses) == 72
        assert statuses.count(200) <= counted[200] and statuses.count(503) <= counted[503]
        assert service.service.limiter.num_working == 0 and service.service.decode_limiter.num_working == 0
        assert not [task for task in service.service.tasks if not task.done()]


def outcome(service: Live, name: str) -> int:
    return int(service.metric("hyper_request_seconds_count", endpoint="/v1/audio/qa", outcome=name))


class busy:  # noqa: N801
    """Context in which places in the engine are occupied, unless `fast` releases them."""

    def __init__(self, service: Live, count: int) -> None:
        self.service = service
        self.threads = [threading.Thread(target=ask, args=(service,)) for _ in range(count)]

    def __enter__(self) -> None:
        slow(self.service)
        for thread in self.threads:
            thread.start()
        line = self.service.service.limiter
        wait_for(lambda: line.num_working + line.num_waiting == len(self.threads))

    def __exit__(self, *_: object) -> None:
        fast(self.service)
        for thread in self.threads:
            thread.join()


def slow(service: Live) -> None:
    assert isinstance(service.service.engine, ScriptedEngine)
    service.service.engine.token_interval_s = 0.05


def fast(service: Live) -> None:
    assert isinstance(service.service.engine, ScriptedEngine)
    service.service.engine.token_interval_s = 0.0


def ask(
    service: Live, *, headers: dict[str, str] | None = None, timeout_s: float = 60, **fields: Any
) -> httpx.Response:
    data = {"question": QUESTION, **fields}
    files = {"file": ("clip", tone(0.2))}
    return httpx.post(f"{service.url}/v1/audio/qa", data=data, files=files, headers=headers, timeout=timeout_s)
