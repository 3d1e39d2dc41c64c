"""Quotas of a key: rate, concurrency and seconds of audio, each refused with its name and a time to retry."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from server import api_keys as keys
from server.engines.protocol import ScriptedEngine
from server.errors import RequestError
from server.quotas import Bucket, Quotas, Tenant
from tests.serving import QUESTION, Live, assert_error, running, scripted, tone


def tenant(**limits: Any) -> Tenant:
    """Return the account of a key with these limits."""
    return Tenant(keys.Key(name="a", sha256="0" * 64, starts="hyp_", created="2026-01-01T00:00:00Z", **limits))  # pyright: ignore


def refusal(work: Callable[[], object]) -> RequestError:
    with pytest.raises(RequestError) as caught:
        work()
    assert caught.value.status == 429 and caught.value.kind.retryable
    return caught.value


async def enter_all(accounts: Sequence[Tenant]) -> int:
    """Enter all accounts and leave them; return the largest number in flight of the last."""
    async with contextlib.AsyncExitStack() as stack:
        for account in accounts:
            await stack.enter_async_context(account.enter())
        return accounts[-1].num_in_flight


def enter(*accounts: Tenant) -> int:
    return asyncio.run(enter_all(accounts))


def charge(account: Tenant, audio_s: float) -> None:
    asyncio.run(account.charge(audio_s))


def test_a_bucket_empties_and_fills(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now_s[0])
    bucket = Bucket(10.0, 60.0)
    bucket.at_s = now_s[0]
    assert bucket.wait_s(10.0) == 0.0
    bucket.take(10.0)
    assert bucket.wait_s(1.0) == pytest.approx(6.0)
    now_s[0] += 3.0
    assert bucket.wait_s(1.0) == pytest.approx(3.0)
    now_s[0] += 10_000.0
    assert bucket.wait_s(10.0) == 0.0 and bucket.level == 10.0
    assert bucket.wait_s(10.1) == float("inf")


def test_requests_a_minute() -> None:
    account = tenant(requests_per_minute=3)
    for _ in range(3):
        enter(account)
    fault = refusal(lambda: enter(account))
    assert (fault.code, fault.limit) == ("rate_limit_exceeded", 3)
    assert fault.retry_after_s is not None and 19 <= fault.retry_after_s <= 20


def test_places() -> None:
    account = tenant(concurrent=2)
    assert refusal(lambda: enter(account, account, account)).code == "too_many_in_flight"
    assert enter(account, account) == 2

    async def fail() -> None:
        async with account.enter():
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        asyncio.run(fail())
    assert account.num_in_flight == 0


def test_seconds_of_audio() -> None:
    account = tenant(audio_s_per_day=100.0)
    charge(account, 60.0)
    fault = refusal(lambda: charge(account, 60.0))
    assert (fault.code, fault.limit) == ("audio_quota_exceeded", 100.0)
    # Twenty seconds of a hundred per day.
    assert fault.retry_after_s == pytest.approx(0.2 * 86_400, rel=0.01)
    charge(account, 40.0)
    assert refusal(lambda: enter(account)).code == "audio_quota_exceeded"
    assert refusal(lambda: charge(tenant(audio_s_per_day=10.0), 11.0)).retry_after_s == 86_400


def test_no_limits_are_none() -> None:
    account = tenant()
    enter(*[account] * 1000)
    for _ in range(10):
        charge(account, 1e6)


def test_a_share_divides_each_limit_and_admits_at_least_one_request() -> None:
    key = tenant(requests_per_minute=2, concurrent=3, audio_s_per_day=100.0).key
    share = Tenant(key, num_replicas=4)
    assert share.max_in_flight == 1
    assert share.audio is not None and share.audio.capacity == 25.0
    # One request at once, and one every two minutes: a quarter of two per minute.
    assert share.requests is not None and (share.requests.capacity, share.requests.refill_s) == (1.0, 120.0)
    enter(share)
    fault = refusal(lambda: enter(share))
    assert (fault.code, fault.limit) == ("rate_limit_exceeded", 2) and fault.retry_after_s in (119, 120)


def test_an_account_lasts_as_long_as_its_key() -> None:
    quotas = Quotas()
    first = tenant(concurrent=1).key
    account = quotas.of(first)
    assert quotas.of(first) is account
    changed = first.model_copy(update={"concurrent": 2})
    assert quotas.of(changed) is not account

    async def forget_in_flight() -> None:
        async with quotas.of(changed).enter():
            quotas.forget(set())
            assert "a" in quotas.tenants

    asyncio.run(forget_in_flight())
    quotas.forget(set())
    assert not quotas.tenants


def test_limits_hold_over_http_and_for_their_own_key_alone(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    secrets = {
        "rate": keys.add(path, name="rate", requests_per_minute=2),
        "places": keys.add(path, name="places", concurrent=1),
        "audio": keys.add(path, name="audio", audio_s_per_day=3),
        "free": keys.add(path, name="free"),
    }
    with running(scripted(key_file=path)) as service:

        def ask(name: str, seconds: float = 0.2) -> httpx.Response:
            files, headers = {"file": ("clip", tone(seconds))}, {"authorization": f"Bearer {secrets[name]}"}
            url = f"{service.url}/v1/audio/qa"
            return httpx.post(url, data={"question": QUESTION}, files=files, headers=headers, timeout=30)

        assert [ask("rate").status_code for _ in range(3)] == [200, 200, 429]
        refused = ask("rate")
        assert_error(refused, 429, "rate_limit_exceeded")
        assert refused.headers["retry-after"].isdigit() and 1 <= int(refused.headers["retry-after"]) <= 30

        assert ask("audio", 2.0).status_code == 200
        assert_error(ask("audio", 2.0), 429, "audio_quota_exceeded")
        assert ask("audio", 0.9).status_code == 200
        assert ask("audio").status_code == 429

        second_of("places", ask, service)
        assert ask("free").status_code == 200
        assert service.metric("hyper_rejected_total", code="429", reason="rate_limit_exceeded") == 2
        service.wait_until_idle()


def second_of(name: str, ask: Callable[[str], httpx.Response], service: Live) -> None:
    """Send two requests at once, one above the limit."""
    assert isinstance(service.service.engine, ScriptedEngine)
    service.service.engine.token_interval_s = 0.002
    replies: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: replies.append(ask(name)))
    thread.start()
    while not service.service.num_in_flight:
        time.sleep(0.005)
    assert_error(ask(name), 429, "too_many_in_flight")
    thread.join()
    assert replies[0].status_code == 200
    service.service.engine.token_interval_s = 0.0
