"""How many pauses an answer can afford: the budget of `pause=auto`, by what is left of the deadline and by the queue.

It learns from finished answers how long a trace and a pause take here and now. What a request fixed itself is never
touched. Knows no HTTP, no engine and no clock of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

SMOOTHING = 0.1
"""The weight of the newest answer in the running means: about the last twenty decide."""

MARGIN = 0.8
"""The share of the remaining time that is planned with; answers differ in length."""

LoweredBy = Literal["deadline", "load"]


@dataclass(frozen=True)
class Budget:
    """Says how many pauses an answer may take, and what made them fewer than the checkpoint allows."""

    max_pauses: int
    lowered_by: LoweredBy | None = None


@dataclass
class PauseBudgeter:
    """Keeps the running means of what answers take; None before the first.

    Attributes:
        trace_s: From when an answer's budget is settled to the last token of its trace, its pauses left out.
        pause_s: From the pause token to the first token behind the span.
    """

    trace_s: float | None = None
    pause_s: float | None = None

    def record(self, trace_s: float, pause_s: Sequence[float]) -> None:
        """Takes the times of a finished answer and of each of its pauses."""
        self.trace_s = smooth(self.trace_s, max(0.0, trace_s - sum(pause_s)))
        for seconds in pause_s:
            self.pause_s = smooth(self.pause_s, seconds)

    def record_late(self, trace_s: float, pause_s: Sequence[float]) -> None:
        """Takes the times of an answer that missed its deadline: a whole one takes that long or longer."""
        late = smooth(self.trace_s, max(0.0, trace_s - sum(pause_s)))
        self.trace_s = late if self.trace_s is None else max(self.trace_s, late)

    def budget(self, most: int, *, left_s: float, num_waiting: int, num_places: int) -> Budget:
        """Returns what an answer that leaves it to the service may spend.

        Args:
            most: The checkpoint's budget.
            left_s: Until the request's deadline.
            num_waiting: Requests in flight beyond those that the engine works on together.
            num_places: How many may wait so before the service refuses.
        """
        budget = Budget(most)
        if num_waiting > 0 and num_places > 0:
            # Every pause makes those behind it wait; with the last place taken nothing is spent.
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
    """Returns the smaller budget, with its reason."""
    return Budget(max_pauses, by) if max_pauses < budget.max_pauses else budget


def smooth(mean: float | None, value: float) -> float:
    """Moves a running mean towards a new value."""
    return value if mean is None else mean + SMOOTHING * (value - mean)
