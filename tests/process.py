"""`hyper serve` as a process of its own, for tests of signals and exit codes."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import httpx

from tests.paths import ROOT
from tests.serving import tone

# The root command finds its sub-commands by entry points, present only in an installed project.
SCRIPT = """
from hyper.commands import ask
from hyper_model.cli import hyper, main
from server.commands import keys, serve
hyper.add_command(serve)
hyper.add_command(ask)
hyper.add_command(keys)
main()
"""


@contextlib.contextmanager
def serve_process(
    environment: Mapping[str, str], ready_timeout_s: float = 30, **options: Any
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Start a server on a free port; yield its process and address once it is ready."""
    process = start(environment, **options)
    killer = threading.Timer(ready_timeout_s, process.kill)
    killer.start()
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("ready: "), f"not ready: {line!r}, exit {process.poll()}"
        killer.cancel()
        assert "curl -F file=@" in line
        yield process, line.split()[1]
    finally:
        killer.cancel()
        process.kill()
        process.wait(30)
        if process.stdout is not None:
            process.stdout.close()


def start(
    environment: Mapping[str, str], prefix: Sequence[str] = (), arguments: Sequence[str] = (), **options: Any
) -> subprocess.Popen[str]:
    """Start `hyper serve` on a free port like the installed script; a prefix is an outer program's command."""
    command = [*prefix, sys.executable, "-c", SCRIPT, "serve", *arguments]
    full = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "client"))),
        "OMP_NUM_THREADS": "1",
        "HYPER_PORT": "0",
        **environment,
    }
    return subprocess.Popen(command, env=full, cwd=ROOT, stdout=subprocess.PIPE, text=True, **options)


def exit_code(process: subprocess.Popen[str], timeout_s: float) -> int:
    """Wait for the end of a process and return its exit code."""
    return process.wait(timeout_s)


def post(url: str, **fields: Any) -> httpx.Response:
    """Send a question about a second of tone."""
    fields = {"question": "What is heard?", **fields}
    return httpx.post(f"{url}/v1/audio/qa", data=fields, files={"file": ("clip", tone())}, timeout=60)
