"""A real Redis server for tests: Debian's `redis-server`, on a free port, without a file on disk."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator

import pytest

PROGRAM = shutil.which("valkey-server") or shutil.which("redis-server")

needs_redis = pytest.mark.skipif(PROGRAM is None, reason="Debian's redis-server is not installed")


class RedisServer:
    """One server that tests start, kill and start again on the same port."""

    def __init__(self) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self.port: int = listener.getsockname()[1]
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Return the server's address."""
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self, *options: str) -> None:
        """Start an empty server and wait until it accepts connections."""
        assert PROGRAM is not None
        command = [
            PROGRAM,
            "--bind",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--save",
            "",
            "--appendonly",
            "no",
            *options,
        ]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline_s = time.monotonic() + 30
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return
            assert time.monotonic() < deadline_s and self.process.poll() is None, "the server does not start"
            time.sleep(0.02)

    def kill(self) -> None:
        """End the server at once; its data are lost."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)
            self.process = None


@contextlib.contextmanager
def redis_server(*options: str) -> Iterator[RedisServer]:
    """Run a server until the block ends."""
    server = RedisServer()
    server.start(*options)
    try:
        yield server
    finally:
        server.kill()
