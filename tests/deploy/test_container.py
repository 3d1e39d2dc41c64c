"""The service as in a container: a read-only root, no capabilities, no namespaces, tini as process 1.

bubblewrap replaces the container runtime. The tests are skipped without tini, or if bubblewrap is missing or may not
create namespaces.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.process import ROOT, exit_code, post, serve_process, start
from tests.serving import tone, wait_for

UID = "10001"
SHM_BYTES = 64 * 1024 * 1024  # Docker's default for a container.
MAKE_NAMESPACES = ["bwrap", "--unshare-user", "--disable-userns", "--ro-bind", "/", "/", "--proc", "/proc"]

pytestmark = pytest.mark.skipif(
    not (shutil.which("bwrap") and shutil.which("tini"))
    or subprocess.run([*MAKE_NAMESPACES, "true"], capture_output=True).returncode != 0,
    reason="needs tini, and bubblewrap that may make namespaces",
)


@dataclass
class Container:
    """Start options of a container, and its two writable folders.

    Attributes:
        options: Command to start a process in it.
        about: File with bubblewrap's report on the started process.
    """

    environment: dict[str, str]
    options: dict[str, Any]
    tmp: Path
    cache: Path
    about: int

    @contextlib.contextmanager
    def running(self, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str, int]]:
        """Start the service; yield bubblewrap's process, the address, and tini's process id outside."""
        with serve_process({**self.environment, **environment}, 60, **self.options) as (process, url):
            yield process, url, json.loads(os.read(self.about, 4096))["child-pid"]


@pytest.fixture
def container(tmp_path: Path) -> Iterator[Container]:
    """The settings of deploy/compose.yaml and the Dockerfile as options of bubblewrap."""
    tmp, cache = tmp_path / "tmp", tmp_path / "cache"
    tmp.mkdir()
    cache.mkdir()
    about, theirs = os.pipe()
    # These tests and their environment may be in /tmp, replaced by another one inside.
    trees = [str(place) for place in (ROOT, Path(sys.prefix).resolve()) if place.is_relative_to("/tmp")]
    prefix = [
        *("bwrap", "--unshare-user", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--disable-userns"),
        *("--as-pid-1", "--die-with-parent", "--uid", UID, "--gid", UID, "--cap-drop", "ALL", "--info-fd", str(theirs)),
        *("--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "--size", str(SHM_BYTES), "--tmpfs", "/dev/shm"),
        *("--bind", str(tmp), "/tmp", "--bind", str(cache), "/mnt"),
        *(part for tree in trees for part in ("--ro-bind", tree, tree)),
        *("--", "tini", "--"),
    ]
    environment = {"HYPER_ENGINE": "scripted", "HYPER_DECODE_SANDBOX": "require", "PYTHONDONTWRITEBYTECODE": "1"}
    environment |= {"HOME": "/mnt", "XDG_CACHE_HOME": "/mnt", "TMPDIR": "/tmp", "HYPER_STATE_DIR": "/mnt/state"}
    yield Container(environment, {"prefix": prefix, "pass_fds": (theirs,)}, tmp, cache, about)
    for descriptor in (about, theirs):
        with contextlib.suppress(OSError):
            os.close(descriptor)


def service_pid(first_pid: int) -> int:
    """Return the process id of tini's child."""
    (child,) = psutil.Process(first_pid).children()
    return child.pid


def status_of(pid: int) -> dict[str, str]:
    """Read the kernel's status of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def test_it_answers_drains_and_ends_with_0(container: Container) -> None:
    with container.running(HYPER_SCRIPTED_TOKEN_INTERVAL_S="0.02") as (process, url, first_pid):
        status = status_of(service_pid(first_pid))
        assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == int(status["CapBnd"], 16) == 0
        assert status["NoNewPrivs"] == "1"
        assert set(httpx.get(f"{url}/v1/info").json()["decoding"]["sandbox"]) & {"landlock", "seccomp"}
        # More than 1 MiB, so it is stored in /tmp while it is read.
        clip = {"file": ("clip", tone(40.0))}
        refused = httpx.post(f"{url}/v1/audio/qa", data={"question": "What?"}, files=clip, timeout=60)
        assert (refused.status_code, refused.json()["error"]["code"]) == (422, "audio_too_long")
        found: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: found.append(post(url)))
        thread.start()
        wait_for(lambda: "hyper_in_flight 1.0" in httpx.get(f"{url}/metrics").text)
        os.kill(first_pid, signal.SIGTERM)
        wait_for(lambda: httpx.get(f"{url}/readyz").json()["reasons"] == ["shutting_down"])
        thread.join()
        assert found[0].status_code == 200, "what is in flight is answered"
        assert exit_code(process, 20) == 0
    left = {path for place in (container.tmp, container.cache) for path in place.rglob("*") if path.is_file()}
    state = container.cache / "state"
    kept = {state / "files.sqlite3", state / "jobs/jobs.sqlite", state / "jobs/jobs-0.lock"}
    assert left == kept, "nothing else is left behind"


def test_a_service_that_is_killed_is_no_success(container: Container) -> None:
    with container.running() as (process, _, first_pid):
        os.kill(service_pid(first_pid), signal.SIGKILL)
        assert exit_code(process, 20) == 128 + signal.SIGKILL


def test_the_services_own_exit_code_comes_out(container: Container, tmp_path: Path) -> None:
    environment = {**container.environment, "HYPER_CHECKPOINT": str(tmp_path / "nothing")}
    process = start(environment, **container.options, stderr=subprocess.DEVNULL)
    try:
        assert exit_code(process, 60) == 78
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def test_outside_of_its_two_places_it_can_write_nothing(container: Container) -> None:
    """Negative control for the tests above: the restrictions exist."""
    places = ("/", "/etc", "/var/tmp", "/root", str(ROOT), sys.prefix)
    tries = "; ".join(f"touch {place}/.written && echo {place}" for place in places)
    tries += "; touch /tmp/a /mnt/b && echo fine; unshare -U true && echo namespaces"
    command = [*container.options["prefix"], "sh", "-c", tries]
    out = subprocess.run(command, pass_fds=container.options["pass_fds"], capture_output=True, text=True)
    assert out.stdout.split() == ["fine"], out
