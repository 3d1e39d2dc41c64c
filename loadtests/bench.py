"""Benchmark the service and its peers in one run, in turns, so that machine noise affects all of them.

Every figure except the encoder's difference is a ratio within the run. It is the median of one side over the median of
the other, with the range of single-round ratios. The peers are processes of `loadtests.peers`; the service and vLLM's
own server are measured over HTTP. Nothing here is a test; `make bench` prints a table and one line of JSON.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import httpx
import numpy as np

from loadtests.client import QA_PATH
from loadtests.clips import FreshClips, wav
from loadtests.llamacpp import HINT, find_tools
from loadtests.peers import QUESTION
from loadtests.target import child, environment, free_port, serving, when_up

CLIENTS = 16
MAX_TOKENS = 300
VISIBLE_TOKENS = 200
MAX_CLIPS_PER_ROUND = 20
CHAT_CLIPS = 8
DRAFT_CLIPS = 8
STEP_BATCH = 32
STEP_TOKENS = 160
DURATIONS_S = (0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0)
NUM_PAUSES, LATENT_TOKENS = 3, 64
SMALL_PARTS = Path("checkpoints/hyper-small")
"""Trained parts of hyper-small; its decoder is SmolLM2-135M, which llama.cpp runs too."""
SMALL_INT8_BYTES = 135e6
PREFILL_TOKENS, TRACE_TOKENS = 250, 75
OUR_PROMPT_TOKENS, THEIR_PROMPT_TOKENS = 175, 800
"""Prompt of a question about a clip of 5 s; llama.cpp pads the clip to 30 s and has 750 audio tokens."""
# This gate pauses as early as possible, three times. Completions run past their end to one length, so repetition must
# not abort them. The sections are the defaults of a checkpoint.
GATE: dict[str, Any] = {
    "max_pauses": NUM_PAUSES,
    "latent_tokens": LATENT_TOKENS,
    "tau_pause": 1.0,
    "tau_abort": 0.0,
    "window_tokens": 8,
    "rest_tokens": 8,
    "loop_tokens": 10**6,
    "acoustic_bias": 0.0,
    "sections": ["ENV", "SPEAKER", "ASR", "DESCRIPTION", "REASONING", "SUMMARY", "REFLECT"],
}


@dataclass(frozen=True)
class Figure:
    """One result: its value, minimum and maximum of single rounds, and its aim."""

    name: str
    value: float
    low: float
    high: float
    aim: str = ""


@dataclass
class Rounds:
    """Times of the two sides of a ratio, per round."""

    ours: list[float] = field(default_factory=list[float])
    theirs: list[float] = field(default_factory=list[float])

    def add(self, ours: float, theirs: float) -> None:
        """Add a round."""
        self.ours.append(ours)
        self.theirs.append(theirs)

    def medians_ms(self) -> str:
        """Return both medians in milliseconds, ours first."""
        return " and ".join(f"{1000 * statistics.median(seconds):.2f} ms" for seconds in (self.ours, self.theirs))

    def figure(self, name: str, aim: str) -> Figure:
        """Return the ratio of ours to theirs."""
        ratios = [ours / theirs for ours, theirs in zip(self.ours, self.theirs, strict=True)]
        value = statistics.median(self.ours) / statistics.median(self.theirs)
        return Figure(name, value, min(ratios), max(ratios), aim)


class Peer:
    """A process with measurements on request."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def wait(self) -> Any:
        """Return its next reply."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise click.ClickException(f"a peer ended with {self.process.wait()}: {self.process.args}")
        return json.loads(line)

    def ask(self, do: str, **arguments: Any) -> Any:
        """Send a request for a measurement and return the reply."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self.process.stdin.flush()
        return self.wait()


@dataclass(frozen=True)
class Bench:
    """Settings common to all parts of the benchmark.

    Attributes:
        rounds: Number of turns per side.
        log: File for messages of the child processes.
    """

    checkpoint: Path
    clips: Path
    rounds: int
    log: Path
    say: Callable[[str], None]

    @contextlib.contextmanager
    def peers(
        self, *kinds: tuple[str, dict[str, Any] | None], forms: Sequence[str] = (), checkpoint: Path | None = None
    ) -> Iterator[list[Peer]]:
        """Start peers, each with its kind and gate, and its form of weights and mode if forms are given."""
        with contextlib.ExitStack() as stack:
            peers: list[Peer] = []
            for index, (kind, gate) in enumerate(kinds):
                command = [sys.executable, "-m", "loadtests.peers", kind]
                command += ["--checkpoint", str(checkpoint or self.checkpoint), "--clips", str(self.clips)]
                if gate is not None:
                    command += ["--pause", json.dumps(gate)]
                if index < len(forms):
                    command += ["--form", forms[index]]
                peers.append(Peer(stack.enter_context(child(command, environment(), self.log, is_read=True))))
            for (kind, _), peer in zip(kinds, peers, strict=True):
                assert peer.wait() == "ready"
                self.say(f"{kind} is ready")
            yield peers

    @contextlib.contextmanager
    def service(self) -> Iterator[str]:
        """Start the service; yield its address."""
        # Like its peers: eager, with float weights. The part `cpu` measures compilation and int8.
        checkpoint = str(self.checkpoint)
        with serving(self.log, HYPER_CHECKPOINT=checkpoint, HYPER_COMPILE="off", HYPER_QUANTIZE="off") as (_, url):
            self.say(f"{url} is ready")
            yield url

    @contextlib.contextmanager
    def stock_server(self) -> Iterator[str]:
        """Start vLLM's own server; yield its address."""
        port = free_port()
        command = [sys.executable, "-m", "loadtests.peers", "openai", "--checkpoint", str(self.checkpoint)]
        command += ["--clips", str(self.clips), "--port", str(port), "--max-num-seqs", str(CLIENTS)]
        with child(command, environment(), self.log) as process:
            yield when_up(process, f"http://127.0.0.1:{port}", "/health", self.log)


def measure_engine(bench: Bench) -> list[Figure]:
    """Measure pauses, gate, encoder and second questions on bare engines, one request at a time."""
    parallel, sampled = Rounds(), Rounds()
    costs: dict[str, list[float]] = {"parallel": [], "sampled": []}
    first, second, steps = Rounds(), Rounds(), Rounds()
    seeds = iter(range(100_000, 200_000))
    kinds = (("ours", GATE | {"mode": "parallel"}), ("ours", GATE | {"mode": "sampled"}), ("stock", None))
    with bench.peers(*kinds) as (ours, ours_sampled, stock):

        def pause_round(peer: Peer, rounds: Rounds, name: str, span_tokens: int) -> None:
            plain_s, num_visible, _ = peer.ask("pauses", seed=next(seeds), max_tokens=VISIBLE_TOKENS, is_paused=False)
            require_length(num_visible)
            for seed in itertools.islice(seeds, MAX_CLIPS_PER_ROUND):
                paused_s, num_visible, num_latent = peer.ask(
                    "pauses", seed=seed, max_tokens=VISIBLE_TOKENS, is_paused=True
                )
                require_length(num_visible)
                # A trace may end before all pauses; its time would underestimate a pause.
                if num_latent == NUM_PAUSES * span_tokens:
                    break
                bench.say(f"clip {seed}: {num_latent} latent tokens, not {NUM_PAUSES * span_tokens}; next clip")
            else:
                raise click.ClickException(
                    f"None of {MAX_CLIPS_PER_ROUND} clips made {bench.checkpoint} pause {NUM_PAUSES} times within "
                    f"{VISIBLE_TOKENS} tokens. Use a checkpoint that writes longer traces."
                )
            rounds.add(paused_s, plain_s)
            costs[name].append((paused_s - plain_s) / NUM_PAUSES)

        for number in range(4 * bench.rounds):
            # Effects smaller than the machine's noise take more turns.
            for _ in range(3):
                pause_round(ours, parallel, "parallel", LATENT_TOKENS)
            if number % 2:
                pause_round(ours_sampled, sampled, "sampled", LATENT_TOKENS + 2)  # plus its two tags
            bench.say(f"pauses {number + 1}/{4 * bench.rounds}")
        for number in range(2 * bench.rounds):
            first.add(ours.ask("first_token", seed=next(seeds)), stock.ask("first_token", seed=next(seeds)))
            pair = ours.ask("second_question", seed=next(seeds))
            second.add(pair[1], pair[0])
            bench.say(f"first tokens {number + 1}/{2 * bench.rounds}")
        for number in range(bench.rounds):
            arguments = {"batch": STEP_BATCH, "max_tokens": STEP_TOKENS}
            steps.add(ours.ask("step", is_armed=True, **arguments), stock.ask("step", is_armed=False, **arguments))
            bench.say(f"steps {number + 1}/{bench.rounds}")
    cost_parallel, cost_sampled = statistics.median(costs["parallel"]), statistics.median(costs["sampled"])
    bench.say(f"a pause costs {1000 * cost_parallel:.1f} ms parallel, {1000 * cost_sampled:.1f} ms sampled")
    bench.say(f"first token: {first.medians_ms()}; second question and first: {second.medians_ms()}")
    bench.say(f"step, armed and stock: {steps.medians_ms()}")
    # One parallel pause is below the noise of a single round, so each sampled pause is divided by their median.
    speedups = [sampled_s / cost_parallel for sampled_s in costs["sampled"]]
    return [
        parallel.figure("pause_latency_ratio_parallel", "<= 1.08"),
        sampled.figure("pause_latency_ratio_sampled", ""),
        Figure("pause_parallel_speedup", cost_sampled / cost_parallel, min(speedups), max(speedups), ">= 12"),
        steps.figure("gate_step_overhead", "<= 1.03"),
        first.figure("ttft_ratio_5s", "<= 0.17"),
        second.figure("second_question_ttft_ratio", "<= 0.25"),
    ]


def measure_drafts(bench: Bench) -> list[Figure]:
    """Measure traces with and without drafts on bare engines, alone and in a full batch."""
    alone, full = Rounds(), Rounds()
    num_equal, num_traces = 0, 0
    with bench.peers(("ours", None), ("drafts", None)) as (plain, drafting):

        def turn(first_seed: int, num_together: int) -> tuple[float, float]:
            nonlocal num_equal, num_traces
            arguments = {"seeds": list(range(first_seed, first_seed + num_together)), "max_tokens": MAX_TOKENS}
            sides = [drafting, plain] if first_seed % 2 else [plain, drafting]
            replies = {side: side.ask("traces", **arguments) for side in sides}
            (drafted_s, drafted), (plain_s, expected) = replies[drafting], replies[plain]
            num_traces += num_together
            num_equal += sum(ours == theirs for ours, theirs in zip(drafted, expected, strict=True))
            return drafted_s, plain_s

        for number in range(bench.rounds):
            # The sum over some clips, because the saved steps differ from trace to trace.
            turns = [turn(300_000 + 100 * number + place, 1) for place in range(DRAFT_CLIPS)]
            alone.add(sum(plain_s for _, plain_s in turns), sum(drafted_s for drafted_s, _ in turns))
            full.add(*turn(400_000 + 101 * number, CLIENTS))
            bench.say(f"drafts {number + 1}/{bench.rounds}")
    bench.say(f"traces alone, without drafts and with: {alone.medians_ms()}")
    bench.say(f"{CLIENTS} traces together, with drafts and without: {full.medians_ms()}")
    equal = num_equal / num_traces
    return [
        alone.figure("drafts_speedup_alone", ">= 1.3"),
        full.figure("drafts_slowdown_16", "<= 1.02"),
        Figure("drafts_ids_identical", equal, equal, equal, "1"),
    ]


def require_length(num_visible: int) -> None:
    """Stop the benchmark if a completion has another length than requested, since times would not be comparable."""
    if num_visible != VISIBLE_TOKENS:
        raise click.ClickException(f"A completion has {num_visible} visible tokens, not {VISIBLE_TOKENS}.")


def measure_throughput(bench: Bench) -> list[Figure]:
    """Measure answers per second at 16 clients: the service, vLLM's own server, a bare engine and transformers."""
    fresh = FreshClips(bench.clips)
    stock_server, bare, batch = Rounds(), Rounds(), Rounds()
    tokens: dict[str, list[float]] = {}
    with (
        bench.peers(("ours", None), ("transformers", None)) as (engine, transformers),
        bench.service() as ours_url,
        bench.stock_server() as stock_url,
    ):
        difference = transformers.ask("encoder_difference", durations_s=DURATIONS_S)
        for number in range(-1, bench.rounds):
            # The first round is not counted; each side allocates its memory in it.
            seeds = range(1000 * (number + 2), 1000 * (number + 2) + 3 * CLIENTS)
            bodies = [wav(fresh.make(seed)) for seed in seeds]
            # transformers answers whole batches at constant speed, so fewer clips suffice.
            part = slice(0, 2 * CLIENTS)
            rates = {
                "ours": rate(asyncio.run(ask_all(ours_url, bodies, ask_ours)), len(bodies)),
                "stock": rate(asyncio.run(ask_all(stock_url, bodies, ask_openai)), len(bodies)),
                "bare": rate(
                    engine.ask("throughput", seeds=list(seeds), clients=CLIENTS, max_tokens=MAX_TOKENS), len(bodies)
                ),
                "transformers": rate(
                    transformers.ask("throughput", seeds=list(seeds)[part], clients=CLIENTS, max_tokens=MAX_TOKENS),
                    len(bodies[part]),
                ),
            }
            bench.say("  ".join(f"{name} {speed:.2f}/s ({num:.0f} tokens)" for name, (speed, num) in rates.items()))
            if number < 0:
                continue
            for rounds, name in ((stock_server, "stock"), (bare, "bare"), (batch, "transformers")):
                rounds.add(rates["ours"][0], rates[name][0])
            for name, (_, num) in rates.items():
                tokens.setdefault(name, []).append(num)
    bench.say("tokens an answer: " + ", ".join(f"{k} {statistics.fmean(v):.1f}" for k, v in tokens.items()))
    return [
        Figure("encoder_max_abs_diff", difference, difference, difference, "<= 1e-4"),
        stock_server.figure("qa_ratio_vs_stock_server", ">= 4.5"),
        batch.figure("qa_ratio_vs_hf_batch16", ">= 3.5"),
        bare.figure("qa_ratio_vs_bare_engine", ">= 0.95"),
    ]


def measure_cpu(bench: Bench) -> list[Figure]:
    """Measure int8 and compilation beside llama.cpp on the decoder of hyper-small, in turns on all cores.

    Prompts are random token ids. llama.cpp's answer has a longer prompt, because it pads every clip to 30 s. Encoders
    are left out on both sides.
    """
    figures = [measure_starts(bench)]
    if not SMALL_PARTS.is_dir():
        bench.say(f"{SMALL_PARTS} does not exist; the comparison with llama.cpp is left out")
        return figures
    forms = ("float-eager", "float-compiled", "int8-compiled")
    tools = find_tools()
    if tools is None:
        bench.say(f"{HINT}; its ratios are left out")
    kinds: list[tuple[str, dict[str, Any] | None]] = [("ours", None)] * len(forms)
    kinds += [("llamacpp", None)] if tools else []
    times: dict[str, dict[str, list[float]]] = {}
    with bench.peers(*kinds, forms=forms, checkpoint=SMALL_PARTS) as peers:
        for number in range(-1, 3 * bench.rounds):
            # The first round is not counted; each side allocates its memory in it.
            for name, peer in zip([*forms, "llamacpp"], peers, strict=False):
                found = times_of(peer, THEIR_PROMPT_TOKENS if name == "llamacpp" else OUR_PROMPT_TOKENS)
                if number >= 0:
                    for what, seconds in found.items():
                        times.setdefault(name, {}).setdefault(what, []).append(seconds)
            bench.say(f"decoding {number + 1}/{3 * bench.rounds}")
    bench.say(floor_line(times["int8-compiled"]["alone"]))
    ours = times["int8-compiled"]
    figures.append(Rounds(times["float-eager"]["alone"], ours["alone"]).figure("int8_speedup_alone", ">= 1.8"))
    figures.append(Rounds(times["float-compiled"]["alone"], ours["alone"]).figure("int8_speedup_alone_compiled", ""))
    figures.append(Rounds(times["float-compiled"]["at_16"], ours["at_16"]).figure("int8_speedup_16_compiled", ""))
    if tools:
        aims = {"alone": ">= 1.2", "at_4": "", "at_16": ">= 2.2", "prefill": ">= 3.5", "answer_5s": ">= 2.5"}
        names = {"alone": "decode_alone", "at_4": "decode_4", "at_16": "decode_16"}
        for what, aim in aims.items():
            rounds = Rounds(times["llamacpp"][what], ours[what])
            figures.append(rounds.figure(f"{names.get(what, what)}_vs_llamacpp_q8", aim))
    return figures


def times_of(peer: Peer, prompt_tokens: int) -> dict[str, float]:
    """Return the seconds of a step alone, at 4 and at 16, of 250 prompt tokens, and of a whole answer."""
    found: dict[str, float] = {}
    for name, batch in (("at_16", 16), ("at_4", 4), ("alone", 1)):
        prefill_s, found[name] = peer.ask("decode", batch=batch, prompt_tokens=PREFILL_TOKENS, max_tokens=20)
        found["prefill"] = prefill_s
    prompt_s, step_s = peer.ask("decode", batch=1, prompt_tokens=prompt_tokens, max_tokens=TRACE_TOKENS)
    return found | {"answer_5s": prompt_s + (TRACE_TOKENS - 1) * step_s}


def floor_line(steps_s: Sequence[float]) -> str:
    """Return the floor of a step, the time to read the int8 weights once from memory, and the share reached."""
    floor_s = SMALL_INT8_BYTES / read_bandwidth()
    share = floor_s / statistics.median(steps_s)
    return (
        f"floor of an int8 step: {1000 * floor_s:.1f} ms to read {SMALL_INT8_BYTES / 1e6:.0f} MB; reached {share:.0%}"
    )


def read_bandwidth(num_bytes: int = 2**29, rounds: int = 3) -> float:
    """Return the bytes per second that one thread reads from memory, in the fastest round."""
    values = np.ones(num_bytes // 8, np.int64)
    best_s = float("inf")
    for _ in range(rounds):
        started_s = time.perf_counter()
        values.sum()
        best_s = min(best_s, time.perf_counter() - started_s)
    return num_bytes / best_s


def measure_starts(bench: Bench) -> Figure:
    """Measure starts of the service: compiled with the saved graph, and eager, in turns."""
    rounds = Rounds()
    with tempfile.TemporaryDirectory() as folder:

        def start_s(mode: str) -> float:
            started_s = time.perf_counter()
            with serving(
                bench.log,
                HYPER_CHECKPOINT=str(bench.checkpoint),
                HYPER_COMPILE=mode,
                HYPER_QUANTIZE="off",
                VLLM_CACHE_ROOT=folder,
            ):
                return time.perf_counter() - started_s

        first_s = start_s("on")
        for _ in range(bench.rounds):
            rounds.add(start_s("on"), start_s("off"))
    bench.say(f"first start {first_s:.1f} s; second start and eager start: {rounds.medians_ms()}")
    return rounds.figure("second_start_s_ratio", "<= 1.3")


def measure_chat(bench: Bench) -> list[Figure]:
    """Measure a question by /v1/chat/completions beside the same one by /v1/audio/qa, one request at a time.

    Each clip is asked once before, so the engine's cache is equally warm for both. Without the time of the encoder, the
    ratio is the harder one.
    """
    fresh, rounds = FreshClips(bench.clips), Rounds()
    with bench.service() as url:
        for number in range(-1, bench.rounds):
            # The first round is not counted, see `measure_throughput`.
            seeds = range(500_000 + CHAT_CLIPS * number, 500_000 + CHAT_CLIPS * (number + 1))
            clips = [wav(fresh.make(seed)) for seed in seeds]
            pairs = asyncio.run(time_chat(url, clips))
            if number >= 0:
                # Pairs, because the machine's speed changes within a round.
                for chat_s, qa_s in pairs:
                    rounds.add(chat_s, qa_s)
            bench.say(f"questions {max(0, number + 1) * CHAT_CLIPS}/{bench.rounds * CHAT_CLIPS}")
    bench.say(f"chat and qa: {rounds.medians_ms()}")
    return [rounds.figure("chat_cost_ratio", "<= 1.05")]


async def time_chat(url: str, clips: Sequence[bytes]) -> list[tuple[float, float]]:
    """Return the seconds of each question by chat and by form, in turns.

    Raises:
        click.ClickException: If the two answers about a clip differ in length.
    """
    pairs: list[tuple[float, float]] = []
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        for index, clip in enumerate(clips):
            seconds: dict[Any, float] = {}
            bodies = {ask_openai: openai_body(clip, model="hyper", hyper={"pause": "off"}), ask_ours: clip}
            await ask_ours(client, clip)
            num_tokens: set[int] = set()
            for ask in (ask_ours, ask_openai) if index % 2 else (ask_openai, ask_ours):
                started_s = time.perf_counter()
                num_tokens.add(await ask(client, bodies[ask]))
                seconds[ask] = time.perf_counter() - started_s
            if len(num_tokens) > 1:
                raise click.ClickException(f"The answers about clip {index} have {num_tokens} tokens.")
            pairs.append((seconds[ask_openai], seconds[ask_ours]))
    return pairs


def rate(measured: Sequence[float], num_answers: int) -> tuple[float, float]:
    """Return answers per second and tokens per answer, from total seconds and tokens."""
    seconds, num_tokens = measured
    return num_answers / seconds, num_tokens / num_answers


async def ask_all(url: str, bodies: Sequence[bytes], ask: Callable[[httpx.AsyncClient, Any], Any]) -> tuple[float, int]:
    """Send one question about each clip with 16 clients at a time; return total seconds and written tokens."""
    prepared = iter([PREPARE[ask](body) for body in bodies])
    num_tokens = 0
    limits = httpx.Limits(max_connections=CLIENTS, max_keepalive_connections=CLIENTS)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:

        async def one_client() -> None:
            nonlocal num_tokens
            for body in prepared:
                num_written = await ask(client, body)
                num_tokens += num_written

        started_s = time.perf_counter()
        await asyncio.gather(*(one_client() for _ in range(CLIENTS)))
        return time.perf_counter() - started_s, num_tokens


async def ask_ours(client: httpx.AsyncClient, clip: bytes) -> int:
    """Send a question to the service; return the written tokens."""
    data = {"question": QUESTION, "pause": "off", "max_tokens": str(MAX_TOKENS)}
    response = await client.post(QA_PATH, data=data, files={"file": ("clip.wav", clip)})
    response.raise_for_status()
    return response.json()["usage"]["completion_tokens"]


async def ask_openai(client: httpx.AsyncClient, body: bytes) -> int:
    """Send a question to a server of OpenAI's chat API; return the written tokens."""
    response = await client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    response.raise_for_status()
    return response.json()["usage"]["completion_tokens"]


def openai_body(clip: bytes, **fields: Any) -> bytes:
    """Return the request body for vLLM's own server, or with other fields for another one."""
    audio = {"data": base64.b64encode(clip).decode(), "format": "wav"}
    content = [{"type": "input_audio", "input_audio": audio}, {"type": "text", "text": QUESTION}]
    message = {"role": "user", "content": content}
    body = {"model": "stock", "messages": [message], "temperature": 0, "max_tokens": MAX_TOKENS, **fields}
    return json.dumps(body).encode()


# Built before the measurement, since the clients share the cores with the measured processes.
PREPARE: Mapping[Any, Callable[[bytes], bytes]] = {ask_ours: bytes, ask_openai: openai_body}


def table(figures: Sequence[Figure]) -> str:
    """Format the figures as a text table."""
    lines = [f"{'figure':<32}{'value':>10}{'rounds':>22}   aim"]
    for figure in figures:
        spread = f"{figure.low:.3g} to {figure.high:.3g}"
        lines.append(f"{figure.name:<32}{figure.value:>10.3g}{spread:>22}   {figure.aim}")
    return "\n".join(lines)
