"""A fleet on Ray Serve: one request id, affinity, a killed replica and a drain; and the parts that need no Ray.

The tests with Ray run where Ray is installed (`make test-fleet`). RAY_TEST_ADDRESS names a running cluster for them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import httpx
import psutil
import pytest

from hyper_model.errors import HyperError
from server.fleet import (
    OWN_CLUSTER_VARIABLES,
    Fleet,
    open_metrics_port,
    prepare_environment,
    replica_variables,
    wanted_replicas,
)
from server.settings import Settings
from tests.paths import ROOT
from tests.serving import tone, wait_for

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the extra `fleet` is not installed")

START = "from server.commands import fleet; fleet()"
TIMEOUT_S = 240
NUM_STREAMS = 10


def free_ports() -> int:
    """Return the first of two free neighbours."""
    while True:
        with socket.socket() as one, socket.socket() as two, contextlib.suppress(OSError, OverflowError):
            one.bind(("127.0.0.1", 0))
            port: int = one.getsockname()[1]
            two.bind(("127.0.0.1", port + 1))
            return port


def context(num: int, **waits_s: float) -> SimpleNamespace:
    return SimpleNamespace(current_num_replicas=num, aggregated_metrics={"expected_wait_s": waits_s})


def test_the_longest_wait_decides_on_the_number_of_replicas() -> None:
    assert wanted_replicas(context(2, one=0.0, two=2.5))[0] == 3
    assert wanted_replicas(context(3, one=0.0, two=1.0))[0] == 3
    assert wanted_replicas(context(3, one=0.0, two=0.1))[0] == 2
    assert wanted_replicas(context(2))[0] == 2, "without a statistic nothing changes"


def test_replicas_of_one_machine_take_different_metrics_ports() -> None:
    settings = Settings(metrics_port=free_ports())
    one, two = open_metrics_port(settings), open_metrics_port(settings)
    assert one is not None and two is not None
    with one, two:
        assert one.getsockname()[1] != two.getsockname()[1]
    assert open_metrics_port(Settings()) is None


def test_every_replica_gets_the_settings_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYPER_QUOTA_URL", "redis://127.0.0.1:6379/0")
    settings = Settings(engine="scripted", host="0.0.0.0")
    variables = replica_variables(settings, Fleet(num_replicas=2, max_replicas=5))
    assert variables["HYPER_QUOTA_URL"] == "redis://127.0.0.1:6379/0" and variables["HYPER_QUOTA_REPLICAS"] == "5"
    assert (variables["HYPER_ENGINE"], variables["HYPER_HOST"]) == ("scripted", "0.0.0.0")


def test_rays_ports_need_a_token_and_a_named_cluster_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE", "RAY_USAGE_STATS_ENABLED"):
        monkeypatch.delenv(name, raising=False)
    environment = dict(os.environ)
    monkeypatch.setattr(os, "environ", environment)
    with pytest.raises(HyperError, match="RAY_AUTH_TOKEN_PATH"):
        prepare_environment(Fleet(1, 1, address="127.0.0.1:6379"))
    prepare_environment(Fleet(1, 1))
    assert environment["RAY_AUTH_MODE"] == "token" and len(environment["RAY_AUTH_TOKEN"]) == 64
    assert environment["RAY_USAGE_STATS_ENABLED"] == "0"


def test_only_a_cluster_of_its_own_is_bound_to_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OWN_CLUSTER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "one")
    environment = dict(os.environ)
    monkeypatch.setattr(os, "environ", environment)
    prepare_environment(Fleet(1, 1, address="10.0.0.1:6379"))
    assert not set(OWN_CLUSTER_VARIABLES) & set(environment)
    prepare_environment(Fleet(1, 1))
    assert set(OWN_CLUSTER_VARIABLES) <= set(environment)


@dataclass
class RayFleet:
    """A running fleet of two replicas."""

    process: subprocess.Popen[bytes]
    url: str
    metrics_port: int

    def replicas(self) -> dict[int, int]:
        """Return the process of each replica by its metrics port."""
        ports = (self.metrics_port, self.metrics_port + 1)
        found: dict[int, int] = {}
        for each in psutil.net_connections("tcp"):
            if each.status == "LISTEN" and each.pid is not None and each.laddr and each.laddr.port in ports:
                found[each.laddr.port] = each.pid
        return found

    def metric(self, port: int, pattern: str) -> float:
        """Return the sum of a replica's samples that match."""
        text = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=TIMEOUT_S).text
        return sum(float(value) for value in re.findall(rf"^{pattern} (\S+)$", text, flags=re.MULTILINE))

    def answered(self) -> list[float]:
        """Return the number of answers of each replica."""
        pattern = r'hyper_request_seconds_count\{endpoint="/v1/audio/qa".*\}'
        return [self.metric(port, pattern) for port in sorted(self.replicas())]

    def ask(self, clip: bytes, **headers: str) -> httpx.Response:
        """Ask a question with a short answer."""
        fields = {"question": "What is heard?", "max_tokens": "4"}
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        url = f"{self.url}/v1/audio/qa"
        return httpx.post(url, data=fields, files={"file": ("clip", clip)}, headers=names, timeout=TIMEOUT_S)


class Streams:
    """Streams with different clips; `started` have an event and `ended` the last one."""

    def __init__(self, fleet: RayFleet) -> None:
        self.started: set[int] = set()
        self.ended: set[int] = set()
        self.threads = [threading.Thread(target=self.read, args=(fleet, number)) for number in range(NUM_STREAMS)]
        for thread in self.threads:
            thread.start()
        wait_for(lambda: len(self.started) == NUM_STREAMS, timeout_s=TIMEOUT_S)

    def read(self, fleet: RayFleet, number: int) -> None:
        fields, files = {"question": "What is heard?", "stream": "true"}, {"file": ("clip", tone(0.3))}
        headers, url = {"x-hyper-clip": f"clip {number}"}, f"{fleet.url}/v1/audio/qa"
        with (
            contextlib.suppress(httpx.TransportError),
            httpx.stream("POST", url, data=fields, files=files, headers=headers, timeout=TIMEOUT_S) as reply,
        ):
            for line in reply.iter_lines():
                if line.startswith("event:"):
                    self.started.add(number)
                if line == "event: done":
                    self.ended.add(number)

    def finish(self) -> None:
        for thread in self.threads:
            thread.join()


@pytest.fixture(scope="module")
def fleet() -> Iterator[RayFleet]:
    port, metrics_port = free_ports(), free_ports()
    command = [sys.executable, "-c", START, "--replicas", "2", "--cpus", "0.5", "--port", str(port)]
    if address := os.environ.get("RAY_TEST_ADDRESS"):
        command += ["--address", address]
    environment = {
        **os.environ,
        "HYPER_ENGINE": "scripted",
        "HYPER_SCRIPTED_TOKEN_INTERVAL_S": "0.05",
        "HYPER_METRICS_PORT": str(metrics_port),
        "HYPER_DRAIN_TIMEOUT_S": "120",
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "client"))),
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        lines = iter(process.stdout.readline, b"")
        assert any(line.startswith(b"ready: ") for line in lines), f"not ready, exit {process.poll()}"
        yield RayFleet(process, f"http://127.0.0.1:{port}", metrics_port)
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(120)
        process.kill()
        process.wait(10)
        if process.stdout is not None:
            process.stdout.close()


@needs_ray
def test_a_fleet_answers_as_one_service_does(fleet: RayFleet) -> None:
    """One test, because a fleet takes a quarter of a minute to start on quiet cores, and these steps end it."""
    assert httpx.get(f"{fleet.url}/readyz", timeout=TIMEOUT_S).status_code == 200
    reply = fleet.ask(tone(0.3), x_request_id="mine-1")
    assert reply.status_code == 200 and reply.headers.get_list("x-request-id") == ["mine-1"]
    refused = httpx.post(f"{fleet.url}/v1/audio/qa", data={"question": "What?"}, timeout=TIMEOUT_S)
    assert refused.json()["error"]["request_id"] == refused.headers["x-request-id"]

    owners: set[int] = set()
    for clip in ("one", "two", "three", "four", "five", "six", "seven", "eight"):
        before = fleet.answered()
        assert [fleet.ask(tone(0.3), x_hyper_clip=clip).status_code for _ in range(3)] == [200] * 3
        grown = [after - one for after, one in zip(fleet.answered(), before, strict=True)]
        assert sorted(grown) == [0, 3], "one clip, one replica"
        owners.add(grown.index(3))
    assert owners == {0, 1}

    streams = Streams(fleet)
    in_flight = {port: int(fleet.metric(port, "hyper_in_flight")) for port in fleet.replicas()}
    victim = min(in_flight, key=lambda port: in_flight[port])
    os.kill(fleet.replicas()[victim], signal.SIGKILL)
    streams.finish()
    assert len(streams.ended) == NUM_STREAMS - in_flight[victim], "the other replica's streams end in order"
    wait_for(lambda: len(fleet.replicas()) == 2, timeout_s=TIMEOUT_S)

    streams = Streams(fleet)
    fleet.process.terminate()
    streams.finish()
    assert len(streams.ended) == NUM_STREAMS, "a drain loses no stream"
    started_s = time.monotonic()
    assert fleet.process.wait(TIMEOUT_S) == 0, f"after {time.monotonic() - started_s:.0f} s"
