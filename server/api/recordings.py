"""Questions about recordings longer than one window.

`open_recording` decodes and cuts. `answer_recording` asks what is said in each window, finds the best windows for the
question and asks them again, or reads the answer from the timeline by code. It takes any number of windows and yields
progress, so a request and a job can drive it alike. `RecordingHandler` is the part that endpoints share.

Each window is one ordinary question of the class `batch`: with its own wait in the queue, quarantine and metrics. A
failed window leaves the others as they are.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from hyper_model.answering import AnswerDelta, AnswerResult, Event
from hyper_model.audio import SAMPLE_RATE_HZ, WINDOW_S, AudioLimits, Channel
from server.answering import AnswerRun, discard
from server.api import replies
from server.api.lifecycle import precompute_quality, record_clip
from server.api.questions import Asked, ClipHandler, start_run, write_prompt
from server.api.stream import ServerSentEvent
from server.api.types import (
    Answer,
    EvidenceReply,
    PauseReply,
    QaReply,
    RunnerUp,
    SpeakerReply,
    TimelineWindow,
    Usage,
    WarningReply,
)
from server.errors import RequestError, to_request_error
from server.generation_stats import GenerationStats
from server.recordings import search, timeline
from server.recordings.cutter import Span, every_window
from server.recordings.perceptions import Counts, Status, WindowPerception
from server.recordings.recording import Recording, RecordingBuilder
from server.recordings.words import without_repeated_words
from server.request_context import RequestContext
from server.service import Service
from server.telemetry.labels import Priority

logger = logging.getLogger("hyper.server")

MAP_QUESTION = "What is said?"
"""Question to each window; the trace describes sounds, speakers and words whatever the question is."""

LongAudio = Literal["error", "window", "chunk"]

Result = TypeVar("Result")


@dataclass(frozen=True)
class WindowDone:
    """Progress: a window has its perception, or has failed.

    Attributes:
        index: Number of the window.
        status: Outcome.
        done, of: Number of finished windows and of all windows.
    """

    index: int
    status: Status
    done: int
    of: int


@dataclass(frozen=True)
class _Relistened:
    """A window with the user's question: its answer and its weight."""

    window: WindowPerception
    weight: float
    score: float
    run: AnswerRun
    result: AnswerResult

    @property
    def rank(self) -> float:
        """Return its weight among windows of an open question: the lowest group confidence of its trace."""
        return self.result.report.lowest or 0.0

    @property
    def confidence(self) -> float | None:
        """Return the probability of its answer, or without one the lowest group confidence of its trace."""
        return self.result.report.lowest if self.result.confidence is None else self.result.confidence


async def open_recording(
    service: Service,
    context: RequestContext,
    data: bytes,
    *,
    track: int | None = None,
    channel: Channel = "mix",
    limits: AudioLimits | None = None,
) -> Recording:
    """Decode a recording block by block in the sandbox, cut it, charge its length to the caller and count it.

    Args:
        track: Audio track to decode, from 1; None for the file's default.
        channel: Channel to use.
        limits: Limits of the decode; None for those of recordings.

    Raises:
        AudioError: If the recording cannot be used.
        RequestError: 429, if the caller has no seconds of audio left; 503, if the disk is full.
    """
    started_s = time.monotonic()
    builder = RecordingBuilder(every_window if service.settings.recording_cuts == "fixed" else None)
    limits = limits or service.recording_limits
    with service.metrics.decoding.track_inprogress(), contextlib.ExitStack() as undo:
        undo.callback(builder.close)
        async with contextlib.AsyncExitStack() as stack:
            with context.timing("decode_wait"):
                await stack.enter_async_context(service.decode_limiter.slot(context.priority))
            with context.timing("decode"):
                about, num_samples = await service.decoder_pool.decode_blocks(
                    data, builder, limits, track=track, channel=channel
                )
        if context.tenant is not None:
            await context.tenant.charge(num_samples / SAMPLE_RATE_HZ)
        recording = builder.finish(about, num_samples)
        undo.pop_all()
    context.decode_s = time.monotonic() - started_s
    record_clip(service, len(data), about.codec, recording.duration_s, recording.quality)
    return recording


async def answer_recording(
    service: Service,
    context: RequestContext,
    asked: Asked,
    recording: Recording,
    *,
    deadline_s: float,
    shows_reasoning: bool = True,
) -> AsyncGenerator[WindowDone | QaReply]:
    """Answer a question about a recording of any number of windows; yield progress, and at last the reply.

    Closing the generator cancels all work. Finished windows stay in `service.perceptions`, so a second run asks only
    the others.

    Args:
        deadline_s: A reading of `time.monotonic()`, for the pause budgets.

    Raises:
        PromptError: If the question or the choices cannot be used.
        RequestError: If all windows fail, the error of the first.
    """
    run = RecordingRun(service, context, asked, recording, deadline_s=deadline_s, shows_reasoning=shows_reasoning)
    await run.prepare()
    async with contextlib.aclosing(run.perceive()) as progress:
        async for done in progress:
            yield done
    yield await run.answer()


class RecordingRun:
    """One question about one recording.

    Args:
        known: Perceptions of windows that need not be asked, beside the stored ones.

    Attributes:
        id: Random name of the answer.
        windows: Perceptions so far, by the number of the window.
        counts: Tokens so far, stored perceptions not included.
        recording_id: Name of the recording for its caller.
    """

    def __init__(
        self,
        service: Service,
        context: RequestContext,
        asked: Asked,
        recording: Recording,
        *,
        deadline_s: float,
        shows_reasoning: bool = True,
        known: Iterable[WindowPerception] = (),
    ) -> None:
        self.service = service
        self.context = context
        self.known = {window.span: window for window in known}
        # The answer combines several windows or is computed, so their log-probabilities are not used.
        self.asked = dataclasses.replace(asked, wants_logprobs=False)
        self.recording = recording
        self.deadline_s = deadline_s
        self.shows_reasoning = shows_reasoning
        self.windows: dict[int, WindowPerception] = {}
        self.relistened: list[_Relistened] = []
        self.scores: dict[int, float] = {}
        self.errors: list[RequestError] = []
        self.id = uuid.uuid4().hex
        self.created_s = int(time.time())
        self.recording_id = service.perceptions.recording_id(context.tenant_name, recording.sha256)
        self.map_token_ids: list[int] = []
        self.token_ids: list[int] = []

    async def prepare(self) -> None:
        """Write the prompts.

        Raises:
            PromptError: If the question or the choices cannot be used.
        """
        self.token_ids = await write_prompt(self.service, self.context, self.asked)
        self.map_token_ids = await write_prompt(self.service, self.context, Asked(MAP_QUESTION))

    async def perceive(self) -> AsyncGenerator[WindowDone]:
        """Ask each window that is neither silent nor known; yield each finished one.

        Raises:
            RequestError: If all asked windows fail, the error of the first.
        """
        spans = self.recording.spans
        known = {**self.service.perceptions.find(self.recording_id), **self.known}
        todo: list[Span] = []
        for span in spans:
            if span.is_silent or span in known:
                yield self._finish(known.get(span) or WindowPerception(span, "silent"))
            else:
                todo.append(span)
        # Batch questions of one recording take no more places than batch requests do.
        places = asyncio.Semaphore(min(self.service.settings.max_num_seqs, self.service.admission.max_batch_in_flight))
        self.context.phase = "queue"
        tasks = [asyncio.create_task(self._perceive_one(span, places)) for span in todo]
        started_s = time.monotonic()
        try:
            for task in asyncio.as_completed(tasks):
                yield self._finish(await task)
                self.context.phase = "generate"
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self.context.record("generate", started_s)
        if todo and len(self.errors) == len(todo) and not any(each.trace for each in self.windows.values()):
            raise self.errors[0]

    def _finish(self, window: WindowPerception) -> WindowDone:
        self.windows[window.span.index] = window
        self.service.metrics.recording_windows.labels(window.status).inc()
        return WindowDone(window.span.index, window.status, len(self.windows), len(self.recording.spans))

    async def _attempt(self, work: Awaitable[Result]) -> Result | str:
        """Return the result, or the code of its error; the other windows stay as they are."""
        try:
            return await work
        except Exception as error:
            return self._record_error(error)

    async def _perceive_one(self, span: Span, places: asyncio.Semaphore) -> WindowPerception:
        async with places:
            found = await self._attempt(self.perceive_window(span))
        return WindowPerception(span, "failed", error=found) if isinstance(found, str) else found

    async def perceive_window(self, span: Span) -> WindowPerception:
        """Ask one window and store its perception; a silent or stored one is not asked.

        Raises:
            Exception: Each exception of a question; see `server.errors.to_request_error`.
        """
        if span.is_silent:
            return WindowPerception(span, "silent")
        stored = self.service.perceptions.find(self.recording_id).get(span)
        if stored is not None:
            return stored
        # The pause gate is off: a second look costs more than it adds to a description.
        run, result = await self._ask(span, Asked(MAP_QUESTION, pause="off"), self.map_token_ids, "batch")
        termination = result.parsed.termination.value
        window = WindowPerception(
            span, "done", result.parsed.trace, counts=counts_of(run, result), termination=termination
        )
        self.service.perceptions.keep(self.recording_id, dataclasses.replace(window, counts=Counts()))
        return window

    async def _ask(
        self, span: Span, asked: Asked, token_ids: Sequence[int], priority: Priority
    ) -> tuple[AnswerRun, AnswerResult]:
        """Ask one window, with a context of its own: its times count from now."""
        context = RequestContext(
            self.context.request_id, is_body_complete=True, tenant=self.context.tenant, priority=priority
        )
        waveform = self.recording.waveform(span.start, span.end)
        await self.service.in_pool(precompute_quality, waveform)
        run = start_run(self.service.answerer, context, asked, token_ids, waveform, self.deadline_s)
        return run, await run.run(discard)

    def _record_error(self, error: Exception) -> str:
        fault = to_request_error(error)
        if fault.code == "internal_error":
            logger.error("window failed", exc_info=error, extra={"request_id": self.context.request_id})
        self.errors.append(fault)
        return fault.code

    @property
    def in_order(self) -> list[WindowPerception]:
        """Return the finished windows in order; words of a shared second are kept once."""
        merged: list[WindowPerception] = []
        for index in sorted(self.windows):
            window = self.windows[index]
            before = merged[-1] if merged else None
            if before and window.trace and window.span.num_shared and before.span.index == index - 1:
                words = without_repeated_words(before.transcript, window.transcript)
                window = dataclasses.replace(window, trace=dataclasses.replace(window.trace, transcript=words))
            merged.append(window)
        return merged

    async def answer(self) -> QaReply:
        """Answer from the timeline by code where that is possible, else ask the best windows again.

        Raises:
            RequestError: If all windows that were asked again fail, the error of the first.
        """
        windows = self.in_order
        counted = timeline.answer_from(self.asked.question, self.asked.choices, windows)
        if counted is not None:
            return self._reply_by_code(counted, windows)
        candidates = [window for window in windows if window.status == "done"] or windows[:1]
        found = search.scores([window.text for window in candidates], self.asked.question, self.asked.choices)
        places = search.best(found)
        self.scores = {window.span.index: score for window, score in zip(candidates, found, strict=True)}
        weights = search.weights([found[place] for place in places])
        num_errors = len(self.errors)
        asked = [
            self._relisten(candidates[place], weight, found[place])
            for place, weight in zip(places, weights, strict=True)
        ]
        self.relistened = [each for each in await gather(asked) if each is not None]
        if not self.relistened:
            raise self.errors[num_errors]
        return self._reply_by_windows(windows)

    async def _relisten(self, window: WindowPerception, weight: float, score: float) -> _Relistened | None:
        found = await self._attempt(self._ask(window.span, self.asked, self.token_ids, self.context.priority))
        return None if isinstance(found, str) else _Relistened(window, weight, score, *found)

    def _reply_by_windows(self, windows: Sequence[WindowPerception]) -> QaReply:
        """Combine the answers of the windows that were asked again."""
        asked = self.relistened
        if self.asked.choices:
            total = sum(each.weight for each in asked) or 1.0
            scores = [
                sum(each.weight * each.result.scores[index] for each in asked) / total
                for index in range(len(self.asked.choices))
            ]
            index = max(range(len(scores)), key=lambda each: scores[each])
            shares = [each.weight * each.result.scores[index] for each in asked]
            main = asked[max(range(len(asked)), key=lambda each: shares[each])]
            answer = Answer(
                text=self.asked.choices[index],
                choice_index=index,
                choice=self.asked.choices[index],
                confidence=scores[index],
                scores=scores,
            )
            # Windows that agree, and carry a good part of the score.
            agreeing = [
                each
                for each, share in sorted(zip(asked, shares, strict=True), key=lambda pair: -pair[1])
                if each is main or (each.result.choice_index == index and share >= max(shares) / 2)
            ]
        else:
            fitting = [each for each in asked if each.score > 0] or asked[:1]
            main = max(fitting, key=lambda each: each.rank)
            others = [
                RunnerUp(window=each.window.span.index, text=each.result.text, confidence=rounded(each.confidence))
                for each in asked
                if each is not main
            ]
            answer = Answer(text=main.result.text, confidence=rounded(main.confidence), runners_up=others)
            agreeing = [main]
        evidence = [self._evidence(each.window, answer.text) for each in agreeing]
        answer = answer.model_copy(update={"answered_by": "windows", "evidence": evidence})
        reply = replies.build(main.run, main.result, shows_reasoning=self.shows_reasoning)
        warnings = [*replies.answer_warnings(main.result), *self._warnings()]
        return self._with_recording(reply, windows, answer, main.run.stats, warnings)

    def _reply_by_code(self, counted: timeline.Counted, windows: Sequence[WindowPerception]) -> QaReply:
        """Write the reply for an answer from the timeline."""
        index = counted.choice_index
        choice = None if index is None else self.asked.choices[index]
        evidence = [self._evidence(windows[place], counted.text) for place in counted.windows]
        answer = Answer(text=counted.text, choice_index=index, choice=choice, answered_by="timeline", evidence=evidence)
        explanation = f"{counted.explanation} Code read the answer from the timeline; times are those of windows."
        warnings = [WarningReply(code="answered_from_timeline", message=explanation), *self._warnings()]
        reply = QaReply(
            id="",
            created=self.created_s,
            model=self.service.checkpoint.manifest.name,
            answer=answer,
            perception=None,
            reasoning=None,
            trace=None,
            termination="complete",
            pause=PauseReply(mode="off", budget=0, lowered_by=None, count=0, latent_tokens=0, at=[]),
            audio=[],
            usage=usage_of(Counts()),
            timings_ms=replies.timings(GenerationStats(0), self.context),
            warnings=[],
        )
        return self._with_recording(reply, windows, answer, GenerationStats(0), warnings)

    def _with_recording(
        self,
        reply: QaReply,
        windows: Sequence[WindowPerception],
        answer: Answer,
        stats: GenerationStats,
        warnings: Sequence[WarningReply],
    ) -> QaReply:
        recording, total = self.recording, Counts()
        for window in windows:
            total += window.counts
        for each in self.relistened:
            total += counts_of(each.run, each.result)
        parts = [
            (window.span.start_s + window.span.num_shared / SAMPLE_RATE_HZ, window.span.end_s)
            for window in windows
            if window.status != "failed"
        ]
        audio = replies.describe_audio(
            recording.about, recording.duration_s, recording.quality, parts, num_windows=len(recording.spans)
        )
        self.context.facts |= {"audio_s": round(recording.duration_s, 3), "windows": len(recording.spans)}
        return reply.model_copy(
            update={
                "id": f"qa_{self.id}",
                "answer": answer,
                "audio": [audio],
                "recording": self.recording_id,
                "timeline": self.timeline(windows),
                "usage": usage_of(total),
                "timings_ms": replies.timings(stats, self.context),
                "warnings": list(warnings),
            }
        )

    def timeline(self, windows: Sequence[WindowPerception] | None = None) -> list[TimelineWindow]:
        """Return the finished windows in wire format."""
        again = {each.window.span.index: counts_of(each.run, each.result) for each in self.relistened}
        return [
            timeline_window(window, self.scores.get(window.span.index), again.get(window.span.index))
            for window in (self.in_order if windows is None else windows)
        ]

    def _evidence(self, window: WindowPerception, answer: str) -> EvidenceReply:
        quote = search.best_quote(window.transcript, f"{self.asked.question} {answer}")
        if quote is None and window.trace is not None:
            quote = window.trace.environment or None
        span = window.span
        return EvidenceReply(window=span.index, start_s=round(span.start_s, 4), end_s=round(span.end_s, 4), quote=quote)

    def _warnings(self) -> list[WarningReply]:
        quality, found = self.recording.quality, list[WarningReply]()
        found += replies.quality_warnings(quality)
        failed = [str(index) for index, window in sorted(self.windows.items()) if window.status == "failed"]
        if failed:
            named = ", ".join(failed[:10]) + (f" and {len(failed) - 10} more" if len(failed) > 10 else "")
            message = f"{len(failed)} of {len(self.recording.spans)} windows failed and were left out: {named}."
            found.append(WarningReply(code="windows_failed", message=message))
        return found


def part_from(recording: Recording, start_s: float, min_duration_s: float) -> tuple[int, int]:
    """Return the first and the last sample, exclusive, of the window from a start.

    Raises:
        RequestError: 400, if less than the minimum is left.
    """
    start = round(start_s * SAMPLE_RATE_HZ)
    end = min(recording.num_samples, start + round(WINDOW_S * SAMPLE_RATE_HZ))
    if end - start < min_duration_s * SAMPLE_RATE_HZ:
        raise RequestError(
            "invalid_parameter",
            f"`start_s` is {start_s:g}; the recording ends at {recording.duration_s:.2f} s.",
            param="start_s",
            limit=round(recording.duration_s, 4),
            actual=start_s,
        )
    return start, end


class RecordingHandler(ClipHandler):
    """Common part of the handlers that answer one question about a clip or a recording.

    Args:
        long_audio: Handling of recordings longer than one window.
        start_s: Start of the window, with `window`.
        max_windows: Maximum number of windows; None for any.
        limits: Limits of a recording's decode; None for those of recordings.
    """

    def __init__(
        self,
        *arguments: Any,
        long_audio: LongAudio = "error",
        start_s: float | None = None,
        max_windows: int | None = None,
        limits: AudioLimits | None = None,
        **fields: Any,
    ) -> None:
        super().__init__(*arguments, **fields)
        self.long_audio: LongAudio = long_audio
        self.start_s = start_s or 0.0
        self.max_windows = max_windows
        self.limits = limits
        self.recording_run: RecordingRun | None = None
        self.used_from_s: tuple[float, Recording] | None = None

    async def prepare(self, deadline_s: float) -> None:
        """Write the prompt, then decode the clip or the recording."""
        if self.long_audio == "error":
            await super().prepare(deadline_s)
            return
        service, context = self.service, self.context
        # The question is cheaper to refuse than the recording.
        token_ids = await write_prompt(service, context, self.asked)
        recording = await open_recording(
            service, context, self.data, track=self.track, channel=self.channel, limits=self.limits
        )
        self.data = b""
        if self.long_audio == "chunk" and len(recording.spans) > 1:
            self.require_few_windows(recording)
            self.recording_run = RecordingRun(
                service, context, self.asked, recording, deadline_s=deadline_s, shows_reasoning=self.shows_reasoning
            )
            await self.recording_run.prepare()
            return
        try:
            waveform = recording.waveform(*part_from(recording, self.start_s, service.recording_limits.min_duration_s))
        finally:
            recording.close()
        self.used_from_s = (self.start_s, recording)
        self.run = start_run(service.answerer, context, self.asked, token_ids, waveform, deadline_s)

    def require_few_windows(self, recording: Recording) -> None:
        """Refuse a recording with too many windows for a request.

        Raises:
            RequestError: 422, with the limit and the way of jobs.
        """
        if self.max_windows is not None and len(recording.spans) > self.max_windows:
            recording.close()
            num_windows = len(recording.spans)
            raise RequestError(
                "audio_too_long",
                f"The recording of {recording.duration_s:.1f} s has {num_windows} windows; "
                f"the limit outside a job is {self.max_windows}.",
                param="long_audio",
                limit=self.max_windows,
                actual=num_windows,
                hint="Send the recording to POST /v1/jobs, or use `long_audio=window` with `start_s`.",
            )

    async def answer_any(
        self, on_event: Callable[[Event], Awaitable[None]], on_window: Callable[[WindowDone], Awaitable[None]]
    ) -> QaReply:
        """Answer about the clip, the window or the recording.

        Args:
            on_event: Called with each event of the answer; for a recording, with its text alone.
            on_window: Called with each finished window of a recording.
        """
        if self.recording_run is None:
            run = self.started_run
            result = await run.run(on_event)
            reply = replies.build(run, result, shows_reasoning=self.shows_reasoning)
            return self.with_place(reply, result)
        async with self.recording_work() as recording_run:
            async with contextlib.aclosing(recording_run.perceive()) as progress:
                async for done in progress:
                    await on_window(done)
            reply = await recording_run.answer()
        await on_event(AnswerDelta(reply.answer.text))
        return reply

    @contextlib.asynccontextmanager
    async def recording_work(self) -> AsyncGenerator[RecordingRun]:
        """Hold the recording's samples while it is answered."""
        assert self.recording_run is not None
        try:
            yield self.recording_run
        finally:
            self.recording_run.recording.close()

    def with_place(self, reply: QaReply, result: AnswerResult) -> QaReply:
        """Add the recording around the window to a reply."""
        if self.used_from_s is None:
            return reply
        start_s, recording = self.used_from_s
        fitted = self.started_run.fitted
        parts = [(start_s + start / SAMPLE_RATE_HZ, start_s + end / SAMPLE_RATE_HZ) for start, end in fitted.parts]
        whole = replies.describe_audio(recording.about, recording.duration_s, recording.quality, parts)
        update: dict[str, Any] = {"audio": [whole.model_copy(update={"start_s": start_s})]}
        if self.long_audio == "chunk":
            window = WindowPerception(
                recording.spans[0], "done", result.parsed.trace, counts=counts_of(self.started_run, result)
            )
            update["timeline"] = [timeline_window(window, None, None)]
        return reply.model_copy(update=update)

    @property
    def answer_id(self) -> str:
        """Return the random name of the answer."""
        return self.recording_run.id if self.recording_run else self.started_run.id

    @property
    def created_s(self) -> int:
        """Return the time of the answer's start, in seconds since 1970."""
        return self.recording_run.created_s if self.recording_run else self.started_run.stats.created_s

    def partial(self) -> dict[str, Any]:
        """Return the trace or the timeline so far."""
        if self.recording_run is None:
            return super().partial()
        return {"timeline": [window.model_dump(mode="json") for window in self.recording_run.timeline()]}


def check_place(long_audio: LongAudio, start_s: float | None) -> None:
    """Refuse a start without a window.

    Raises:
        RequestError: 400.
    """
    if start_s is not None and long_audio != "window":
        message = f"`start_s` needs `long_audio=window`; it is {long_audio}."
        raise RequestError("invalid_parameter", message, param="start_s")


def window_event(done: WindowDone) -> ServerSentEvent:
    """Return the event of a finished window."""
    return ServerSentEvent(dataclasses.asdict(done), "window.done")


def timeline_window(window: WindowPerception, score: float | None, again: Counts | None) -> TimelineWindow:
    """Return a window in wire format.

    Args:
        score: Score of the search; None without a search.
        again: Tokens of the user's question to this window; None if it was not asked again.
    """
    span, trace = window.span, window.trace
    total = window.counts + (again or Counts())
    return TimelineWindow(
        index=span.index,
        start_s=round(span.start_s, 4),
        end_s=round(span.end_s, 4),
        boundary=span.boundary,
        status=window.status,
        error=window.error,
        environment=window.environment,
        speakers=[
            SpeakerReply(id=speaker.id, description=speaker.description, quotes=list(speaker.quotes))
            for speaker in (trace.speakers if trace else ())
        ],
        transcript=trace.transcript if trace else None,
        score=rounded(score),
        relistened=again is not None,
        usage=usage_of(total),
    )


def counts_of(run: AnswerRun, result: AnswerResult) -> Counts:
    """Return the tokens of an answer."""
    stats = run.stats
    return Counts(
        stats.prompt_tokens,
        stats.audio_tokens,
        stats.cached_tokens,
        result.num_completion_tokens,
        result.num_pause_tokens,
    )


def usage_of(counts: Counts) -> Usage:
    """Return token counts in wire format."""
    fields: Mapping[str, int] = dataclasses.asdict(counts)
    total = counts.prompt_tokens + counts.completion_tokens + counts.pause_tokens
    return Usage(**fields, total_tokens=total)


def rounded(value: float | None) -> float | None:
    """Round a score to four digits."""
    return None if value is None else round(value, 4)


async def gather(works: Iterable[Awaitable[_Relistened | None]]) -> list[_Relistened | None]:
    """Await all; a cancellation cancels each."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
