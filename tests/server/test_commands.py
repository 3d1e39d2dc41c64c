"""`hyper serve` and `hyper ask` as processes: readiness line, signals, exit codes and output."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import resource
import signal
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
from click.testing import CliRunner, Result

from server.commands import ask, serve
from server.serving import url_of
from tests.process import exit_code, post, serve_process, start
from tests.server.test_settings import KUBERNETES
from tests.serving import Live, tone, wait_for

SCRIPTED = {"HYPER_ENGINE": "scripted"}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("clips") / "tone.wav"
    path.write_bytes(tone(2.0))
    yield path


def run_ask(*arguments: str) -> Result:
    return CliRunner().invoke(ask, arguments)


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
            started_s = time.monotonic()
            process.send_signal(signal.SIGTERM)
            assert exit_code(process, 15) == 0
            assert time.monotonic() - started_s < 10


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


@pytest.mark.parametrize("from_", ["a pipe", "standard input"])
@pytest.mark.parametrize("options", [(), ("--stream",)])
def test_ask_takes_a_clip_from_a_pipe_and_from_standard_input(
    live: Live, clip: Path, from_: str, options: tuple[str, ...]
) -> None:
    source = f"<(cat {clip})" if from_ == "a pipe" else f"- < {clip}"
    name, _, redirection = source.partition(" < ")
    command = f"{sys.executable} -m hyper_model.cli ask {name} 'What is heard?' --url {live.url} {' '.join(options)}"
    command += f" < {redirection}" if redirection else ""
    ran = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0 and "2.0 s of loud sound" in ran.stdout, ran.stderr


def test_ask_names_an_empty_pipe_and_an_unreadable_file(live: Live, clip: Path, tmp_path: Path) -> None:
    for source, words in (("- < /dev/null", "standard input is empty"), ("<(true)", "is empty")):
        name, _, redirection = source.partition(" < ")
        command = f"{sys.executable} -m hyper_model.cli ask {name} 'What?' --url {live.url}"
        command += f" < {redirection}" if redirection else ""
        ran = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
        assert ran.returncode == 1 and words in ran.stderr and "Traceback" not in ran.stderr
    odd = tmp_path / 'été \u2028\n"x".wav'
    odd.write_bytes(clip.read_bytes())
    assert run_ask(str(odd), "What is heard?", "--url", live.url).exit_code == 0
    assert_one_line(run_ask(str(clip), "What \udcff?", "--url", live.url), "UTF-8")


@pytest.mark.parametrize(
    "proxy", ["socks5://127.0.0.1:9", "http://127.0.0.1:9", "nonsense://x", "http://a:b@[::1", "x y"]
)
@pytest.mark.parametrize("variable", ["ALL_PROXY", "HTTP_PROXY", "all_proxy", "http_proxy"])
def test_ask_bypasses_every_proxy_for_a_local_address(
    live: Live, clip: Path, monkeypatch: pytest.MonkeyPatch, variable: str, proxy: str
) -> None:
    monkeypatch.setenv(variable, proxy)
    result = run_ask(str(clip), "What is heard?", "--url", live.url)
    assert result.exit_code == 0, result.output
    assert run_ask(str(clip), "?", "--url", live.url.replace("127.0.0.1", "localhost")).exit_code == 0


@pytest.mark.parametrize(
    ("proxy", "words"),
    [
        ("socks5://user:secret@127.0.0.1:9", "socks5"),
        ("nonsense://x", "nonsense"),
        ("http://127.0.0.1:9", "127.0.0.1:9"),
        ("http://[::1", "not an address"),
        ("http://127.0.0.1:port", "not an address"),
    ],
)
def test_ask_names_a_proxy_that_cannot_be_used(
    clip: Path, monkeypatch: pytest.MonkeyPatch, proxy: str, words: str
) -> None:
    for variable in ("ALL_PROXY", "HTTP_PROXY"):
        monkeypatch.setenv(variable, proxy)
        result = run_ask(str(clip), "What is heard?", "--url", "http://hyper.example:8000")
        assert_one_line(result, words)
        assert variable in result.output and "NO_PROXY=hyper.example" in result.output and "secret" not in result.output
        monkeypatch.delenv(variable)


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
    assert "CLIP QUESTION" in CliRunner().invoke(ask, ["--help"]).output
    code = "import sys, server.commands; print(sorted({'fastapi', 'httpx', 'numpy', 'uvicorn'} & set(sys.modules)))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    assert loaded.stdout.strip() == "[]"


def test_ask_prints_the_answer_and_what_it_stands_on(live: Live, clip: Path) -> None:
    result = run_ask(str(clip), "What is heard?", "--url", live.url)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0] == "2.0 s of loud sound"
    assert any("background:" in line and "loud sound" in line for line in lines)


def test_ask_offers_choices(live: Live, clip: Path) -> None:
    result = run_ask(str(clip), "What is it?", "--choice", "a bell", "--choice", "a dog", "--url", live.url)
    assert result.output.splitlines()[0].split("  (")[0] in ("a bell", "a dog") and "%)" in result.output


def test_ask_prints_json(live: Live, clip: Path) -> None:
    reply = json.loads(run_ask(str(clip), "What is heard?", "--json", "--url", live.url).output)
    assert reply["answer"]["text"] == "2.0 s of loud sound"


def test_ask_streams(live: Live, clip: Path) -> None:
    result = run_ask(str(clip), "What is heard?", "--stream", "--url", live.url)
    assert "[PLANNING] Measure" in result.output and result.output.rstrip().endswith("2.0 s of loud sound")
    lines = run_ask(str(clip), "What is heard?", "--stream", "--json", "--url", live.url).output.splitlines()
    assert json.loads(lines[0])["event"] == "section.start" and json.loads(lines[-1])["event"] == "done"


def test_ask_says_why_there_is_no_answer(live: Live, clip: Path, tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("no audio")
    result = run_ask(str(text), "What is heard?", "--url", live.url)
    assert result.exit_code == 1 and "error: " in result.output and "Traceback" not in result.output
    result = run_ask(str(clip), "What is heard?", "--choice", "only one", "--url", live.url)
    assert result.exit_code == 1 and "choices" in result.output
    result = run_ask(str(clip), "What is heard?", "--url", "http://127.0.0.1:9")
    assert result.exit_code == 1 and "hyper serve" in result.output
    assert run_ask(str(tmp_path / "none.wav"), "What?").exit_code == 2


@pytest.mark.parametrize(
    "url", ["http://[", "http://x:99999999", "http://127.0.0.1:99999", "nonsense", "http://x\0y", ""]
)
def test_ask_names_an_address_that_is_none(clip: Path, url: str) -> None:
    assert_one_line(run_ask(str(clip), "What is heard?", "--url", url), url.partition("\0")[0])


@pytest.mark.parametrize(
    "body",
    [b"<html>welcome</html>", b"[]", b"{}", b'{"object": "chat.completion"}', b'{"object": "audio.qa"}', b"\xff", b"1"],
)
@pytest.mark.parametrize("options", [(), ("--json",), ("--stream",), ("--stream", "--json")])
def test_ask_says_that_another_service_answers(clip: Path, body: bytes, options: tuple[str, ...]) -> None:
    if options == ("--json",) and b"audio.qa" in body:
        return
    for reply in (body, b"event: done\ndata: " + body + b"\n\n", b"event: error\ndata: " + body + b"\n\n"):
        if reply.startswith(b"event: done") and options:
            continue
        with answering(reply) as url:
            assert_one_line(run_ask(str(clip), "What is heard?", "--url", url, *options), "hyper serve")


def assert_one_line(result: Result, named: str) -> None:
    """Check that a command ended with one line and this text in it."""
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result
    lines = result.output.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and named in lines[0], result.output


@contextlib.contextmanager
def answering(body: bytes) -> Iterator[str]:
    """Answer one request with 200 and this body, whatever its content."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        thread.join(10)


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
