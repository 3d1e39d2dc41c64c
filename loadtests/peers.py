"""Peers of the benchmark, each in its own process: bare engines, transformers, the decoder.

`python -m loadtests.peers KIND ...` loads a checkpoint and writes "ready". It then answers each line with a JSON
request by a line with a JSON reply. Only this module of the package imports the service, since its subjects have no
HTTP API.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import itertools
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, Literal, TextIO, get_args

import click
import numpy as np

from hyper_model.engine_environment import native_dtype, num_cores
from loadtests.clips import SAMPLE_RATE_HZ, FreshClips
from loadtests.llamacpp import HINT, LlamaCpp, find_tools
from loadtests.workload import find_clips

QUESTION = "What does the first speaker say?"
SECOND_QUESTION = "How many people speak?"
DTYPE = native_dtype()
Kind = Literal["ours", "drafts", "stock", "transformers", "openai", "decode", "llamacpp"]
Form = Literal["float-eager", "float-compiled", "int8-compiled"]
DECODE_MEMORY_BYTES = 256 * 2**20


@click.command()
@click.argument("kind", type=click.Choice(get_args(Kind)))
@click.option("--checkpoint", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--clips", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True)
@click.option("--max-num-seqs", default=32, show_default=True)
@click.option("--pause", help="Fields of the manifest's `pause` group to serve instead, as JSON.")
@click.option("--port", type=int, help="openai only: where vLLM's own server listens.")
@click.option("--form", type=click.Choice(get_args(Form)), default="float-eager", help="ours only: weights and mode.")
def main(
    kind: Kind, checkpoint: Path, clips: Path, max_num_seqs: int, pause: str | None, port: int | None, form: Form
) -> None:
    """Serve measurements of KIND over standard input and output, or become vLLM's own OpenAI server."""
    if (checkpoint / "parts.json").is_file():
        checkpoint = composed(checkpoint)
    if kind == "openai":
        become_openai_server(checkpoint, max_num_seqs, port)
    if pause is not None:
        with tempfile.TemporaryDirectory() as folder:
            run(kind, with_pause(checkpoint, Path(folder), json.loads(pause)), clips, max_num_seqs, form)
    else:
        run(kind, checkpoint, clips, max_num_seqs, form)


def composed(parts: Path) -> Path:
    """Compose a checkpoint from its trained parts and installed packages, in the cache folder."""
    from hyper_model.compose import compose_once, read_parts

    return compose_once(read_parts(parts), report=lambda line: click.echo(line, err=True)).path


def run(kind: Kind, checkpoint: Path, clips: Path, max_num_seqs: int, form: Form = "float-eager") -> None:
    """Serve measurements until standard input closes."""
    replies()
    if kind == "llamacpp":
        serve_sync(llama_cpp())
        return
    if kind == "decode":
        asyncio.run(serve(DecodePeer(clips)))
        return
    fresh = FreshClips(clips)
    if kind == "transformers":
        peer = TransformersPeer(checkpoint, fresh)
        serve_sync(peer)
    else:
        asyncio.run(serve(EnginePeer(checkpoint, fresh, max_num_seqs, kind, form)))


def llama_cpp() -> LlamaCpp:
    """Return llama.cpp on the decoder of hyper-small, from the pinned package.

    Raises:
        click.ClickException: llama.cpp is not installed.
    """
    from hyper_model.compose import SMOLLM2, cache_folder, locate

    tools = find_tools()
    if tools is None:
        raise click.ClickException(HINT)
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    return LlamaCpp(tools, locate(SMOLLM2), folder, num_cores())


def with_pause(checkpoint: Path, folder: Path, fields: dict[str, Any]) -> Path:
    """Copy a checkpoint and change the copy's gate."""
    from hyper_model.checkpoint import update_pause

    copied = folder / checkpoint.resolve().name
    shutil.copytree(checkpoint, copied)
    update_pause(copied, fields)
    return copied


def become_openai_server(checkpoint: Path, max_num_seqs: int, port: int | None) -> None:
    """Replace this process by vLLM's own server with its own model class."""
    from hyper_model.engine_environment import prepare_environment

    prepare_environment()
    os.environ["VLLM_PLUGINS"] = ""
    arguments = openai_arguments(checkpoint, max_num_seqs, port)
    os.execv(sys.executable, [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments])


def openai_arguments(checkpoint: Path, max_num_seqs: int, port: int | None) -> list[str]:
    """Return the command line of vLLM's own server: defaults, with the service's dtype, batch size and eager mode."""
    arguments = ["--model", str(checkpoint), "--served-model-name", "stock", "--host", "127.0.0.1", "--port", str(port)]
    arguments += ["--dtype", DTYPE, "--max-num-seqs", str(max_num_seqs), "--enforce-eager"]
    return [*arguments, "--generation-config", "vllm", "--disable-uvicorn-access-log"]


@functools.cache
def replies() -> TextIO:
    """Reserve standard output for replies; other prints of vLLM and its children go to standard error."""
    original = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return original


def reply(value: Any) -> None:
    """Write one reply."""
    replies().write(json.dumps(value) + "\n")


def serve_sync(peer: Any) -> None:
    """Answer requests until standard input closes."""
    reply("ready")
    for line in sys.stdin:
        request = json.loads(line)
        reply(getattr(peer, request.pop("do"))(**request))


async def serve(peer: EnginePeer | DecodePeer) -> None:
    """Answer requests with an engine or a decoder until standard input closes."""
    await peer.start()
    reply("ready")
    while line := await asyncio.to_thread(sys.stdin.readline):
        request = json.loads(line)
        reply(await getattr(peer, request.pop("do"))(**request))
    await peer.stop()


class DecodePeer:
    """Decoder of clips in this process and in the service's sandbox."""

    def __init__(self, clips: Path) -> None:
        from hyper_model.audio import AudioLimits
        from server.decoding.pool import DecoderPool

        self.clips = [path.read_bytes() for path in find_clips(clips)]
        self.num_deaths = 0
        self.box = DecoderPool(AudioLimits(), memory_bytes=DECODE_MEMORY_BYTES, on_death=self.count_death)

    def count_death(self, reason: str) -> None:
        """Count a decoder without a result."""
        self.num_deaths += 1

    async def start(self) -> None:
        """Start the sandbox."""
        await self.box.start()

    async def stop(self) -> None:
        """Stop the sandbox."""
        await self.box.stop()

    async def layers(self) -> list[str]:
        """Return the protection layers of the sandbox."""
        return list(self.box.layers)

    async def deaths(self) -> int:
        """Return the number of decoders without a result."""
        return self.num_deaths

    async def decode_file(self, path: str) -> dict[str, Any]:
        """Decode a file in the sandbox; return its duration, silence, track and warnings, or the refusal."""
        from hyper_model.errors import AudioError

        try:
            waveform = await self.box.decode(await asyncio.to_thread(Path(path).read_bytes))
        except AudioError as error:
            return {"error": error.code, "message": error.message}
        return {
            "duration_s": waveform.duration_s,
            "is_silent": waveform.quality.silence_ratio == 1.0,
            "track": waveform.track,
            "codes": [warning.code for warning in waveform.warnings],
        }

    async def overheads_ms(self, rounds: int) -> list[float]:
        """Decode each clip directly and then in the sandbox; return the additional milliseconds of each."""
        from hyper_model.audio import decode

        overheads: list[float] = []
        for _ in range(rounds):
            for clip in self.clips:
                started_s = time.perf_counter()
                decode(clip)
                middle_s = time.perf_counter()
                await self.box.decode(clip)
                overheads.append(1000 * (time.perf_counter() - 2 * middle_s + started_s))
        return overheads


class EnginePeer:
    """vLLM's engine without a server: with our model class and gate, the same with drafts, or unmodified ("stock")."""

    def __init__(
        self, checkpoint: Path, fresh: FreshClips, max_num_seqs: int, kind: Kind, form: Form = "float-eager"
    ) -> None:
        from hyper_model.checkpoint import open_checkpoint
        from hyper_model.compose import cache_folder
        from hyper_model.quantize import quantize_once
        from server.engines.vllm import VllmEngine
        from server.settings import Settings

        self.checkpoint = open_checkpoint(checkpoint, verify=False)
        if form == "int8-compiled":
            self.checkpoint = quantize_once(self.checkpoint, cache_folder(), verify=False)
        self.tokenizer = self.checkpoint.tokenizer
        self.fresh = fresh
        self.numbers = itertools.count()
        if kind == "stock":
            # Without plugins, vLLM does not load our model class.
            os.environ["VLLM_PLUGINS"] = ""
        # Figures of pauses and gate compare requests with and without a gate, and only the first get drafts.
        drafts = "auto" if kind == "drafts" else "off"
        settings: Any = {"dtype": DTYPE, "max_num_seqs": max_num_seqs, "checkpoint": checkpoint, "drafts": drafts}
        # Only the part `cpu` compares modes; elsewhere both sides of a ratio run eagerly.
        settings["compile"] = "off" if form == "float-eager" else "on"
        self.engine: Any = (StockEngine if kind == "stock" else VllmEngine)(Settings(**settings), self.checkpoint)

    async def stop(self) -> None:
        """Stop the engine."""
        await self.engine.stop()

    async def start(self) -> None:
        """Load the model, and run each measured size once."""
        await self.engine.start()
        for seconds in (1, 5):
            await self.last(self.request(np.zeros(seconds * SAMPLE_RATE_HZ, np.float32), 4))

    def request(self, clip: np.ndarray, max_tokens: int, question: str = QUESTION, **fields: Any) -> Any:
        """Return a request about a clip; without stop tokens, the answer runs to its limit."""
        from hyper_model.audio import Waveform
        from hyper_model.trace import build_prompt
        from server.engines.protocol import GenerationRequest

        key = Waveform(clip).sha256
        prompt = build_prompt(self.tokenizer, question)
        fields = {"cache_salt": "bench", "clip_keys": (key,), **fields}
        return GenerationRequest(f"bench-{next(self.numbers)}", prompt, (clip,), max_tokens, **fields)

    async def last(self, request: Any) -> tuple[float, float, int, int]:
        """Run a request; return seconds to its first and last token, visible tokens and latent tokens."""
        started_s = time.perf_counter()
        first_s, num_visible, num_latent = 0.0, 0, 0
        async with aclosing(self.engine.generate(request)) as chunks:
            async for chunk in chunks:
                first_s = first_s or time.perf_counter() - started_s
                num_visible += len(chunk.token_ids)
                num_latent += len(chunk.span)
        return first_s, time.perf_counter() - started_s, num_visible, num_latent

    async def first_token(self, seed: int) -> float:
        """Return the seconds to the first token about a new clip."""
        return (await self.last(self.request(self.fresh.make(seed), 1)))[0]

    async def second_question(self, seed: int) -> tuple[float, float]:
        """Return the seconds to the first token of a first and of a second question about a new clip."""
        clip = self.fresh.make(seed)
        first, _, _, _ = await self.last(self.request(clip, 1))
        second, _, _, _ = await self.last(self.request(clip, 1, SECOND_QUESTION))
        return first, second

    async def pauses(self, seed: int, max_tokens: int, is_paused: bool) -> tuple[float, int, int]:
        """Return the seconds of a whole completion about a new clip, with its visible and latent tokens."""
        from hyper_model.pause import GateSettings

        gate = GateSettings.of(self.checkpoint.manifest, self.tokenizer) if is_paused else None
        request = self.request(self.fresh.make(seed), max_tokens, gate=gate)
        return (await self.last(request))[1:]

    async def step(self, batch: int, max_tokens: int, is_armed: bool) -> float:
        """Return the seconds of one decode step of a full batch; an armed gate never fires."""
        from hyper_model.pause import GateSettings

        gate = None
        if is_armed:
            gate = GateSettings.of(self.checkpoint.manifest, self.tokenizer)
            assert gate is not None
            gate = dataclasses.replace(gate, tau_pause=0.0, tau_abort=0.0, loop_tokens=10**9)
        clip = np.zeros(SAMPLE_RATE_HZ, np.float32)
        times = [time_tokens(self.engine, self.request(clip, max_tokens, gate=gate)) for _ in range(batch)]
        stamps = await asyncio.gather(*times)
        # After the last request's first token, all requests decode together.
        started_s = max(stamps_of_request[0] for stamps_of_request in stamps)
        ended_s = min(stamps_of_request[-1] for stamps_of_request in stamps)
        num_steps = (
            min(sum(started_s <= stamp <= ended_s for stamp in stamps_of_request) for stamps_of_request in stamps) - 1
        )
        return (ended_s - started_s) / num_steps

    async def traces(self, seeds: Sequence[int], max_tokens: int) -> tuple[float, list[list[int]]]:
        """Write the traces of new clips together; return the seconds after all first tokens, and the token ids."""
        from hyper_model.pause import GateSettings
        from hyper_model.trace import Section

        stop = (*self.tokenizer.stop_ids, self.tokenizer.tag_ids[Section.FINAL_ANSWER][0])
        gate = GateSettings.of(self.checkpoint.manifest, self.tokenizer)

        async def write(seed: int) -> tuple[float, float, list[int]]:
            first_s, token_ids = 0.0, list[int]()
            request = self.request(self.fresh.make(seed), max_tokens, gate=gate, stop_token_ids=stop)
            async with aclosing(self.engine.generate(request)) as chunks:
                async for chunk in chunks:
                    first_s = first_s or time.perf_counter()
                    token_ids += [*chunk.span, *chunk.token_ids]
            return first_s, time.perf_counter(), token_ids

        written = await asyncio.gather(*map(write, seeds))
        seconds = max(last_s for _, last_s, _ in written) - max(first_s for first_s, _, _ in written)
        return seconds, [token_ids for _, _, token_ids in written]

    async def decode(self, batch: int, prompt_tokens: int, max_tokens: int) -> tuple[float, float]:
        """Return the seconds of a batch of new prompts without clips, and of one decode step of the batch."""
        from server.engines.protocol import GenerationRequest

        random = np.random.default_rng(next(self.numbers))
        # Ordinary words in the vocabulary of either checkpoint.
        prompts = random.integers(300, 2_000, (batch, prompt_tokens)).tolist()
        requests = [GenerationRequest(f"bench-{next(self.numbers)}", prompt, (), max_tokens) for prompt in prompts]
        begun_s = time.perf_counter()
        stamps = await asyncio.gather(*(time_tokens(self.engine, request) for request in requests))
        first_s, last_s = max(each[0] for each in stamps), min(each[-1] for each in stamps)
        num_steps = min(sum(first_s <= stamp <= last_s for stamp in each) for each in stamps) - 1
        return first_s - begun_s, (last_s - first_s) / num_steps

    async def throughput(self, seeds: Sequence[int], clients: int, max_tokens: int) -> tuple[float, int]:
        """Answer one question about each new clip, `clients` at a time; return total seconds and written tokens."""
        from hyper_model.trace import Section

        clips = iter([self.fresh.make(seed) for seed in seeds])
        close_id = self.tokenizer.tag_ids[Section.FINAL_ANSWER][1]
        stop = (*self.tokenizer.stop_ids, close_id)
        num_tokens = 0

        async def client() -> None:
            nonlocal num_tokens
            for clip in clips:
                _, _, num_visible, _ = await self.last(self.request(clip, max_tokens, stop_token_ids=stop))
                num_tokens += num_visible

        started_s = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(clients)))
        return time.perf_counter() - started_s, num_tokens


async def time_tokens(engine: Any, request: Any) -> list[float]:
    """Return the arrival time of each token; a slow reader gets several at once."""
    stamps: list[float] = []
    async with aclosing(engine.generate(request)) as chunks:
        async for chunk in chunks:
            stamps += [time.perf_counter()] * len(chunk.token_ids)
    return stamps


class StockEngine:
    """Unmodified vLLM: its own Qwen2-Audio class, no logits processor, driven by AsyncLLM's calls."""

    def __init__(self, settings: Any, checkpoint: Any) -> None:
        self.settings = settings
        self.checkpoint = checkpoint
        self.llm: Any = None

    async def start(self) -> None:
        """Start vLLM's processes with the settings of the service."""
        from hyper_model.engine_environment import prepare_environment

        prepare_environment(kv_cache_gib=self.settings.kv_cache_gib)
        os.environ.setdefault("VLLM_WORKER_MULTIPROCESSING_METHOD", "spawn")
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        from server.engines.vllm import cpu_fields

        args = AsyncEngineArgs(
            model=str(self.checkpoint.path),
            dtype=self.settings.dtype,
            max_model_len=self.checkpoint.manifest.max_model_len,
            max_num_seqs=self.settings.max_num_seqs,
            limit_mm_per_prompt={"audio": 1},
            enforce_eager=True,
            generation_config="vllm",
            # The comparison covers only model class and gate, so all other settings are equal.
            **cpu_fields(),
        )
        self.llm = AsyncLLM.from_engine_args(args)
        await self.llm.reset_mm_cache()

    async def stop(self) -> None:
        """Stop vLLM's processes."""
        await asyncio.to_thread(self.llm.shutdown)

    async def generate(self, request: Any) -> Any:
        """Yield the completion as chunks of the service's own type."""
        from server.engines.protocol import TokenChunk
        from server.engines.vllm import sampling_params

        prompt = {
            "prompt_token_ids": list(request.prompt_token_ids),
            "multi_modal_data": {"audio": [(clip, SAMPLE_RATE_HZ) for clip in request.clips]},
        }
        (engine_input,) = await self.llm.renderer.render_cmpl_async([prompt])
        params = sampling_params(request, request.max_tokens)
        async with aclosing(self.llm.generate(engine_input, params, request.request_id)) as outputs:
            async for output in outputs:
                yield TokenChunk(tuple(output.outputs[0].token_ids))


class TransformersPeer:
    """transformers' `generate` in batches of 16, as in the published evaluation code."""

    def __init__(self, checkpoint: Path, fresh: FreshClips) -> None:
        import torch
        from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration

        self.fresh = fresh
        self.model: Any = Qwen2AudioForConditionalGeneration.from_pretrained(
            checkpoint, dtype=getattr(torch, DTYPE)
        ).eval()
        self.processor: Any = AutoProcessor.from_pretrained(checkpoint)
        self.processor.tokenizer.padding_side = "left"
        content = [{"type": "audio"}, {"type": "text", "text": QUESTION}]
        conversation = [{"role": "user", "content": content}]
        self.prompt = self.processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)

    def throughput(self, seeds: Sequence[int], clients: int, max_tokens: int) -> tuple[float, int]:
        """Answer one question about each new clip, `clients` per batch; return total seconds and written tokens."""
        import torch

        clips = [self.fresh.make(seed) for seed in seeds]
        num_tokens = 0
        started_s = time.perf_counter()
        for start in range(0, len(clips), clients):
            batch = clips[start : start + clients]
            inputs = self.processor(
                text=[self.prompt] * len(batch),
                audio=batch,
                sampling_rate=SAMPLE_RATE_HZ,
                return_tensors="pt",
                padding=True,
            ).to(self.model.dtype)
            with torch.inference_mode():
                output = self.model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
            written = output[:, inputs["input_ids"].shape[1] :]
            num_tokens += int((written != self.model.generation_config.pad_token_id).sum())
        return time.perf_counter() - started_s, num_tokens

    def encoder_difference(self, durations_s: Sequence[float]) -> float:
        """Return the largest difference, in float32, between our packed encoder and transformers' padded one."""
        import torch

        from hyper_model.audio_encoder import LogMel, encode

        dtype = self.model.dtype
        tower = self.model.float().model.audio_tower
        source = np.concatenate([self.fresh.make(seed) for seed in range(8)])
        clips = [source[: round(seconds * SAMPLE_RATE_HZ)] for seconds in durations_s]
        log_mel = LogMel(tower.config.num_mel_bins)
        worst = 0.0
        with torch.inference_mode():
            packed, lengths = encode(tower, [log_mel(clip) for clip in clips])
            for clip, together in zip(clips, packed.split(lengths), strict=True):
                alone, _ = encode(tower, [log_mel(clip)])
                padded = self.padded(tower, clip)
                for encoded in (together, alone):
                    worst = max(worst, float((encoded - padded).abs().max()))
        self.model.to(dtype)
        return worst

    def padded(self, tower: Any, clip: np.ndarray) -> Any:
        """Encode a clip as transformers does: padded to 30 s, with a mask."""
        import torch

        features = self.processor.feature_extractor(
            clip,
            sampling_rate=SAMPLE_RATE_HZ,
            padding="max_length",
            return_attention_mask=True,
            return_tensors="pt",
        )
        frames = features["attention_mask"].sum(-1)
        num_states, num_tokens = (int(length) for length in tower._get_feat_extract_output_lengths(frames))
        mask = torch.zeros(1, 1, 1500, 1500)
        mask[..., num_states:] = float("-inf")
        return tower(features["input_features"], attention_mask=mask).last_hidden_state[0, :num_tokens]


if __name__ == "__main__":
    main()
