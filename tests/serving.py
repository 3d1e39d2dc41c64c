"""The real service on a real port for tests, and clips to send."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
import numpy as np
import soundfile

from hyper_model.audio import SAMPLE_RATE_HZ
from server.app import create_app
from server.engines.protocol import Engine, ScriptedEngine
from server.service import Service
from server.serving import DrainingServer, uvicorn_config
from server.settings import Settings

Result = TypeVar("Result")

QUESTION = "What is heard?"


@dataclass
class Live:
    """A running service: its address, a client, and its internals."""

    url: str
    client: httpx.Client
    service: Service
    server: DrainingServer
    loop: asyncio.AbstractEventLoop

    def run(self, work: Coroutine[Any, Any, Result], timeout_s: float = 120) -> Result:
        """Run a coroutine on the service's event loop, shared with its engine."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout_s)

    def ask(self, clip: bytes | None = None, **fields: Any) -> httpx.Response:
        """Post a question as a form; the default clip is a second of tone."""
        fields = {"question": QUESTION, **fields}
        return self.client.post("/v1/audio/qa", data=fields, files={"file": ("clip", clip or tone())})

    def events(self, clip: bytes | None = None, **fields: Any) -> list[tuple[str, dict[str, Any]]]:
        """Post a question and collect the stream's events."""
        response = self.ask(clip, stream="true", **fields)
        assert response.headers["content-type"].startswith("text/event-stream"), response.text
        return parse_events(response.text)

    def wait_until_idle(self, timeout_s: float = 5.0) -> None:
        """Wait until nothing is in flight in the service and the engine."""
        deadline_s = time.monotonic() + timeout_s
        while self.service.num_in_flight or self.service.engine.num_in_flight:
            assert time.monotonic() < deadline_s, "still in flight"
            time.sleep(0.02)

    def metric(self, name: str, **labels: str) -> float:
        """Return one of our metrics, summed over all labels not given; 0 if it was never counted."""
        found = (sample for family in self.service.metrics.registry.collect() for sample in family.samples)
        return sum(each.value for each in found if each.name == name and labels.items() <= each.labels.items())


@contextlib.contextmanager
def running(
    settings: Settings,
    engine: Engine | None = None,
    ready_timeout_s: float = 240,
    listeners: Sequence[socket.socket] = (),
) -> Iterator[Live]:
    """Run the service in a thread until the block ends; it is ready, on all ports, when the block begins."""
    app = create_app(settings, engine)
    config = uvicorn_config(app, settings)
    listener = config.bind_socket()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    service: Service = app.state.service
    server = DrainingServer(config, service, url)
    server.is_announced = True  # Its line would appear in the output of an arbitrary test.
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener, *listeners]})
    thread.start()
    try:
        deadline_s = time.monotonic() + ready_timeout_s
        while service.state == "starting" or server.loop is None:
            assert time.monotonic() < deadline_s, "not ready in time"
            time.sleep(0.02)
        assert service.state == "ready", service.failure
        with httpx.Client(base_url=url, timeout=60) as client:
            yield Live(url, client, service, server, server.loop)
    finally:
        server.should_exit = True
        thread.join(60)
        listener.close()
        assert not thread.is_alive()


def scripted(**fields: Any) -> Settings:
    """Return settings for the scripted engine on a free port, without jobs unless they are on."""
    return Settings(engine="scripted", port=0, **{"jobs": False, **fields})


def wav(samples_S: Any, sample_rate_hz: int = SAMPLE_RATE_HZ) -> bytes:
    """Write samples as a WAV file."""
    file = io.BytesIO()
    soundfile.write(file, np.asarray(samples_S, dtype=np.float32), sample_rate_hz, format="WAV")
    return file.getvalue()


def tone(duration_s: float = 1.0, amplitude: float = 0.3, hertz: float = 440.0) -> bytes:
    """Write a sine as a WAV file."""
    times_S = np.arange(int(duration_s * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
    return wav(amplitude * np.sin(2 * np.pi * hertz * times_S))


def parse_events(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Parse server-sent events, without comments."""
    found: list[tuple[str, dict[str, Any]]] = []
    for block in text.split("\n\n"):
        lines = [line for line in block.split("\n") if line and not line.startswith(":")]
        if lines:
            assert [line.partition(": ")[0] for line in lines] == ["event", "data"], lines
            found.append((lines[0].partition(": ")[2], json.loads(lines[1].partition(": ")[2])))
    return found


def mp3(duration_s: float = 3.0) -> bytes:
    """Write a sine as an MP3 file."""
    file = io.BytesIO()
    times_S = np.arange(int(duration_s * 16000)) / 16000
    soundfile.write(file, 0.3 * np.sin(2765 * times_S), 16000, format="MP3")
    return file.getvalue()


def post_json(live: Live, body: Any) -> httpx.Response:
    """Post a JSON body, given as an object or as raw bytes."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return live.client.post("/v1/audio/qa", content=content, headers={"content-type": "application/json"})


def json_question(**fields: Any) -> dict[str, Any]:
    """Return the JSON body of a question about a second of tone."""
    return {"question": QUESTION, "audio": {"data": base64.b64encode(tone()).decode()}, **fields}


def assert_error(reply: httpx.Response, status: int, code: str, param: str | None = None) -> dict[str, Any]:
    """Check the form of an error and return the object."""
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    fields = {"type", "code", "message", "param", "request_id", "retryable", "limit", "actual", "hint"}
    assert set(error) == fields
    assert (error["code"], error["param"]) == (code, param)
    assert error["request_id"] == reply.headers["x-request-id"]
    # No internals of the machine: paths, classes, addresses, decoders.
    assert not re.search(r"/tmp|/usr|0x[0-9a-f]{6}|Traceback|ffmpeg|libsnd|\.py", reply.text)
    return error


def wait_for(holds: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Wait until the condition holds."""
    deadline_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.01)


def slow_down(service: Live, token_interval_s: float) -> None:
    """Make the engine slow after its canary question."""
    assert isinstance(service.service.engine, ScriptedEngine)
    service.service.engine.token_interval_s = token_interval_s
