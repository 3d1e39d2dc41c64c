"""Choose the checkpoint of a service: the configured one, or the embedded one of this repository.

hyper-small is composed once from the repository's trained parts and pinned packages. Without these packages the service
uses hyper-mini, a whole checkpoint in the repository.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from hyper_model.checkpoint import Checkpoint, open_checkpoint
from hyper_model.compose import open_or_compose
from hyper_model.errors import CheckpointError
from server.engines.scripted import scripted_checkpoint
from server.settings import Settings

logger = logging.getLogger("hyper.server")

_FOLDER = Path(__file__).parent.parent / "checkpoints"
EMBEDDED_CHECKPOINT = _FOLDER / "hyper-mini"
"""A whole checkpoint; no package is needed."""
PREFERRED_PARTS: Path | None = None
"""Trained parts of the preferred checkpoint; None prefers `EMBEDDED_CHECKPOINT`."""


@dataclass(frozen=True)
class ChosenCheckpoint:
    """The checkpoint of a service.

    Attributes:
        fallback_reason: Reason for the use of hyper-mini instead of the preferred checkpoint; None without fallback.
    """

    checkpoint: Checkpoint
    fallback_reason: str | None = None


def choose_checkpoint(settings: Settings) -> ChosenCheckpoint:
    """Open the configured checkpoint, else the embedded one; the scripted engine can run without.

    Raises:
        CheckpointError: The checkpoint cannot be served, or none is configured and none is embedded.
    """
    if settings.checkpoint is not None:
        checkpoint = open_or_compose(settings.checkpoint, verify=settings.verify_checkpoint, report=logger.info)
        return ChosenCheckpoint(checkpoint)
    if settings.engine == "scripted":
        return ChosenCheckpoint(scripted_checkpoint())
    reason = None
    if PREFERRED_PARTS is not None and PREFERRED_PARTS.is_dir():
        try:
            return ChosenCheckpoint(open_or_compose(PREFERRED_PARTS, report=logger.info))
        except CheckpointError as error:
            logger.warning("using %s: %s cannot be composed: %s", EMBEDDED_CHECKPOINT.name, PREFERRED_PARTS.name, error)
            # The error names paths of this machine, and every user can read the reason.
            reason = f"{PREFERRED_PARTS.name} cannot be composed from its packages; the log has the error"
    if EMBEDDED_CHECKPOINT.is_dir():
        return ChosenCheckpoint(open_checkpoint(EMBEDDED_CHECKPOINT, verify=settings.verify_checkpoint), reason)
    # An installed package contains no checkpoints.
    raise CheckpointError(
        "HYPER_CHECKPOINT is not set, and there is no embedded checkpoint; set it to a checkpoint directory"
    )
