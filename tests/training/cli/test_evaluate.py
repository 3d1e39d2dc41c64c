"""`hyper eval` in use: on a service, and in its own process on the real engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tests.process import ROOT
from tests.serving import Live
from training.cli.evaluate import KEPT_FILE, evaluate

TRUTH = ROOT / "tests/assets/clips/truth.json"
OWN = ["--suite", "own", "--data", str(TRUTH)]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(evaluate, arguments)


def test_a_service_is_measured_and_compared_with_an_earlier_run(live: Live, tmp_path: Path) -> None:
    first = run(*OWN, "--url", live.url, "--out", str(tmp_path / "first"), "--json")
    assert first.exit_code == 0, first.output
    figures = json.loads(first.stdout.splitlines()[-1])
    assert figures["num_items"] == figures["num_choice_items"] == 10
    assert {"choice_accuracy", "wer", "cer", "ttft_p50_s", "environment_map"} <= set(figures) and "items" not in figures
    names = {path.name for path in (tmp_path / "first").iterdir()}
    assert names >= {"result.json", "report.md", KEPT_FILE}
    again = run(*OWN, "--url", live.url, "--against", str(tmp_path / "first"), "--items", "6")
    assert again.exit_code == 0, again.output
    assert "6 shared items; 0 left out" in again.output
    assert f"{figures['system']} minus {figures['system']} (2)" in again.output


def test_a_checkpoint_is_measured_by_the_engine_that_serves_it(tmp_path: Path) -> None:
    """Compute all measures on ten clips."""
    command = [sys.executable, "-m", "hyper_model.cli", "eval", *OWN, "--probe", "--json"]
    command += ["--out", str(tmp_path / "run")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=280)
    assert ran.returncode == 0, ran.stderr[-2000:]
    figures: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    assert figures["system"] == "hyper-mini" and len(figures["manifest_sha256"]) == 64
    assert figures["choice_accuracy"] >= 0.7 and figures["strict_format_rate"] == 1.0
    assert figures["e2e_p50_s"] > 0 and "ttft_p50_s" not in figures
    table = figures["probe"]
    assert table["num_completions"] == 10 and len(table["pauses"]) == 3
    assert table["pauses"][0]["trigger_rate"] == pytest.approx(figures["pauses_per_sample"], abs=1e-3)
    assert "## Latent probe" in (tmp_path / "run/report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--suite", "nonsense"], "is not one of 'held-out'"),
        (["--suite", "snr-N"], "is not one of 'held-out'"),
        (["--suite", "mmau"], "--data"),
        (["--data", str(TRUTH)], "--suite held-out has its own items; use --data with paqa, mmau, mmar, own"),
        ([*OWN, "--url", "http://127.0.0.1:9", "--pauses", "0"], "--pauses applies to a --checkpoint"),
        ([*OWN, "--url", "http://127.0.0.1:9", "--baseline", "cascade"], "exclude each other"),
        ([*OWN, "--url", "http://127.0.0.1:9", "--probe"], "--checkpoint"),
        ([*OWN, "--url", "http://127.0.0.1:9", "--extra-body", "["], "not valid JSON"),
        ([*OWN, "--url", "http://127.0.0.1:9", "--extra-body", "[]"], "must be a JSON object"),
        ([*OWN, "--url", "http://127.0.0.1:9", "--api-key-env", "NO_SUCH_KEY"], "NO_SUCH_KEY"),
        ([*OWN, "--url", "http://127.0.0.1:9", "--tries", "1"], "no server at this address"),
        (
            [*OWN, "--url", "http://127.0.0.1:9", "--against", str(ROOT / "Makefile")],
            "neither a checkpoint nor a result",
        ),
        ([*OWN, "--url", "http://127.0.0.1:9", "--against", str(TRUTH)], "not a result of this version"),
        ([*OWN, "--checkpoint", str(ROOT / "docs")], "hyper.json"),
    ],
)
def test_what_cannot_be_done_is_said_at_once(arguments: list[str], said: str) -> None:
    result = run(*arguments)
    assert result.exit_code != 0 and said in f"{result.output} {result.exception}"


def test_a_result_of_other_items_is_no_comparison(live: Live, tmp_path: Path) -> None:
    clip = TRUTH.parent / "one-voice.mp3"
    (tmp_path / "other.csv").write_text(f"audio,question,answer\n{clip},What is it?,a voice\n")
    other = ["--suite", "own", "--data", str(tmp_path / "other.csv"), "--url", live.url]
    assert run(*other, "--out", str(tmp_path / "out")).exit_code == 0
    result = run(*OWN, "--url", live.url, "--against", str(tmp_path / "out"))
    assert result.exit_code == 1 and "no item in common" in str(result.exception)
