"""Benchmark of Stage II for `make bench-train`: cost of its steps beside a plain trainer, and correctness checks.

It runs on the embedded checkpoint in float32, on clips from the command line. It prints one JSON line:
  - `grpo_step_ratio_vs_naive`: seconds per sampled token of our step, over those of a plain step. The plain step
    generates with transformers and computes clip and prompt anew for every rollout. Both run in turns with the same
    prompts, weights and threads.
  - `sync_logprob_gap_fp32`: mean difference between the engine's and the trainer's log-probabilities of the same
    rollouts, the largest of the steps after an update.
  - `resume_max_diff`: largest difference between the weights of an uninterrupted and of a resumed run.
  - `forced_token_grad`: largest gradient at the last hidden state before a forced token.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from transformers import Qwen2AudioForConditionalGeneration, WhisperFeatureExtractor

from hyper_model.audio import SAMPLE_RATE_HZ, decode, require_single_window
from hyper_model.audio_encoder import num_audio_tokens
from hyper_model.checkpoint import open_checkpoint, update_pause
from hyper_model.pause import GateSettings
from hyper_model.trace import TraceTokenizer, build_prompt
from training.data.truth import Truth
from training.export import RunModel, model_of_checkpoint
from training.policy import IGNORED, HyperPolicy, Row, Scores
from training.recipes import GrpoRecipe, mini_grpo
from training.rl.rollout import Prompt, VllmBackend
from training.rl.rollout_transformers import TransformersBackend
from training.rl.tasks import Task
from training.rl.trainer import GrpoTrainer
from training.trainer import prepare_run_dir, read_log

QUESTIONS = ("What is in the background?", "How many people speak?", "What is said first?", "Who speaks first?")


class ClipTasks:
    """Simple questions about given clips, in turn; their rewards do not matter here."""

    def __init__(self, clips: Sequence[Path], tokenizer: TraceTokenizer) -> None:
        self.tasks: list[Task] = []
        for number, path in enumerate(clips):
            waveform = decode(path.read_bytes())
            require_single_window(waveform)
            question = QUESTIONS[number % len(QUESTIONS)]
            prompt = Prompt(build_prompt(tokenizer, question), waveform.samples_S, ())
            self.tasks.append(Task(prompt, Truth(question, "one", num_speakers=1 + number % 3)))

    def draw(self, number: int) -> Task:
        """Return a task."""
        return self.tasks[number % len(self.tasks)]


def stock_inputs(sequences: Sequence[Sequence[int]], clips: Sequence[np.ndarray], audio_id: int) -> dict[str, Any]:
    """Return the inputs of the library's own model: every clip padded to 30 s, prompts padded on the left."""
    features = WhisperFeatureExtractor(feature_size=80)(
        list(clips), sampling_rate=SAMPLE_RATE_HZ, padding="max_length", return_attention_mask=True, return_tensors="pt"
    )
    expanded: list[list[int]] = []
    for token_ids, samples_S in zip(sequences, clips, strict=True):
        at = token_ids.index(audio_id)
        audio_ids = [audio_id] * num_audio_tokens(len(samples_S))
        expanded.append([*token_ids[:at], *audio_ids, *token_ids[at + 1 :]])
    longest = max(map(len, expanded))
    return {
        "input_ids": torch.tensor([[0] * (longest - len(ids)) + ids for ids in expanded]),
        "attention_mask": torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in expanded]),
        "input_features": features["input_features"],
        "feature_attention_mask": features["attention_mask"],
    }


class StockBackend(TransformersBackend):
    """Generation as in the library: `generate` of the whole model, with a separate clip per rollout."""

    def __init__(self, model: RunModel, *, rows_at_once: int) -> None:
        super().__init__(model, rows_at_once=rows_at_once)
        self.decoder = stock(model.core)

    def inputs(self, prompts: Sequence[Prompt]) -> dict[str, torch.Tensor]:
        """Return prompts and clips, one for each rollout."""
        audio_id = self.model.tokenizer.audio_id
        return stock_inputs([p.token_ids for p in prompts], [p.samples_S for p in prompts], audio_id)


class StockTrainer(GrpoTrainer):
    """Scoring as in the library: separate prompt and clip per rollout, and logits at every position."""

    def pack(self, rows: Sequence[Row], clips: Sequence[np.ndarray]) -> dict[str, Any]:
        """Split branched rows into separate sequences."""
        sequences: list[list[int]] = []
        targets: list[list[int]] = []
        row_clips: list[np.ndarray] = []
        for row in rows:
            for begin, end in itertools.pairwise((*row.branches, len(row.token_ids))):
                trunk = row.branches[0]
                sequences.append([*row.token_ids[:trunk], *row.token_ids[begin:end]])
                targets.append([*row.targets[:trunk], *row.targets[begin:end]])
                row_clips.append(clips[row.clip])
        longest = max(map(len, targets))
        wanted = torch.tensor([[IGNORED] * (longest - len(branch_row)) + branch_row for branch_row in targets])
        return {"inputs": stock_inputs(sequences, row_clips, self.run_model.tokenizer.audio_id), "targets_BT": wanted}

    def score(self, model: Any, batch: dict[str, Any]) -> Scores:
        """Score with the library's own forward pass."""
        library: Any = Qwen2AudioForConditionalGeneration
        logits_BTV = library.forward(model, **batch["inputs"]).logits
        targets_BT = batch["targets_BT"]
        logits_BTV = logits_BTV[:, -targets_BT.shape[1] :].float().index_fill(2, self.banned, -torch.inf)
        logprobs_BTV = logits_BTV.log_softmax(-1)
        is_scored_BT = targets_BT != IGNORED
        logprobs_N = logprobs_BTV.gather(2, targets_BT.clamp(min=0)[..., None])[..., 0][is_scored_BT]
        return Scores(logprobs_N, torch.zeros_like(logprobs_N))


def stock(policy: HyperPolicy) -> Any:
    """Return the library's own model around the same parameters."""
    model = copy.copy(policy)
    model.__class__ = Qwen2AudioForConditionalGeneration  # pyright: ignore[reportAttributeAccessIssue]
    return model


class Bench:
    """One engine, shared by several trainers.

    Args:
        base: The checkpoint, with a gate that pauses in every rollout.
    """

    def __init__(self, base: Path, clips: Sequence[Path], folder: Path) -> None:
        self.base, self.folder = base, folder
        self.checkpoint = open_checkpoint(base, verify=False)
        gate = GateSettings.of(self.checkpoint.manifest, self.checkpoint.tokenizer)
        assert gate is not None
        self.gate = gate
        self.tasks = ClipTasks(clips, self.checkpoint.tokenizer)
        self.engine = VllmBackend(self.checkpoint, dtype="float32", is_sampler=True)

    def trainer(self, name: str, *, is_resumed: bool = False, is_naive: bool = False, **changes: Any) -> GrpoTrainer:
        """Return a trainer with a run directory of this name."""
        recipe: GrpoRecipe = dataclasses.replace(
            mini_grpo(), dtype="float32", export_dtype="float32", wanted_pauses=0.0, max_redraws=0, **changes
        )
        prepare_run_dir(self.folder / name, recipe, is_resumed=is_resumed)
        model = model_of_checkpoint(self.base, dtype=torch.float32)
        if is_naive:
            backend = StockBackend(model, rows_at_once=recipe.rows_at_once)
            return StockTrainer(model, recipe, self.folder / name, self.tasks, backend, gate=self.gate)
        return GrpoTrainer(model, recipe, self.folder / name, self.tasks, self.engine, gate=self.gate)

    def step_ratio(self, rounds: int) -> tuple[float, dict[str, float]]:
        """Measure both kinds of steps in turns; return the ratio of their medians, and the medians in ms per token.

        Also return the difference between the plain side's scores and its sampling log-probabilities.
        """
        sides = {"ours": self.trainer("ours"), "naive": self.trainer("naive", is_naive=True)}
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(rounds + 1):
            for name, trainer in sides.items():
                trainer.progress.next_task = turn * trainer.recipe.batch_size
                trainer.buffer = []
                started_s = time.perf_counter()
                trainer.training_step(trainer.model, turn)
                trainer.model.zero_grad()  # pyright: ignore[reportOptionalMemberAccess]
                spent_s = time.perf_counter() - started_s
                num_tokens = sum(len(each.token_ids) for group in trainer.groups for each in group.rollouts)
                if turn:  # The first step of each kind is a warm-up.
                    seconds[name].append(1_000 * spent_s / num_tokens)
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        # A small difference shows equal work; the plain side must score its own samples.
        medians["naive_gap"] = statistics.fmean(sides["naive"].measured["gap"])
        return medians["ours"] / medians["naive"], medians

    def gap_and_resume(self) -> tuple[float, float]:
        """Run four steps, and the last two again; return the largest gap and the largest difference."""
        changes = {"num_steps": 4, "save_every_steps": 2, "learning_rate": 1e-4, "warmup_steps": 0}
        self.trainer("whole", **changes).train()
        whole, broken = self.folder / "whole", self.folder / "broken"
        shutil.copytree(whole, broken)
        shutil.rmtree(broken / "checkpoint-4")
        resumed = self.trainer("broken", is_resumed=True, **changes)
        resumed.train(resume_from_checkpoint=str(broken / "checkpoint-2"))
        stored = model_of_checkpoint(whole / "checkpoint-4/model", dtype=torch.float32).policy.state_dict()
        now = resumed.run_model.policy.state_dict()
        difference = max(float((now[name] - tensor).abs().max()) for name, tensor in stored.items())
        return max(row["gap"] for row in read_log(whole)), difference

    def forced_gradient(self) -> float:
        """Return the largest gradient before a forced token, in a step with different rewards."""
        trainer = self.trainer("forced")
        (group,) = trainer.sample([0], self.gate)
        unequal = [dataclasses.replace(each, total=float(place)) for place, each in enumerate(group.rewards)]
        core: Any = trainer.run_model.core
        seen: list[torch.Tensor] = []

        def keep(module: Any, inputs: Any, output: Any) -> None:
            output.last_hidden_state.retain_grad()
            seen.append(output.last_hidden_state)

        micros = trainer.packed([dataclasses.replace(group, rewards=unequal)])
        hook = core.model.language_model.register_forward_hook(keep)
        worst = 0.0
        for micro in micros:
            trainer.micro_loss(core, micro).backward()
            arrived_BT = seen[-1].grad.abs().amax(-1)  # pyright: ignore[reportOptionalMemberAccess]
            is_forced_BT = micro["batch"]["targets_BT"] == IGNORED
            assert float(arrived_BT[~is_forced_BT].max()) > 0, "nothing was learnt at all"
            worst = max(worst, float(arrived_BT[is_forced_BT].max()))
        hook.remove()
        return worst


@click.command()
@click.argument("clips", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--checkpoint",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=Path("checkpoints/hyper-mini"),
    show_default=True,
    help="Checkpoint to train.",
)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Number of steps of each kind.")
def bench(clips: Path, checkpoint: Path, rounds: int) -> None:
    """Measure Stage II on the audio files in CLIPS; the last line is JSON."""
    files = sorted(path for path in clips.iterdir() if path.suffix in (".wav", ".flac", ".mp3", ".ogg"))
    if not files:
        raise click.ClickException(f"{clips} has no audio file (.wav, .flac, .mp3, .ogg)")
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch) / "base"
        shutil.copytree(checkpoint, base)
        update_pause(base, {"calibration": None, "tau_pause": 1.0, "max_pauses": 1})
        found = Bench(base, files, Path(scratch))
        ratio, medians = found.step_ratio(rounds)
        gap, difference = found.gap_and_resume()
        result = {
            "grpo_step_ratio_vs_naive": round(ratio, 4),
            "sync_logprob_gap_fp32": gap,
            "resume_max_diff": difference,
            "forced_token_grad": found.forced_gradient(),
            "naive_logprob_gap": medians.pop("naive_gap"),
            "ms_per_token": {name: round(value, 3) for name, value in medians.items()},
            "threads": torch.get_num_threads(),
        }
    click.echo(json.dumps(result))


if __name__ == "__main__":
    bench()
