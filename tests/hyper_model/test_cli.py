from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hyper_model.cli import main
from tests.builders import build_random_checkpoint, write_entry_points
from tests.paths import ROOT

FAULTS = """
import click
from hyper_model.errors import CheckpointError, InvalidAudioError, PromptError

@click.command()
@click.argument("kind")
def fail(kind):
    \"\"\"Fail as asked.\"\"\"
    raise {"audio": InvalidAudioError("the clip is empty"), "prompt": PromptError("no question"),
           "checkpoint": CheckpointError("no manifest")}[kind]
"""


@pytest.fixture
def commands(tmp_path: Path) -> Path:
    """Three sub-commands: a real one, one that fails on request, and one of a missing package."""
    (tmp_path / "faults_for_tests.py").write_text(FAULTS)
    targets = {
        "checkpoint": "hyper_model.commands:checkpoint",
        "fail": "faults_for_tests:fail",
        "absent": "no_such_package.commands:run",
    }
    write_entry_points(tmp_path, targets)
    return tmp_path


def run_hyper(commands: Path, *arguments: str, code: str = "pass") -> subprocess.CompletedProcess[str]:
    imports = "import sys\nfrom hyper_model.cli import main\n"
    program = f"{imports}try:\n    main({list(arguments)!r})\nfinally:\n    {code}"
    return subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{commands}"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_help_lists_what_is_installed_and_what_is_not_without_loading_an_engine(commands: Path) -> None:
    heavy = "print([m for m in ('torch', 'transformers', 'vllm', 'fastapi', 'tokenizers') if m in sys.modules])"
    ran = run_hyper(commands, "--help", code=heavy)
    assert ran.returncode == 0, ran.stderr
    assert "Verify, adopt, compose, quantize and calibrate checkpoints." in ran.stdout
    assert "Fail as asked." in ran.stdout
    assert "(not available: no_such_package is not installed)" in ran.stdout
    assert ran.stdout.splitlines()[-1] == "[]"


def test_running_a_command_loads_no_other(commands: Path) -> None:
    ran = run_hyper(commands, "checkpoint", "--help", code="print('faults_for_tests' in sys.modules)")
    assert ran.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize(
    ("kind", "code", "line"),
    [
        ("audio", 65, "hyper: the clip is empty"),
        ("prompt", 2, "hyper: no question"),
        ("checkpoint", 78, "hyper: no manifest"),
    ],
)
def test_a_fault_is_one_line_and_an_exit_code(kind: str, code: int, line: str, commands: Path) -> None:
    ran = run_hyper(commands, "fail", kind)
    assert (ran.returncode, ran.stdout, ran.stderr) == (code, "", line + "\n")


def test_a_command_whose_package_is_missing_says_which(commands: Path) -> None:
    ran = run_hyper(commands, "absent", "--any", "thing")
    assert ran.returncode == 2
    assert ran.stderr == "hyper: `hyper absent` needs the Python package no_such_package, which is not installed\n"


def test_an_unknown_command_is_a_usage_error(commands: Path) -> None:
    ran = run_hyper(commands, "sing")
    assert ran.returncode == 2
    assert "No such command 'sing'" in ran.stderr


def test_a_checkpoint_is_verified_and_described(
    commands: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(commands)
    built = build_random_checkpoint(tmp_path / "model")

    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as exit_info:
            main(["checkpoint", *arguments])
        assert exit_info.value.code == 0
        return capsys.readouterr().out

    assert built.manifest_sha256 in run("verify", str(built.path))
    told = run("info", str(built.path))
    assert "at most 3 of 64 tokens, parallel" in told
    facts = json.loads(run("info", str(built.path), "--json"))
    assert facts["manifest"] == json.loads((built.path / "hyper.json").read_text())
    assert facts["manifest_sha256"] == built.manifest_sha256
    assert f"{facts['num_parameters']:,} in float32" in told
