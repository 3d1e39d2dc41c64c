"""Sets what vLLM reads from the environment when it is imported: the same for the service, evaluation and rollouts.

Imports neither vLLM nor torch; call it before either is imported. What an operator has set stands.
"""

from __future__ import annotations

import os
from importlib import metadata


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


def _is_cpu_build() -> bool:
    try:
        metadata.version("vllm-cpu")
    except metadata.PackageNotFoundError:
        return False
    return True
