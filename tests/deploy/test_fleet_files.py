"""The files of a fleet in deploy/: compose, HAProxy and KubeRay agree with the service and its settings."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from server.fleet import RAY_VARIABLES, ROUTING_HEADER
from server.settings import Settings
from tests.paths import ROOT
from tests.serving import Live, running, scripted, tone

DEPLOY = ROOT / "deploy"
CONFIGURATIONS = ("haproxy.cfg", "haproxy.compose.cfg")

needs_haproxy = pytest.mark.skipif(shutil.which("haproxy") is None, reason="Debian's haproxy is not installed")


def kuberay() -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "kuberay.yaml").read_text(encoding="utf-8"))["spec"]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_the_compose_file_of_the_fleet_is_one() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    checked = subprocess.run([*command, DEPLOY / "compose.fleet.yaml"], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_compose_sets_what_the_replicas_read_and_publishes_only_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    services = yaml.safe_load((DEPLOY / "compose.fleet.yaml").read_text(encoding="utf-8"))["services"]
    for name, value in services["replica"]["environment"].items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    assert settings.quota_url == "redis://quota:6379/0" and settings.key_file is not None
    assert settings.quota_replicas == services["replica"]["deploy"]["replicas"]
    assert [name for name, service in services.items() if "ports" in service] == ["proxy"]
    for service in services.values():
        assert service["read_only"] and service["cap_drop"] == ["ALL"] and service["mem_limit"]


def test_kuberay_runs_this_application_with_known_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = kuberay()
    serve = yaml.safe_load(spec["serveConfigV2"])
    (application,) = serve["applications"]
    assert application["import_path"] == "server.fleet:build"
    assert set(application["args"]) <= {"num_replicas", "max_replicas", "num_cpus", "num_gpus"}
    cluster = spec["rayClusterConfig"]
    assert cluster["authOptions"] == {"mode": "token"} and cluster["rayVersion"] in pyproject_ray()
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        (container,) = group["template"]["spec"]["containers"]
        variables = {each["name"]: each["value"] for each in container["env"]}
        ours = {name: value for name, value in variables.items() if name.startswith("HYPER_")}
        assert {name.lower().removeprefix("hyper_") for name in ours} <= set(Settings.model_fields)
        assert variables["RAY_SERVE_SESSION_ID_HEADER_KEY"] == ROUTING_HEADER
        assert variables["RAY_USAGE_STATS_ENABLED"] == RAY_VARIABLES["RAY_USAGE_STATS_ENABLED"]
        for name, value in ours.items():
            monkeypatch.setenv(name, value)
        assert Settings().key_file is not None
    assert int(application["args"]["max_replicas"]) <= cluster["workerGroupSpecs"][0]["maxReplicas"]


def pyproject_ray() -> str:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'"ray\[serve\]==([\d.]+)"', text)
    assert found
    return found[1]


@needs_haproxy
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_haproxy_takes_the_configuration_without_a_warning(name: str) -> None:
    run = subprocess.run(["haproxy", "-c", "-f", DEPLOY / name], capture_output=True, text=True)
    assert run.returncode == 0 and "WARNING" not in run.stdout + run.stderr, run.stderr


def test_the_proxy_keeps_the_limits_of_the_service() -> None:
    text, settings = (DEPLOY / "haproxy.cfg").read_text(encoding="utf-8"), Settings()
    assert f"maxconn {settings.max_connections}" in text
    assert f"timeout http-request {settings.head_timeout_s:g}s" in text
    for name in CONFIGURATIONS:
        config = (DEPLOY / name).read_text(encoding="utf-8")
        (server_s,) = re.findall(r"timeout server (\d+)s", config)
        assert int(server_s) * 1000 > settings.max_timeout_ms
        (idle_s,) = re.findall(r"timeout http-keep-alive (\d+)s", config)
        assert int(idle_s) < settings.keep_alive_s


@contextlib.contextmanager
def front(backend: str, folder: Path) -> Iterator[str]:
    """Run HAProxy with deploy/haproxy.cfg before a backend; yield its address."""
    port = free_port()
    text = (DEPLOY / "haproxy.cfg").read_text(encoding="utf-8").replace("GET /-/healthz", "GET /livez")
    config = folder / "haproxy.cfg"
    config.write_text(text.replace("timeout http-request 10s", "timeout http-request 1s"), encoding="utf-8")
    environment = {**os.environ, "HYPER_FRONT": f"127.0.0.1:{port}", "HYPER_FLEET": backend}
    process = subprocess.Popen(["haproxy", "-db", "-f", str(config)], env=environment, stderr=subprocess.DEVNULL)
    try:
        deadline_s = time.monotonic() + 30
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"http://127.0.0.1:{port}/livez").status_code == 200:
                    break
            assert time.monotonic() < deadline_s and process.poll() is None
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait(10)


@pytest.fixture(scope="module")
def proxied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Live, str]]:
    with running(scripted()) as live, front(live.url.removeprefix("http://"), tmp_path_factory.mktemp("front")) as url:
        yield live, url


@needs_haproxy
def test_answers_and_streams_pass_the_proxy_with_one_request_id(proxied: tuple[Live, str]) -> None:
    _, url = proxied
    files = {"file": ("clip", tone())}
    for stream in ("false", "true"):
        fields = {"question": "What is heard?", "stream": stream}
        headers = {"x-request-id": "mine-1"}
        reply = httpx.post(f"{url}/v1/audio/qa", data=fields, files=files, headers=headers, timeout=60)
        assert reply.status_code == 200 and reply.headers.get_list("x-request-id") == ["mine-1"]
    odd = httpx.get(f"{url}/v1/info", headers={"x-request-id": "a" * 100})
    assert odd.headers["x-request-id"].startswith("req_") and len(odd.headers.get_list("x-request-id")) == 1


@needs_haproxy
def test_the_proxy_hides_metrics_and_refuses_two_lengths(proxied: tuple[Live, str]) -> None:
    _, url = proxied
    reply = httpx.get(f"{url}/metrics")
    assert reply.status_code == 404 and reply.json()["error"]["code"] == "not_found"
    assert reply.json()["error"]["request_id"] == reply.headers["x-request-id"]


@needs_haproxy
def test_a_head_that_never_ends_is_closed_and_large_heads_are_refused(proxied: tuple[Live, str]) -> None:
    _, url = proxied
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nhost: a\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 408")
    assert httpx.get(f"{url}/livez", headers={"x-long": "a" * 20_000}).status_code in (400, 431)


@needs_haproxy
def test_a_plain_text_refusal_of_ray_becomes_the_services_error_object(tmp_path: Path) -> None:
    refusal = b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: text/plain\r\ncontent-length: 4\r\n\r\nfull"
    probe = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"

    def serve(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection:
                    head = connection.recv(65536)
                    connection.sendall(probe if b"/livez" in head else refusal)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        with front(f"127.0.0.1:{listener.getsockname()[1]}", tmp_path) as url:
            reply = httpx.get(f"{url}/v1/info")
    assert reply.status_code == 503 and reply.headers["retry-after"] == "1"
    error = reply.json()["error"]
    assert (error["code"], error["retryable"]) == ("overloaded", True)
    assert error["request_id"] == reply.headers["x-request-id"]
