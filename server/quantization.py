"""Choice of float or int8 weights for a service on a CPU.

`HYPER_QUANTIZE=auto` serves a checkpoint in int8 if its accuracy was compared and int8 is faster on this processor. The
speed is measured once and kept in the cache folder, like the int8 weights themselves. Other checkpoints stay as they
are, because only their owner can compare accuracies. The module is independent of HTTP and engines.
"""

from __future__ import annotations

import logging

from hyper_model.checkpoint import Checkpoint
from hyper_model.compose import cache_folder
from hyper_model.engine_environment import is_cpu_build
from hyper_model.errors import CheckpointError
from hyper_model.int8_gain import Gain, gain_of, has_int8_products
from hyper_model.quantize import quantize_once
from server.settings import Settings

logger = logging.getLogger("hyper.server")

COMPARED: frozenset[str] = frozenset()
"""Names of checkpoints with an accuracy measured in int8 beside float (docs/LOG.md).

It is empty: hyper-mini gains no speed, and hyper-small is unfinished.
"""
MIN_SPEEDUP = 1.1
"""Smallest estimated speed-up of a step that outweighs another wording of some answers."""


def choose_weights(settings: Settings, checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint to serve: the given one, or its int8 form in the cache folder.

    Raises:
        CheckpointError: If the settings require int8 weights and they cannot be written.
    """
    if settings.quantize == "off" or settings.engine != "vllm" or checkpoint.manifest.quantization is not None:
        return checkpoint
    if settings.quantize == "auto":
        reason = reason_to_stay(checkpoint)
        if reason is not None:
            logger.info("the weights stay float: %s", reason)
            return checkpoint
    try:
        chosen = quantize_once(checkpoint, cache_folder(), verify=settings.verify_checkpoint)
    except CheckpointError as error:
        if settings.quantize == "on":
            raise
        logger.warning("the weights stay float: %s", error)
        return checkpoint
    logger.info("serving int8 weights", extra={"checkpoint": str(chosen.path)})
    return chosen


def reason_to_stay(checkpoint: Checkpoint) -> str | None:
    """Return the reason to keep float weights, or None if int8 is faster here."""
    if not is_cpu_build():
        return "int8 is for CPUs"
    if checkpoint.manifest.name not in COMPARED:
        return f"the int8 accuracy of {checkpoint.manifest.name} was not measured (HYPER_QUANTIZE=on decides)"
    if not has_int8_products():
        return "this processor has no int8 products"
    gain = gain_of(checkpoint.path, cache_folder())
    if gain is None:
        return "the speed of int8 could not be measured"
    if gain.speedup < MIN_SPEEDUP:
        return f"int8 is no faster here ({describe(gain)})"
    logger.info("int8 is faster here (%s)", describe(gain))
    return None


def describe(gain: Gain) -> str:
    """Return the figures of a measurement for the log."""
    return f"products {gain.int8_ms:.2f} ms instead of {gain.float_ms:.2f} ms, a step {gain.speedup:.2f} times as fast"
