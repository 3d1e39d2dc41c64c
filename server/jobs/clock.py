"""Seconds since 1970 for expiry and ages, unaffected by jumps of the system's clock.

A clock may jump by days: a wrong battery clock before the first synchronisation, a restored virtual machine. Nothing
may then be deleted early. Expiry therefore needs two clocks to agree: the system's, and the one at the process's
start plus the time elapsed since.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass(frozen=True)
class CautiousClock:
    """Clock for deletions: the earlier of the system's clock and the elapsed time since the start."""

    started_s: float = field(default_factory=time.time)
    started_monotonic_s: float = field(default_factory=time.monotonic)

    def now_s(self) -> float:
        """Return seconds since 1970, never more than have certainly passed."""
        return min(time.time(), self.started_s + time.monotonic() - self.started_monotonic_s)

    def age_s(self, moment_s: float) -> float:
        """Return the seconds since a moment; 0 for a moment in the future."""
        return max(0.0, self.now_s() - moment_s)
