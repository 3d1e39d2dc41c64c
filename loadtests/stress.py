"""Stress the service with hostile files and requests, missing keys, faults, overload and a soak test.

Each part starts its own services and stores its result, so that an interrupted run can continue. Everything is measured
over HTTP, or from processes started here; a peer of `loadtests.peers` measures the cost of the sandbox.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import json
import os
import secrets
import signal
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

from loadtests import hostile, replicas
from loadtests import odd_files as odd
from loadtests.bench import Bench
from loadtests.client import QA_PATH
from loadtests.driver import DriverLateError
from loadtests.experiment import Experiment, machine, write
from loadtests.fuzz_http import Findings, generate, probe_without_key
from loadtests.job_kills import kill_repeatedly
from loadtests.report import percentile, table
from loadtests.scenarios import SCENARIOS, Figure, Scenario, figures_json
from loadtests.target import MEBIBYTE, Target, environment, target_of
from loadtests.workload import Clips

Engine = Literal["scripted", "vllm"]

NUM_CLIENTS = 4
FILE_TIMEOUT_S = 120.0
MIN_FOR_SILENCES = 1_000
DECODER = "server.decoding.worker"
"""Part of the command line of decoder processes."""

WATCH_INTERVAL_S = 0.2
CANARY_RATE_HZ = 12_345
UNBOXED_TIMEOUT_S = 10
NUM_ODD_FILES = 300
KEPT = 50
PACED = {"HYPER_ENGINE": "scripted", "HYPER_SCRIPTED_TOKEN_INTERVAL_S": "0.005"}
SHORT_TRACES = {"HYPER_ENGINE": "scripted", "HYPER_DEFAULT_MAX_TOKENS": "8"}
QUICK_SCALE = 0.1
NUM_KILLS = 20
SUMMED = frozenset({"unaccounted", "failures"})
"""Counts reported by several parts; the total is their sum."""

# Permissive options of an ordinary player. Each set of options works for some kinds of trap.
UNBOXED_OPTIONS = (
    ("-protocol_whitelist", "file,http,tcp,udp,rtp,crypto,concat,subfile,data,pipe", "-allowed_extensions", "ALL"),
    ("-protocol_whitelist", "file,http,tcp,udp,rtp,crypto,concat,subfile,data,pipe", "-safe", "0", "-f", "concat"),
    ("-protocol_whitelist", "file,http,tcp,udp,rtp,crypto,concat,subfile,data,pipe"),
)
UNBOXED_TRAPS = ("hls as nothing", "hls of a file as nothing", "ffconcat of a file as nothing")


@dataclass(frozen=True)
class StressRun:
    """Settings of a run, common to all parts.

    Attributes:
        out: Folder of results and service logs.
        clips: Folder of good clips.
        num_files: Number of hostile files.
        num_requests: Number of generated requests.
        is_quick: Shorten everything to a tenth and leave out vLLM.
        overload_engine: Engine of overload and soak.
        say: Callback for progress messages.
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
        """Return the log file of the services."""
        return self.out / "service.log"

    def asked_of(self, part: str) -> dict[str, Any]:
        """Return the settings with an effect on a part; a stored result with other settings is invalid."""
        settings: dict[str, Any] = {"seed": self.seed, "is_quick": self.is_quick}
        if part == "files":
            settings["num_files"] = self.num_files
        if part == "requests":
            settings["num_requests"] = self.num_requests
        if part in ("overload", "soak"):
            settings["engine"] = self.overload_engine
        return settings

    @contextlib.contextmanager
    def service(self, settings: Mapping[str, str], key: str | None = None) -> Iterator[Target]:
        """Start a service and end it after the block."""
        with target_of(None, key=key, metrics_url=None, settings=settings, log=self.log) as target:
            yield target

    @contextlib.contextmanager
    def guarded(self) -> Iterator[tuple[Target, str]]:
        """Start a service with API keys; yield it with a key for everything."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "keys.json"
            command = [sys.executable, "-m", "hyper_model.cli", "keys", "add", "stress"]
            command += ["--scope", "ask", "--scope", "metrics"]
            env = environment(HYPER_KEY_FILE=str(path))
            output = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
            key = next(word for word in output.split() if word.startswith("hyp_"))
            with self.service({**SHORT_TRACES, "HYPER_KEY_FILE": str(path)}, key) as target:
                yield target, key


Result = tuple[list[Figure], dict[str, Any]]


class Listener:
    """Counter of TCP and UDP calls to a local port, active during the block."""

    def __init__(self) -> None:
        self.num_calls = 0
        self.tcp = socket.create_server(("127.0.0.1", 0))
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.port: int = self.tcp.getsockname()[1]
        self.udp.bind(("127.0.0.1", self.port))
        self.is_over = threading.Event()
        self.threads = [threading.Thread(target=self.listen, args=(each,)) for each in (self.tcp, self.udp)]

    def __enter__(self) -> Listener:
        for port in (self.tcp, self.udp):
            port.settimeout(WATCH_INTERVAL_S)
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
        """Accept calls and hang up."""
        while not self.is_over.is_set():
            with contextlib.suppress(TimeoutError):
                if port is self.tcp:
                    port.accept()[0].close()
                else:
                    port.recv(1)
                self.num_calls += 1


class Canary:
    """A file readable for everybody but forbidden to the decoder; its rate or a word in it would show in a reply."""

    def __init__(self, folder: Path) -> None:
        self.word = f"HYPER-CANARY-{secrets.token_hex(8)}"
        # The decoder's user may read the folder, so only the sandbox prevents it.
        folder.chmod(0o755)
        self.path = folder / "canary.wav"
        sound = bytes(2 * CANARY_RATE_HZ)
        head = hostile.wave(b"", rate_hz=CANARY_RATE_HZ)[20:36]
        words = self.word.encode() + b"\0"
        self.path.write_bytes(hostile.riff((b"fmt ", head), (b"LIST", b"INFOICMT" + words), (b"data", sound)))
        self.path.chmod(0o644)
        # Most file systems record only the first read after a change.
        os.utime(self.path, (0, time.time()))

    def was_read(self) -> bool:
        """Return True if the file system has recorded a read of the file."""
        return self.path.stat().st_atime_ns != 0

    def is_in(self, reply: httpx.Response) -> bool:
        """Return True if a reply reveals the file."""
        return self.word in reply.text or f'"sample_rate_hz":{CANARY_RATE_HZ},' in reply.text.replace(" ", "")


class FileOutcomes:
    """Outcomes of hostile files, counted by several clients.

    Attributes:
        statuses: Number of replies by status; 599 for a failed connection.
        wrong: The first replies with a server error or the canary file's content.
        num_ours: Server errors.
        num_betrayed: Replies with the canary file's content.
    """

    def __init__(self, canary: Canary, say: Callable[[str], None]) -> None:
        self.canary = canary
        self.say = say
        self.statuses: collections.Counter[int] = collections.Counter()
        self.seconds: list[float] = []
        self.wrong: list[str] = []
        self.num_ours = self.num_betrayed = 0
        self.lock = threading.Lock()

    def send(self, client: httpx.Client, file: tuple[str, bytes]) -> None:
        """Send one file and count its outcome."""
        name, data = file
        fields = {"question": "What is heard?", "reasoning": "answer"}
        started_s = time.perf_counter()
        try:
            reply = client.post(QA_PATH, data=fields, files={"file": ("clip", data)})
        except httpx.HTTPError as fault:
            reply = httpx.Response(599, text=type(fault).__name__)
        took_s = time.perf_counter() - started_s
        with self.lock:
            self.statuses[reply.status_code] += 1
            self.seconds.append(took_s)
            is_ours, is_betrayed = reply.status_code >= 500, self.canary.is_in(reply)
            self.num_ours += is_ours
            self.num_betrayed += is_betrayed
            if (is_ours or is_betrayed) and len(self.wrong) < KEPT:
                self.wrong.append(f"{name}: {reply.status_code} after {took_s:.1f} s: {reply.text[:200]}")
            if len(self.seconds) % 500 == 0:
                self.say(f"files: {len(self.seconds)} sent, {self.num_ours} server errors, {dict(self.statuses)}")


def files(stress: StressRun) -> Result:
    """Send hostile files, and watch the port and the file of their traps."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        canary = Canary(folder)
        listener = stack.enter_context(Listener())
        is_noted = reading_is_noted(folder)
        num_sprung = spring(folder)
        stress.say(f"files: outside the sandbox {num_sprung} of {len(UNBOXED_TRAPS)} traps call or read")
        good = hostile.clips(folder)
        target = stack.enter_context(stress.service(SHORT_TRACES))
        watch = stack.enter_context(DecoderWatch(target))
        client = stack.enter_context(httpx.Client(base_url=target.url, timeout=FILE_TIMEOUT_S))
        sent = hostile.files(
            good,
            folder,
            listener.port,
            canary.path,
            stress.num_files,
            stress.seed,
            has_silences=stress.num_files >= MIN_FOR_SILENCES,
        )
        outcomes = FileOutcomes(canary, stress.say)
        with ThreadPoolExecutor(NUM_CLIENTS) as clients:
            for _ in each_with_a_bound(clients, functools.partial(outcomes.send, client), sent):
                pass
        values = metrics_of(target)
        num_ours = outcomes.num_ours + (not target.is_ready())
        num_reads = outcomes.num_betrayed + canary.was_read()
    num = len(outcomes.seconds)
    figures = [
        Figure("audio_5xx", num_ours, num),
        Figure("decoder_outbound", listener.num_calls + len(watch.sockets), num),
        Figure("foreign_reads", num_reads, num),
        Figure("decode_peak_mib", round(values["hyper_decode_peak_bytes"] / MEBIBYTE, 1), num),
        Figure("decoder_deaths", values["hyper_decoder_deaths_total"], num),
        Figure("audio_p99_ms", round(1000 * (percentile(outcomes.seconds, 99) or 0.0), 1), num),
        Figure("traps_sprung_unboxed", num_sprung, len(UNBOXED_TRAPS)),
    ]
    return figures, {
        "statuses": dict(sorted(outcomes.statuses.items())),
        "wrong": outcomes.wrong,
        "slowest_s": round(max(outcomes.seconds), 2),
        "reading_is_noted": is_noted,
        "decoder_looks": watch.num_looks,
        "decoder_state": watch.state,
        "decoder_sockets": sorted(watch.sockets),
    }


def each_with_a_bound(
    clients: ThreadPoolExecutor, send: Callable[[tuple[str, bytes]], None], sent: Iterator[tuple[str, bytes]]
) -> Iterator[None]:
    """Send files with a bound on pending ones, to limit memory."""
    pending: collections.deque[Any] = collections.deque()
    for file in sent:
        pending.append(clients.submit(send, file))
        if len(pending) > 4 * NUM_CLIENTS:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


class DecoderWatch:
    """Observer of decoder processes during the block: their confinement and their network sockets.

    Attributes:
        num_looks: Number of observations.
        state: Kernel status of the last process; seccomp 2 is a filter.
        sockets: Network sockets of any process.
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
        """Observe until the block ends."""
        while not self.is_over.wait(WATCH_INTERVAL_S):
            # A worker lives for some milliseconds and may be gone already.
            with contextlib.suppress(psutil.Error, OSError):
                for process in self.service.children(recursive=True):
                    with contextlib.suppress(psutil.Error, OSError):
                        if DECODER in process.cmdline():
                            self.look(process)

    def look(self, process: psutil.Process) -> None:
        """Record status and sockets of one process."""
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
        self.state = {name: status[name] for name in ("Seccomp", "NoNewPrivs", "Uid") if name in status}
        self.num_looks += 1
        self.sockets |= {
            f"{connection.type.name} {connection.raddr}" for connection in process.net_connections(kind="inet")
        }


def reading_is_noted(folder: Path) -> bool:
    """Return True if this file system records reads; if not, only replies can reveal a read of the canary."""
    probe = folder / "twin"
    probe.write_bytes(b"twin")
    os.utime(probe, (0, time.time()))
    probe.read_bytes()
    return probe.stat().st_atime_ns != 0


def spring(folder: Path) -> int:
    """Run the traps in an unsandboxed player; return the number with an effect. 0 would mean useless traps."""
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
    """Return the settled figures of /metrics, each summed over its labels."""
    target.when_idle()
    time.sleep(1.0)
    totals: dict[str, float] = {}
    for family in text_string_to_metric_families(target.scrape()[0]):
        for sample in family.samples:
            totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
    return totals


def requests(stress: StressRun) -> Result:
    """Send generated requests: most to an open service, the others to one with API keys, with and without a key."""
    num_guarded = stress.num_requests // 4
    findings: dict[str, Findings] = {}

    def told(kind: str) -> Callable[[int], None]:
        return lambda num: stress.say(f"requests, {kind}: {num} sent")

    with stress.service({**SHORT_TRACES, "HYPER_MAX_AUDIO_S": "30"}) as target:
        num_open = stress.num_requests - 2 * num_guarded
        findings["open"] = generate(target.url, None, num_open, stress.seed, told("open"))
    with stress.guarded() as (target, key):
        findings["with a key"] = generate(target.url, key, num_guarded, stress.seed + 1, told("with a key"))
        findings["without"] = generate(target.url, key, num_guarded, stress.seed + 2, told("without"), is_withheld=True)
    num = sum(result.num for result in findings.values())
    return [
        Figure("http_5xx", sum(result.num_ours for result in findings.values()), num),
        Figure("http_undescribed", sum(result.num_wrong for result in findings.values()), num),
    ], {kind: result.as_json() for kind, result in findings.items()}


def auth(stress: StressRun) -> Result:
    """Request every address with every method without a key."""
    with stress.guarded() as (target, key):
        findings = probe_without_key(target.url, key, lambda num: stress.say(f"auth: {num} tried"))
    return [Figure("unauthenticated_reached", findings.num_ours, findings.num)], findings.as_json()


def sandbox(stress: StressRun) -> Result:
    """Decode the same clips inside and outside of the sandbox, in turns."""
    rounds = 3 if stress.is_quick else 20
    bench = Bench(Path("checkpoints/hyper-mini"), stress.clips, rounds, stress.log, stress.say)
    with bench.peers(("decode", None)) as (peer,):
        overheads_ms: list[float] = peer.ask("overheads_ms", rounds=rounds)
        layers: list[str] = peer.ask("layers")
    value = round(statistics.median(overheads_ms), 2)
    details = {"p95_ms": percentile(overheads_ms, 95), "layers": layers}
    return [Figure("sandbox_overhead_ms", value, len(overheads_ms))], details


def odd_files(stress: StressRun) -> Result:
    """Decode ordinary but odd files in the sandbox and by an ffmpeg program, and compare the durations."""
    lost: list[str] = []
    refused: list[str] = []
    num = 0
    with tempfile.TemporaryDirectory() as folder:
        # The decoder's user reads nothing here: its parent sends the bytes.
        path = Path(folder) / "odd"
        bench = Bench(Path("checkpoints/hyper-mini"), stress.clips, 1, stress.log, stress.say)
        with bench.peers(("decode", None)) as (peer,):
            for name, data in odd.files(Path(folder), NUM_ODD_FILES, stress.seed):
                num += 1
                path.write_bytes(data)
                decoded = peer.ask("decode_file", path=str(path))
                true = odd.reference(path, decoded.get("track", 1))
                if "error" in decoded:
                    if true.duration_s > odd.MIN_LOST_S:
                        refused.append(f"{name}: {decoded['error']}: {decoded['message']}")
                elif odd.is_lost(decoded["duration_s"], decoded["is_silent"], decoded["codes"], true):
                    lost.append(f"{name}: {decoded}, ffmpeg {true}")
                if num % 100 == 0:
                    stress.say(f"odd_files: {num} decoded, {len(lost)} lost sound without a warning")
            num_deaths: int = peer.ask("deaths")
    return [
        Figure("odd_files_lost_silently", len(lost), num),
        Figure("odd_files_refused", len(refused), num),
        Figure("odd_files_decoder_deaths", num_deaths, num),
    ], {"lost": lost[:KEPT], "refused": refused[:KEPT]}


def overload(stress: StressRun) -> Result:
    """Offer 0.8 and 3 times the peak."""
    return carry_out(stress, "overload")


def soak(stress: StressRun) -> Result:
    """Offer 11,000 requests at 0.7 of the peak from the overload part."""
    if stress.is_quick:
        stress.say("soak: left out of a quick run, in which growth would be noise")
        return [], {}
    stored = read_part(stress, "overload") or {}
    peak = stored.get("figures", {}).get("peak_per_s", {}).get("value")
    return carry_out(stress, "soak", peak)


def chaos(stress: StressRun) -> Result:
    """Let clients leave, kill and stop the engine, and end the service."""
    return carry_out(stress, "chaos")


def carry_out(stress: StressRun, name: str, peak: float | None = None) -> Result:
    """Run a scenario of `python -m loadtests run` against its own service."""
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


def quotas(stress: StressRun) -> Result:
    """Share a key's quota between two replicas, and kill the quota store under load."""
    num_over, statuses = replicas.overrun(stress.log, stress.clips)
    num_ours, num = replicas.outage(stress.log, stress.clips)
    return [
        Figure("quota_overrun", num_over, replicas.NUM_TRIES),
        Figure("store_outage_5xx", num_ours, num),
    ], {"statuses": statuses}


def fleet(stress: StressRun) -> Result:
    """Kill one of two replicas with open streams, then take one away by SIGTERM."""
    others_lost, own_lost, num_own = replicas.end_replica(stress.log, stress.clips, signal.SIGKILL)
    lost = replicas.end_replica(stress.log, stress.clips, signal.SIGTERM)
    return [
        Figure("replica_kill_other_streams_lost", others_lost, replicas.NUM_STREAMS - num_own),
        Figure("scale_in_streams_lost", lost[0] + lost[1], replicas.NUM_STREAMS),
    ], {"killed": {"streams": num_own, "lost": own_lost}, "taken_away": {"streams": lost[2]}}


def jobs(stress: StressRun) -> Result:
    """Kill a service with jobs at random times, while the receiver of their webhooks comes and goes."""
    num_kills = 3 if stress.is_quick else NUM_KILLS
    report = kill_repeatedly(stress.clips, stress.log, stress.seed, num_kills, stress.say)
    return [
        Figure("job_steps_lost", report.num_lost, report.num_steps),
        Figure("job_steps_twice", report.num_twice, report.num_steps),
        Figure("webhooks_delivered", round(report.delivered, 4), report.num_hooked),
    ], {"kills": num_kills, **report.details}


PARTS: Mapping[str, Callable[[StressRun], Result]] = {
    each.__name__: each
    for each in (sandbox, odd_files, auth, requests, files, quotas, fleet, jobs, overload, soak, chaos)
}


def run(stress: StressRun, parts: Sequence[str]) -> tuple[list[Figure], dict[str, str]]:
    """Run the parts without a stored result; return all figures, and the reason for each missing result."""
    stress.out.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Figure] = {}
    failures: dict[str, str] = {}
    for part in parts:
        stored = read_part(stress, part)
        if stored is None:
            stress.say(f"{part}: {(PARTS[part].__doc__ or '').strip()}")
            started_s = time.monotonic()
            try:
                measured, details = PARTS[part](stress)
            except (DriverLateError, click.ClickException, httpx.HTTPError, subprocess.SubprocessError) as fault:
                # Other parts may succeed, and the next run repeats this one.
                failures[part] = str(fault)
                stress.say(f"{part}: no result: {fault}")
                continue
            stored = {
                "asked": stress.asked_of(part),
                "figures": figures_json(measured),
                "seconds": round(time.monotonic() - started_s, 1),
                "machine": machine(),
                "details": details,
            }
            path = part_path(stress, part)
            path.with_suffix(".new").write_text(json.dumps(stored, indent=1) + "\n")
            path.with_suffix(".new").replace(path)
        else:
            stress.say(f"{part}: kept from {stored['machine']['time']}")
        for name, entry in stored["figures"].items():
            figure = Figure(name, entry["value"], entry["of"])
            if name in SUMMED and name in figures:
                figure = replace(figure, value=figure.value + figures[name].value, num=figure.num + figures[name].num)
            figures[name] = figure
    return list(figures.values()), failures


def part_path(stress: StressRun, part: str) -> Path:
    """Return the path of a part's result."""
    return stress.out / f"{part}.json"


def read_part(stress: StressRun, part: str) -> dict[str, Any] | None:
    """Return the stored result of a part with equal settings, or None."""
    try:
        stored: dict[str, Any] = json.loads(part_path(stress, part).read_text())
    except (FileNotFoundError, ValueError):
        return None
    return stored if stored.get("asked") == stress.asked_of(part) else None
