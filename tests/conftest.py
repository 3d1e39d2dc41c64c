"""Services that tests share: one scripted, and one over vLLM with a tiny random checkpoint, started when asked for."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before anything loads torch: tests share the machine, and tiny models gain nothing from threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from hyper_model.manifest import GATED_SECTIONS
from server.app import EMBEDDED_CHECKPOINT
from server.settings import Settings
from tests.serving import Live, running, scripted

PAUSING = {
    "max_pauses": 3,
    "latent_tokens": 8,
    "tau_pause": 1.0,
    "tau_abort": 0.0,
    "window_tokens": 6,
    "rest_tokens": 9,
    "sections": [section.value for section in GATED_SECTIONS],
}
"""A gate that always wants to pause: with its rests, three pauses in every trace of some length."""


class VllmHost:
    """Keeps at most one vLLM engine alive: started when first asked for, again when a test has ended it."""

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self.stack = contextlib.ExitStack()
        self.started: Live | None = None

    def live(self) -> Live:
        """Returns the service over vLLM, starting it (20 to 90 s) if need be."""
        if self.started is None:
            settings = Settings(
                engine="vllm", port=0, checkpoint=self.checkpoint, dtype="float32", default_max_tokens=64
            )
            with warnings.catch_warnings():
                # torch and vLLM deprecate parts of themselves as they are imported.
                warnings.simplefilter("ignore")
                self.started = self.stack.enter_context(running(settings))
        return self.started

    def close(self) -> None:
        """Ends the engine, for a test that needs one of its own."""
        self.started = None
        with warnings.catch_warnings():
            # vLLM leaves sockets to the garbage collector.
            warnings.simplefilter("ignore")
            self.stack.close()
            gc.collect()


@pytest.fixture(scope="session")
def live() -> Iterator[Live]:
    """The service over the scripted engine."""
    with running(scripted()) as service:
        yield service


@pytest.fixture(scope="session")
def slow() -> Iterator[Live]:
    """The same at the pace of a slow model: about ten seconds a trace."""
    with running(scripted(scripted_token_interval_s=0.04, ping_interval_s=0.5)) as service:
        yield service


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint with random weights."""
    from tests.builders import build_random_checkpoint

    directory = tmp_path_factory.mktemp("checkpoint") / "random-tiny"
    build_random_checkpoint(directory)
    return directory


@pytest.fixture(scope="session")
def vllm_host(random_checkpoint: Path) -> Iterator[VllmHost]:
    """Where tests get the one vLLM engine from."""
    host = VllmHost(random_checkpoint)
    yield host
    host.close()


@pytest.fixture(scope="session")
def pausing_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded checkpoint with a gate that pauses as soon as a window is full, and as often as it may."""
    from hyper_model.checkpoint import update_pause

    directory = tmp_path_factory.mktemp("checkpoint") / "hyper-mini"
    shutil.copytree(EMBEDDED_CHECKPOINT, directory)
    update_pause(directory, PAUSING | {"calibration": None})
    return directory


@pytest.fixture(scope="session")
def pausing_host(pausing_checkpoint: Path) -> Iterator[VllmHost]:
    """Where tests get the engine on that checkpoint from."""
    host = VllmHost(pausing_checkpoint)
    yield host
    host.close()


@pytest.fixture
def live_vllm(vllm_host: VllmHost) -> Live:
    """The service over vLLM."""
    return vllm_host.live()
