"""Choose the checkpoint of a service: the configured one, or the embedded one of this repository."""

from __future__ import annotations

import logging
from pathlib import Path

from hyper_model.checkpoint import Checkpoint, open_checkpoint
from hyper_model.compose import open_or_compose
from hyper_model.errors import CheckpointError
from server.engines.scripted import scripted_checkpoint
from server.settings import Settings

logger = logging.getLogger("hyper.server")

EMBEDDED_CHECKPOINT = Path(__file__).parent.parent / "checkpoints/hyper-mini"


def choose_checkpoint(settings: Settings) -> Checkpoint:
    """Open the configured checkpoint, else the embedded one; the scripted engine can run without.

    A configured directory of trained parts is composed into the cache first.

    Raises:
        CheckpointError: The checkpoint cannot be served, or none is configured and none is embedded.
    """
    if settings.checkpoint is not None:
        return open_or_compose(settings.checkpoint, verify=settings.verify_checkpoint, report=logger.info)
    if settings.engine == "scripted":
        return scripted_checkpoint()
    if EMBEDDED_CHECKPOINT.is_dir():
        return open_checkpoint(EMBEDDED_CHECKPOINT, verify=settings.verify_checkpoint)
    # An installed package contains no checkpoints.
    raise CheckpointError(
        "HYPER_CHECKPOINT is not set, and there is no embedded checkpoint; set it to a checkpoint directory"
    )
