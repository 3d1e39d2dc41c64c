"""The Locust file in normal use, but without its web page."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.paths import ROOT
from tests.serving import Live


def test_users_ask_stream_and_leave(live: Live) -> None:
    # Not imported here: locust patches the standard library for greenlets, also in this process.
    pytest.importorskip("configargparse", reason="requirements/install.sh .venv cpu load")
    command = [sys.executable, "-m", "locust", "-f", "loadtests/locustfile.py", "--host", live.url, "--headless"]
    command += ["--users", "4", "--spawn-rate", "4", "--only-summary", "--json", "--stop-timeout", "30"]
    command += ["--questions", "24", "--max-tokens", "8", "--share-leave", "0.2", "--questions-per-s", "4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = {each["name"]: each for each in json.loads(done.stdout)}
    num_whole, num_streams = (lines[f"/v1/audio/qa {kind}"]["num_requests"] for kind in ("whole", "stream"))
    assert num_whole > 0 and num_streams > 0 and num_whole + num_streams <= 24
    assert lines["first token"]["num_requests"] > 0
    assert not any(each["num_failures"] for each in lines.values()), lines
    live.wait_until_idle()
