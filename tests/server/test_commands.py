"""`hyper serve` as a process: readiness line, signals, exit codes and output."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner

from server.commands import serve
from server.serving import url_of
from tests.process import exit_code, post, serve_process, start
from tests.server.test_settings import KUBERNETES
from tests.serving import tone, wait_for

SCRIPTED = {"HYPER_ENGINE": "scripted"}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("clips") / "tone.wav"
    path.write_bytes(tone(2.0))
    yield path


def test_serve_says_when_it_is_ready_and_ends_with_0_at_sigterm() -> None:
    with serve_process(SCRIPTED) as (process, url):
        assert httpx.get(f"{url}/readyz").json()["ready"] is True
        assert post(url).json()["answer"]["text"] == "1.0 s of loud sound"
        process.send_signal(signal.SIGTERM)
        assert exit_code(process, 10) == 0


def test_serve_answers_what_is_in_flight_before_it_ends() -> None:
    with serve_process({**SCRIPTED, "HYPER_SCRIPTED_TOKEN_INTERVAL_S": "0.02"}) as (process, url):
        found: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: found.append(post(url)))
        thread.start()
        wait_for(lambda: "hyper_in_flight 1.0" in httpx.get(f"{url}/metrics").text)
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: httpx.get(f"{url}/readyz").json()["reasons"] == ["shutting_down"])
        refused = post(url)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        thread.join()
        assert found[0].status_code == 200 and found[0].json()["termination"] == "complete"
        assert exit_code(process, 10) == 0


def test_a_stalled_upload_and_an_idle_connection_do_not_hold_the_end_up() -> None:
    environment = {**SCRIPTED, "HYPER_DRAIN_TIMEOUT_S": "1", "HYPER_UPLOAD_IDLE_TIMEOUT_S": "60"}
    with serve_process(environment) as (process, url):
        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        with socket.create_connection(address) as stalled, socket.create_connection(address):
            head = (
                b"POST /v1/audio/qa HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n{"
            )
            stalled.sendall(head)
            wait_for(lambda: "hyper_in_flight 1.0" in httpx.get(f"{url}/metrics").text)
            process.send_signal(signal.SIGTERM)
            assert exit_code(process, 15) == 0


def test_serve_says_why_it_cannot(tmp_path: Path) -> None:
    process = start({"HYPER_ENGINE": "vllm", "HYPER_CHECKPOINT": str(tmp_path)}, stderr=subprocess.PIPE)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 78 and "hyper.json" in error and "Traceback" not in error
    process = start({**SCRIPTED, "HYPER_MAX_IN_FLIGHT": "none"}, stderr=subprocess.PIPE)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 2 and "HYPER_MAX_IN_FLIGHT" in error and "Traceback" not in error


def test_serve_refuses_a_misspelt_variable_by_name() -> None:
    result = CliRunner().invoke(serve, [], env={**SCRIPTED, "HYPER_MAX_INFLIGHT": "4", "HYPER_URL": "http://x"})
    assert result.exit_code == 2 and "HYPER_MAX_INFLIGHT" in result.output and "HYPER_URL" not in result.output


def test_serve_ignores_the_variables_of_a_kubernetes_service_of_its_name_and_logs_them() -> None:
    options: dict[str, Any] = {"arguments": ("--port", "0"), "stderr": subprocess.PIPE}
    with serve_process({**SCRIPTED, **KUBERNETES}, **options) as (process, url):
        assert httpx.get(f"{url}/readyz").status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        with process.stderr as lines:
            text = lines.read()
        assert exit_code(process, 10) == 0, text
    assert "Kubernetes" in text and "HYPER_PORT" in text and "HYPER_SERVICE_HOST" in text


def test_the_announced_address_is_a_url() -> None:
    assert url_of("127.0.0.1", 8000) == "http://127.0.0.1:8000"
    assert httpx.URL(url_of("::1", 8000)).host == "::1"


def test_a_port_that_is_taken_is_a_quick_failure() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        process = start({**SCRIPTED, "HYPER_PORT": str(taken.getsockname()[1])}, stderr=subprocess.PIPE)
        _, error = process.communicate(timeout=30)
        assert process.returncode not in (0, None) and "in use" in error


def test_help_says_what_there_is_without_loading_the_service() -> None:
    assert "--checkpoint" in CliRunner().invoke(serve, ["--help"]).output
    code = "import sys, server.commands; print(sorted({'fastapi', 'httpx', 'numpy', 'uvicorn'} & set(sys.modules)))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    assert loaded.stdout.strip() == "[]"


def test_a_clip_that_finds_no_room_on_the_disk_is_refused_until_there_is_some() -> None:
    with serve_process(SCRIPTED) as (process, url):
        # The kernel fails the write as on a full disk; only clips of more than 1 MiB are written.
        kept = resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (65536, -1))
        reply = httpx.post(f"{url}/v1/audio/qa", data={"question": "What?"}, files={"file": ("clip", tone(40.0))})
        error = reply.json()["error"]
        assert (reply.status_code, error["code"], reply.headers["retry-after"]) == (503, "storage_full", "10")
        assert "tmp" not in reply.text and post(url).status_code == 200
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, kept)
        reply = httpx.post(f"{url}/v1/audio/qa", data={"question": "What?"}, files={"file": ("clip", tone(40.0))})
        assert reply.json()["error"]["code"] != "storage_full"
