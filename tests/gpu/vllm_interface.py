"""Stand-ins for the vLLM classes that the pause adapters import, for machines without vLLM.

Only names and fields: the checks call the V2 gate as vLLM's runner does. `test_device_checks` compares the fields with
vLLM's own.
"""

from __future__ import annotations

import enum
import sys
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any


@dataclass
class SamplingParams:
    """The request's fields read by the gate."""

    max_tokens: int = 16
    n: int = 1
    extra_args: dict[str, Any] | None = field(default=None)


@dataclass
class LogitsContext:
    """Layout of a step: the slot of each row of logits."""

    expanded_idx_mapping: Any
    idx_mapping: Any
    idx_mapping_np: Any
    expanded_local_pos: Any
    input_ids: Any
    pos: Any
    seq_lens_upper_bound_np: Any


class LogitsProcessor:
    """Base class of a processor."""


class LogitsProcRequestState:
    """Type of the runner's buffers."""


class BatchUpdate:
    """Type of the V1 runner's changes."""


class MoveDirectionality(enum.Enum):
    """Directions of the V1 runner's moves."""

    UNIDIRECTIONAL = 0
    SWAP = 1


MODULES = {
    "vllm": {"SamplingParams": SamplingParams},
    "vllm.v1": {},
    "vllm.v1.sample": {},
    "vllm.v1.sample.logits_processor": {
        "BatchUpdate": BatchUpdate,
        "LogitsProcessor": LogitsProcessor,
        "MoveDirectionality": MoveDirectionality,
    },
    "vllm.v1.worker": {},
    "vllm.v1.worker.gpu": {},
    "vllm.v1.worker.gpu.sample": {},
    "vllm.v1.worker.gpu.sample.logits_processor": {
        "LogitsContext": LogitsContext,
        "LogitsProcRequestState": LogitsProcRequestState,
        "LogitsProcessor": LogitsProcessor,
    },
}


def install() -> None:
    """Put the stand-ins in the place of vLLM's modules."""
    for name, members in MODULES.items():
        module = ModuleType(name)
        vars(module).update(members)
        sys.modules[name] = module
