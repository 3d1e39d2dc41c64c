"""Everything at once that the service promises to withstand: hostile files and requests, knocks without a key, faults,
too much load, and a long day. Each part starts services of its own and keeps its result, so that a run can go on.

Knows the service by HTTP, and its processes where it has started them; what decoding in a box costs is measured by a
peer of `loadtests.peers`.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import click
import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from loadtests import hostile
from loadtests.bench import Bench
from loadtests.client import QA_PATH
from loadtests.driver import DriverLateError
from loadtests.experiment import Experiment, machine, write
from loadtests.fuzz_http import Findings, generate, probe_without_key
from loadtests.report import percentile, table
from loadtests.scenarios import SCENARIOS, Figure, Scenario, figures_json
from loadtests.target import MEBIBYTE, Target, environment, target_of
from loadtests.workload import Clips

Engine = Literal["scripted", "vllm"]

NUM_CLIENTS = 4
FILE_TIMEOUT_S = 120.0
MIN_FOR_SILENCES = 1_000
DECODER = "server.decoding.worker"
"""What stands in the command line of the processes that decode."""

WATCH_INTERVAL_S = 0.2
CANARY_RATE_HZ = 12_345
UNBOXED_TIMEOUT_S = 10
KEPT = 50
PACED = {"HYPER_ENGINE": "scripted", "HYPER_SCRIPTED_TOKEN_INTERVAL_S": "0.005"}
SHORT_TRACES = {"HYPER_ENGINE": "scripted", "HYPER_DEFAULT_MAX_TOKENS": "8"}
QUICK_SCALE = 0.1
SUMMED = frozenset({"unaccounted", "failures"})
"""Figures that several parts have, and that are counts."""

# What a player that means well lets its input do. One set of options is not for every kind of trap.
UNBOXED_OPTIONS = (
    ("-protocol_whitelist", "file,http,tcp,udp,rtp,crypto,concat,subfile,data,pipe", "-allowed_extensions", "ALL"),
    ("-protocol_whitelist", "file,http,tcp,udp,rtp,crypto,concat,subfile,data,pipe", "-safe", "0", "-f", "concat"),
    ("-protocol_whitelist", "file,http,tcp,udp,rtp,crypto,concat,subfile,data,pipe"),
)
UNBOXED_TRAPS = ("hls as nothing", "hls of a file as nothing", "ffconcat of a file as nothing")


@dataclass(frozen=True)
class StressRun:
    """Holds what every part goes by.

    Attributes:
        out: Where results, and the messages of the services, go.
        clips: Folder of good clips.
        num_files: Hostile files to send.
        num_requests: Requests to generate.
        is_quick: Makes everything a tenth as long, and leaves out vLLM.
        overload_engine: What is overloaded and soaked.
        say: Where progress goes.
    """

    out: Path
    clips: Path
    num_files: int
    num_requests: int
    seed: int
    is_quick: bool
    overload_engine: Engine
    say: Callable[[str], None]

    @property
    def log(self) -> Path:
        """Where services write what is wrong."""
        return self.out / "service.log"

    def asked_of(self, part: str) -> dict[str, Any]:
        """Returns what a result of a part depends on: one of other numbers is no result of this run."""
        asked: dict[str, Any] = {"seed": self.seed, "is_quick": self.is_quick}
        if part == "files":
            asked["num_files"] = self.num_files
        if part == "requests":
            asked["num_requests"] = self.num_requests
        if part in ("overload", "soak"):
            asked["engine"] = self.overload_engine
        return asked

    @contextlib.contextmanager
    def service(self, settings: Mapping[str, str], key: str | None = None) -> Iterator[Target]:
        """Starts a service of one's own and ends it afterwards."""
        with target_of(None, key=key, metrics_url=None, settings=settings, log=self.log) as target:
            yield target

    @contextlib.contextmanager
    def guarded(self) -> Iterator[tuple[Target, str]]:
        """Starts a service that asks for keys; yields it and a key that opens everything."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "keys.json"
            command = [sys.executable, "-m", "hyper_model.cli", "keys", "add", "stress"]
            command += ["--scope", "ask", "--scope", "metrics"]
            env = environment(HYPER_KEY_FILE=str(path))
            said = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
            key = next(word for word in said.split() if word.startswith("hyp_"))
            with self.service({**SHORT_TRACES, "HYPER_KEY_FILE": str(path)}, key) as target:
                yield target, key


Result = tuple[list[Figure], dict[str, Any]]


class Listener:
    """Counts who calls a port of its own, by TCP and by UDP, while the block lasts."""

    def __init__(self) -> None:
        self.num_calls = 0
        self.tcp = socket.create_server(("127.0.0.1", 0))
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.port: int = self.tcp.getsockname()[1]
        self.udp.bind(("127.0.0.1", self.port))
        self.is_over = threading.Event()
        self.threads = [threading.Thread(target=self.listen, args=(each,)) for each in (self.tcp, self.udp)]

    def __enter__(self) -> Listener:
        for each in (self.tcp, self.udp):
            each.settimeout(WATCH_INTERVAL_S)
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.is_over.set()
        for thread in self.threads:
            thread.join()
        self.tcp.close()
        self.udp.close()

    def listen(self, port: socket.socket) -> None:
        """Takes calls and hangs up."""
        while not self.is_over.is_set():
            with contextlib.suppress(TimeoutError):
                if port is self.tcp:
                    port.accept()[0].close()
                else:
                    port.recv(1)
                self.num_calls += 1


class Canary:
    """A file that everybody may read and nobody should: a clip whose rate, or a word in it, would show in a reply."""

    def __init__(self, folder: Path) -> None:
        self.word = f"HYPER-CANARY-{secrets.token_hex(8)}"
        # Whoever runs the decoder must be able to get here: it is the box that keeps it away, and not the folder.
        folder.chmod(0o755)
        self.path = folder / "canary.wav"
        sound = bytes(2 * CANARY_RATE_HZ)
        head = hostile.wave(b"", rate_hz=CANARY_RATE_HZ)[20:36]
        words = self.word.encode() + b"\0"
        self.path.write_bytes(hostile.riff((b"fmt ", head), (b"LIST", b"INFOICMT" + words), (b"data", sound)))
        self.path.chmod(0o644)
        # Most file systems note a reading only where it is the first since the last change.
        os.utime(self.path, (0, time.time()))

    def was_read(self) -> bool:
        """Whether the file system has noted that somebody read the file."""
        return self.path.stat().st_atime_ns != 0

    def is_in(self, reply: httpx.Response) -> bool:
        """Whether a reply tells of the file."""
        return self.word in reply.text or f'"sample_rate_hz":{CANARY_RATE_HZ},' in reply.text.replace(" ", "")


def files(stress: StressRun) -> Result:
    """Sends hostile files, and watches the port that they call and the file that they point at."""
    statuses: collections.Counter[int] = collections.Counter()
    seconds: list[float] = []
    wrong: list[str] = []
    num_ours = num_betrayed = 0
    lock = threading.Lock()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        canary = Canary(folder)
        listener = stack.enter_context(Listener())
        is_noted = reading_is_noted(folder)
        num_sprung = spring(folder)
        stress.say(f"files: outside of the box {num_sprung} of {len(UNBOXED_TRAPS)} traps call or read")
        good = hostile.clips(folder)
        target = stack.enter_context(stress.service(SHORT_TRACES))
        watch = stack.enter_context(DecoderWatch(target))
        client = stack.enter_context(httpx.Client(base_url=target.url, timeout=FILE_TIMEOUT_S))

        def send(file: tuple[str, bytes]) -> None:
            nonlocal num_ours, num_betrayed
            name, data = file
            started_s = time.perf_counter()
            try:
                reply = client.post(
                    QA_PATH,
                    data={"question": "What is heard?", "reasoning": "answer"},
                    files={"file": ("clip", data)},
                )
            except httpx.HTTPError as fault:
                reply = httpx.Response(599, text=type(fault).__name__)
            took_s = time.perf_counter() - started_s
            with lock:
                statuses[reply.status_code] += 1
                seconds.append(took_s)
                is_ours, is_betrayed = reply.status_code >= 500, canary.is_in(reply)
                num_ours += is_ours
                num_betrayed += is_betrayed
                if (is_ours or is_betrayed) and len(wrong) < KEPT:
                    wrong.append(f"{name}: {reply.status_code} after {took_s:.1f} s: {reply.text[:200]}")
                if len(seconds) % 500 == 0:
                    stress.say(f"files: {len(seconds)} sent, {num_ours} server errors, {dict(statuses)}")

        sent = hostile.files(
            good,
            folder,
            listener.port,
            canary.path,
            stress.num_files,
            stress.seed,
            has_silences=stress.num_files >= MIN_FOR_SILENCES,
        )
        with ThreadPoolExecutor(NUM_CLIENTS) as clients:
            for _ in each_with_a_bound(clients, send, sent):
                pass
        values = metrics_of(target)
        num_ours += not target.is_ready()
        num_reads = num_betrayed + canary.was_read()
    num = len(seconds)
    found = [
        Figure("audio_5xx", num_ours, num),
        Figure("decoder_outbound", listener.num_calls + len(watch.sockets), num),
        Figure("foreign_reads", num_reads, num),
        Figure("decode_peak_mib", round(values["hyper_decode_peak_bytes"] / MEBIBYTE, 1), num),
        Figure("decoder_deaths", values["hyper_decoder_deaths_total"], num),
        Figure("audio_p99_ms", round(1000 * (percentile(seconds, 99) or 0.0), 1), num),
        Figure("traps_sprung_unboxed", num_sprung, len(UNBOXED_TRAPS)),
    ]
    return found, {
        "statuses": dict(sorted(statuses.items())),
        "wrong": wrong,
        "slowest_s": round(max(seconds), 2),
        "reading_is_noted": is_noted,
        "decoder_looks": watch.num_looks,
        "decoder_state": watch.state,
        "decoder_sockets": sorted(watch.sockets),
    }


def each_with_a_bound(
    clients: ThreadPoolExecutor, send: Callable[[tuple[str, bytes]], None], sent: Iterator[tuple[str, bytes]]
) -> Iterator[None]:
    """Sends files, holding no more of them than are about to leave."""
    pending: collections.deque[Any] = collections.deque()
    for file in sent:
        pending.append(clients.submit(send, file))
        if len(pending) > 4 * NUM_CLIENTS:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


class DecoderWatch:
    """Looks at the decoding processes while the block lasts: what keeps them in, and whether one has a network socket.

    Attributes:
        num_looks: How often a process was seen.
        state: What the kernel says of the last one: seccomp 2 is a filter.
        sockets: Network sockets that one had.
    """

    def __init__(self, target: Target) -> None:
        assert target.process is not None
        self.service = psutil.Process(target.process.pid)
        self.num_looks = 0
        self.state: dict[str, str] = {}
        self.sockets: set[str] = set()
        self.is_over = threading.Event()
        self.thread = threading.Thread(target=self.work)

    def __enter__(self) -> DecoderWatch:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.is_over.set()
        self.thread.join()

    def work(self) -> None:
        """Looks, again and again."""
        while not self.is_over.wait(WATCH_INTERVAL_S):
            # A worker lives for some milliseconds, and may be gone by now.
            with contextlib.suppress(psutil.Error, OSError):
                for process in self.service.children(recursive=True):
                    with contextlib.suppress(psutil.Error, OSError):
                        if DECODER in process.cmdline():
                            self.look(process)

    def look(self, process: psutil.Process) -> None:
        """Notes what one process is and has."""
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        told = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
        self.state = {name: told[name] for name in ("Seccomp", "NoNewPrivs", "Uid") if name in told}
        self.num_looks += 1
        self.sockets |= {f"{each.type.name} {each.raddr}" for each in process.net_connections(kind="inet")}


def reading_is_noted(folder: Path) -> bool:
    """Whether this file system tells of readings at all; else that nobody read the canary shows in replies alone."""
    twin = folder / "twin"
    twin.write_bytes(b"twin")
    os.utime(twin, (0, time.time()))
    twin.read_bytes()
    return twin.stat().st_atime_ns != 0


def spring(folder: Path) -> int:
    """Gives traps to a player outside of any box; returns how many of them call or read. None would be no traps."""
    own = folder / "unboxed"
    own.mkdir()
    num_sprung = 0
    for name in UNBOXED_TRAPS:
        canary = Canary(own)
        with Listener() as listener:
            path = own / "trap"
            path.write_bytes(dict(hostile.traps(listener.port, canary.path))[name])
            for options in UNBOXED_OPTIONS:
                command = [hostile.ffmpeg(), "-nostdin", "-v", "quiet", *options, "-i", str(path), "-f", "null", "-"]
                with contextlib.suppress(subprocess.TimeoutExpired):
                    subprocess.run(command, timeout=UNBOXED_TIMEOUT_S, check=False)
                if listener.num_calls or canary.was_read():
                    break
        num_sprung += bool(listener.num_calls or canary.was_read())
    return num_sprung


def metrics_of(target: Target) -> dict[str, float]:
    """Returns the figures of /metrics, each the sum over its labels, once they have settled."""
    target.when_idle()
    time.sleep(1.0)
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(target.scrape()[0]):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found


def requests(stress: StressRun) -> Result:
    """Sends generated requests: most to an open service, some with a key and some without to one that asks for it."""
    num_guarded = stress.num_requests // 4
    found: dict[str, Findings] = {}

    def told(kind: str) -> Callable[[int], None]:
        return lambda num: stress.say(f"requests, {kind}: {num} sent")

    with stress.service({**SHORT_TRACES, "HYPER_MAX_AUDIO_S": "30"}) as target:
        num_open = stress.num_requests - 2 * num_guarded
        found["open"] = generate(target.url, None, num_open, stress.seed, told("open"))
    with stress.guarded() as (target, key):
        found["with a key"] = generate(target.url, key, num_guarded, stress.seed + 1, told("with a key"))
        found["without"] = generate(target.url, key, num_guarded, stress.seed + 2, told("without"), is_withheld=True)
    num = sum(each.num for each in found.values())
    return [
        Figure("http_5xx", sum(each.num_ours for each in found.values()), num),
        Figure("http_undescribed", sum(each.num_wrong for each in found.values()), num),
    ], {kind: each.as_json() for kind, each in found.items()}


def auth(stress: StressRun) -> Result:
    """Tries every address by every method without a key."""
    with stress.guarded() as (target, key):
        found = probe_without_key(target.url, key, lambda num: stress.say(f"auth: {num} tried"))
    return [Figure("unauthenticated_reached", found.num_ours, found.num)], found.as_json()


def sandbox(stress: StressRun) -> Result:
    """Decodes the same clips in the box and outside of it, in turns."""
    rounds = 3 if stress.is_quick else 20
    bench = Bench(Path("checkpoints/hyper-mini"), stress.clips, rounds, stress.log, stress.say)
    with bench.peers(("decode", None)) as (peer,):
        overheads_ms: list[float] = peer.ask("overheads_ms", rounds=rounds)
        layers: list[str] = peer.ask("layers")
    value = round(statistics.median(overheads_ms), 2)
    details = {"p95_ms": percentile(overheads_ms, 95), "layers": layers}
    return [Figure("sandbox_overhead_ms", value, len(overheads_ms))], details


def overload(stress: StressRun) -> Result:
    """Offers 0.8 and 3 times the peak."""
    return carry_out(stress, "overload")


def soak(stress: StressRun) -> Result:
    """Offers 11,000 requests at 0.7 of the peak that the overload found."""
    if stress.is_quick:
        stress.say("soak: left out of a quick run, in which growth would be noise")
        return [], {}
    kept = read_part(stress, "overload") or {}
    peak = kept.get("figures", {}).get("peak_per_s", {}).get("value")
    return carry_out(stress, "soak", peak)


def chaos(stress: StressRun) -> Result:
    """Lets clients leave, kills and stops the engine, and ends the service."""
    return carry_out(stress, "chaos")


def carry_out(stress: StressRun, name: str, peak: float | None = None) -> Result:
    """Runs a scenario of `python -m loadtests run` against a service of its own."""
    scenario: Scenario = SCENARIOS[name].scaled(QUICK_SCALE if stress.is_quick else 1.0)
    settings = dict(scenario.environment)
    if stress.is_quick or (name != "chaos" and stress.overload_engine == "scripted"):
        settings |= PACED
    with stress.service(settings) as target:
        experiment = Experiment(target, Clips(stress.clips), stress.seed, stress.say, peak)
        try:
            figures = experiment.carry_out(scenario)
        except DriverLateError:
            stress.say(table(experiment.reports))
            raise
        write(stress.out / "scenarios", experiment.result(name, figures), experiment.reports)
    return figures, {"settings": settings}


PARTS: Mapping[str, Callable[[StressRun], Result]] = {
    each.__name__: each for each in (sandbox, auth, requests, files, overload, soak, chaos)
}


def run(stress: StressRun, parts: Sequence[str]) -> tuple[list[Figure], dict[str, str]]:
    """Carries out parts, but for those whose result is there; returns all figures, and why a part has none."""
    stress.out.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Figure] = {}
    failures: dict[str, str] = {}
    for part in parts:
        kept = read_part(stress, part)
        if kept is None:
            stress.say(f"{part}: {(PARTS[part].__doc__ or '').strip()}")
            started_s = time.monotonic()
            try:
                found, details = PARTS[part](stress)
            except (DriverLateError, click.ClickException, httpx.HTTPError, subprocess.SubprocessError) as fault:
                # The others may well have one, and this one is taken up again by the next run.
                failures[part] = str(fault)
                stress.say(f"{part}: no result: {fault}")
                continue
            kept = {
                "asked": stress.asked_of(part),
                "figures": figures_json(found),
                "seconds": round(time.monotonic() - started_s, 1),
                "machine": machine(),
                "details": details,
            }
            path = part_path(stress, part)
            path.with_suffix(".new").write_text(json.dumps(kept, indent=1) + "\n")
            path.with_suffix(".new").replace(path)
        else:
            stress.say(f"{part}: kept from {kept['machine']['time']}")
        for name, each in kept["figures"].items():
            one = Figure(name, each["value"], each["of"])
            if name in SUMMED and name in figures:
                one = replace(one, value=one.value + figures[name].value, num=one.num + figures[name].num)
            figures[name] = one
    return list(figures.values()), failures


def part_path(stress: StressRun, part: str) -> Path:
    """Returns where a part's result is kept."""
    return stress.out / f"{part}.json"


def read_part(stress: StressRun, part: str) -> dict[str, Any] | None:
    """Returns the result of a part, where there is one of the same numbers."""
    try:
        kept: dict[str, Any] = json.loads(part_path(stress, part).read_text())
    except (FileNotFoundError, ValueError):
        return None
    return kept if kept.get("asked") == stress.asked_of(part) else None
