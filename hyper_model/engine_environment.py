"""Environment variables for vLLM, shared by the service, evaluation and rollouts.

vLLM reads them at import, so call this before importing vLLM or torch; the module imports neither. Values set by the
operator are kept.
"""

from __future__ import annotations

import os
import re
import shutil
import sysconfig
from importlib import metadata
from pathlib import Path
from typing import Literal


def prepare_environment(*, kv_cache_gib: int = 1, is_compiled: bool = False) -> None:
    """Set the defaults of every engine in this project.

    Args:
        kv_cache_gib: Memory of the key-value cache on a CPU, in GiB.
        is_compiled: Whether this process will start an engine with a compiled model on a CPU.
    """
    defaults = {
        "VLLM_CPU_KVCACHE_SPACE": str(kv_cache_gib),
        # vLLM's log lines go through the program's own logging.
        "VLLM_CONFIGURE_LOGGING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if is_cpu_build():
        # On a busy CPU, loading 7B and its first step take longer than vLLM's ten minutes.
        defaults["VLLM_ENGINE_READY_TIMEOUT_S"] = "3600"
        if not is_compiled:
            # Even with an eager model the CPU build compiles small pieces with g++. Without g++ the engine would die
            # at start, and these pieces alone gain nothing.
            defaults["TORCH_COMPILE_DISABLE"] = "1"
        if num_cores() <= 2:
            # On more cores vLLM binds its threads itself. Waiting threads would spin on the core needed to feed a
            # pause. This spin count covers the microseconds between two operators.
            defaults |= {"OMP_NUM_THREADS": str(num_cores()), "GOMP_SPINCOUNT": "10000"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def reason_not_to_compile() -> str | None:
    """Return the reason why torch cannot compile models for this CPU, or None; a GPU's build brings all it needs."""
    if not is_cpu_build():
        return None
    if os.environ.get("TORCH_COMPILE_DISABLE", "0") not in ("", "0"):
        return "TORCH_COMPILE_DISABLE is set"
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler ({compiler})"
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.is_file():
        return f"Python's headers are not installed ({header})"
    return _fault_of(_vllm_cache())


def _vllm_cache() -> Path:
    """Return the folder of vLLM's compiled code."""
    chosen = os.environ.get("VLLM_CACHE_ROOT")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(chosen).expanduser() if chosen else base / "vllm"


def _fault_of(folder: Path) -> str | None:
    """Return the reason why compiled code cannot be loaded from a folder, existing or not."""
    place = folder.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not os.access(place, os.W_OK):
        return f"the cache of compiled code cannot be written ({folder})"
    if os.statvfs(place).f_flag & os.ST_NOEXEC:
        return f"the cache of compiled code is on a file system mounted noexec ({folder})"
    return None


def num_cores() -> int:
    """Return the number of cores available to this process."""
    return len(os.sched_getaffinity(0))


def native_dtype() -> Literal["bfloat16", "float32"]:
    """Return the compute dtype: bfloat16, or float32 on CPUs without native bfloat16 products.

    On such CPUs bfloat16 takes up to ten times as long as float32.
    """
    if not is_cpu_build():
        return "bfloat16"
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return "float32"
    # x86 lists the instructions as avx512_bf16 and amx_bf16, Arm as bf16.
    has_bfloat16 = re.search(r"^(flags|Features)\s*:.*\b(avx512_bf16|amx_bf16|bf16)\b", text, re.MULTILINE)
    return "bfloat16" if has_bfloat16 else "float32"


def is_cpu_build() -> bool:
    """Return whether the installed vLLM is the build for CPUs."""
    try:
        metadata.version("vllm-cpu")
    except metadata.PackageNotFoundError:
        return False
    return True
