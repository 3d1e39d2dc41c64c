"""Quotas of each API key: request rate, concurrency and seconds of audio.

The accounts here are in the memory of one process, so a restart refills every bucket. `server.quota_store` has the
accounts of several replicas. The module raises HTTP errors and is otherwise independent of HTTP.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from server.api_keys import Key
from server.errors import RequestError

DAY_S = 86_400.0
MINUTE_S = 60.0


@dataclass
class Bucket:
    """Token bucket, full at the start, with a steady refill.

    Attributes:
        capacity: Maximum level.
        refill_s: Seconds to fill an empty bucket.
    """

    capacity: float
    refill_s: float
    level: float = field(init=False)
    at_s: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.level = self.capacity

    def wait_s(self, amount: float) -> float:
        """Return the seconds until the amount is available: 0 if it is now, infinity if it never will be."""
        now_s = time.monotonic()
        self.level = min(self.capacity, self.level + (now_s - self.at_s) * self.capacity / self.refill_s)
        self.at_s = now_s
        if amount > self.capacity:
            return math.inf
        return max(0.0, (amount - self.level) * self.refill_s / self.capacity)

    def take(self, amount: float) -> None:
        """Remove the amount."""
        self.level -= amount

    def set_level(self, level: float) -> None:
        """Replace the level, as of now."""
        self.level = min(self.capacity, level)
        self.at_s = time.monotonic()


class Tenant:
    """Usage account of one key.

    Attributes:
        num_replicas: Number of replicas among which the limits are divided; 1 for the whole limits.
        num_in_flight: Number of the key's requests in flight in this process.
        max_in_flight: Limit of `num_in_flight`; None without a limit.
        requests, audio: Buckets of the other two limits; None without a limit.
    """

    def __init__(self, key: Key, num_replicas: int = 1) -> None:
        self.key = key
        self.num_in_flight = 0
        self.divide(num_replicas)

    def divide(self, num_replicas: int) -> None:
        """Set this process's share of the limits, with full buckets; a share admits at least one request at a time."""
        key = self.key
        self.num_replicas = num_replicas
        self.max_in_flight = None if key.concurrent is None else max(1, key.concurrent // num_replicas)
        self.requests = self.audio = None
        if key.requests_per_minute is not None:
            per_minute = key.requests_per_minute / num_replicas
            capacity = max(1.0, per_minute)
            self.requests = Bucket(capacity, MINUTE_S * capacity / per_minute)
        if key.audio_s_per_day is not None:
            self.audio = Bucket(key.audio_s_per_day / num_replicas, DAY_S)

    @contextlib.asynccontextmanager
    async def enter(self) -> AsyncGenerator[None]:
        """Count a request while it is in flight. The check runs before its body is read.

        Raises:
            RequestError: 429, with the time to retry.
        """
        self.take()
        self.num_in_flight += 1
        try:
            yield
        finally:
            self.num_in_flight -= 1

    def take(self) -> None:
        """Check the three limits and take one request from its bucket.

        Raises:
            RequestError: 429, with the time to retry.
        """
        if self.max_in_flight is not None and self.num_in_flight >= self.max_in_flight:
            raise self.too_many_in_flight(self.num_in_flight)
        if self.audio and (wait_s := self.audio.wait_s(min(1.0, self.audio.capacity))) > 0:
            raise self.out_of_audio(wait_s)
        self.take_requests(1)

    async def charge_requests(self, num: int) -> None:
        """Deduct further requests, for the questions of one request beyond its first.

        Raises:
            RequestError: 429, if too few are left.
        """
        self.take_requests(num)

    def take_requests(self, num: int) -> None:
        """Take requests from their bucket.

        Raises:
            RequestError: 429, if too few are left.
        """
        if self.requests and num:
            if (wait_s := self.requests.wait_s(num)) > 0:
                raise self.out_of_requests(wait_s)
            self.requests.take(num)

    async def charge(self, audio_s: float) -> None:
        """Deduct the seconds of a clip before it is answered.

        Raises:
            RequestError: 429, if too few seconds are left.
        """
        self.take_audio(audio_s)

    def take_audio(self, audio_s: float) -> None:
        """Take seconds of audio from their bucket.

        Raises:
            RequestError: 429, if too few seconds are left.
        """
        if self.audio:
            if (wait_s := self.audio.wait_s(audio_s)) > 0:
                raise self.out_of_audio(wait_s)
            self.audio.take(audio_s)

    def too_many_in_flight(self, num_in_flight: int) -> RequestError:
        """Return the error for too many requests in flight."""
        limit = self.key.concurrent
        return RequestError(
            "too_many_in_flight",
            f"This key is limited to {limit} requests in flight.",
            limit=limit,
            actual=num_in_flight,
            retry_after_s=1,
            hint="Wait for a reply before the next request.",
        )

    def out_of_requests(self, wait_s: float) -> RequestError:
        """Return the error for too many requests per minute."""
        limit = self.key.requests_per_minute
        return RequestError(
            "rate_limit_exceeded",
            f"This key is limited to {limit:g} requests per minute; each question of a request counts as one.",
            limit=limit,
            retry_after_s=math.ceil(wait_s if math.isfinite(wait_s) else MINUTE_S),
            hint="Retry after the Retry-After time.",
        )

    def out_of_audio(self, wait_s: float) -> RequestError:
        """Return the error for an exhausted audio quota."""
        limit = self.key.audio_s_per_day
        message = f"This key is limited to {limit:g} s of audio per day."
        return RequestError(
            "audio_quota_exceeded",
            message,
            limit=limit,
            retry_after_s=math.ceil(min(wait_s, DAY_S)),
            hint="The quota refills evenly over a day. Retry after the Retry-After time, or send a shorter clip.",
        )


class Quotas:
    """Accounts of all keys, in memory."""

    def __init__(self) -> None:
        self.tenants: dict[str, Tenant] = {}

    def of(self, key: Key) -> Tenant:
        """Return the account of a key; new or changed keys get a new account."""
        tenant = self.tenants.get(key.name)
        if tenant is None or tenant.key != key:
            tenant = self.tenants[key.name] = self.open(key)
        return tenant

    def open(self, key: Key) -> Tenant:
        """Return a new account."""
        return Tenant(key)

    def forget(self, names: set[str]) -> None:
        """Drop the accounts of all other names, once they have nothing in flight."""
        for name, tenant in list(self.tenants.items()):
            if name not in names and not tenant.num_in_flight:
                del self.tenants[name]
