"""The measured service: a running one, or one started here by `hyper serve`.

For a service started here, this module also reads its processes; everything else comes over HTTP.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from loadtests.client import QA_PATH

START_TIMEOUT_S = 300
# OpenBLAS settings of another machine would slow only some peers.
LEFT_OUT = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "OMP_NUM_THREADS", "GOMP_SPINCOUNT")
ENGINE_PROCESS = "VLLM"
"""Part of the process titles of vLLM."""

COUNTED_ENDPOINTS = (QA_PATH, "other")
"""Endpoint labels of a question: `other` if the service refuses it before routing."""

MEBIBYTE = 2**20


def environment(**fields: str) -> dict[str, str]:
    """Return the environment of a child process, without settings of the caller's own service."""
    inherited = {k: v for k, v in os.environ.items() if k not in LEFT_OUT and not k.startswith("HYPER_")}
    return inherited | fields


@contextlib.contextmanager
def child(
    command: Sequence[str], env: Mapping[str, str], log: Path, *, is_read: bool = False
) -> Iterator[subprocess.Popen[str]]:
    """Start a process and end it after the block; its messages go to a file.

    Args:
        is_read: Return its standard output to the caller instead of the file.
    """
    with log.open("a") as errors:
        output = subprocess.PIPE if is_read else errors
        process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=output, stderr=errors, text=True)
    try:
        yield process
    finally:
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()
        # A peer ends and cleans up when its input closes; a server needs a signal.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20 if is_read else 0)
        process.terminate()
        try:
            process.wait(40)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


@contextlib.contextmanager
def serving(
    log: Path, *, timeout_s: float = START_TIMEOUT_S, **fields: str
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Start `hyper serve` on a free port with these variables; yield its process and address when it is ready."""
    port = free_port()
    env = environment(HYPER_PORT=str(port), **{"HYPER_LOG_LEVEL": "error", **fields})
    with child([sys.executable, "-m", "hyper_model.cli", "serve"], env, log) as process:
        yield process, when_up(process, f"http://127.0.0.1:{port}", "/readyz", log, timeout_s)


def when_up(process: subprocess.Popen[str], url: str, path: str, log: Path, timeout_s: float = START_TIMEOUT_S) -> str:
    """Wait for an address to answer, and return it.

    Raises:
        click.ClickException: The process ended or took too long.
    """
    deadline_s = time.monotonic() + timeout_s
    # One client, because each new one reads the certificates again.
    with httpx.Client(timeout=2) as client:
        while True:
            with contextlib.suppress(httpx.TransportError):
                if client.get(url + path).status_code == 200:
                    return url
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise click.ClickException(f"{url}{path} does not answer; see {log}")
            time.sleep(0.2)


def free_port() -> int:
    """Return a free port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@dataclass(frozen=True)
class Reading:
    """Figures of one scrape of /metrics.

    Attributes:
        ended: Ended questions by outcome.
        in_flight: Admitted requests.
        rss_mib: Resident memory of the service's own process.
    """

    ended: Mapping[str, int]
    in_flight: int
    rss_mib: float


class Target:
    """A service at an address.

    Attributes:
        key: The API key, if required. It needs access to /metrics too, unless /metrics has its own port.
        metrics_url: Address of /metrics.
        process: The service's own process, if started here.
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        metrics_url: str | None = None,
        process: subprocess.Popen[str] | None = None,
    ) -> None:
        self.url = url
        self.key = key
        self.metrics_url = metrics_url or url
        self.process = process
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        self.client = httpx.Client(headers=headers, timeout=30)

    def close(self) -> None:
        """Close the connections."""
        self.client.close()

    def is_ready(self) -> bool:
        """Return True if the service reports ready."""
        try:
            return self.client.get(f"{self.url}/readyz").status_code == 200
        except httpx.TransportError:
            return False

    def info(self) -> dict[str, Any]:
        """Return the service's /v1/info, empty if unavailable."""
        reply = self.client.get(f"{self.url}/v1/info")
        return reply.json() if reply.status_code == 200 else {}

    def scrape(self) -> tuple[str, float]:
        """Return the text of /metrics and the seconds of the scrape.

        Raises:
            click.ClickException: /metrics does not answer, or refuses this key.
        """
        started_s = time.perf_counter()
        reply = self.client.get(f"{self.metrics_url}/metrics")
        seconds = time.perf_counter() - started_s
        if reply.status_code != 200:
            raise click.ClickException(f"{self.metrics_url}/metrics answers {reply.status_code}; see --metrics-url")
        return reply.text, seconds

    def read(self) -> Reading:
        """Read the service's own figures from /metrics; errors as in `scrape`."""
        return parse_metrics(self.scrape()[0])

    def when_idle(self, timeout_s: float = 60.0) -> Reading:
        """Wait until nothing is in flight; return this reading, or the last one after `timeout_s`."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            reading = self.read()
            if reading.in_flight == 0 or time.monotonic() > deadline_s:
                return reading
            time.sleep(0.2)

    def engine_processes(self) -> list[psutil.Process]:
        """Return the engine's processes; empty if it runs in the service's process or elsewhere."""
        if self.process is None:
            return []
        processes: list[psutil.Process] = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if any(ENGINE_PROCESS in word for word in process.cmdline()):
                    processes.append(process)
        return processes


@contextlib.contextmanager
def target_of(
    url: str | None, *, key: str | None, metrics_url: str | None, settings: Mapping[str, str], log: Path
) -> Iterator[Target]:
    """Yield the service at an address, or start one with these settings and end it after the block."""
    if url is not None:
        with contextlib.closing(Target(url, key, metrics_url)) as target:
            yield target
        return
    with (
        serving(log, timeout_s=START_TIMEOUT_S, **settings) as (process, own_url),
        contextlib.closing(Target(own_url, key, metrics_url, process)) as target,
    ):
        yield target


def parse_metrics(text: str) -> Reading:
    """Extract the required figures from the text of /metrics."""
    ended: dict[str, int] = {}
    values: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == "hyper_request_seconds_count" and sample.labels["endpoint"] in COUNTED_ENDPOINTS:
                outcome = sample.labels["outcome"]
                ended[outcome] = ended.get(outcome, 0) + int(sample.value)
            elif not sample.labels:
                values[sample.name] = sample.value
    rss_mib = values.get("process_resident_memory_bytes", 0.0) / MEBIBYTE
    return Reading(ended, int(values.get("hyper_in_flight", 0)), rss_mib)
