from __future__ import annotations

from pathlib import Path

import pytest

from hyper_model import engine_environment
from hyper_model.engine_environment import native_dtype

MILAN = "model name\t: AMD EPYC\nflags\t\t: fpu avx avx2 fma f16c\n"
GENOA = "model name\t: AMD EPYC\nflags\t\t: fpu avx2 avx512f avx512_bf16 fma\n"
GRAVITON = "Features\t: fp asimd sve bf16 i8mm\n"


@pytest.mark.parametrize(("cpuinfo", "wanted"), [(MILAN, "float32"), (GENOA, "bfloat16"), (GRAVITON, "bfloat16")])
def test_a_processor_without_bfloat16_computes_in_float32(
    monkeypatch: pytest.MonkeyPatch, cpuinfo: str, wanted: str
) -> None:
    monkeypatch.setattr(engine_environment, "_is_cpu_build", lambda: True)
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: cpuinfo)
    assert native_dtype() == wanted


def test_a_gpu_computes_in_bfloat16_whatever_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_environment, "_is_cpu_build", lambda: False)
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: MILAN)
    assert native_dtype() == "bfloat16"
