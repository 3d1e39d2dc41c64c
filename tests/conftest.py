"""Shared services for tests: one scripted, and one over vLLM with a tiny random checkpoint, started on demand."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# Set before torch is loaded: tests share the machine, and tiny models gain nothing from threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tests start many engines, and compiling one takes longer than all of its requests.
os.environ.setdefault("HYPER_COMPILE", "off")
os.environ.setdefault("HYPER_QUANTIZE", "off")

from hyper_model.manifest import GATED_SECTIONS
from server.embedded import EMBEDDED_CHECKPOINT
from server.settings import Settings
from tests.serving import Live, running, scripted

# Examples have no deadline: on busy cores, time says nothing about the code.
hypothesis.settings.register_profile("hyper", deadline=None)
hypothesis.settings.load_profile("hyper")

PAUSING = {
    "max_pauses": 3,
    "latent_tokens": 8,
    "tau_pause": 1.0,
    "tau_abort": 0.0,
    "window_tokens": 6,
    "rest_tokens": 9,
    "sections": [section.value for section in GATED_SECTIONS],
}
"""A gate with a pause at every opportunity: with its rests, three pauses in every long trace."""


class VllmHost:
    """Owner of at most one vLLM engine, started on first use and again after a test has ended it."""

    def __init__(self, checkpoint: Path, **fields: Any) -> None:
        self.checkpoint = checkpoint
        self.fields = fields
        self.stack = contextlib.ExitStack()
        self.started: Live | None = None

    def live(self) -> Live:
        """Return the service over vLLM, started (20 to 90 s) if needed."""
        if self.started is None:
            settings = Settings(
                engine="vllm",
                port=0,
                checkpoint=self.checkpoint,
                dtype="float32",
                default_max_tokens=64,
                **self.fields,
            )
            with warnings.catch_warnings():
                # torch and vLLM raise deprecation warnings at import.
                warnings.simplefilter("ignore")
                self.started = self.stack.enter_context(running(settings))
        return self.started

    def close(self) -> None:
        """End the engine, for a test with its own engine."""
        self.started = None
        with warnings.catch_warnings():
            # vLLM leaves sockets to the garbage collector.
            warnings.simplefilter("ignore")
            self.stack.close()
            gc.collect()


@pytest.fixture(scope="session", autouse=True)
def state_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Store the services' state outside the user's home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="session")
def live() -> Iterator[Live]:
    """Service over the scripted engine."""
    with running(scripted()) as service:
        yield service


@pytest.fixture(scope="session")
def slow() -> Iterator[Live]:
    """Service at the pace of a slow model: about ten seconds per trace."""
    with running(scripted(scripted_token_interval_s=0.04, ping_interval_s=0.5)) as service:
        yield service


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny checkpoint with random weights."""
    from tests.builders import build_random_checkpoint

    directory = tmp_path_factory.mktemp("checkpoint") / "random-tiny"
    build_random_checkpoint(directory)
    return directory


@pytest.fixture(scope="session")
def vllm_host(random_checkpoint: Path) -> Iterator[VllmHost]:
    """Host of the shared vLLM engine."""
    host = VllmHost(random_checkpoint)
    yield host
    host.close()


@pytest.fixture(scope="session")
def pausing_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Embedded checkpoint with a gate that pauses at every full window, up to its budget.

    It receives each clip in one pass. Only the service recognises words in pieces; tests compare it with loops.
    """
    from hyper_model.checkpoint import update_manifest, update_pause

    directory = tmp_path_factory.mktemp("checkpoint") / "hyper-mini"
    shutil.copytree(EMBEDDED_CHECKPOINT, directory)
    opened = update_pause(directory, PAUSING | {"calibration": None})
    update_manifest(directory, {"audio": opened.manifest.audio.model_dump(mode="json") | {"single_pass_s": None}})
    return directory


@pytest.fixture(scope="session")
def pausing_host(pausing_checkpoint: Path) -> Iterator[VllmHost]:
    """Host of the engine on the pausing checkpoint."""
    host = VllmHost(pausing_checkpoint)
    yield host
    host.close()


@pytest.fixture
def live_vllm(vllm_host: VllmHost) -> Live:
    """Service over vLLM."""
    return vllm_host.live()
