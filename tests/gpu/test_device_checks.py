"""The script of the GPU checks runs on a CPU with tiny shapes, and its stand-ins match vLLM."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from tests.gpu import vllm_interface
from tests.paths import ROOT


@pytest.mark.timeout(900)
def test_the_script_runs_every_part_without_vllm(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHON": sys.executable, "OUT": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    command = ["sh", str(ROOT / "tests/gpu/run.sh"), "--scale", "tiny", "--without-vllm"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    lines = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert [line["part"] for line in lines] == ["machine", "gate", "encoder", "training", "memory"]
    machine, gate, encoder, training, memory = lines
    assert (machine["device"], machine["vllm"]) == ("cpu", "absent")
    assert gate["wrong_rows"] == 0 and gate["pauses"] > 10 and gate["aborts"] > 0
    assert encoder["float32_max_abs_diff"] < 1e-4 and encoder["packed_rms_error"] > 0
    assert training["last_loss"] < training["first_loss"]
    # A CPU has no counter of allocations.
    assert memory["weights_gib"] is None and memory["planned_weights_gib"] > 0
    assert [json.loads(line) for line in run.stdout.splitlines()] == lines


def test_full_shapes_are_refused_without_a_card() -> None:
    environment = os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    command = ["sh", str(ROOT / "tests/gpu/run.sh"), "--without-vllm"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 2 and "no GPU is visible" in run.stderr


@pytest.mark.parametrize("name", [name for name, members in vllm_interface.MODULES.items() if members])
def test_a_stand_in_has_the_names_and_fields_of_vllm(name: str) -> None:
    with warnings.catch_warnings():
        # torch and vLLM raise deprecation warnings at import.
        warnings.simplefilter("ignore")
        real = importlib.import_module(name)
    for member, stand_in in vllm_interface.MODULES[name].items():
        found: Any = getattr(real, member)
        for each in dataclasses.fields(stand_in) if dataclasses.is_dataclass(stand_in) else ():
            assert each.name in found.__annotations__ or hasattr(found, each.name)
    if name == "vllm.v1.sample.logits_processor":
        assert {each.name for each in vllm_interface.MoveDirectionality} <= {
            each.name for each in real.MoveDirectionality
        }
