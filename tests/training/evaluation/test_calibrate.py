"""Calibration of thresholds: the curve, the choice, refusals, and the command on the real engine."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from hyper_model.checkpoint import open_checkpoint, update_pause
from hyper_model.errors import CheckpointError
from hyper_model.manifest import Calibration
from hyper_model.pause import GateSettings, replay
from hyper_model.trace import PauseMode
from server.engines.scripted import scripted_checkpoint
from tests.builders import answer_result
from tests.process import ROOT
from training.cli import data as commands
from training.data.truth import Truth
from training.evaluation.calibrate import (
    Wanted,
    calibrate,
    draw_curve,
    find_thresholds,
    highest_abort,
    pause_rate,
    simulate,
    threshold_curve,
    threshold_for,
)
from training.rl.rollout import Completion, num_kept

CHECKPOINT = scripted_checkpoint()
MINI = ROOT / "checkpoints/hyper-mini"
CLIPS = ROOT / "tests/assets/clips"


def settings(**fields: object) -> GateSettings:
    found = GateSettings.of(CHECKPOINT.manifest, CHECKPOINT.tokenizer)
    assert found is not None
    return dataclasses.replace(found, **{"window_tokens": 4, "rest_tokens": 4, **fields})  # pyright: ignore


def completions(gate: GateSettings, number: int = 60) -> list[Completion]:
    """Traces with random drops in confidence; deeper drops are rarer."""
    random, made = np.random.default_rng(0), list[Completion]()
    text = "<THINK><REASONING>" + "it rains and a train goes by " * 2 + "</REASONING></THINK><FINAL_ANSWER>a"
    written = tuple(CHECKPOINT.tokenizer.encode_trace(text))
    result = answer_result(CHECKPOINT, written)
    for _ in range(number):
        confidences = tuple(float(each) for each in 1 - 0.6 * random.beta(0.6, 4, len(written)))
        made.append(Completion(result, replay(gate, written, confidences), written, confidences))
    return made


def test_a_curve_rises_with_its_threshold_and_ends_at_one() -> None:
    gate = settings()
    curve = threshold_curve(gate, completions(gate))
    assert [point.tau for point in curve] == sorted({point.tau for point in curve}) and curve[-1].tau == 1.0
    assert [point.abort_rate for point in curve] == sorted(point.abort_rate for point in curve)
    assert curve[-1].pauses == gate.max_pauses and curve[-1].abort_rate == 1.0
    assert curve[0].pauses <= 0.1


def test_the_threshold_gives_the_wanted_rate() -> None:
    gate = settings()
    made = completions(gate)
    for wanted in (0.3, 0.7, 1.5):
        tau = threshold_for(gate, made, wanted)
        assert pause_rate(gate, made, tau) == pytest.approx(wanted, abs=0.1)
        assert pause_rate(gate, made, tau - 0.001) <= pause_rate(gate, made, tau)


def test_a_simulated_pause_keeps_budget_and_rest() -> None:
    made = completions(settings())
    for budget in (1, 2, 3):
        gate = settings(max_pauses=budget, tau_pause=1.0, tau_abort=0.0)
        assert {simulate(gate, completion).num_pauses for completion in made} == {budget}
    sampled = settings(tau_pause=1.0, tau_abort=0.0, mode=PauseMode.SAMPLED)
    assert {simulate(sampled, completion).num_pauses for completion in made} == {3}


def test_a_simulated_abort_ends_the_completion() -> None:
    (completion,) = completions(settings(), 1)
    gate = simulate(settings(tau_abort=1.0, tau_pause=1.0), completion)
    assert gate.is_aborted and gate.num_pauses == 0


def test_only_completions_that_are_wrong_without_a_pause_are_aborted() -> None:
    gate = settings()
    made = completions(gate)
    lowest = sorted(each.gate.lowest for each in made if each.gate and each.gate.lowest is not None)
    hopeless = lowest[len(lowest) // 4]
    is_wrong = [each.gate is not None and (each.gate.lowest or 1) <= hopeless for each in made]
    curve = threshold_curve(gate, made, is_wrong)
    tau = highest_abort(curve, 0.5, 0.9, num_completions=len(made))
    aborted = [
        wrong for each, wrong in zip(made, is_wrong, strict=True) if each.gate and (each.gate.lowest or 1) <= tau
    ]
    assert hopeless <= tau < 1 and sum(aborted) / len(aborted) >= 0.9
    assert highest_abort(curve, 0.05, 0.9, num_completions=len(made)) == 0, "too few below it for a judgement"


@pytest.mark.parametrize("is_wrong", [None, False])
def test_without_wrong_answers_low_confidence_aborts_nothing(is_wrong: bool | None) -> None:
    gate = settings()
    made = completions(gate)
    curve = threshold_curve(gate, made, [is_wrong] * len(made))
    assert highest_abort(curve, 1.0, 0.9, num_completions=len(made)) == 0


def test_completions_without_a_window_make_no_curve() -> None:
    gate = settings(window_tokens=10_000)
    with pytest.raises(CheckpointError, match="no completion has a full window of 10000 tokens"):
        threshold_curve(gate, completions(gate))


def test_the_curve_is_drawn(tmp_path: Path) -> None:
    gate = settings()
    calibration = Calibration(
        source="made up",
        num_completions=60,
        wanted_pauses=(0.45, 1.0),
        wanted_abort_rate=0.01,
        pauses=0.7,
        abort_rate=0.0,
        curve=tuple(threshold_curve(gate, completions(gate))),
    )
    draw_curve(calibration, 0.9, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


TRUTHS = [Truth("Which?", "b")] * 60


def engine(gain: float) -> Callable[[GateSettings], list[Completion]]:
    """Engine with an effect of pauses on later tokens, equal to a shift of every threshold."""

    def complete(gate: GateSettings) -> list[Completion]:
        made = completions(gate)
        if not gate.max_pauses:
            return made
        moved = dataclasses.replace(gate, tau_pause=gate.tau_pause * gain)
        return [dataclasses.replace(each, gate=simulate(moved, each)) for each in made]

    return complete


@pytest.mark.parametrize("gain", [0.93, 1.0, 1.07])
def test_the_threshold_is_moved_until_the_real_rate_is_the_wanted_one(gain: float) -> None:
    fields, calibration, last = find_thresholds(
        settings(), engine(gain), TRUTHS, source="made up", wanted=Wanted((0.45, 1.0), abort_rate=0.2)
    )
    assert 0.45 <= calibration.pauses <= 1.0 and calibration.abort_rate <= 0.2 and len(last) == 60
    assert 0 <= fields["tau_abort"] <= fields["tau_pause"] < 1
    assert (calibration.num_completions, calibration.source) == (60, "made up") and len(calibration.curve) > 10


def test_a_rate_that_no_threshold_gives_is_said_with_what_was_measured() -> None:
    with pytest.raises(CheckpointError, match=r"no threshold gave 5 to 6 pauses.*measured 3\.00 pauses"):
        find_thresholds(settings(), engine(1.0), TRUTHS, source="made up", wanted=Wanted((5.0, 6.0)))


def test_where_completions_repeat_themselves_no_threshold_is_blamed() -> None:
    def complete(gate: GateSettings) -> list[Completion]:
        made = engine(1.0)(gate)
        for each in made[:3] if gate.max_pauses else ():
            assert each.gate is not None
            each.gate.is_aborted = True
        return made

    with pytest.raises(CheckpointError, match="these repeat themselves for loop_tokens, 64 tokens, more than"):
        find_thresholds(settings(), complete, TRUTHS, source="made up", wanted=Wanted())


def test_more_pauses_than_the_budget_are_refused_before_anything_runs(copied: Path) -> None:
    with pytest.raises(CheckpointError, match="2 pauses are wanted of a budget of 1"):
        wanted = Wanted((2.0, 3.0))
        calibrate(open_checkpoint(copied, verify=False), [], [], source="", wanted=wanted, fields={"max_pauses": 1})


@pytest.mark.parametrize("mode", list(PauseMode))
def test_only_visible_tokens_count_against_a_limit(mode: PauseMode) -> None:
    gate = settings(mode=mode, latent_tokens=3)
    span = [gate.open_id] * 3 if mode is PauseMode.PARALLEL else [gate.open_id, 65, 66, gate.close_id]
    token_ids = [65, 66, *span, 67, 68]
    expected = [1, 2, 3 + len(span), 4 + len(span), len(token_ids)]
    assert [num_kept(gate, token_ids, most) for most in (1, 2, 3, 4, 9)] == expected


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    directory = tmp_path / "mini"
    shutil.copytree(MINI, directory)
    return directory


def test_a_checkpoint_without_a_gate_is_refused_and_left_as_it_was(copied: Path) -> None:
    before = (copied / "hyper.json").read_bytes()
    with pytest.raises(CheckpointError, match="cannot be calibrated: no gate"):
        calibrate(open_checkpoint(copied, verify=False), [], [], source="", wanted=Wanted(), fields={"max_pauses": 0})
    assert (copied / "hyper.json").read_bytes() == before


def test_settings_that_do_not_fit_leave_the_manifest_as_it_was(copied: Path) -> None:
    before = (copied / "hyper.json").read_bytes()
    # The last one is valid in a manifest, but not for this tokenizer.
    for fields in ({"tau_pause": 2.0}, {"tau_pause": 0.1, "tau_abort": 0.2}, {"nonsense": 1}, {"open_id": 1}):
        with pytest.raises(CheckpointError):
            update_pause(copied, fields)
    assert (copied / "hyper.json").read_bytes() == before and len(list(copied.parent.iterdir())) == 1


def test_the_command_calibrates_on_clips_of_ones_own_and_the_checkpoint_stays_whole(copied: Path) -> None:
    """Run in its own process with the real engine, so the thresholds are the real model's."""
    command = [sys.executable, "-m", "hyper_model.cli", "checkpoint", "calibrate", str(copied)]
    command += ["--examples", str(CLIPS / "truth.json")]
    command += ["--wanted", "0.3", "2", "--max-pauses", "3", "--window-tokens", "6", "--section", "reasoning"]
    command += ["--section", "asr", "--png", str(copied.parent / "curve.png")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=280)
    assert ran.returncode == 0, ran.stderr[-2000:]
    pause = open_checkpoint(copied).manifest.pause
    assert pause.calibration and 0.3 <= pause.calibration.pauses <= 2 and pause.calibration.num_completions == 10
    assert (pause.max_pauses, pause.window_tokens, pause.sections) == (3, 6, ("REASONING", "ASR"))
    assert pause.max_closed_loops == 8 and pause.calibration.wanted_wrong == 0.9 and pause.tau_abort == 0.0
    assert "before and 0.069 after, on 148 answers of 600 synthetic scenes" in ran.stdout, "ten answers are too few"
    assert f"tau_pause {pause.tau_pause:.4f}" in ran.stdout and "10 questions of truth.json" in ran.stdout
    assert (copied.parent / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_confidence_alone_needs_enough_answers_and_then_leaves_the_manifest_as_it_was(copied: Path) -> None:
    before = (copied / "hyper.json").read_bytes()
    command = [sys.executable, "-m", "hyper_model.cli", "checkpoint", "calibrate", str(copied), "--confidence-only"]
    command += ["--examples", str(CLIPS / "truth.json")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=280)
    assert ran.returncode and "too few answers" in ran.stderr, ran.stderr[-2000:]
    assert (copied / "hyper.json").read_bytes() == before


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not JSON"),
        ('[{"question": "a"}]', "item 1"),
        ('[{"file": "no.wav", "question": "a"}]', "item 1"),
    ],
)
def test_examples_that_cannot_be_read_are_named(tmp_path: Path, copied: Path, text: str, said: str) -> None:
    (tmp_path / "set.json").write_text(text)
    arguments = [str(copied), "--examples", str(tmp_path / "set.json")]
    result = CliRunner().invoke(commands.calibrate, arguments)
    assert result.exit_code == 1 and said in f"{result.output} {result.exception}"
