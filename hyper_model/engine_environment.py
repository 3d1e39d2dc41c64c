"""Sets what vLLM reads from the environment when it is imported: the same for the service, evaluation and rollouts.

Imports neither vLLM nor torch; call it before either is imported. What an operator has set stands.
"""

from __future__ import annotations

import os
import re
from importlib import metadata
from pathlib import Path
from typing import Literal


def prepare_environment(*, kv_cache_gib: int = 1) -> None:
    """Sets the defaults of every engine of this project.

    Args:
        kv_cache_gib: On a CPU, the memory of the key-value cache.
    """
    defaults = {
        "VLLM_CPU_KVCACHE_SPACE": str(kv_cache_gib),
        # Its log lines go through the program's own logging.
        "VLLM_CONFIGURE_LOGGING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if _is_cpu_build():
        # Even in eager mode the CPU build hands small pieces to the compiler, which needs g++ on the machine: without
        # one the engine dies at start, with one nothing gets faster.
        defaults["TORCH_COMPILE_DISABLE"] = "1"
        if num_cores() <= 2:
            # With more than two vLLM binds its threads itself. Waiting threads would spin on the core that the
            # service needs when a pause is to be fed; this covers the microseconds between two operators.
            defaults |= {"OMP_NUM_THREADS": str(num_cores()), "GOMP_SPINCOUNT": "10000"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def num_cores() -> int:
    """Counts the cores that this process may use."""
    return len(os.sched_getaffinity(0))


def native_dtype() -> Literal["bfloat16", "float32"]:
    """Returns what to compute in here: bfloat16, but float32 on a processor that cannot multiply the former itself.

    Such a processor takes up to ten times as long for bfloat16 as for float32.
    """
    if not _is_cpu_build():
        return "bfloat16"
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return "float32"
    # x86 names the instructions avx512_bf16 and amx_bf16, Arm bf16.
    found = re.search(r"^(flags|Features)\s*:.*\b(avx512_bf16|amx_bf16|bf16)\b", text, re.MULTILINE)
    return "bfloat16" if found else "float32"


def _is_cpu_build() -> bool:
    try:
        metadata.version("vllm-cpu")
    except metadata.PackageNotFoundError:
        return False
    return True
