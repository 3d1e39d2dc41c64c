"""Perception of each window of a recording, kept per tenant under the recording's id, within a time and a size.

A second question about the same sound finds the perception here and asks no window again. The id is a keyed digest of
the caller's name and the samples, so no other caller can name or find it.

The module is independent of requests and engines.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from hyper_model.trace import Trace, environment_labels
from server.recordings.cutter import Span

Status = Literal["done", "silent", "failed"]

_BYTES_PER_WINDOW = 2_000
"""Estimate of one window's objects beside its text."""


@dataclass(frozen=True)
class Counts:
    """Tokens of one or more answers."""

    prompt_tokens: int = 0
    audio_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    pause_tokens: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class WindowPerception:
    """What the model wrote about one window.

    Attributes:
        span: Place of the window.
        status: "silent" windows are never asked; "failed" ones have an error's code instead of a trace.
        trace: The trace; None without one.
        counts: Tokens of the question; zero for a stored perception.
        termination: End of the trace.
    """

    span: Span
    status: Status
    trace: Trace | None = None
    error: str | None = None
    counts: Counts = Counts()
    termination: str = "complete"

    @property
    def environment(self) -> list[str]:
        """Return the labels of background sounds."""
        return environment_labels(self.trace.environment or "") if self.trace else []

    @property
    def transcript(self) -> str:
        """Return the words; empty without speech."""
        return (self.trace.transcript or "") if self.trace else ""

    @property
    def text(self) -> str:
        """Return all words about the window, for the search."""
        if self.trace is None:
            return ""
        speakers = [f"{speaker.description} {' '.join(speaker.quotes)}" for speaker in self.trace.speakers]
        parts = [self.trace.transcript, self.trace.environment, self.trace.description, *speakers]
        return "\n".join(part for part in parts if part)


@dataclass
class _Stored:
    windows: Mapping[Span, WindowPerception]
    num_bytes: int
    until_s: float


@dataclass
class PerceptionStore:
    """Perceptions of recent recordings, the least recently used of which is dropped first.

    Attributes:
        secret: Key of the ids.
        max_bytes: Bound of the estimated size.
        ttl_s: Seconds until a perception is dropped, counted from its last use.
    """

    secret: bytes
    max_bytes: int
    ttl_s: float
    num_bytes: int = 0
    stored: OrderedDict[str, _Stored] = field(default_factory=OrderedDict[str, _Stored])

    def recording_id(self, tenant_name: str, sha256: str) -> str:
        """Return the id of a recording of a caller."""
        named = f"{tenant_name}\0{sha256}".encode()
        return f"rec_{hmac.new(self.secret, named, hashlib.sha256).hexdigest()[:32]}"

    def find(self, recording_id: str) -> Mapping[Span, WindowPerception]:
        """Return the stored perceptions of a recording by window; empty for an unknown one."""
        self._drop_old()
        found = self.stored.get(recording_id)
        if found is None:
            return {}
        found.until_s = time.monotonic() + self.ttl_s
        self.stored.move_to_end(recording_id)
        return found.windows

    def keep(self, recording_id: str, window: WindowPerception) -> None:
        """Store the perception of a window, without its token counts."""
        self._drop_old()
        before = self.stored.pop(recording_id, None)
        self.num_bytes -= before.num_bytes if before else 0
        windows = {**(before.windows if before else {}), window.span: window}
        num_bytes = sum(_BYTES_PER_WINDOW + 4 * len(each.text) for each in windows.values())
        if num_bytes > self.max_bytes:
            return
        self.stored[recording_id] = _Stored(windows, num_bytes, time.monotonic() + self.ttl_s)
        self.num_bytes += num_bytes
        while self.num_bytes > self.max_bytes:
            self._drop(next(iter(self.stored)))

    def _drop_old(self) -> None:
        now_s = time.monotonic()
        for recording_id in [each for each, found in self.stored.items() if found.until_s < now_s]:
            self._drop(recording_id)

    def _drop(self, recording_id: str) -> None:
        self.num_bytes -= self.stored.pop(recording_id).num_bytes
