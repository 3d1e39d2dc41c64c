"""From a data set to an answer over HTTP, with the commands of a researcher and an operator, all of it small.

200 items of scenes, Stage I on them, Stage II with pausing rollouts by vLLM, export, serve, ask. After so few steps the
answers prove nothing about training. The test proves that each part accepts the output of the previous one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import httpx

from hyper_model.checkpoint import open_checkpoint
from tests.process import ROOT, serve_process
from tests.training_data import write_bank, write_sounds
from training.data.sources.downloads import SOUNDS_FOLDER
from training.trainer import read_log

MINI = ROOT / "checkpoints/hyper-mini"
# The 7B recipes with the changes for a small test: the same code and the same data set.
SMALL = {"batch_size": 4, "rows_at_once": 2, "autocast": "false", "fsdp": "", "warmup_steps": 1}


def hyper(*arguments: object) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hyper_model.cli", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def settings(**more: object) -> list[str]:
    return [part for name, value in (SMALL | more).items() for part in ("--set", f"{name}={value}")]


def test_a_data_set_becomes_a_served_checkpoint(tmp_path: Path) -> None:
    work, items = tmp_path / "work", tmp_path / "items"
    write_bank(work / "bank", lines_per_voice=6)
    write_sounds(work / "assets" / SOUNDS_FOLDER)
    hyper("data", "export", items, "--work", work, "--items", 200, "--workers", 2)
    (rows,) = items.glob("*.jsonl")
    assert len(rows.read_text(encoding="utf-8").splitlines()) == 200
    hyper("data", "check", rows)

    first = tmp_path / "first"
    hyper(
        *("train", "mini_finetune", tmp_path / "run1", "--base", MINI, "--data", rows, "--export", first),
        *("--set", "num_steps=3", "--set", "batch_size=4", "--set", "rows_at_once=2"),
    )
    assert [row["step"] for row in read_log(tmp_path / "run1")] == [1, 2, 3]

    second = tmp_path / "second"
    hyper(
        *("train", "qwen2_audio_7b_grpo", tmp_path / "run2", "--base", first, "--data", rows, "--export", second),
        *settings(num_steps=2, group_size=2, max_tokens=160, rows_at_once=8, max_redraws=0),
    )
    log = read_log(tmp_path / "run2")
    assert len(log) == 2 and all(row["gap"] < 0.05 for row in log)
    manifest = open_checkpoint(second).manifest
    assert json.loads(manifest.recipe or "")["trained_steps"] == 2
    assert manifest.name == "second" and manifest.base_model.startswith("first (")

    with serve_process({"HYPER_ENGINE": "vllm", "HYPER_CHECKPOINT": str(second)}, ready_timeout_s=200) as (_, url):
        clip = items / json.loads(rows.read_text(encoding="utf-8").splitlines()[0])["audios"][0]
        with clip.open("rb") as file:
            reply = httpx.post(
                f"{url}/v1/audio/qa",
                data={"question": "What is in the background?", "choices": ["music", "water", "quiet"]},
                files={"file": (clip.name, file)},
                timeout=120,
            )
        assert reply.status_code == 200, reply.text
        assert reply.json()["answer"]["text"] in ("music", "water", "quiet")
        assert reply.json()["usage"]["pause_tokens"] >= 0
