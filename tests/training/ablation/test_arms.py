"""An ablation: data, rewards and settings of each arm, and running and resuming its steps."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from hyper_model.checkpoint import open_checkpoint, update_pause
from hyper_model.errors import HyperError
from tests.process import ROOT
from tests.training_data import tiny_run, write_clips
from training.ablation import arms as module
from training.ablation.arms import (
    ARMS,
    STYLE_LENGTHS,
    STYLE_WEIGHTS,
    SUITES,
    Arm,
    Base,
    Plan,
    Step,
    run_arms,
    run_step,
    steps_of,
)
from training.cli.ablation import ablation
from training.recipes import REWARD_WEIGHTS, LengthRange, debug, mini_grpo, mini_sft, with_settings

MINI = ROOT / "checkpoints/hyper-mini"
PLAN = Plan(num_steps=7, num_sft_steps=5, num_items=1_000)


def arm(name: str) -> Arm:
    return next(each for each in ARMS if each.name == name)


def steps(name: str, seed: int = 0, plan: Plan = PLAN) -> list[Step]:
    return steps_of(arm(name), seed, plan=plan, base=Base.read(MINI), run_dir=Path("run"), work=Path("build"))


def settings(step: Step) -> tuple[str, ...]:
    return tuple(text for flag, text in zip(step.arguments, step.arguments[1:], strict=False) if flag == "--set")


def option(step: Step, name: str) -> str:
    return step.arguments[step.arguments.index(name) + 1]


def test_stage_1_alone_is_what_stage_2_begins_from() -> None:
    first, *asked = steps("sft")
    assert [step.title for step in asked] == list(SUITES)
    assert all(option(step, "--checkpoint") == str(first.result) and option(step, "--pauses") == "0" for step in asked)
    with_stage_2 = steps("grpo-explicit")
    assert with_stage_2[0] == first and option(with_stage_2[1], "--base") == str(first.result)
    assert [option(step, "--items") for step in asked] == ["334", "333", "333"]


def test_the_rival_is_asked_the_same_and_has_no_checkpoint() -> None:
    asked, ours = steps("cascade"), steps("sft")[1:]
    assert [(step.title, option(step, "--items")) for step in asked] == [(s.title, option(s, "--items")) for s in ours]
    for step in asked:
        assert option(step, "--baseline") == "cascade"
        assert "--checkpoint" not in step.arguments and "--pauses" not in step.arguments


def test_an_arm_that_pauses_is_trained_calibrated_trained_and_asked() -> None:
    first, gate, second, gate_again, *asked = steps("hyper", seed=2)
    assert first.arguments[:2] == ("train", "mini_sft") and option(first, "--base") == str(MINI)
    assert gate.arguments[:2] == ("checkpoint", "calibrate") and gate.copied == first.result
    # As in the base's gate.
    assert option(gate, "--max-pauses") == "3" and option(gate, "--wanted") == "0.45"
    assert option(gate, "--wanted-aborts") == str(Base.read(MINI).wanted_aborts)
    assert option(gate, "--window-tokens") == "1" and option(gate, "--section") == "ENV"
    assert option(second, "--base") == str(gate.result)
    # Stage II moves the threshold for rollouts at temperature 1; served output is more confident.
    assert gate_again.copied == second.result and gate_again.arguments[3:] == gate.arguments[3:]
    assert all(
        option(step, "--checkpoint") == str(gate_again.result) and "--pauses" not in step.arguments for step in asked
    )


def test_who_may_pause_twice_as_often_is_served_by_a_gate_that_does() -> None:
    _, gate, _, served, *_ = steps("hyper-6")
    assert [float(served.arguments[served.arguments.index("--wanted") + i]) for i in (1, 2)] == [0.9, 2.0]
    assert option(gate, "--wanted") == "0.45" and option(served, "--max-pauses") == "6"


def test_positions_get_their_tokens_before_stage_1() -> None:
    made, first, *_ = steps("hyper-positions", seed=1)
    assert made.arguments == ("checkpoint", "positions", str(MINI), str(made.result))
    assert option(first, "--base") == str(made.result)
    assert any('"has_position_tokens": true' in text for text in settings(first))
    assert made.result == steps("hyper-positions")[0].result


def test_arms_of_one_form_share_stage_1_and_no_others_do() -> None:
    results = {each.name: steps(each.name)[0].result for each in ARMS if not each.baseline}
    assert len({results[name] for name in ("hyper", "hyper-no-consistency", "hyper-1", "hyper-6")}) == 1
    assert len(set(results.values())) == len(results) - 4
    assert steps("hyper")[0].result != steps("hyper", seed=1)[0].result
    logs = [step.log for each in ARMS for step in steps(each.name)]
    assert len(set(logs)) == len({step.result for each in ARMS for step in steps(each.name)})


@pytest.mark.parametrize("each", [arm for arm in ARMS if arm.has_stage_2], ids=lambda arm: arm.name)
def test_the_recipes_take_every_arms_settings(each: Arm) -> None:
    first, second = (step for step in steps(each.name, seed=1) if step.run_dir)
    sft = with_settings(mini_sft(), settings(first))
    assert (sft.num_steps, sft.seed, sft.trace_style) == (5, 1, each.style) and sft.spelling is None
    assert sft.decoder is not None and sft.decoder.vocab_size == 0
    assert sft.decoder.hidden_size == 320 and sft.decoder.latent_tokens == 8
    assert (sft.pause_share > 0, sft.pause_mode) == (each.max_pauses > 0, each.pause_mode or "parallel")
    grpo = with_settings(mini_grpo(), settings(second))
    assert (grpo.num_steps, grpo.seed, grpo.max_pauses) == (7, 1, each.max_pauses)
    assert grpo.wanted_pauses <= max(each.max_pauses, 0)
    assert grpo.weights == {**REWARD_WEIGHTS, **STYLE_WEIGHTS[each.style], **each.weights}
    assert grpo.trace_length == dataclasses.replace(LengthRange(), **STYLE_LENGTHS[each.style])


def test_no_style_is_asked_for_what_it_has_not() -> None:
    short, direct = (
        with_settings(mini_grpo(), settings(steps(name)[1])).weights for name in ("grpo-short", "grpo-direct")
    )
    assert short["alignment"] and not direct["alignment"]
    for weights in (short, direct):
        assert not any(weights[name] for name in ("fidelity", "environment", "speakers", "transcript"))
        assert weights["accuracy"] == 1.0 and weights["format"] and weights["length"]


def test_further_settings_come_last_and_so_win() -> None:
    plan = dataclasses.replace(
        PLAN, sft_set=("batch_size=4",), grpo_set=("num_steps=2",), sections=("ASR",), wanted_aborts=0.5
    )
    first, gate, second, *_ = steps("hyper", plan=plan)
    assert settings(first)[-1] == "batch_size=4" and settings(second)[-1] == "num_steps=2"
    assert option(gate, "--section") == "ASR" and option(gate, "--wanted-aborts") == "0.5"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Tiny checkpoint of Stage I with the debug recipe, beside clips in `work`."""
    run = tiny_run(
        dataclasses.replace(debug(), num_steps=2), write_clips(tmp_path / "work"), tmp_path / "run", is_resumed=False
    )
    run.train()
    run.trainer.run_model.export(tmp_path / "base", recipe=run.trainer.recipe, num_steps=2, dtype=torch.float32)
    return tmp_path / "base"


def test_stage_1_goes_on_from_the_base_with_its_vocabulary_and_is_not_run_twice(base: Path, tmp_path: Path) -> None:
    plan = Plan(num_steps=1, num_sft_steps=2, num_items=6, sft_set=("batch_size=2", "rows_at_once=2"))
    out, work = tmp_path / "out", tmp_path / "work"
    sampled = steps_of(
        arm("hyper-sampled"),
        0,
        plan=plan,
        base=dataclasses.replace(Base.read(base), wanted=(0.0, 1.0), wanted_aborts=1.0),
        run_dir=out,
        work=work,
    )[0]
    run_step(sampled)
    made, before = open_checkpoint(sampled.result), open_checkpoint(base)
    assert made.manifest.pause.mode == "sampled" and made.manifest.pause.max_pauses == 0
    assert made.manifest.files["tokenizer.json"] == before.manifest.files["tokenizer.json"]
    assert json.loads(made.manifest.recipe)["trace_style"] == "explicit"
    said = sampled.log.read_text()
    run_step(sampled)
    assert sampled.log.read_text() == said, "its result is there"
    lost = made.path.rename(tmp_path / "lost")
    run_step(sampled)
    assert "--resume" in sampled.log.read_text()
    again = open_checkpoint(sampled.result)
    assert again.manifest.files["model.safetensors"] == open_checkpoint(lost).manifest.files["model.safetensors"]


def test_what_fails_is_named_with_its_log_and_holds_up_no_other_arm(tmp_path: Path) -> None:
    for suite in SUITES:
        (tmp_path / "out/cascade/seed-0" / suite).mkdir(parents=True)
        (tmp_path / "out/cascade/seed-0" / suite / "result.json").write_text("{}")
    failed = run_arms(
        [arm("hyper-1"), arm("hyper-6"), arm("cascade")],
        plan=dataclasses.replace(PLAN, sft_set=("nonsense=1",)),
        base=Base.read(MINI),
        run_dir=tmp_path / "out",
        work=tmp_path / "work",
        num_seeds=1,
    )
    assert list(failed) == ["hyper-1, seed 0", "hyper-6, seed 0"]
    assert "'nonsense=1'" in failed["hyper-1, seed 0"] and "stage-1.log" in failed["hyper-1, seed 0"]
    assert failed["hyper-6, seed 0"] == "Stage I, explicit-parallel failed for another arm"


def test_what_cannot_be_done_is_said_before_anything_is_begun(tmp_path: Path) -> None:
    def run(*arguments: object) -> str:
        result = CliRunner().invoke(ablation, [str(tmp_path / "out"), *map(str, arguments)])
        assert result.exit_code != 0 and not (tmp_path / "out" / "stage-1").exists()
        return f"{result.output} {result.exception}"

    assert "--base" in run()
    assert "no ablation" in run("--report")
    assert "is not one of" in run("--base", MINI, "--arm", "nonsense")


def test_an_uncalibrated_base_makes_no_arm_that_pauses(tmp_path: Path) -> None:
    import shutil

    shutil.copytree(MINI, tmp_path / "base")
    update_pause(tmp_path / "base", {"calibration": None})
    result = CliRunner().invoke(ablation, [str(tmp_path / "out"), "--base", str(tmp_path / "base"), "--arm", "hyper"])
    assert result.exit_code == 2 and "hyper checkpoint calibrate" in result.output.replace("\n", " ")


def test_a_directory_keeps_one_plan(tmp_path: Path) -> None:
    base = Base.read(MINI)
    module.check_settings(tmp_path / "out", PLAN.said(base))
    module.check_settings(tmp_path / "out", PLAN.said(base))
    with pytest.raises(HyperError, match=r"started with num_steps .*, now 8; sections .*new RUN_DIR"):
        module.check_settings(tmp_path / "out", dataclasses.replace(PLAN, num_steps=8, sections=("ASR",)).said(base))
