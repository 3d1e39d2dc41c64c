"""Stress parts with two replicas: shared quotas, an outage of their store, and the loss of a replica.

The replicas are two `hyper serve` processes with the scripted engine. Debian's redis-server is the store. Its haproxy
stands in front with deploy/haproxy.compose.cfg.
"""

from __future__ import annotations

import collections
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import httpx

from loadtests.client import QA_PATH
from loadtests.clips import FreshClips, wav
from loadtests.target import Target, environment, free_port, target_of

NUM_TRIES = 400
BUCKET = 100
NUM_PARALLEL = 8
NUM_OUTAGES = 2
OUTAGE_S = 3.0
NUM_STREAMS = 10
PROXY = Path("deploy/haproxy.compose.cfg")
TIMEOUT_S = 300.0
FAST = {"HYPER_ENGINE": "scripted", "HYPER_DEFAULT_MAX_TOKENS": "4", "HYPER_MAX_IN_FLIGHT": "100"}
SLOW = {"HYPER_ENGINE": "scripted", "HYPER_SCRIPTED_TOKEN_INTERVAL_S": "0.1", "HYPER_DRAIN_TIMEOUT_S": "120"}


def program(name: str) -> str:
    """Return the path of a program.

    Raises:
        click.ClickException: It is not installed.
    """
    found = shutil.which(name)
    if found is None:
        raise click.ClickException(f"{name} is not installed; Debian's package has the same name")
    return found


class Store:
    """A Redis server on one port, started and killed several times."""

    def __init__(self) -> None:
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start an empty server."""
        command = [program("redis-server"), "--bind", "127.0.0.1", "--port", str(self.port), "--save", ""]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)

    def kill(self) -> None:
        """End the server at once."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)
            self.process = None


@contextlib.contextmanager
def two_services(log: Path, settings: Mapping[str, str], key: str | None = None) -> Iterator[tuple[Target, Target]]:
    """Run two replicas with the same settings."""
    with (
        target_of(None, key=key, metrics_url=None, settings=settings, log=log) as one,
        target_of(None, key=key, metrics_url=None, settings=settings, log=log) as two,
    ):
        yield one, two


def add_key(path: Path, name: str, *limits: str) -> str:
    """Create a key with these options and return it."""
    command = [sys.executable, "-m", "hyper_model.cli", "keys", "add", name, "--file", str(path), *limits]
    output = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True).stdout
    return next(word for word in output.split() if word.startswith("hyp_"))


def post(url: str, key: str, clip: bytes) -> int:
    """Ask one question; return the status, or 599 without a reply."""
    try:
        reply = httpx.post(
            url + QA_PATH,
            data={"question": "What is heard?"},
            files={"file": ("clip", clip)},
            headers={"authorization": f"Bearer {key}"},
            timeout=TIMEOUT_S,
        )
    except httpx.TransportError:
        return 599
    return reply.status_code


def overrun(log: Path, clips: Path) -> tuple[int, dict[str, int]]:
    """Send 400 parallel tries to two replicas on a bucket of 100; return the number above it, and all statuses.

    The bucket counts seconds of audio: it refills by one second in 14 minutes, so the expected number is exact.
    """
    clip = wav(FreshClips(clips, 1.0).make(1))
    with tempfile.TemporaryDirectory() as folder, closing_store() as store:
        path = Path(folder) / "keys.json"
        key = add_key(path, "stress", "--audio-s-per-day", str(BUCKET), "--scope", "ask", "--scope", "metrics")
        settings = {**FAST, "HYPER_KEY_FILE": str(path), "HYPER_QUOTA_URL": f"redis://127.0.0.1:{store.port}/0"}
        with two_services(log, settings, key) as targets, ThreadPoolExecutor(NUM_PARALLEL) as clients:
            statuses = collections.Counter(
                clients.map(lambda number: post(targets[number % 2].url, key, clip), range(NUM_TRIES))
            )
    return max(0, statuses[200] - BUCKET), {str(status): num for status, num in sorted(statuses.items())}


def outage(log: Path, clips: Path) -> tuple[int, int]:
    """Kill the store and start it again under load; return the numbers of 5xx replies and of all replies."""
    clip = wav(FreshClips(clips, 0.5).make(1))
    statuses: collections.Counter[int] = collections.Counter()
    is_over = threading.Event()
    with tempfile.TemporaryDirectory() as folder, closing_store() as store:
        path = Path(folder) / "keys.json"
        limits = ("--requests-per-minute", "1000000", "--concurrent", "1000", "--audio-s-per-day", "1000000")
        key = add_key(path, "stress", *limits)
        settings = {**FAST, "HYPER_KEY_FILE": str(path), "HYPER_QUOTA_URL": f"redis://127.0.0.1:{store.port}/0"}
        with two_services(log, settings, key) as targets, ThreadPoolExecutor(NUM_PARALLEL) as clients:

            def load(target: Target) -> None:
                while not is_over.is_set():
                    statuses[post(target.url, key, clip)] += 1

            tasks = [clients.submit(load, targets[number % 2]) for number in range(NUM_PARALLEL)]
            for _ in range(NUM_OUTAGES):
                time.sleep(OUTAGE_S)
                store.kill()
                time.sleep(OUTAGE_S)
                store.start()
            time.sleep(OUTAGE_S)
            is_over.set()
            for task in tasks:
                task.result()
    return sum(num for status, num in statuses.items() if status >= 500), statuses.total()


@contextlib.contextmanager
def closing_store() -> Iterator[Store]:
    """Run a store until the block ends."""
    store = Store()
    store.start()
    try:
        yield store
    finally:
        store.kill()


@contextlib.contextmanager
def proxy_before(targets: Sequence[Target]) -> Iterator[str]:
    """Run HAProxy with the configuration of compose before these replicas; each reply names its replica."""
    port = free_port()
    servers = "\n".join(
        f"    server replica{number} {target.url.removeprefix('http://')} check inter 200ms"
        for number, target in enumerate(targets)
    )
    text = re.sub(r"\n    server-template .*", lambda _: f"\n{servers}", PROXY.read_text(encoding="utf-8"))
    text = text.replace("    balance hdr", "    http-response set-header x-replica %s\n    balance hdr")
    with tempfile.NamedTemporaryFile("w", suffix=".cfg") as config:
        config.write(text)
        config.flush()
        variables = {**os.environ, "HYPER_FRONT": f"127.0.0.1:{port}"}
        process = subprocess.Popen([program("haproxy"), "-db", "-f", config.name], env=variables)
        try:
            url = f"http://127.0.0.1:{port}"
            deadline_s = time.monotonic() + TIMEOUT_S
            while True:
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(f"{url}/readyz").status_code == 200:
                        break
                if time.monotonic() > deadline_s:
                    raise click.ClickException("haproxy does not pass requests")
                time.sleep(0.2)
            yield url
        finally:
            process.kill()
            process.wait(10)


class Streams:
    """Open streams through the proxy.

    Attributes:
        owners: Replica of each stream with a first event.
        ended: Streams with their last event.
    """

    def __init__(self, url: str, clip: bytes) -> None:
        self.url = url
        self.clip = clip
        self.owners: dict[int, str] = {}
        self.ended: set[int] = set()
        self.threads = [threading.Thread(target=self.read, args=(number,)) for number in range(NUM_STREAMS)]
        for thread in self.threads:
            thread.start()

    def read(self, number: int) -> None:
        """Read one stream to its end."""
        fields = {"question": "What is heard?", "stream": "true"}
        headers = {"x-hyper-clip": f"clip-{number}"}
        files = {"file": ("clip", self.clip)}
        with (
            contextlib.suppress(httpx.TransportError),
            httpx.stream(
                "POST", self.url + QA_PATH, data=fields, files=files, headers=headers, timeout=TIMEOUT_S
            ) as reply,
        ):
            for line in reply.iter_lines():
                if line.startswith("event:"):
                    self.owners[number] = reply.headers.get("x-replica", "")
                if line == "event: done":
                    self.ended.add(number)

    def wait_until_open(self) -> None:
        """Wait for the first event of every stream.

        Raises:
            click.ClickException: If one does not come.
        """
        deadline_s = time.monotonic() + TIMEOUT_S
        while len(self.owners) < NUM_STREAMS:
            if time.monotonic() > deadline_s:
                raise click.ClickException(f"only {len(self.owners)} of {NUM_STREAMS} streams have an event")
            time.sleep(0.05)

    def finish(self) -> None:
        """Wait for the end of all streams."""
        for thread in self.threads:
            thread.join()


def end_replica(log: Path, clips: Path, number: signal.Signals) -> tuple[int, int, int]:
    """Send a signal to one of two replicas with open streams.

    Returns:
        The streams lost at the other replica, those lost at this one, and the number of streams of this one.
    """
    clip = wav(FreshClips(clips, 1.0).make(1))
    with two_services(log, SLOW) as targets, proxy_before(targets) as url:
        streams = Streams(url, clip)
        streams.wait_until_open()
        process = targets[0].process
        assert process is not None
        process.send_signal(number)
        streams.finish()
    own = {stream for stream, owner in streams.owners.items() if owner == "replica0"}
    lost = set(streams.owners) - streams.ended
    return len(lost - own), len(lost & own), len(own)
