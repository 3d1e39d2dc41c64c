"""Admission of requests before their bodies are read, because uploads and decoding have a cost too."""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections.abc import AsyncGenerator, Callable, Sequence

from server.errors import RequestError
from server.limiter import PriorityLimiter
from server.request_context import RequestContext
from server.settings import Settings
from server.telemetry.metrics import Metrics

MAX_RETRY_AFTER_S = 60
COME_AGAIN = "Retry after the Retry-After time."


class Admission:
    """Counter of requests in flight; it refuses requests if the service is unready, full or too slow.

    Attributes:
        num_in_flight: Number of admitted requests, including uploads and decoding.
        reasons_not_ready: Function for the codes of the reasons to refuse requests.
    """

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        limiter: PriorityLimiter,
        reasons_not_ready: Callable[[], Sequence[str]],
    ) -> None:
        self.settings = settings
        self.metrics = metrics
        self.limiter = limiter
        self.reasons_not_ready = reasons_not_ready
        self.num_in_flight = 0

    @property
    def is_full(self) -> bool:
        """Return whether every place is taken."""
        return self.num_in_flight >= self.settings.max_in_flight

    @property
    def max_batch_in_flight(self) -> int:
        """Return the maximum number of places for requests of the class batch."""
        return max(1, int(self.settings.max_in_flight * self.settings.max_batch_share))

    @contextlib.asynccontextmanager
    async def admit(self, context: RequestContext) -> AsyncGenerator[None]:
        """Hold one of the places for requests.

        Raises:
            RequestError: 429, if the caller has exhausted its key's limits; 503, if the service is not ready or full.
        """
        messages = {
            "starting": "The model is still loading.",
            "shutting_down": "The service is shutting down.",
            "engine_unavailable": "The engine is not running.",
            "overloaded": f"The service has reached its limit of {self.settings.max_in_flight} requests in flight.",
        }
        async with contextlib.AsyncExitStack() as stack:
            if context.tenant is not None:
                await stack.enter_async_context(context.tenant.enter())
            for reason in self.reasons_not_ready():
                if reason == "overloaded":
                    raise self.overloaded(messages[reason])
                raise RequestError(reason, messages[reason], hint=COME_AGAIN)
            if context.priority == "batch" and self.num_in_flight >= self.max_batch_in_flight:
                raise self.overloaded(
                    f"The service has reached its limit of {self.max_batch_in_flight} batch requests in flight."
                )
            wait_s = self.limiter.wait_s(self.num_in_flight)
            if wait_s > self.settings.max_queue_wait_s:
                limit_s = self.settings.max_queue_wait_s
                raise self.overloaded(
                    f"The expected wait for the engine is {math.ceil(wait_s)} s; the limit is {limit_s:g} s."
                )
            gauges = [self.metrics.in_flight, *([self.metrics.batch_in_flight] * (context.priority == "batch"))]
            self.num_in_flight += 1
            for gauge in gauges:
                stack.enter_context(gauge.track_inprogress())
            try:
                yield
            finally:
                self.num_in_flight -= 1

    def require_time(self, context: RequestContext, deadline_s: float) -> None:
        """Refuse a request with an expected start after its deadline; called before its clip is decoded.

        Args:
            context: The request's context.
            deadline_s: A reading of `time.monotonic()`.

        Raises:
            RequestError: 503; so far the request has cost only its upload.
        """
        num_ahead = self.limiter.num_working + (self.limiter.num_waiting if context.priority == "batch" else 0)
        wait_s = self.limiter.wait_s(num_ahead)
        if wait_s > 0 and time.monotonic() + wait_s > deadline_s:
            raise self.overloaded("The expected wait for the engine exceeds the request's deadline.")

    def overloaded(self, message: str) -> RequestError:
        """Return a 503 with the expected time until a free place as Retry-After."""
        excess_s = max(0.0, self.limiter.wait_s(self.num_in_flight) - self.settings.max_queue_wait_s)
        free_s = (self.limiter.work_s or 0.0) / self.limiter.num_places
        # Spread the times, so that callers refused together do not return together.
        wait_s = (excess_s + free_s) * random.uniform(1.0, 1.25)
        retry_after_s = min(MAX_RETRY_AFTER_S, max(1, math.ceil(wait_s)))
        return RequestError("overloaded", message, hint=COME_AGAIN, retry_after_s=retry_after_s)
