"""Pause budget of `pause=auto`, from the remaining deadline and the queue length.

It learns the durations of traces and pauses from finished answers. Budgets set by requests are never changed. The
module is independent of HTTP and engines, and has no clock of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

SMOOTHING = 0.1
"""Weight of the newest answer in the running means: about the last twenty answers count."""

MARGIN = 0.8
"""Usable share of the remaining time; answers differ in length."""

LoweredBy = Literal["deadline", "load"]


@dataclass(frozen=True)
class Budget:
    """Maximum number of pauses of an answer, and the reason for a value below the checkpoint's."""

    max_pauses: int
    lowered_by: LoweredBy | None = None


@dataclass
class PauseBudgeter:
    """Running means of trace and pause durations in seconds; None before the first.

    Attributes:
        trace_s: From the decision on the budget to the trace's last token, without pauses.
        pause_s: From the pause token to the first token behind the span.
    """

    trace_s: float | None = None
    pause_s: float | None = None

    def record(self, trace_s: float, pause_s: Sequence[float]) -> None:
        """Add the duration of a finished answer and of each of its pauses."""
        self.trace_s = smooth(self.trace_s, max(0.0, trace_s - sum(pause_s)))
        for seconds in pause_s:
            self.pause_s = smooth(self.pause_s, seconds)

    def record_late(self, trace_s: float, pause_s: Sequence[float]) -> None:
        """Add the durations of an answer after its deadline, as a lower bound for a complete one."""
        lower_bound_s = smooth(self.trace_s, max(0.0, trace_s - sum(pause_s)))
        self.trace_s = lower_bound_s if self.trace_s is None else max(self.trace_s, lower_bound_s)

    def budget(self, most: int, *, left_s: float, num_waiting: int, num_places: int) -> Budget:
        """Return the budget of an answer with `pause=auto`.

        Args:
            most: The checkpoint's budget.
            left_s: Seconds until the request's deadline.
            num_waiting: Requests in flight beyond the engine's concurrency.
            num_places: Maximum number of waiting requests.
        """
        budget = Budget(most)
        if num_waiting > 0 and num_places > 0:
            # Every pause delays the requests behind it; with the last place taken the budget is 0.
            share = max(0.0, 1 - num_waiting / num_places)
            budget = lower(budget, int(most * share), "load")
        if self.trace_s is not None:
            free_s = left_s * MARGIN - self.trace_s
            if free_s <= 0:
                budget = lower(budget, 0, "deadline")
            elif self.pause_s:
                budget = lower(budget, int(free_s / self.pause_s), "deadline")
        return budget


def lower(budget: Budget, max_pauses: int, by: LoweredBy) -> Budget:
    """Return the smaller budget, with its reason."""
    return Budget(max_pauses, by) if max_pauses < budget.max_pauses else budget


def smooth(mean: float | None, value: float) -> float:
    """Return a running mean updated with a new value."""
    return value if mean is None else mean + SMOOTHING * (value - mean)
