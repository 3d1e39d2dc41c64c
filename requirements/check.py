"""Imports what an environment is for, and says in one line what is wrong where an import fails.

Run by install.sh after it changed something; knows only the standard library until it imports what it checks.
"""

import ctypes
import importlib
import importlib.util
import os
import sys

IMPORTS = {
    "cpu": ["torch", "vllm", "transformers", "fastapi", "soundfile", "soxr", "av"],
    "gpu": ["torch", "vllm", "transformers", "fastapi", "soundfile", "soxr", "av"],
    "train": ["torch", "tqdm", "transformers", "accelerate", "peft", "tensorboard"],
    "data": ["hibari", "onnxruntime"],
    "baseline": ["ctranslate2", "faster_whisper"],
    "small": ["gguf"],
    "dev": ["pytest", "hypothesis", "schemathesis"],
    # Not locust itself: it replaces sockets everywhere as it is imported, and warns of those that are there already.
    "load": ["aiohttp", "gevent", "simpy"],
    "fleet": ["ray.serve"],
    "sbom": ["cyclonedx_py"],
}
BROKEN_BESIDE_CPU_TORCH = ["torchvision", "torchaudio", "torchcodec"]
# vLLM logs a library that its CPU kernels miss and fails much later, at the first step.
SYSTEM_LIBRARIES = {"cpu": {"libnuma.so.1": "Debian and Ubuntu have it in the package libnuma1"}}


def main(names: list[str]) -> int:
    """Returns 0 when every import of the named sets works, else 1 with the reason on stderr."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    present = [name for name in BROKEN_BESIDE_CPU_TORCH if importlib.util.find_spec(name)]
    if present:
        return fail(f"{', '.join(present)} installed by hand breaks transformers here: uninstall it")
    for library, hint in (item for name in names for item in SYSTEM_LIBRARIES.get(name, {}).items()):
        try:
            ctypes.CDLL(library)
        except OSError as error:
            return fail(f"{error} ({hint})")
    for module in (module for name in names for module in IMPORTS[name]):
        try:
            importlib.import_module(module)
        except ImportError as error:
            return fail(f"import {module}: {error}")
    if "cpu" in names or "gpu" in names:
        try:
            from transformers import Qwen2AudioForConditionalGeneration
        except ImportError as error:
            return fail(f"import of Qwen2-Audio: {error}")
        print(
            f"Ready: Python {sys.version.split()[0]}, {Qwen2AudioForConditionalGeneration.__name__} imports.",
            file=sys.stderr,
        )
    return 0


def fail(reason: str) -> int:
    """Prints the reason; returns the exit status."""
    print(f"The environment does not work: {reason}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
