"""The tests of the official `openai` client with its previous major version, in a process of its own."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import ROOT

LOCK = ROOT / "requirements/openai2.txt"
CLIENT_TESTS = (
    "tests/server/api/test_openai.py",
    "tests/server/api/test_answer_schema.py",
    "tests/server/api/test_files.py",
    "tests/server/jobs/test_batches_of_keys.py",
)

OWN_WARNING = "ignore:The 'warn' method is deprecated:DeprecationWarning"
"""The client of that version calls `logging.Logger.warn`."""


@pytest.fixture(scope="module")
def previous(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the locked client into a folder; most of its dependencies are those of the current one."""
    folder = tmp_path_factory.mktemp("openai2")
    command = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "--retries",
        "1",
        "--timeout",
        "20",
        "install",
    ]
    command += ["--quiet", "--no-deps", "--only-binary", ":all:", "--require-hashes", "--target", str(folder)]
    done = subprocess.run([*command, "-r", str(LOCK)], capture_output=True, text=True, timeout=200)
    if done.returncode:
        assert "HASHES" not in done.stderr, done.stderr
        pytest.skip("the package index has no openai 2, or cannot be reached: " + done.stderr.strip().splitlines()[-1])
    return folder


def test_the_lock_is_of_the_major_before() -> None:
    (locked,) = re.findall(r"^openai==(\d+)\.", LOCK.read_text(encoding="utf-8"), re.M)
    current = importlib.metadata.version("openai").partition(".")[0]
    assert int(locked) == int(current) - 1


@pytest.mark.parametrize("path", CLIENT_TESTS)
def test_the_previous_major_of_the_client_passes_the_tests(previous: Path, path: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(previous)}
    ask = [sys.executable, "-c", "import openai; print(openai.__version__, openai.__file__)"]
    version, module = subprocess.run(ask, env=environment, capture_output=True, text=True, check=True).stdout.split()
    assert f"openai=={version} " in LOCK.read_text(encoding="utf-8") and Path(module).is_relative_to(previous)
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-W", OWN_WARNING, path]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-5000:]
    assert re.search(r"^\d+ passed", done.stdout, re.M), done.stdout[-500:]
