"""Quotas of several replicas, with a real Redis server: exact limits, leases that expire, and outages without a 5xx."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis import Redis

from hyper_model.errors import HyperError
from server import api_keys as keys
from server import quota_store
from server.errors import RequestError
from server.quota_store import LEASE_S, REPLICAS, QuotaStore, SharedQuotas, leases_key, levels_key
from server.quotas import Tenant
from server.settings import Settings
from server.telemetry.metrics import Metrics
from tests.process import serve_process
from tests.redis_server import RedisServer, needs_redis, redis_server
from tests.serving import Live, running, scripted, tone, wait_for

pytestmark = needs_redis


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait long for the store, so that a busy machine is no outage."""
    monkeypatch.setattr(quota_store, "TIMEOUT_S", 60.0)


def key_with(**limits: Any) -> keys.Key:
    return keys.Key(name="a", sha256="0" * 64, starts="hyp_", created="2026-01-01T00:00:00Z", **limits)  # pyright: ignore


def store_of(redis: RedisServer, **fields: Any) -> QuotaStore:
    return QuotaStore(Settings(quota_url=redis.url, **fields), Metrics())


@contextlib.asynccontextmanager
async def replicas(redis: RedisServer, num: int) -> AsyncIterator[list[QuotaStore]]:
    """Run the stores of several replicas; each has counted all of them."""
    stores = [store_of(redis) for _ in range(num)]
    for store in stores:
        await store.start()
    for store in stores:
        await store.beat()
        assert (store.is_up, store.num_replicas) == (True, num)
    try:
        yield stores
    finally:
        for store in stores:
            await store.close()


async def code_of(tenant: Tenant, *, audio_s: float = 0.0) -> str:
    """Enter and charge; return the code of the refusal, or an empty string."""
    try:
        async with tenant.enter():
            await tenant.charge(audio_s)
    except RequestError as error:
        assert error.status == 429 and error.retry_after_s is not None and error.retry_after_s >= 1
        return error.code
    return ""


@pytest.mark.usefixtures("patient")
def test_parallel_requests_at_two_replicas_never_pass_a_limit_in_sum(redis: RedisServer) -> None:
    async def run() -> None:
        async with replicas(redis, 2) as stores:
            # The bucket of a day refills by one second of audio in 14 minutes, so the count is exact.
            tenants = [SharedQuotas(store).of(key_with(audio_s_per_day=100)) for store in stores]
            codes = Counter(await asyncio.gather(*(code_of(tenants[n % 2], audio_s=1.0) for n in range(400))))
            assert codes == {"": 100, "audio_quota_exceeded": 300}

            started_s = time.monotonic()
            other = key_with(requests_per_minute=100).model_copy(update={"name": "b"})
            tenants = [SharedQuotas(store).of(other) for store in stores]
            codes = Counter(await asyncio.gather(*(code_of(tenants[n % 2]) for n in range(400))))
            refilled = (time.monotonic() - started_s) * 100 / 60
            assert 100 <= codes[""] <= 100 + refilled and codes.keys() == {"", "rate_limit_exceeded"}

    asyncio.run(run())


def test_each_question_of_a_request_counts_in_both_replicas(redis: RedisServer) -> None:
    async def check() -> None:
        async with replicas(redis, 2) as stores:
            key = key_with(requests_per_minute=5)
            first, second = (SharedQuotas(store).of(key) for store in stores)
            async with first.enter():
                await first.charge_requests(2)
            async with second.enter():
                with pytest.raises(RequestError) as caught:
                    await second.charge_requests(2)
                assert (caught.value.code, caught.value.limit) == ("rate_limit_exceeded", 5)
                await second.charge_requests(1)

    asyncio.run(check())


def test_requests_in_flight_count_in_both_replicas_and_return_their_places(redis: RedisServer) -> None:
    async def run() -> None:
        async with replicas(redis, 2) as stores:
            one, two = (SharedQuotas(store).of(key_with(concurrent=2)) for store in stores)
            async with one.enter(), two.enter():
                with pytest.raises(RequestError) as caught:
                    async with two.enter():
                        pass
                assert (caught.value.code, caught.value.limit, caught.value.actual) == ("too_many_in_flight", 2, 2)
                assert (one.num_in_flight, two.num_in_flight) == (1, 1)
            assert await code_of(two) == "" and (one.num_in_flight, two.num_in_flight) == (0, 0)
            assert not any(store.leases for store in stores)

    asyncio.run(run())


def test_a_cancelled_request_returns_its_lease(redis: RedisServer) -> None:
    async def run() -> None:
        async with replicas(redis, 1) as (store,):
            tenant = SharedQuotas(store).of(key_with(concurrent=1))

            async def hold() -> None:
                async with tenant.enter():
                    await asyncio.sleep(60)

            task = asyncio.create_task(hold())
            while not store.leases:
                await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await asyncio.gather(*store.commands)
            assert await code_of(tenant) == ""

    asyncio.run(run())


def test_leases_of_a_dead_replica_expire_and_those_of_a_live_one_are_renewed(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quota_store, "LEASE_S", 2)
    monkeypatch.setattr(quota_store, "BEAT_S", 0.2)

    async def run() -> None:
        async with replicas(redis, 2) as (dead, alive):
            gone, kept = (SharedQuotas(store).of(key_with(concurrent=2)) for store in (dead, alive))
            async with contextlib.AsyncExitStack() as stack:
                await stack.enter_async_context(kept.enter())
                await stack.enter_async_context(gone.enter())
                # Its process dies: no more beats, and nothing is returned.
                dead.is_over.set()
                assert await code_of(kept) == "too_many_in_flight"
                while await code_of(kept) == "too_many_in_flight":
                    await asyncio.sleep(0.05)
                # The lease of the live replica is older than its life, and still counts.
                async with kept.enter():
                    assert await code_of(kept) == "too_many_in_flight"
                while alive.num_replicas == 2:
                    await asyncio.sleep(0.05)

    asyncio.run(asyncio.wait_for(run(), 60))


def test_without_the_store_each_replica_takes_its_share(redis: RedisServer) -> None:
    async def run() -> None:
        async with replicas(redis, 2) as stores:
            fields = {"requests_per_minute": 10, "concurrent": 4, "audio_s_per_day": 20}
            tenants = [SharedQuotas(store).of(key_with(**fields)) for store in stores]
            # Two of ten requests and four of twenty seconds are spent before the outage.
            for tenant in tenants:
                assert await code_of(tenant, audio_s=2.0) == ""
            await tenants[0].charge(0.0)
            redis.kill()
            for tenant, store in zip(tenants, stores, strict=True):
                codes = [await code_of(tenant, audio_s=1.0) for _ in range(6)]
                assert not store.is_up
                assert codes[:4] == [""] * 4 and set(codes[4:]) <= {"", "rate_limit_exceeded"}
                assert "rate_limit_exceeded" in codes
                assert tenant.max_in_flight == 2
                metrics = store.metrics.registry
                assert metrics.get_sample_value("hyper_quota_store_down") == 1
                assert metrics.get_sample_value("hyper_quota_store_errors_total") == 1
            redis.start()
            for store in stores:
                await store.beat()
                assert store.is_up and store.metrics.registry.get_sample_value("hyper_quota_store_down") == 0
            assert await code_of(tenants[0], audio_s=20.0) == ""

    asyncio.run(run())


def test_a_request_in_flight_over_an_outage_counts_afterwards(redis: RedisServer) -> None:
    async def run() -> None:
        async with replicas(redis, 1) as (store,):
            tenant = SharedQuotas(store).of(key_with(concurrent=2))
            async with tenant.enter():
                redis.kill()
                async with tenant.enter():
                    redis.start()
                    await store.beat()
                    assert await code_of(tenant) == "too_many_in_flight"

    asyncio.run(run())


def test_a_hung_store_delays_one_request_and_no_more(redis: RedisServer) -> None:
    async def run() -> None:
        async with replicas(redis, 1) as (store,):
            tenant = SharedQuotas(store).of(key_with(requests_per_minute=1000))
            assert redis.process is not None
            redis.process.send_signal(signal.SIGSTOP)
            try:
                assert [await code_of(tenant) for _ in range(50)] == [""] * 50
                assert store.metrics.registry.get_sample_value("hyper_quota_store_errors_total") == 1
            finally:
                redis.process.send_signal(signal.SIGCONT)
            await store.beat()
            assert store.is_up

    asyncio.run(run())


def test_a_clock_set_back_or_forward_neither_refills_nor_blocks_for_long(redis: RedisServer) -> None:
    async def run() -> None:
        async with replicas(redis, 1) as (store,):
            tenant = SharedQuotas(store).of(key_with(audio_s_per_day=10, concurrent=1))
            assert await code_of(tenant, audio_s=8.0) == ""
            with Redis.from_url(redis.url, decode_responses=True) as client:
                # Levels and a lease of a day from now, as after a clock that was ahead.
                client.hset(levels_key("a"), "audio_at", time.time() + 86_400)
                assert await code_of(tenant, audio_s=3.0) == "audio_quota_exceeded"
                assert await code_of(tenant, audio_s=0.5) == ""
                assert float(str(client.hget(levels_key("a"), "audio_at"))) < time.time() + 60
                assert 0 < int(str(client.ttl(levels_key("a")))) <= 86_400 + 60
                async with tenant.enter():
                    assert 0 < int(str(client.ttl(leases_key("a")))) <= 2 * LEASE_S
                assert client.zcard(leases_key("a")) == 0

    asyncio.run(run())


def test_a_store_that_refuses_commands_counts_as_away(tmp_path: Path) -> None:
    with redis_server("--requirepass", "secret") as redis:
        password = tmp_path / "password"
        password.write_text("wrong\n")

        async def run(*, is_up: bool) -> None:
            store = store_of(redis, quota_password_file=password, quota_replicas=4)
            await store.start()
            assert (store.is_up, store.num_replicas) == (is_up, 1 if is_up else 4)
            tenant = SharedQuotas(store).of(key_with(requests_per_minute=40))
            assert await code_of(tenant) == ""
            assert tenant.requests is not None and tenant.requests.capacity == (40 if is_up else 10)
            await store.close()

        asyncio.run(run(is_up=False))
        password.write_text("secret\n")
        asyncio.run(run(is_up=True))
        with pytest.raises(HyperError, match="HYPER_QUOTA_PASSWORD_FILE"):
            store_of(redis, quota_password_file=tmp_path / "absent")


def test_a_replica_that_ends_is_no_longer_counted(redis: RedisServer) -> None:
    async def run() -> None:
        async with replicas(redis, 3) as stores:
            await stores[0].close()
            await stores[1].beat()
            assert stores[1].num_replicas == 2
        with Redis.from_url(redis.url) as client:
            assert client.zcard(REPLICAS) == 0

    asyncio.run(run())


@contextlib.contextmanager
def two_services(redis: RedisServer, path: Path, **fields: Any) -> Iterator[tuple[Live, Live]]:
    settings = scripted(key_file=path, quota_url=redis.url, quota_replicas=2, max_in_flight=500, **fields)
    with running(settings) as one, running(settings) as two:
        wait_for(lambda: all(store_in(live).num_replicas == 2 for live in (one, two)))
        yield one, two


def store_in(live: Live) -> QuotaStore:
    store = live.service.quota_store
    assert store is not None
    return store


def ask(live: Live, secret: str, clip: bytes) -> httpx.Response:
    headers = {"authorization": f"Bearer {secret}"}
    fields = {"question": "What is heard?", "max_tokens": "4"}
    return live.client.post("/v1/audio/qa", data=fields, files={"file": ("clip", clip)}, headers=headers)


@pytest.mark.usefixtures("patient")
def test_two_services_answer_exactly_as_many_questions_as_one_key_may_ask(redis: RedisServer, tmp_path: Path) -> None:
    secret = keys.add(tmp_path / "keys.json", name="a", audio_s_per_day=10)
    clip = tone(0.5)
    with two_services(redis, tmp_path / "keys.json") as services, ThreadPoolExecutor(8) as clients:
        replies = list(clients.map(lambda n: ask(services[n % 2], secret, clip).status_code, range(60)))
    assert Counter(replies) == {200: 20, 429: 40}


def test_a_store_that_is_killed_and_started_again_under_load_causes_no_5xx(redis: RedisServer, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    secret = keys.add(path, name="a", requests_per_minute=1e6, concurrent=1000, audio_s_per_day=1e6)
    clip = tone(0.2)
    statuses: Counter[int] = Counter()
    is_over = threading.Event()
    with two_services(redis, path) as services, ThreadPoolExecutor(4) as clients:

        def load(live: Live) -> None:
            while not is_over.is_set():
                statuses[ask(live, secret, clip).status_code] += 1

        tasks = [clients.submit(load, services[n % 2]) for n in range(4)]
        for _ in range(2):
            wait_for(lambda: all(store_in(live).is_up for live in services), timeout_s=30)
            num_before = statuses.total()
            wait_for(lambda: statuses.total() > num_before + 10, timeout_s=60)  # noqa: B023
            redis.kill()
            wait_for(lambda: not any(store_in(live).is_up for live in services), timeout_s=30)
            num_before = statuses.total()
            wait_for(lambda: statuses.total() > num_before + 10, timeout_s=60)  # noqa: B023
            redis.start()
        wait_for(lambda: all(store_in(live).is_up for live in services), timeout_s=30)
        is_over.set()
        for task in tasks:
            task.result(60)
    assert statuses.keys() == {200}


def test_a_killed_replica_leaves_its_places_to_the_others(redis: RedisServer, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    secret = keys.add(path, name="a", concurrent=1)
    environment = {
        "HYPER_ENGINE": "scripted",
        "HYPER_SCRIPTED_TOKEN_INTERVAL_S": "0.5",
        "HYPER_KEY_FILE": str(path),
        "HYPER_QUOTA_URL": redis.url,
    }
    headers = {"authorization": f"Bearer {secret}"}
    with (
        running(scripted(key_file=path, quota_url=redis.url)) as survivor,
        serve_process(environment, ready_timeout_s=120) as (process, url),
        Redis.from_url(redis.url) as client,
    ):
        files, fields = {"file": ("clip", tone(0.2))}, {"question": "What is heard?", "stream": "true"}
        with (
            contextlib.suppress(httpx.TransportError),
            httpx.stream("POST", f"{url}/v1/audio/qa", files=files, data=fields, headers=headers, timeout=60) as reply,
        ):
            assert reply.status_code == 200
            assert ask(survivor, secret, tone(0.2)).json()["error"]["code"] == "too_many_in_flight"
            os.kill(process.pid, signal.SIGKILL)
            process.wait(10)
        assert client.zcard(leases_key("a")) == 1
        wait_for(lambda: ask(survivor, secret, tone(0.2)).status_code == 200, timeout_s=4 * LEASE_S)
