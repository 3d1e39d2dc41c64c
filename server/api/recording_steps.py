"""Steps of a job about a recording: the perception of each window, then each question.

A window's perception is the outcome of its step. So a process that was killed in the middle of a long recording resumes
after the last finished window. All steps of a process share one decoded recording.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections import OrderedDict, defaultdict
from collections.abc import Awaitable, Callable, Iterable, Sequence

from pydantic import TypeAdapter

from server.api.questions import Asked
from server.api.recordings import MAP_QUESTION, RecordingRun
from server.api.types import QaReply
from server.jobs.records import StepOutcome
from server.recordings.perceptions import Counts, WindowPerception
from server.recordings.recording import Recording
from server.request_context import RequestContext
from server.service import Service

WINDOW = TypeAdapter(WindowPerception)


class OpenRecordings:
    """Decoded recordings of jobs in progress; the one used longest ago is dropped first.

    A recording removes its file when no step uses it any more.

    Args:
        max_open: Maximum number of recordings.
    """

    def __init__(self, max_open: int) -> None:
        self.max_open = max_open
        self.found: OrderedDict[str, Recording] = OrderedDict()
        self.locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def get(self, job_id: str, decode: Callable[[], Awaitable[Recording]]) -> Recording:
        """Return the recording of a job; the first step decodes it, and the others wait.

        Raises:
            Exception: Each exception of `decode`; the next step tries again.
        """
        async with self.locks[job_id]:
            if job_id not in self.found:
                self.found[job_id] = await decode()
            self.found.move_to_end(job_id)
            while len(self.found) > self.max_open:
                self.forget(next(iter(self.found)))
            return self.found[job_id]

    def forget(self, job_id: str) -> None:
        """Drop the recording of a job."""
        self.found.pop(job_id, None)
        self.locks.pop(job_id, None)


async def perceive(
    service: Service, context: RequestContext, recording: Recording, index: int, deadline_s: float
) -> StepOutcome:
    """Ask one window, and return its perception as the outcome of a step.

    Raises:
        Exception: Each exception of a question; see `server.errors.to_request_error`.
    """
    run = RecordingRun(service, context, Asked(MAP_QUESTION), recording, deadline_s=deadline_s)
    await run.prepare()
    window = await run.perceive_window(recording.spans[index])
    return {"window": WINDOW.dump_python(window, mode="json")}


async def answer(
    service: Service,
    context: RequestContext,
    asked: Asked,
    recording: Recording,
    known: Iterable[WindowPerception],
    *,
    deadline_s: float,
    shows_reasoning: bool,
) -> QaReply:
    """Answer one question from known perceptions; a window without one is asked now.

    Raises:
        Exception: Each exception of a question; see `server.errors.to_request_error`.
    """
    run = RecordingRun(
        service, context, asked, recording, deadline_s=deadline_s, shows_reasoning=shows_reasoning, known=known
    )
    await run.prepare()
    async for _ in run.perceive():
        pass
    return await run.answer()


def known_windows(outcomes: Sequence[StepOutcome], *, with_counts: bool) -> list[WindowPerception]:
    """Return the perceptions of the finished steps of windows.

    Args:
        with_counts: Keep the token counts; one question of a job reports them.
    """
    windows = [WINDOW.validate_python(outcome["window"]) for outcome in outcomes if "window" in outcome]
    return windows if with_counts else [dataclasses.replace(window, counts=Counts()) for window in windows]
