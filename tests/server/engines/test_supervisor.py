"""Tests for server/engines/supervisor.py with simulated engines; test_vllm.py has the tests with real vLLM."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engines import supervisor as module
from server.engines.protocol import GenerationRequest, ScriptedEngine, TokenChunk
from server.engines.scripted import scripted_checkpoint
from server.engines.supervisor import BANNED_S, MAX_REMEMBERED, SUSPECT_S, Quarantine
from server.errors import PoisonedClipError
from tests.serving import Live, assert_error, running, scripted, slow_down, tone, wait_for


def test_an_engine_that_dies_is_started_again_and_those_in_it_hear_of_it_at_once() -> None:
    with running(scripted()) as service:
        slow_down(service, 0.2)
        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.append(service.ask()))
        thread.start()
        wait_for(lambda: service.service.engine.num_in_flight == 1)
        service.run(service.service.engine.stop())
        thread.join(1.0)
        assert_error(found[0], 503, "engine_unavailable")
        assert "retry-after" in found[0].headers
        slow_down(service, 0.0)
        wait_for(lambda: service.service.state == "ready" and service.service.engine.is_alive)
        assert service.ask().status_code == 200
        assert service.metric("hyper_engine_restarts_total", reason="died") == 1
        assert service.metric("hyper_engine_up") == service.metric("hyper_canary_ok") == 1


def test_an_idle_engine_that_hangs_is_found_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PING_INTERVAL_S", 0.1)
    with running(scripted(hang_timeout_s=1.5)) as service:
        slow_down(service, 600.0)
        wait_for(lambda: service.service.state == "recovering")
        assert service.client.get("/livez").status_code == 200
        ready = service.client.get("/readyz")
        assert (ready.status_code, ready.json()["reasons"]) == (503, ["engine_unavailable"])
        assert_error(service.ask(), 503, "engine_unavailable")


class SickEngine(ScriptedEngine):
    """Engine that dies or hangs on one clip, and starts a limited number of times."""

    deadly_samples = 16_000 * 2
    num_starts = 100
    gets_stuck = False
    is_stuck = False

    async def start(self) -> None:
        """Start, up to the limit."""
        self.num_starts -= 1
        if self.num_starts < 0:
            raise RuntimeError("no memory")
        self.is_stuck = False
        await super().start()

    async def pace(self, ended: asyncio.Event) -> None:
        """Wait forever while hung."""
        if self.is_stuck:
            await ended.wait()
        await super().pace(ended)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk, None]:
        """Die or hang at the clip."""
        async with contextlib.aclosing(super().generate(request)) as chunks:
            async for chunk in chunks:
                if len(request.clips) and len(request.clips[0]) == self.deadly_samples:
                    self.is_stuck = self.gets_stuck
                    if not self.gets_stuck:
                        self.ended.set()
                yield chunk


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_BACKOFF_S", 0.01)


def sick(**fields: Any) -> contextlib.AbstractContextManager[Live]:
    return running(scripted(**fields), SickEngine(scripted_checkpoint().tokenizer))


def restarted(service: Live, times: int) -> None:
    wait_for(lambda: service.metric("hyper_engine_restarts_total", reason="died") == times)
    wait_for(lambda: service.service.state == "ready" and service.service.engine.is_alive)


def test_a_clip_that_the_engine_dies_on_twice_is_refused_and_a_bystander_is_not(at_once: None) -> None:
    with sick() as service:
        deadly, harmless = tone(2.0), tone(1.0)
        for times in (1, 2):
            assert_error(service.ask(deadly), 503, "engine_unavailable")
            restarted(service, times)
        assert not assert_error(service.ask(deadly), 422, "poisoned_clip", "file")["retryable"]
        name, data = service.events(deadly)[-1]
        assert (name, data["error"]["code"]) == ("error", "poisoned_clip")
        assert service.ask(harmless).status_code == 200
        wait_for(lambda: service.metric("hyper_poisoned_clips") == 1 and service.metric("hyper_suspected_clips") == 0)
        assert service.metric("hyper_engine_restarts_total", reason="died") == 2


def test_an_engine_that_hangs_is_found_by_its_silence(at_once: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PING_INTERVAL_S", 0.1)
    with sick(hang_timeout_s=1.5) as service:
        engine = service.service.engine
        assert isinstance(engine, SickEngine)
        engine.gets_stuck = True
        assert_error(service.ask(tone(2.0)), 503, "engine_unavailable")
        wait_for(lambda: service.service.state == "ready", 15)
        assert service.metric("hyper_engine_restarts_total", reason="hung") == 1
        slow_down(service, 0.2)
        assert service.ask(max_tokens=3).status_code == 200, "slow is not hung"


def test_an_engine_that_cannot_be_kept_running_ends_the_service(at_once: None) -> None:
    with sick(max_engine_restarts=3) as service:
        engine = service.service.engine
        assert isinstance(engine, SickEngine)
        engine.num_starts = 0
        service.run(engine.stop())
        wait_for(lambda: service.service.failure is not None)
        assert "failed 4 times in ten minutes: not_started" in str(service.service.failure)
        assert service.metric("hyper_engine_restarts_total", reason="not_started") == 2


def test_a_drain_during_a_restart_ends_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_BACKOFF_S", 60.0)
    with running(scripted()) as service:
        for times in (1, 2):
            service.run(service.service.engine.stop())
            wait_for(lambda times=times: service.metric("hyper_engine_restarts_total", reason="died") == times)
            if times == 1:
                wait_for(lambda: service.service.state == "ready" and service.service.engine.is_alive)
        service.loop.call_soon_threadsafe(service.server.begin_drain)
        wait_for(lambda: service.server.should_exit)
        assert service.service.failure is None


class Clock:
    """A clock set by hand."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


async def stay(quarantine: Quarantine, clip: str, leave: asyncio.Event, inside: list[str]) -> None:
    async with quarantine.enter(clip):
        inside.append(clip)
        try:
            await leave.wait()
        finally:
            inside.remove(clip)


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def test_suspects_go_in_alone_and_come_out_innocent() -> None:
    async def scene() -> None:
        quarantine = Quarantine()
        inside: list[str] = []
        leave = {clip: asyncio.Event() for clip in "abcd"}
        tasks = {clip: asyncio.create_task(stay(quarantine, clip, leave[clip], inside)) for clip in "ab"}
        await settle()
        quarantine.record_failure()
        quarantine.record_failure()
        assert set(quarantine.suspects) == {"a", "b"} and not quarantine.banned, "one failure counts once"
        for event in leave.values():
            event.set()
        await asyncio.gather(*tasks.values())
        for event in leave.values():
            event.clear()
        quarantine.renew()
        tasks = {clip: asyncio.create_task(stay(quarantine, clip, leave[clip], inside)) for clip in "cabd"}
        await settle()
        assert inside == ["c"], "suspects wait for who is in there, and who comes after them waits for them"
        leave["c"].set()
        await settle()
        assert inside == ["a"]
        tasks["a"].cancel()
        await settle()
        assert inside in (["b"], ["d"]) and "a" in quarantine.suspects, "who leaves early is as suspect as before"
        leave["b"].set()
        leave["d"].set()
        await asyncio.gather(*tasks.values(), return_exceptions=True)
        assert not inside and set(quarantine.suspects) == {"a"} and not quarantine.working

    asyncio.run(scene())


def test_a_ban_ends_and_memory_is_bounded() -> None:
    async def scene() -> None:
        clock = Clock()
        quarantine = Quarantine(clock)
        for _ in range(2):
            quarantine.renew()
            async with quarantine.enter("a"):
                quarantine.record_failure()
                # As in the service: the request with the clip fails.
                held = dict(quarantine.suspects)
            quarantine.suspects.update(held)
        with pytest.raises(PoisonedClipError):
            async with quarantine.enter("a"):
                pass
        clock.now_s = BANNED_S + 1
        async with quarantine.enter("a"):
            pass
        for number in range(MAX_REMEMBERED + 5):
            quarantine.renew()
            clock.now_s += SUSPECT_S / MAX_REMEMBERED / 2
            async with contextlib.AsyncExitStack() as stack:
                await stack.enter_async_context(quarantine.enter(f"{number}"))
                quarantine.record_failure()
        assert len(quarantine.suspects) == MAX_REMEMBERED

    asyncio.run(scene())


@settings(max_examples=50, deadline=None)
@given(
    clips=st.lists(st.sampled_from("abcdef"), min_size=1, max_size=12),
    suspects=st.sets(st.sampled_from("abcdef")),
    cancelled=st.sets(st.integers(0, 11)),
)
def test_everybody_gets_in_and_suspects_only_alone(clips: list[str], suspects: set[str], cancelled: set[int]) -> None:
    async def scene() -> None:
        quarantine = Quarantine()
        for clip in suspects:
            quarantine.suspects[clip] = float("inf")
        served: list[int] = []

        async def ask(number: int, clip: str) -> None:
            async with quarantine.enter(clip):
                was_suspect = clip in quarantine.suspects
                for _ in range(3):
                    await asyncio.sleep(0)
                    assert not was_suspect or quarantine.working.total() == 1
                served.append(number)

        tasks = [asyncio.create_task(ask(number, clip)) for number, clip in enumerate(clips)]
        await asyncio.sleep(0)
        for number in cancelled:
            if number < len(tasks):
                tasks[number].cancel()
        async with asyncio.timeout(5):
            results = await asyncio.gather(*tasks, return_exceptions=True)
        assert not [each for each in results if isinstance(each, Exception)]
        assert set(range(len(clips))) - cancelled <= set(served)
        assert not quarantine.working and not quarantine.is_closed

    asyncio.run(scene())
