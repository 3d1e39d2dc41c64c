"""Quotas shared by several replicas, in a Redis or Valkey server.

One script per request makes the checks of `server.quotas` for all replicas together, by the store's clock. Requests in
flight are leases: each replica renews its own every second, and the leases of a dead replica expire.

While the store does not answer, each replica takes its share of every limit, and no request fails for that reason. A
request waits for the store at most once: after a failure, only the beat looks for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable
from importlib import resources
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from hyper_model.errors import HyperError
from server.api_keys import Key
from server.quotas import Quotas, Tenant
from server.settings import Settings
from server.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from redis.asyncio import Redis

logger = logging.getLogger("hyper.server")

BEAT_S = 1.0
LEASE_S = 10
"""Life of a lease without renewal, several beats long: a busy event loop may delay a beat by seconds."""

TIMEOUT_S = 1.0
MAX_CONNECTIONS = 16

PREFIX = "hyper:quota:"
REPLICAS = f"{PREFIX}replicas"

Reply = TypeVar("Reply")


class Verdict(NamedTuple):
    """Reply of the script.

    Attributes:
        code: Code of the refusal, or an empty string.
        wait_s: Seconds until a retry.
        num_in_flight: Requests in flight of the key, in all replicas.
        requests, audio: Levels of the two buckets.
    """

    code: str
    wait_s: float
    num_in_flight: int
    requests: float
    audio: float


class QuotaStore:
    """Client of the store, with its own replica's leases.

    Attributes:
        is_up: Whether the store answered the last command.
        num_replicas: Number of replicas in the last beat; before the first one, the configured number.
        leases: Names of the keys of requests in flight, by lease.
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        """Prepare the client; the first beat connects.

        Raises:
            HyperError: If the password file cannot be read.
        """
        # Imported here, because a service without a store needs no client.
        from redis.asyncio import Redis
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff
        from redis.exceptions import RedisError

        assert settings.quota_url is not None
        credentials: dict[str, Any] = {}
        if (path := settings.quota_password_file) is not None:
            try:
                credentials["password"] = path.read_text(encoding="utf-8").strip()
            except OSError as error:
                raise HyperError(f"HYPER_QUOTA_PASSWORD_FILE={path} cannot be read: {error.strerror}") from None
        self.redis: Redis = Redis.from_url(  # pyright: ignore[reportUnknownMemberType]
            settings.quota_url,
            **credentials,
            decode_responses=True,
            socket_timeout=TIMEOUT_S,
            socket_connect_timeout=TIMEOUT_S,
            # A request does not wait for a second try: the replica's share decides instead.
            retry=Retry(NoBackoff(), 0),
        )
        script = resources.files("server").joinpath("quotas.lua").read_text(encoding="utf-8")
        self.script = self.redis.register_script(script)
        self.failures: tuple[type[Exception], ...] = (RedisError, OSError, TimeoutError)
        self.metrics = metrics
        self.name = secrets.token_hex(8)
        self.is_up = False
        self.num_replicas = settings.quota_replicas
        self.leases: dict[str, str] = {}
        self.connections = asyncio.Semaphore(MAX_CONNECTIONS)
        self.commands: set[asyncio.Task[Any]] = set()
        self.is_over = asyncio.Event()
        self.beating: asyncio.Task[None] | None = None
        metrics.quota_replicas.set(self.num_replicas)

    async def start(self) -> None:
        """Look for the store once, then every second until `close`."""
        await self.beat()
        self.beating = asyncio.create_task(self.keep())

    async def keep(self) -> None:
        """Renew leases and registration at intervals; a beat also finds a store that answers again."""
        while not self.is_over.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.is_over.wait(), BEAT_S)
                return
            await self.beat()

    async def beat(self) -> None:
        """Renew the leases, register this replica and count all of them."""
        found = await self.ask(self._beat, is_beat=True)
        if found is None:
            return
        if not self.is_up:
            self.is_up = True
            self.metrics.quota_store_down.set(0)
            logger.info("the quota store answers: limits hold for all replicas together", extra={"replicas": found})
        self.num_replicas = found
        self.metrics.quota_replicas.set(found)

    async def _beat(self) -> int:
        seconds, micros = await self.redis.time()  # pyright: ignore[reportUnknownMemberType]
        now_s = seconds + micros / 1e6
        leases = {name: dict[str, float]() for name in self.leases.values()}
        for lease, name in self.leases.items():
            leases[name][lease] = now_s + LEASE_S
        async with self.redis.pipeline(transaction=False) as pipe:
            for name, expiries in leases.items():
                pipe.zadd(leases_key(name), expiries)
                pipe.expire(leases_key(name), 2 * LEASE_S)
            pipe.zremrangebyscore(REPLICAS, "-inf", now_s)
            pipe.zadd(REPLICAS, {self.name: now_s + LEASE_S})
            pipe.expire(REPLICAS, 2 * LEASE_S)
            pipe.zcard(REPLICAS)
            replies: list[Any] = await pipe.execute()
        return int(replies[-1])

    async def enter(self, key: Key, lease: str) -> Verdict | None:
        """Check a key's limits and take a lease; None if the store does not answer."""
        return await self._run("enter", key, lease)

    async def charge(self, key: Key, audio_s: float) -> Verdict | None:
        """Take seconds of audio; None if the store does not answer."""
        return await self._run("charge", key, repr(audio_s))

    async def charge_requests(self, key: Key, num: int) -> Verdict | None:
        """Take further requests; None if the store does not answer."""
        return await self._run("ask", key, str(num))

    async def _run(self, operation: str, key: Key, argument: str) -> Verdict | None:
        limits = [
            "" if limit is None else repr(limit)
            for limit in (key.requests_per_minute, key.audio_s_per_day, key.concurrent)
        ]
        keys = [levels_key(key.name), leases_key(key.name)]
        reply = await self.ask(lambda: self.script(keys=keys, args=[operation, *limits, argument, LEASE_S]))
        if reply is None:
            return None
        code, wait_s, num_in_flight, requests, audio = reply
        return Verdict(str(code), float(wait_s), int(num_in_flight), float(requests), float(audio))

    async def leave(self, key: Key, lease: str) -> None:
        """Return a lease; if that fails, it expires."""
        self.leases.pop(lease, None)
        await self.ask(lambda: self.redis.zrem(leases_key(key.name), lease))

    async def ask(self, command: Callable[[], Awaitable[Reply]], *, is_beat: bool = False) -> Reply | None:
        """Return the reply to a command, or None after a failure; then the replica's share applies.

        The command runs in a task of its own, because the client library loses a cancellation now and then. A cancelled
        request thus leaves no connection with half a reply, and still returns its lease.
        """
        task = asyncio.create_task(self._ask(command, is_beat=is_beat))
        self.commands.add(task)
        task.add_done_callback(self.commands.discard)
        return await asyncio.shield(task)

    async def _ask(self, command: Callable[[], Awaitable[Reply]], *, is_beat: bool) -> Reply | None:
        async with self.connections:
            # Checked here, because a command before this one may have failed meanwhile.
            if not (self.is_up or is_beat):
                return None
            try:
                return await command()
            except self.failures as error:
                self.fail(error)
                return None

    def fail(self, error: Exception) -> None:
        """Use this replica's shares until the next successful beat."""
        self.metrics.quota_store_errors.inc()
        self.metrics.quota_store_down.set(1)
        if self.is_up:
            reason = f"{type(error).__name__}: {error}"
            logger.warning(
                "the quota store does not answer: this replica takes its share of every limit",
                extra={"reason": reason, "replicas": self.num_replicas},
            )
        self.is_up = False

    async def close(self) -> None:
        """Remove this replica's registration and close the connections."""
        if self.beating is not None:
            self.is_over.set()
            await self.beating
        await self.ask(lambda: self.redis.zrem(REPLICAS, self.name))
        await asyncio.gather(*self.commands)
        with contextlib.suppress(*self.failures):
            await self.redis.aclose()


def levels_key(name: str) -> str:
    """Return the store's key for an API key's bucket levels; the braces keep its keys in one cluster slot."""
    return f"{PREFIX}{{{name}}}:levels"


def leases_key(name: str) -> str:
    """Return the store's key for the leases of an API key."""
    return f"{PREFIX}{{{name}}}:leases"


class SharedTenant(Tenant):
    """Account of one key in the store; its own buckets are this replica's share, for the time without the store."""

    def __init__(self, key: Key, store: QuotaStore) -> None:
        super().__init__(key, store.num_replicas)
        self.store = store

    @contextlib.asynccontextmanager
    async def enter(self) -> AsyncGenerator[None]:
        """Count a request of all replicas while it is in flight.

        Raises:
            RequestError: 429, with the time to retry.
        """
        lease = secrets.token_hex(8)
        has_lease = self.key.concurrent is not None
        verdict = await self.store.enter(self.key, lease)
        if verdict is None:
            self.divide_again()
            self.take()
        else:
            self.follow(verdict)
        self.num_in_flight += 1
        if has_lease:
            self.store.leases[lease] = self.key.name
        try:
            yield
        finally:
            self.num_in_flight -= 1
            if has_lease:
                await self.store.leave(self.key, lease)

    async def charge(self, audio_s: float) -> None:
        """Deduct the seconds of a clip for all replicas before it is answered.

        Raises:
            RequestError: 429, if too few seconds are left.
        """
        if self.key.audio_s_per_day is None:
            return
        verdict = await self.store.charge(self.key, audio_s)
        if verdict is None:
            self.divide_again()
            self.take_audio(audio_s)
        else:
            self.follow(verdict)

    async def charge_requests(self, num: int) -> None:
        """Deduct further requests for all replicas, for the questions of one request beyond its first.

        Raises:
            RequestError: 429, if too few are left.
        """
        if self.key.requests_per_minute is None or not num:
            return
        verdict = await self.store.charge_requests(self.key, num)
        if verdict is None:
            self.divide_again()
            self.take_requests(num)
        else:
            self.follow(verdict)

    def follow(self, verdict: Verdict) -> None:
        """Set the share to its part of the store's levels, and raise the store's refusal.

        Raises:
            RequestError: 429, with the time to retry.
        """
        self.divide_again()
        if self.requests:
            self.requests.set_level(verdict.requests / self.num_replicas)
        if self.audio:
            self.audio.set_level(verdict.audio / self.num_replicas)
        match verdict.code:
            case "":
                return
            case "too_many_in_flight":
                raise self.too_many_in_flight(verdict.num_in_flight)
            case "rate_limit_exceeded":
                raise self.out_of_requests(verdict.wait_s)
            case _:
                raise self.out_of_audio(verdict.wait_s)

    def divide_again(self) -> None:
        """Follow a changed number of replicas; the next reply of the store sets the levels."""
        if self.num_replicas != self.store.num_replicas:
            self.divide(self.store.num_replicas)


class SharedQuotas(Quotas):
    """Accounts of all keys, in the store."""

    def __init__(self, store: QuotaStore) -> None:
        super().__init__()
        self.store = store

    def open(self, key: Key) -> Tenant:
        """Return a new account."""
        return SharedTenant(key, self.store)
