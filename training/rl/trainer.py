"""Train with GRPO and pauses: Stage II (method, section 6). The serving engine and gate sample, the trainer scores.

A step has these parts:

- Copy the policy's weights into the engine.
- Sample groups of rollouts and compute their rewards.
- Redraw groups with equal rewards.
- Score every rollout with the policy and with the reference.
- Update the weights.

Tokens outside the policy's choice (pauses, spans, forced tags) have no loss, no divergence and no confidence. A clip is
encoded once for its whole group.

Axes: G rollouts of a group, N scored tokens of all rollouts.
"""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from hyper_model.audio_encoder import LogMel
from hyper_model.pause import GateSettings
from hyper_model.trace import PauseMode, Termination
from hyper_model.trace_parser import ParsedTrace, TraceFormat, parse
from training.export import RunModel
from training.policy import IGNORED, Row, Scores, branch, merged, named_tensors, pack
from training.recipes import GrpoRecipe
from training.rl.losses import (
    Bounds,
    TauTracker,
    Tokens,
    advantages,
    confidence_weights,
    policy_loss,
    token_weights,
)
from training.rl.rewards import REWARDS, Reward, reward
from training.rl.rollout import Prompt, Rollout, banned_ids
from training.rl.tasks import Task, Tasks
from training.trainer import PolicyTrainer, TrainingError

BASELINE_STEPS = 10
"""Number of first steps with their mean length and form as the baseline for collapse detection."""
MIN_FORM_FALL = 0.2
"""Minimum fall of the share of strict traces for a collapse."""
MAX_GAPS = 3
"""Number of consecutive steps with sampler and trainer apart before the run stops."""
COMPLETIONS_FILE = "completions.jsonl"


class Backend(Protocol):
    """A sampler of rollouts with given weights."""

    def sync(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load a policy's weights, by their names on disk."""
        ...

    def rollouts(
        self,
        prompts: Sequence[Prompt],
        *,
        group_size: int,
        seeds: Sequence[int],
        temperature: float,
        max_tokens: int,
        gate: GateSettings | None,
    ) -> list[list[Rollout]]:
        """Sample a group per prompt."""
        ...


@dataclass(frozen=True, eq=False)
class Group:
    """The rollouts of a task with their rewards."""

    task: Task
    rollouts: Sequence[Rollout]
    parsed: Sequence[ParsedTrace]
    rewards: Sequence[Reward]

    @property
    def is_flat(self) -> bool:
        """Return True if all rewards are equal, so that the group has no gradient."""
        return not any(advantages([earned.total for earned in self.rewards], is_divided=False))


@dataclass(frozen=True, eq=False)
class _Chunk:
    """Rollouts of one task in one row, each with its advantage and a flag per token for scored tokens."""

    task: Task
    rollouts: Sequence[tuple[Rollout, tuple[float, list[bool]]]]


@dataclass
class CollapseDetector:
    """Detector of much shorter or malformed traces, the paper's collapse near step 200.

    Attributes:
        num_steps, length, form: Number of steps, with their smoothed mean length in tokens and share of strict traces.
        first_length, first_form: The same over the first steps.
    """

    num_steps: int = 0
    length: float = 0.0
    form: float = 0.0
    first_length: float = 0.0
    first_form: float = 0.0

    def update(self, length: float, form: float, recipe: GrpoRecipe) -> str | None:
        """Update with a step's figures; return the reason to stop the run, or None."""
        self.num_steps += 1
        share = max(1 / self.num_steps, 1 / BASELINE_STEPS)
        self.length += share * (length - self.length)
        self.form += share * (form - self.form)
        if self.num_steps <= BASELINE_STEPS:
            self.first_length, self.first_form = self.length, self.form
            return None
        if self.length < recipe.collapse_length * self.first_length:
            return f"traces fell from {self.first_length:.0f} to {self.length:.0f} tokens"
        # If few traces were strict at the beginning, their share is noise.
        if self.form < recipe.collapse_format * self.first_form and self.first_form - self.form > MIN_FORM_FALL:
            return f"strict traces fell from {self.first_form:.0%} to {self.form:.0%}"
        return None


@dataclass
class Progress:
    """State of a run besides weights and optimizer.

    Attributes:
        next_task: Number of the first task not drawn by any rank.
        tau: The controlled threshold.
        num_gaps: Consecutive steps with sampler and trainer apart.
        stopped: Reason for an early end, or None.
    """

    tau: TauTracker
    next_task: int = 0
    num_gaps: int = 0
    watch: CollapseDetector = field(default_factory=CollapseDetector)
    stopped: str | None = None


class GrpoTrainer(PolicyTrainer):
    """Trainer of Stage II on rollouts.

    Args:
        gate: Pause settings of the rollouts; None disables pauses.
    """

    recipe: GrpoRecipe

    def __init__(
        self,
        model: RunModel,
        recipe: GrpoRecipe,
        run_dir: Path,
        tasks: Tasks,
        backend: Backend,
        *,
        gate: GateSettings | None,
    ) -> None:
        self.tasks, self.backend, self.gate = tasks, backend, gate
        tracker = TauTracker(0.0, recipe.wanted_pauses)
        if gate is not None:
            tracker = TauTracker(gate.tau_pause, recipe.wanted_pauses, lowest=gate.tau_abort)
        self.progress = Progress(tracker)
        self.log_mel = LogMel(model.config["audio_config"]["num_mel_bins"])
        self.banned = torch.tensor(banned_ids(model.tokenizer, gate))
        self.groups: list[Group] = []
        self.buffer: list[list[dict[str, Any]]] = []
        # Per batch of this step: number of tokens, and figures for the log.
        self.found: list[tuple[int, dict[str, float]]] = []
        # Copied before a resumed run loads its weights, so the reference has the run's initial weights.
        self.reference = None
        if recipe.kl_weight and not model.is_adapted:
            self.reference = copy.deepcopy(model.policy).requires_grad_(False).eval()
            if recipe.autocast:
                # Its forward pass runs in this precision anyway, and it takes half of the memory.
                self.reference.to(getattr(torch, recipe.export_dtype))
        super().__init__(model, recipe, run_dir)
        if recipe.batch_size % (self.args.world_size * recipe.updates_per_rollout):
            raise TrainingError(
                f"batch_size {recipe.batch_size} must be a multiple of the {self.args.world_size} ranks times "
                f"{recipe.updates_per_rollout} updates"
            )
        if recipe.lora is not None and recipe.lora.dropout:
            raise TrainingError("adapters with dropout score other policies than the one that samples: set it to 0")
        if recipe.fsdp and recipe.backend == "transformers":
            raise TrainingError("a sharded policy cannot generate by itself: use the vllm backend, or no fsdp")
        if gate is not None and recipe.wanted_pauses > gate.max_pauses:
            raise TrainingError(f"wanted_pauses {recipe.wanted_pauses:g} is above the {gate.max_pauses} of the gate")
        if recipe.save_every_steps % recipe.updates_per_rollout:
            raise TrainingError("save_every_steps must be a multiple of updates_per_rollout: rollouts are not saved")

    def make_step(self, step: int) -> int:
        """Return the step's number; its rollouts need the current weights, so nothing is prepared ahead."""
        return step

    def own_state(self) -> dict[str, Any]:
        """Return the position in the tasks, the gate's threshold and the state of the collapse detector."""
        return asdict(self.progress)

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        """Restore the state of `own_state`."""
        # A resumed run after an early stop starts its detector anew.
        watch = CollapseDetector() if state["stopped"] else CollapseDetector(**state["watch"])
        # States of earlier releases may lack the lower limit of the threshold.
        tau = TauTracker(**{"lowest": self.progress.tau.lowest, **state["tau"]})
        self.progress = Progress(**{**state, "tau": tau, "watch": watch, "stopped": None})

    def micro_batches(self, prepared: int) -> list[dict[str, Any]]:
        """Sample when the last rollouts are used up, and return this update's share of the packed batches."""
        num_updates = self.recipe.updates_per_rollout
        turn = prepared % num_updates
        if turn == 0 or not self.buffer:
            self.groups = self._collect()
            size = len(self.groups) // num_updates
            # Pack all updates now: the ratio refers to the policy before the first update.
            self.buffer = [self.packed(self.groups[i * size : (i + 1) * size]) for i in range(num_updates)]
        return self.buffer[turn]

    def micro_loss(self, model: Any, micro: dict[str, Any]) -> torch.Tensor:
        """Return a batch's share of the loss."""
        recipe = self.recipe
        scores = self.score(model, micro["batch"])
        if not len(scores.logprobs_N):
            return scores.logprobs_N.sum()
        tokens = Tokens(**micro["tokens"])
        bounds = Bounds(recipe.clip_low, recipe.clip_high, recipe.kl_weight, recipe.max_importance)
        loss, figures = policy_loss(scores.logprobs_N, tokens, bounds)
        figures["entropy"] = float(scores.entropies_N.mean())
        self.found.append((len(scores.logprobs_N), figures))
        return loss

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Run a step, and check the agreement of sampler and trainer.

        Raises:
            TrainingError: They disagreed for several consecutive steps; importance weights cannot correct this.
        """
        self.found = []
        loss = super().training_step(model, inputs, num_items_in_batch)
        num_tokens = max(1.0, self.sum_over_ranks(sum(num for num, _ in self.found)))
        means = {
            name: self.sum_over_ranks(sum(num * figures[name] for num, figures in self.found)) / num_tokens
            for name in ("gap", "importance_ess", "clipped", "entropy", *(["kl"] if self.recipe.kl_weight else []))
        }
        gap_max = max((figures["gap_max"] for _, figures in self.found), default=0.0)
        self.record(gap_max=self.max_over_ranks(gap_max), **means)
        gap = means["gap"]
        self.progress.num_gaps = self.progress.num_gaps + 1 if gap > self.recipe.max_gap else 0
        if self.progress.num_gaps >= MAX_GAPS:
            raise TrainingError(
                f"step {self.state.global_step + 1}: for {MAX_GAPS} steps the log-probabilities of engine and trainer "
                f"differed by {gap:.2g} on average, above max_gap {self.recipe.max_gap:g}: have both the same weights?"
            )
        is_last_update = (self.state.global_step + 1) % self.recipe.updates_per_rollout == 0
        if self.progress.stopped and is_last_update:
            self.control.should_training_stop = True
            self.control.should_save = True
        return loss

    def _on_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.args.device)

    def sync(self) -> None:
        """Copy the policy's weights into the engine."""
        with merged(self.model) as whole:  # pyright: ignore[reportArgumentType]
            self.backend.sync(named_tensors(whole))

    def _collect(self) -> list[Group]:
        """Sample this rank's share of the groups of a step."""
        recipe, progress = self.recipe, self.progress
        started_s = time.monotonic()
        self.sync()
        synced_s = time.monotonic()
        gate = None if self.gate is None else replace(self.gate, tau_pause=progress.tau.tau)
        num_wanted = recipe.batch_size // self.args.world_size
        useful: list[Group] = []
        flat: list[Group] = []
        for _ in range(recipe.max_redraws + 1):
            num_missing = num_wanted - len(useful)
            first = progress.next_task + self.args.process_index * num_wanted
            progress.next_task += self.args.world_size * num_wanted
            for group in self.sample(range(first, first + num_missing), gate):
                (flat if group.is_flat else useful).append(group)
            if len(useful) == num_wanted:
                break
        # Ranks may differ in their number of draws; the next draw begins beyond all of them.
        progress.next_task = int(self.max_over_ranks(progress.next_task))
        groups = [*useful, *flat][:num_wanted]
        # Record all sampled groups, so that always solved and never solved prompts stay in the figures.
        self._note_groups([*useful, *flat], len(flat))
        self._write_completions(groups[0])
        self.record(sync_s=synced_s - started_s, rollout_s=time.monotonic() - synced_s)
        return groups

    def sample(self, numbers: Iterable[int], gate: GateSettings | None) -> list[Group]:
        """Sample and reward a group per task."""
        recipe = self.recipe
        tasks = [(number, self.tasks.draw(number)) for number in numbers]
        sampled = self.backend.rollouts(
            [task.prompt for _, task in tasks],
            group_size=recipe.group_size,
            seeds=[_seed(recipe.seed, number) for number, _ in tasks],
            temperature=recipe.temperature,
            max_tokens=recipe.max_tokens,
            gate=gate,
        )
        groups: list[Group] = []
        for (_, task), rollouts in zip(tasks, sampled, strict=True):
            parsed = [self._read(rollout) for rollout in rollouts]
            earned = [reward(trace, task.truth, recipe.weights, recipe.trace_length) for trace in parsed]
            groups.append(Group(task, rollouts, parsed, earned))
        return groups

    def _read(self, rollout: Rollout) -> ParsedTrace:
        return parse(
            rollout.token_ids,
            self.run_model.tokenizer,
            termination_hint=Termination.TRUNCATED if rollout.is_cut else Termination.COMPLETE,
            pause_mode=self.gate.mode if self.gate else PauseMode.PARALLEL,
            latent_tokens=self.gate.latent_tokens if self.gate else None,
        )

    def _note_groups(self, groups: Sequence[Group], num_flat: int) -> None:
        """Record the step's figures over all ranks, move the threshold and check for a collapse."""
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        earned = [each for group in groups for each in group.rewards]
        parsed = [each for group in groups for each in group.parsed]
        num = self.sum_over_ranks(len(rollouts))

        def mean(values: Iterable[float]) -> float:
            return self.sum_over_ranks(sum(values)) / num

        length = mean(sum(each.section_num_tokens.values()) for each in parsed)
        strict = mean(each.format is TraceFormat.STRICT for each in parsed)
        pauses = mean(rollout.gate.num_pauses if rollout.gate else 0 for rollout in rollouts)
        self.record(
            reward=mean(each.total for each in earned),
            reward_background=mean(each.background_gate for each in earned),
            length=length,
            strict=strict,
            pauses=pauses,
            tau_pause=self.progress.tau.tau,
            aborted=mean(bool(rollout.gate and rollout.gate.is_aborted) for rollout in rollouts),
            cut=mean(rollout.is_cut for rollout in rollouts),
            flat_groups=self.sum_over_ranks(num_flat) / self.args.world_size,
        )
        for name in REWARDS:
            known = [value for each in earned if (value := each.parts[name]) is not None]
            num_known = self.sum_over_ranks(len(known))
            total = self.sum_over_ranks(sum(known))
            if num_known:
                self.record(**{f"reward_{name}": total / num_known})
        self.progress.tau.update(pauses)
        self.progress.stopped = self.progress.watch.update(length, strict, self.recipe)

    def _write_completions(self, group: Group) -> None:
        if not self.is_world_process_zero():
            return
        best = max(range(len(group.rewards)), key=lambda i: group.rewards[i].total)
        row = {
            "step": self.state.global_step + 1,
            "question": group.task.truth.question,
            "choices": group.task.truth.choices,
            "answer": group.task.truth.answer,
            "rewards": [round(each.total, 4) for each in group.rewards],
            "best": {
                "total": group.rewards[best].total,
                "background_gate": group.rewards[best].background_gate,
                **group.rewards[best].parts,
            },
            "completion": group.parsed[best].raw,
        }
        with (self.run_dir / COMPLETIONS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def packed(self, groups: Sequence[Group]) -> list[dict[str, Any]]:
        """Pack groups into batches with all inputs of the loss, the reference's log-probabilities included."""
        recipe = self.recipe
        weighed = [self._weighed(group) for group in groups]
        counts = [sum(scored) for _, scored in (pair for pairs_of_group in weighed for pair in pairs_of_group)]
        total = self.sum_over_ranks(sum(counts))
        num_rollouts = self.sum_over_ranks(sum(num > 0 for num in counts))
        chunks: list[_Chunk] = []
        at_once = min(recipe.rows_at_once, recipe.group_size)
        for group, pairs in zip(groups, weighed, strict=True):
            whole = list(zip(group.rollouts, pairs, strict=True))
            chunks += [_Chunk(group.task, whole[at : at + at_once]) for at in range(0, len(whole), at_once)]
        chunks_at_once = max(1, recipe.rows_at_once // at_once)
        batches = [
            self._batch(chunks[at : at + chunks_at_once], total, num_rollouts)
            for at in range(0, len(chunks), chunks_at_once)
        ]
        if self.recipe.kl_weight:
            started_s = time.monotonic()
            for micro in batches:
                micro["tokens"]["reference_logprobs_N"] = self._reference_logprobs(micro["batch"])
            self.record(reference_s=time.monotonic() - started_s)
        if recipe.updates_per_rollout > 1:
            for micro in batches:
                micro["tokens"]["old_logprobs_N"] = self._logprobs(self.model, micro["batch"])
        return batches

    def _weighed(self, group: Group) -> list[tuple[float, list[bool]]]:
        """Return (advantage, flags of scored tokens) of each rollout."""
        recipe = self.recipe
        gains = advantages([earned.total for earned in group.rewards], is_divided=recipe.divides_advantages)
        weights = [1.0] * len(gains)
        if recipe.lgc_weights:
            weights = confidence_weights(
                [rollout.gate.lowest if rollout.gate else None for rollout in group.rollouts],
                [bool(rollout.gate and rollout.gate.is_aborted) for rollout in group.rollouts],
            )
        weighed: list[tuple[float, list[bool]]] = []
        for rollout, gain, weight in zip(group.rollouts, gains, weights, strict=True):
            is_left_out = rollout.is_cut and recipe.overlong == "mask"
            weighed.append((gain * weight, [not forced and not is_left_out for forced in rollout.is_forced]))
        return weighed

    def _batch(self, chunks: Sequence[_Chunk], total: float, num_rollouts: float) -> dict[str, Any]:
        """Pack chunks into one row each; the prompt and its clip occur once per row."""
        tokenizer, recipe = self.run_model.tokenizer, self.recipe
        counts = [sum(scored) for chunk in chunks for _, (_, scored) in chunk.rollouts]
        weights = iter(
            token_weights(counts, recipe.loss, num_rollouts=num_rollouts, total=total, limit=recipe.max_tokens)
        )
        rows: list[Row] = []
        columns: dict[str, list[float]] = {"advantages_N": [], "weights_N": [], "sampler_logprobs_N": []}
        for chunk in chunks:
            prompt = chunk.task.prompt
            audio_at = prompt.token_ids.index(tokenizer.audio_id)
            completions: list[tuple[Sequence[int], list[int]]] = []
            for rollout, (gain, scored) in chunk.rollouts:
                targets = [token if on else IGNORED for token, on in zip(rollout.token_ids, scored, strict=True)]
                completions.append((rollout.token_ids, targets))
                columns["advantages_N"] += [gain] * sum(scored)
                columns["weights_N"] += [next(weights)] * sum(scored)
                columns["sampler_logprobs_N"] += [p for p, on in zip(rollout.logprobs, scored, strict=True) if on]
            rows.append(branch(prompt.token_ids, completions, audio_at, len(rows)))
        batch = self.pack(rows, [chunk.task.prompt.samples_S for chunk in chunks])
        return {"batch": batch, "tokens": {name: torch.tensor(values) for name, values in columns.items()}}

    def pack(self, rows: Sequence[Row], clips: Sequence[np.ndarray]) -> dict[str, Any]:
        """Build the arguments of `score`."""
        mels = [self.log_mel(samples_S) for samples_S in clips]
        return pack(rows, mels, pad_id=self.run_model.tokenizer.end_of_text_id, is_encoded=False)

    def score(self, model: Any, batch: dict[str, Any]) -> Scores:
        """Score a batch with a policy, over the sampler's choices."""
        return model(**batch, banned_ids=self._on_device(self.banned), temperature=self.recipe.temperature)

    @torch.no_grad()
    def _logprobs(self, model: Any, batch: dict[str, Any]) -> torch.Tensor:
        batch = self._prepare_inputs(batch)
        with self.compute_loss_context_manager():
            return self.score(model, batch).logprobs_N

    def _reference_logprobs(self, batch: dict[str, Any]) -> torch.Tensor:
        if self.reference is not None:
            return self._logprobs(self.reference.to(self.args.device), batch)
        policy = self.run_model.policy
        with policy.disable_adapter() if self.run_model.is_adapted else nullcontext():
            return self._logprobs(self.model, batch)


def _seed(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:7], "little")
