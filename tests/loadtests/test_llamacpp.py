"""llama.cpp as a peer: its tools are found or left out, and its figures are read from its own output."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loadtests.llamacpp import BENCH, QUANTIZE, LlamaCpp, find_tools, read_times

# A line of llama-batched-bench with --output-format jsonl, after its log.
OUTPUT = """main: n_kv_max = 334
{"n_kv_max": 334, "n_batch": 2048, "n_ubatch": 512, "flash_attn": 0, "is_pp_shared": 0, "is_tg_separate": 0, \
"n_gpu_layers": -1, "n_threads": 1, "n_threads_batch": 1, "pp": 250, "tg": 20, "pl": 1, "n_kv": 270, \
"t_pp": 0.943396, "speed_pp": 265.0, "t_tg": 0.443459, "speed_tg": 45.1, "t": 1.386855, "speed": 194.7}
"""


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Programs in a folder that `$LLAMA_CPP_BIN` names; both write their arguments to a file."""
    monkeypatch.setenv("PATH", "/absent")
    monkeypatch.setenv("LLAMA_CPP_BIN", str(tmp_path))
    for name, output in ((BENCH, OUTPUT), (QUANTIZE, "")):
        (tmp_path / "output").write_text(OUTPUT)
        last = f"/bin/cat {tmp_path}/output" if output else "echo made >$3"
        (tmp_path / name).write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/{name}.log\n{last}\n')
        (tmp_path / name).chmod(0o755)
    found = find_tools()
    assert found is not None
    return found


def test_missing_tools_are_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("LLAMA_CPP_BIN", raising=False)
    monkeypatch.setattr("loadtests.llamacpp.util.find_spec", lambda name: None)
    assert find_tools() is None


def test_a_measurement_reads_the_tools_times(tools: dict[str, Path], tmp_path: Path) -> None:
    source = tmp_path / "small.gguf"
    for _ in range(2):
        peer = LlamaCpp(tools, source, tmp_path, 2)
    assert (tmp_path / f"{QUANTIZE}.log").read_text().split() == [
        "--allow-requantize",
        str(source),
        str(tmp_path / "small-q8_0.gguf"),
        "Q8_0",
        "1",
    ], "converted once"
    prefill_s, step_s = peer.decode(4, 250, 20)
    assert prefill_s == pytest.approx(250 / 265, rel=1e-3) and step_s == pytest.approx(1 / 45.1, rel=1e-3)
    words = (tmp_path / f"{BENCH}.log").read_text().split()
    options = dict(zip(words[::2], words[1::2], strict=True))
    assert options["-npp"] == "250" and options["-ntg"] == "20" and options["-npl"] == "4"
    assert options["-t"] == options["-tb"] == "2" and options["-fa"] == "off"
    assert int(options["-c"]) >= 4 * 270, "the context holds the batch"


def test_output_without_figures_is_refused() -> None:
    with pytest.raises(ValueError, match="no line of JSON"):
        read_times("error: unable to load model")
    with pytest.raises(json.JSONDecodeError):
        read_times("{broken")
