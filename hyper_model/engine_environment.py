"""Environment variables for vLLM, shared by the service, evaluation and rollouts.

vLLM reads them at import, so call this before importing vLLM or torch; the module imports neither. Values set by the
operator are kept.
"""

from __future__ import annotations

import os
import re
from importlib import metadata
from pathlib import Path
from typing import Literal


def prepare_environment(*, kv_cache_gib: int = 1) -> None:
    """Set the defaults of every engine in this project.

    Args:
        kv_cache_gib: Memory of the key-value cache on a CPU, in GiB.
    """
    defaults = {
        "VLLM_CPU_KVCACHE_SPACE": str(kv_cache_gib),
        # vLLM's log lines go through the program's own logging.
        "VLLM_CONFIGURE_LOGGING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if _is_cpu_build():
        # Even in eager mode the CPU build compiles small pieces with g++. Without g++ the engine dies at start, and
        # with it nothing gets faster.
        defaults["TORCH_COMPILE_DISABLE"] = "1"
        if num_cores() <= 2:
            # On more cores vLLM binds its threads itself. Waiting threads would spin on the core needed to feed a
            # pause. This spin count covers the microseconds between two operators.
            defaults |= {"OMP_NUM_THREADS": str(num_cores()), "GOMP_SPINCOUNT": "10000"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def num_cores() -> int:
    """Return the number of cores available to this process."""
    return len(os.sched_getaffinity(0))


def native_dtype() -> Literal["bfloat16", "float32"]:
    """Return the compute dtype: bfloat16, or float32 on CPUs without native bfloat16 products.

    On such CPUs bfloat16 takes up to ten times as long as float32.
    """
    if not _is_cpu_build():
        return "bfloat16"
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return "float32"
    # x86 lists the instructions as avx512_bf16 and amx_bf16, Arm as bf16.
    has_bfloat16 = re.search(r"^(flags|Features)\s*:.*\b(avx512_bf16|amx_bf16|bf16)\b", text, re.MULTILINE)
    return "bfloat16" if has_bfloat16 else "float32"


def _is_cpu_build() -> bool:
    try:
        metadata.version("vllm-cpu")
    except metadata.PackageNotFoundError:
        return False
    return True
