from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from hyper_model import engine_environment
from hyper_model.engine_environment import native_dtype, reason_not_to_compile

MILAN = "model name\t: AMD EPYC\nflags\t\t: fpu avx avx2 fma f16c\n"
GENOA = "model name\t: AMD EPYC\nflags\t\t: fpu avx2 avx512f avx512_bf16 fma\n"
GRAVITON = "Features\t: fp asimd sve bf16 i8mm\n"


@pytest.mark.parametrize(("cpuinfo", "wanted"), [(MILAN, "float32"), (GENOA, "bfloat16"), (GRAVITON, "bfloat16")])
def test_a_processor_without_bfloat16_computes_in_float32(
    monkeypatch: pytest.MonkeyPatch, cpuinfo: str, wanted: str
) -> None:
    monkeypatch.setattr(engine_environment, "is_cpu_build", lambda: True)
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: cpuinfo)
    assert native_dtype() == wanted


def test_a_gpu_computes_in_bfloat16_whatever_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_environment, "is_cpu_build", lambda: False)
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: MILAN)
    assert native_dtype() == "bfloat16"


def test_compilation_needs_a_compiler_and_headers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(engine_environment, "is_cpu_build", lambda: True)
    monkeypatch.delenv("TORCH_COMPILE_DISABLE", raising=False)
    monkeypatch.setenv("CXX", str(tmp_path / "g++"))
    assert "no C++ compiler" in str(reason_not_to_compile())
    (tmp_path / "g++").write_text("#!/bin/sh\n")
    (tmp_path / "g++").chmod(0o755)
    monkeypatch.setattr(engine_environment.sysconfig, "get_path", lambda name: str(tmp_path))
    assert "headers are not installed" in str(reason_not_to_compile())
    (tmp_path / "Python.h").write_text("")
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    assert reason_not_to_compile() is None
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    assert reason_not_to_compile() == "TORCH_COMPILE_DISABLE is set"


def test_a_gpu_needs_no_compiler_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_environment, "is_cpu_build", lambda: False)
    monkeypatch.setenv("CXX", "absent")
    assert reason_not_to_compile() is None


def test_compiled_code_needs_a_cache_that_may_hold_programs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(engine_environment, "is_cpu_build", lambda: True)
    monkeypatch.delenv("TORCH_COMPILE_DISABLE", raising=False)
    monkeypatch.setenv("CXX", "true")
    monkeypatch.setattr(engine_environment.sysconfig, "get_path", lambda name: str(tmp_path))
    (tmp_path / "Python.h").write_text("")
    # Root may write everywhere, and few machines have a file system without programs, so both answers are replaced.
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "absent"))
    with monkeypatch.context() as patch:
        patch.setattr(engine_environment.os, "access", lambda path, _: not str(path).startswith(str(tmp_path)))
        assert "cannot be written" in str(reason_not_to_compile())
    with monkeypatch.context() as patch:
        patch.setattr(engine_environment.os, "statvfs", lambda _: SimpleNamespace(f_flag=os.ST_NOEXEC))
        assert "noexec" in str(reason_not_to_compile())
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "new/vllm"))
    assert reason_not_to_compile() is None
