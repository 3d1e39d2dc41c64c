"""Stage II with the real engine: scored tokens were sampled, and forced tokens are not trained on.

The module shares one engine, on the embedded checkpoint and in float32, because a start takes longer than a test.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from hyper_model.checkpoint import Checkpoint, open_checkpoint, update_pause
from hyper_model.errors import HyperError
from hyper_model.pause import GateSettings
from hyper_model.positions import give_positions
from hyper_model.trace import build_prompt
from tests.process import ROOT
from training.data.examples import Example
from training.data.truth import Truth
from training.export import model_of_checkpoint
from training.policy import IGNORED, merged, named_tensors
from training.recipes import GrpoRecipe, Lora, debug_grpo
from training.rl.rollout import Prompt, VllmBackend, banned_ids, follow, num_kept
from training.rl.rollout_transformers import TransformersBackend
from training.rl.tasks import ExampleTasks, Task
from training.rl.trainer import COMPLETIONS_FILE, CollapseDetector, GrpoTrainer
from training.trainer import TrainingError, prepare_run_dir, read_log

CLIPS = ROOT / "tests/assets/clips"


class Repeated:
    """Source of one repeated question."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def draw(self, number: int) -> Task:
        return self.task


class ClipTasks:
    """Source of questions about the ten sample clips, repeated."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.tasks: list[Task] = []
        for row in json.loads((CLIPS / "truth.json").read_text(encoding="utf-8")):
            if not row["file"].endswith((".wav", ".flac")):
                continue
            samples_S, _ = soundfile.read(CLIPS / row["file"], dtype="float32")
            prompt = Prompt(build_prompt(checkpoint.tokenizer, row["question"], row["choices"]), samples_S, ())
            truth = Truth(
                row["question"],
                row["answer"],
                tuple(row["choices"]),
                environment=row["environment"],
                num_speakers=row["num_speakers"],
                transcript=row["transcript"],
            )
            self.tasks.append(Task(prompt, truth))

    def draw(self, number: int) -> Task:
        return self.tasks[number % len(self.tasks)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Embedded checkpoint with a gate that pauses in every rollout, in the sections of its training."""
    directory = tmp_path_factory.mktemp("grpo") / "hyper-mini"
    shutil.copytree(ROOT / "checkpoints/hyper-mini", directory)
    update_pause(directory, {"calibration": None, "tau_pause": 1.0, "max_pauses": 2})
    return directory


@pytest.fixture(scope="module")
def backend(base: Path) -> Iterator[VllmBackend]:
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        # torch and vLLM raise deprecation warnings at import.
        warnings.simplefilter("ignore")
        yield VllmBackend(open_checkpoint(base, verify=False), dtype="float32", is_sampler=True)


@pytest.fixture(scope="module")
def gate(base: Path) -> GateSettings:
    opened = open_checkpoint(base, verify=False)
    found = GateSettings.of(opened.manifest, opened.tokenizer)
    assert found is not None
    return found


@pytest.fixture
def start(base: Path, backend: VllmBackend, gate: GateSettings) -> Callable[..., GrpoTrainer]:
    """Start or resume a run of the debug recipe."""

    def begin(run_dir: Path, *, is_resumed: bool = False, lora: Lora | None = None, **changes: Any) -> GrpoTrainer:
        used = changes.pop("used_backend", backend)
        recipe: GrpoRecipe = dataclasses.replace(debug_grpo(), lora=lora, **changes)
        prepare_run_dir(run_dir, recipe, is_resumed=is_resumed)
        model = model_of_checkpoint(base, dtype=torch.float32, lora=lora)
        if recipe.backend == "transformers":
            used = TransformersBackend(model, rows_at_once=8)
        return GrpoTrainer(model, recipe, run_dir, ClipTasks(open_checkpoint(base, verify=False)), used, gate=gate)

    return begin


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs") / "whole"


def test_sampler_and_trainer_agree_after_every_update(start: Callable[..., GrpoTrainer], whole: Path) -> None:
    start(whole, learning_rate=1e-4, warmup_steps=0).train()
    rows = read_log(whole)
    assert len(rows) == 4 and all(row["gap"] <= 1e-5 and row["gap_max"] <= 1e-3 for row in rows), rows
    # The weights did change, so the engine has the current ones.
    assert rows[-1]["kl"] > 0 and all(row["pauses"] > 0.5 for row in rows)
    said = [json.loads(line) for line in (whole / COMPLETIONS_FILE).read_text(encoding="utf-8").splitlines()]
    assert len(said) == 4 and all("<FINAL_ANSWER>" in row["completion"] for row in said)


def test_a_broken_run_goes_on_bit_for_bit(start: Callable[..., GrpoTrainer], whole: Path, tmp_path: Path) -> None:
    assert (whole / "checkpoint-4/complete").exists(), "the run before this test made it"
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run/checkpoint-4/complete").unlink()
    trainer = start(tmp_path / "run", is_resumed=True, learning_rate=1e-4, warmup_steps=0)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    for folder in (whole, tmp_path / "run"):
        assert [row["step"] for row in read_log(folder)] == [1, 2, 3, 4]
    keys = ("loss", "reward", "pauses", "tau_pause", "length", "entropy")
    one, two = ([[row[key] for key in keys] for row in read_log(run)] for run in (whole, tmp_path / "run"))
    assert one == two
    files = [run / "checkpoint-4/model/model.safetensors" for run in (whole, tmp_path / "run")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_nothing_that_was_forced_is_learnt_from(start: Callable[..., GrpoTrainer], tmp_path: Path) -> None:
    trainer = start(tmp_path / "run")
    (group,) = trainer.sample([0], trainer.gate)
    tokenizer = trainer.run_model.tokenizer
    num_forced = 0
    for rollout in group.rollouts:
        assert rollout.gate is not None and rollout.gate.num_pauses >= 1
        latent = [token == tokenizer.pause_id for token in rollout.token_ids]
        assert list(rollout.is_forced) == latent and sum(latent) == 8 * rollout.gate.num_pauses
        assert all(
            logprob == 0.0 for logprob, forced in zip(rollout.logprobs, rollout.is_forced, strict=True) if forced
        )
        num_forced += sum(latent)
    # Replace the rewards by different ones, so that there is something to learn.
    unequal = [dataclasses.replace(each, total=float(place)) for place, each in enumerate(group.rewards)]
    micros = trainer.packed([dataclasses.replace(group, rewards=unequal)])
    targets = torch.cat([micro["batch"]["targets_BT"].flatten() for micro in micros])
    scored = sum(len(rollout.token_ids) for rollout in group.rollouts) - num_forced
    assert int((targets != IGNORED).sum()) == scored
    # The last hidden state before a forced token gets no gradient.
    seen: list[torch.Tensor] = []
    core = trainer.run_model.core

    def keep(module: Any, inputs: Any, output: Any) -> None:
        output.last_hidden_state.retain_grad()
        seen.append(output.last_hidden_state)

    hook = core.model.language_model.register_forward_hook(keep)  # pyright: ignore[reportAttributeAccessIssue]
    sum(trainer.micro_loss(core, micro) for micro in micros).backward()  # pyright: ignore
    hook.remove()
    for micro, hidden in zip(micros, seen, strict=True):
        arrived = hidden.grad.abs().sum(-1)  # pyright: ignore[reportOptionalMemberAccess]
        assert float(arrived[micro["batch"]["targets_BT"] == IGNORED].max()) == 0.0
        assert float(arrived[micro["batch"]["targets_BT"] != IGNORED].max()) > 0.0


def test_long_prompts_are_not_answered_from_stale_keys(
    start: Callable[..., GrpoTrainer], backend: VllmBackend, tmp_path: Path
) -> None:
    """With a clip of 20 s the prompt fills whole blocks of the cache, invalid after a change of weights."""
    trainer = start(tmp_path / "run")
    samples_S = np.random.default_rng(0).standard_normal(20 * 16_000).astype(np.float32) * 0.05
    task = dataclasses.replace(
        trainer.tasks.draw(0), prompt=Prompt(trainer.tasks.draw(0).prompt.token_ids, samples_S, ())
    )
    trainer.tasks = Repeated(task)
    for _ in range(2):
        with torch.no_grad():
            for name, parameter in trainer.run_model.core.named_parameters():
                if "language_model.layers" in name and parameter.dim() > 1:
                    parameter.mul_(1.01)
        trainer.sync()
        (group,) = trainer.sample([0], None)
        for micro in trainer.packed([group]):
            logprobs = trainer._logprobs(trainer.run_model.policy, micro["batch"])
            torch.testing.assert_close(logprobs, micro["tokens"]["sampler_logprobs_N"], atol=2e-4, rtol=1e-4)


def test_a_stale_engine_is_noticed(start: Callable[..., GrpoTrainer], tmp_path: Path) -> None:
    trainer = start(tmp_path / "run", max_gap=1e-3)
    trainer.sync = lambda: None
    with torch.no_grad():
        for parameter in trainer.run_model.core.model.language_model.parameters():  # pyright: ignore
            parameter.mul_(1.02)
    with pytest.raises(TrainingError, match="same weights"):
        trainer.train()


def test_adapters_are_trained_and_merged_into_the_engine(start: Callable[..., GrpoTrainer], tmp_path: Path) -> None:
    trainer = start(tmp_path / "run", lora=Lora(rank=4, alpha=16), learning_rate=3e-3, warmup_steps=0, num_steps=3)
    trainer.train()
    rows = read_log(tmp_path / "run")
    assert all(row["gap"] <= 2e-5 for row in rows) and rows[-1]["kl"] > 0
    with merged(trainer.run_model.policy) as policy:
        assert len(dict(named_tensors(policy))) == len(dict(named_tensors(model_of_checkpoint_of(trainer).policy)))


def model_of_checkpoint_of(trainer: GrpoTrainer) -> Any:
    return model_of_checkpoint(Path(trainer.backend.checkpoint.path), dtype=torch.float32)  # pyright: ignore


def test_transformers_generates_rollouts_of_the_same_kind(start: Callable[..., GrpoTrainer], tmp_path: Path) -> None:
    trainer = start(tmp_path / "run", backend="transformers", num_steps=2)
    assert isinstance(trainer.backend, TransformersBackend)
    # For any number in memory together, no two rollouts of a group are drawn alike.
    trainer.backend.rows_at_once = 2
    trainer.train()
    (group,) = trainer.sample([1], None)
    assert len({rollout.logprobs for rollout in group.rollouts}) > 2
    rows = read_log(tmp_path / "run")
    assert all(row["gap"] <= 1e-5 and row["pauses"] > 0.5 and row["reward"] > 0.5 for row in rows), rows


def test_several_updates_of_one_set_of_rollouts(start: Callable[..., GrpoTrainer], tmp_path: Path) -> None:
    trainer = start(tmp_path / "run", updates_per_rollout=2, num_steps=4, learning_rate=3e-3, warmup_steps=0)
    trainer.train()
    rows = read_log(tmp_path / "run")
    assert ["reward" in row for row in rows] == [True, False, True, False]
    # The second update is compared with the sampling policy and reaches the bounds of its ratio.
    assert all(row["gap"] <= 1e-5 for row in rows)
    assert [row["clipped"] > 0 for row in rows] == [False, True, False, True]
    with pytest.raises(TrainingError, match="updates_per_rollout"):
        start(tmp_path / "other", updates_per_rollout=2, save_every_steps=3)


def test_a_reward_that_fails_ends_the_run(
    start: Callable[..., GrpoTrainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ValueError("no reward")

    monkeypatch.setattr("training.rl.trainer.reward", fail)
    with pytest.raises(ValueError, match="no reward"):
        start(tmp_path / "run").train()


def test_a_collapse_ends_the_run_and_says_why(start: Callable[..., GrpoTrainer], tmp_path: Path) -> None:
    trainer = start(tmp_path / "run", collapse_length=100.0, num_steps=40, save_every_steps=1000, group_size=2)
    trainer.progress.watch = CollapseDetector(num_steps=10, length=90.0, form=1.0, first_length=90.0, first_form=1.0)
    trainer.train()
    assert trainer.state.global_step == 1 and (tmp_path / "run/checkpoint-1/complete").exists()
    assert "tokens" in trainer.own_state()["stopped"]


def test_two_ranks_train_with_an_engine_each(base: Path, tmp_path: Path) -> None:
    rows = json.loads((CLIPS / "truth.json").read_text(encoding="utf-8"))[:4]
    lines = ["audio,question,answer,choices"]
    lines += [f'{CLIPS / row["file"]},"{row["question"]}",{row["answer"]},{"|".join(row["choices"])}' for row in rows]
    (tmp_path / "clips.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "hyper_model.cli", "train", "debug_grpo", str(tmp_path / "run")]
    command += ["--base", str(base), "--data", str(tmp_path / "clips.csv"), "--processes", "2"]
    command += ["--set", "num_steps=2", "--set", "group_size=2", "--export", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [row["step"] for row in read_log(tmp_path / "run")] == [1, 2]
    assert all(row["gap"] <= 1e-5 for row in read_log(tmp_path / "run"))
    open_checkpoint(tmp_path / "out")


def test_a_watch_lets_noise_pass_and_sees_a_fall() -> None:
    recipe, watch = debug_grpo(), CollapseDetector()
    recipe = dataclasses.replace(recipe, collapse_length=0.5, collapse_format=0.7)
    told = [watch.update(100 + 30 * (step % 2), 1.0, recipe) for step in range(40)]
    assert told == [None] * 40
    told = [watch.update(20, 1.0, recipe) for _ in range(20)]
    assert told[0] is None and told[-1] is not None and "tokens" in told[-1]


@pytest.mark.parametrize("has_positions", [False, True], ids=["copies", "positions"])
def test_what_a_rollout_may_not_choose_follows_from_the_gate(base: Path, tmp_path: Path, has_positions: bool) -> None:
    opened = give_positions(base, tmp_path / "positions") if has_positions else open_checkpoint(base, verify=False)
    tokenizer, gate = opened.tokenizer, GateSettings.of(opened.manifest, opened.tokenizer)
    assert gate is not None and len(set(gate.span_ids)) == (8 if has_positions else 1)
    banned = banned_ids(tokenizer, gate)
    assert {tokenizer.audio_id, *gate.span_ids, tokenizer.pause_id, tokenizer.pause_close_id} <= set(banned)
    assert not set(banned) & set(tokenizer.stop_ids)
    (open_env, _), (_, close_think) = tokenizer.tag_ids["ENV"], tokenizer.tag_ids["THINK"]  # pyright: ignore
    span = list(gate.span_ids)
    followed, forced = follow(gate, [open_env, 300, *span, 301, close_think], [0.5] * (4 + len(span)))
    assert followed is not None and followed.num_pauses == 1
    assert list(forced) == [False, False, *[True] * len(span), False, False]
    assert num_kept(gate, [open_env, 300, *span, 301, close_think], 3) == 3 + len(span)


def test_a_data_sets_clip_that_cannot_be_read_is_named(base: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.wav").write_bytes(b"no sound")
    rows = [Example("1", tmp_path / "bad.wav", "What?", "a", source="items.jsonl, line 7")]
    tasks = ExampleTasks(rows, open_checkpoint(base, verify=False).tokenizer, seed=0)
    with pytest.raises(HyperError, match=r"items\.jsonl, line 7"):
        tasks.draw(0)
