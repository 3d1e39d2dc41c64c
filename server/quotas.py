"""Quotas of each API key: request rate, concurrency and seconds of audio.

The state is in memory, so a restart refills every bucket. The module raises HTTP errors and is otherwise independent of
HTTP.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Generator
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


class Tenant:
    """Usage account of one key."""

    def __init__(self, key: Key) -> None:
        self.key = key
        self.num_in_flight = 0
        self.requests = None if key.requests_per_minute is None else Bucket(key.requests_per_minute, MINUTE_S)
        self.audio = None if key.audio_s_per_day is None else Bucket(key.audio_s_per_day, DAY_S)

    @contextlib.contextmanager
    def enter(self) -> Generator[None]:
        """Count a request while it is in flight. The check runs before its body is read.

        Raises:
            RequestError: 429, with the time to retry.
        """
        key = self.key
        if key.concurrent is not None and self.num_in_flight >= key.concurrent:
            message = f"This key is limited to {key.concurrent} requests in flight."
            raise RequestError(
                "too_many_in_flight",
                message,
                limit=key.concurrent,
                actual=self.num_in_flight,
                retry_after_s=1,
                hint="Wait for a reply before the next request.",
            )
        if self.audio and (wait_s := self.audio.wait_s(min(1.0, self.audio.capacity))) > 0:
            raise self.out_of_audio(wait_s)
        if self.requests:
            if (wait_s := self.requests.wait_s(1.0)) > 0:
                message = f"This key is limited to {key.requests_per_minute:g} requests per minute."
                raise RequestError(
                    "rate_limit_exceeded",
                    message,
                    limit=key.requests_per_minute,
                    retry_after_s=math.ceil(wait_s),
                    hint="Retry after the Retry-After time.",
                )
            self.requests.take(1.0)
        self.num_in_flight += 1
        try:
            yield
        finally:
            self.num_in_flight -= 1

    def charge(self, audio_s: float) -> None:
        """Deduct the seconds of a clip before it is answered.

        Raises:
            RequestError: 429, if too few seconds are left.
        """
        if self.audio:
            if (wait_s := self.audio.wait_s(audio_s)) > 0:
                raise self.out_of_audio(wait_s)
            self.audio.take(audio_s)

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
    """Accounts of all keys."""

    def __init__(self) -> None:
        self.tenants: dict[str, Tenant] = {}

    def of(self, key: Key) -> Tenant:
        """Return the account of a key; new or changed keys get a new account."""
        tenant = self.tenants.get(key.name)
        if tenant is None or tenant.key != key:
            tenant = self.tenants[key.name] = Tenant(key)
        return tenant

    def forget(self, names: set[str]) -> None:
        """Drop the accounts of all other names, once they have nothing in flight."""
        for name, tenant in list(self.tenants.items()):
            if name not in names and not tenant.num_in_flight:
                del self.tenants[name]
