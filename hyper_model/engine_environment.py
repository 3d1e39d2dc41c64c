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
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def _is_cpu_build() -> bool:
    try:
        metadata.version("vllm-cpu")
    except metadata.PackageNotFoundError:
        return False
    return True
