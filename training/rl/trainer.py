"""Stage II: GRPO with pauses (method, section 6). The engine and the gate that serve write, the trainer scores.

One step: put the policy's weights into the engine; sample groups; reward them; draw others in the place of groups whose
rewards are all equal; score every rollout with the policy and with the one at the beginning; step. What nobody chose
(pauses, spans, forced tags) has no loss, no divergence and no confidence. A clip is encoded once for its whole group.

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
from training.rl.rewards import Reward, reward
from training.rl.rollout import Prompt, Rollout, banned_ids
from training.rl.tasks import Task, Tasks
from training.trainer import PolicyTrainer, TrainingError

BASELINE_STEPS = 10
"""Steps whose mean length and form a collapse is told by."""
MIN_FORM_FALL = 0.2
"""How much of all traces must have lost their form for it to be a collapse."""
MAX_GAPS = 3
"""Steps in a row in which sampler and trainer may disagree."""
COMPLETIONS_FILE = "completions.jsonl"


class Backend(Protocol):
    """Writes rollouts with weights that it is given."""

    def sync(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Takes a policy's weights, under their names on disk."""
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
        """Samples a group a prompt."""
        ...


@dataclass(frozen=True, eq=False)
class Group:
    """Holds a task's rollouts and what they earned."""

    task: Task
    rollouts: Sequence[Rollout]
    parsed: Sequence[ParsedTrace]
    rewards: Sequence[Reward]

    @property
    def is_flat(self) -> bool:
        """Whether all rewards are equal, so that nothing can be learnt from the group."""
        return not any(advantages([each.total for each in self.rewards], is_divided=False))


@dataclass(frozen=True, eq=False)
class _Chunk:
    """Rollouts of one task that are scored together: each with its advantage, and which of its tokens are scored."""

    task: Task
    rollouts: Sequence[tuple[Rollout, tuple[float, list[bool]]]]


@dataclass
class CollapseDetector:
    """Notices when traces become much shorter, or lose their form: the collapse that the paper saw near step 200.

    Attributes:
        num_steps, length, form: Steps seen, and their smoothed mean length in tokens and share of strict traces.
        first_length, first_form: The same over the first steps.
    """

    num_steps: int = 0
    length: float = 0.0
    form: float = 0.0
    first_length: float = 0.0
    first_form: float = 0.0

    def update(self, length: float, form: float, recipe: GrpoRecipe) -> str | None:
        """Looks at a step; returns why the run should end, or None."""
        self.num_steps += 1
        share = max(1 / self.num_steps, 1 / BASELINE_STEPS)
        self.length += share * (length - self.length)
        self.form += share * (form - self.form)
        if self.num_steps <= BASELINE_STEPS:
            self.first_length, self.first_form = self.length, self.form
            return None
        if self.length < recipe.collapse_length * self.first_length:
            return f"traces fell from {self.first_length:.0f} to {self.length:.0f} tokens"
        # Where few traces were strict from the beginning, their share is noise.
        if self.form < recipe.collapse_format * self.first_form and self.first_form - self.form > MIN_FORM_FALL:
            return f"strict traces fell from {self.first_form:.0%} to {self.form:.0%}"
        return None


@dataclass
class Progress:
    """Holds what a run goes on from besides weights and optimizer.

    Attributes:
        next_task: Number of the first task that no rank has drawn.
        tau: The threshold that is moved.
        num_gaps: Steps in a row in which sampler and trainer disagreed.
        stopped: Why the run ended early, or None.
    """

    tau: TauTracker
    next_task: int = 0
    num_gaps: int = 0
    watch: CollapseDetector = field(default_factory=CollapseDetector)
    stopped: str | None = None


class GrpoTrainer(PolicyTrainer):
    """Trains on rollouts.

    Args:
        gate: What rollouts pause by; None, and none does.
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
        # Of this step's batches: their tokens, and what was found about them.
        self.found: list[tuple[int, dict[str, float]]] = []
        # Made here, from the weights that the run begins with, before a resumed run loads others.
        self.reference = None
        if recipe.kl_weight and not model.is_adapted:
            self.reference = copy.deepcopy(model.policy).requires_grad_(False).eval()
            if recipe.autocast:
                # It is computed in that precision anyway, and takes half of the memory.
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
        """Returns the step's number: its rollouts come from the weights of the moment, so nothing is made ahead."""
        return step

    def own_state(self) -> dict[str, Any]:
        """Returns the place in the tasks, the gate's threshold and what is watched."""
        return asdict(self.progress)

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        """Goes on from there."""
        # A run that was stopped and is resumed all the same is watched from where it stands now.
        watch = CollapseDetector() if state["stopped"] else CollapseDetector(**state["watch"])
        # A state of a release before may not say how low the threshold may go.
        tau = TauTracker(**{"lowest": self.progress.tau.lowest, **state["tau"]})
        self.progress = Progress(**{**state, "tau": tau, "watch": watch, "stopped": None})

    def micro_batches(self, prepared: int) -> list[dict[str, Any]]:
        """Samples when the last rollouts are used up, and packs this update's share of them."""
        num_updates = self.recipe.updates_per_rollout
        turn = prepared % num_updates
        if turn == 0 or not self.buffer:
            self.groups = self._collect()
            size = len(self.groups) // num_updates
            # All of them now: what the policy thought before the first update is what its ratio is taken to.
            self.buffer = [self.packed(self.groups[i * size : (i + 1) * size]) for i in range(num_updates)]
        return self.buffer[turn]

    def micro_loss(self, model: Any, micro: dict[str, Any]) -> torch.Tensor:
        """Returns a batch's share of the loss."""
        recipe = self.recipe
        scores = self.score(model, micro["batch"])
        if not len(scores.logprobs_N):
            return scores.logprobs_N.sum()
        tokens = Tokens(**micro["tokens"])
        bounds = Bounds(recipe.clip_low, recipe.clip_high, recipe.kl_weight, recipe.max_importance)
        loss, found = policy_loss(scores.logprobs_N, tokens, bounds)
        found["entropy"] = float(scores.entropies_N.mean())
        self.found.append((len(scores.logprobs_N), found))
        return loss

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Runs a step, and looks whether sampler and trainer still agree.

        Raises:
            TrainingError: They did not for several steps in a row: importance weights cannot mend that.
        """
        self.found = []
        loss = super().training_step(model, inputs, num_items_in_batch)
        num_tokens = max(1.0, self.sum_over_ranks(sum(num for num, _ in self.found)))
        means = {
            name: self.sum_over_ranks(sum(num * found[name] for num, found in self.found)) / num_tokens
            for name in ("gap", "importance_ess", "clipped", "entropy", *(["kl"] if self.recipe.kl_weight else []))
        }
        gap_max = max((found["gap_max"] for _, found in self.found), default=0.0)
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
        """Puts the policy's weights into the engine."""
        with merged(self.model) as whole:  # pyright: ignore[reportArgumentType]
            self.backend.sync(named_tensors(whole))

    def _collect(self) -> list[Group]:
        """Samples the groups of a step: this rank's share of them."""
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
        # Ranks may have drawn unequally often; the next draw begins beyond all of them.
        progress.next_task = int(self.max_over_ranks(progress.next_task))
        groups = [*useful, *flat][:num_wanted]
        # Of all that was sampled: prompts that are always solved, or always lost, must not vanish from the figures.
        self._note_groups([*useful, *flat], len(flat))
        self._write_completions(groups[0])
        self.record(sync_s=synced_s - started_s, rollout_s=time.monotonic() - synced_s)
        return groups

    def sample(self, numbers: Iterable[int], gate: GateSettings | None) -> list[Group]:
        """Samples and rewards a group for each of these tasks."""
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
            earned = [reward(each, task.truth, recipe.weights) for each in parsed]
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
        """Keeps the step's figures, moves the threshold and looks for a collapse; over all ranks."""
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
            reward_accuracy=mean(each.accuracy for each in earned),
            reward_format=mean(each.format for each in earned),
            reward_fidelity=mean(each.fidelity for each in earned),
            reward_alignment=mean(each.alignment for each in earned),
            reward_background=mean(each.background_gate for each in earned),
            reward_length=mean(each.length for each in earned),
            length=length,
            strict=strict,
            pauses=pauses,
            tau_pause=self.progress.tau.tau,
            aborted=mean(bool(rollout.gate and rollout.gate.is_aborted) for rollout in rollouts),
            cut=mean(rollout.is_cut for rollout in rollouts),
            flat_groups=self.sum_over_ranks(num_flat) / self.args.world_size,
        )
        for name in ("environment", "speakers", "transcript"):
            known = [value for each in earned if (value := getattr(each, name)) is not None]
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
            "best": asdict(group.rewards[best]),
            "completion": group.parsed[best].raw,
        }
        with (self.run_dir / COMPLETIONS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def packed(self, groups: Sequence[Group]) -> list[dict[str, Any]]:
        """Packs groups into batches with all that the loss needs, the reference's opinion included."""
        recipe = self.recipe
        weighed = [self._weighed(group) for group in groups]
        counts = [sum(scored) for _, scored in (pair for each in weighed for pair in each)]
        total = self.sum_over_ranks(sum(counts))
        num_rollouts = self.sum_over_ranks(sum(num > 0 for num in counts))
        chunks: list[_Chunk] = []
        at_once = min(recipe.rows_at_once, recipe.group_size)
        for group, pairs in zip(groups, weighed, strict=True):
            whole = list(zip(group.rollouts, pairs, strict=True))
            chunks += [_Chunk(group.task, whole[at : at + at_once]) for at in range(0, len(whole), at_once)]
        chunks_at_once = max(1, recipe.rows_at_once // at_once)
        found = [
            self._batch(chunks[at : at + chunks_at_once], total, num_rollouts)
            for at in range(0, len(chunks), chunks_at_once)
        ]
        if self.recipe.kl_weight:
            started_s = time.monotonic()
            for micro in found:
                micro["tokens"]["reference_logprobs_N"] = self._reference_logprobs(micro["batch"])
            self.record(reference_s=time.monotonic() - started_s)
        if recipe.updates_per_rollout > 1:
            for micro in found:
                micro["tokens"]["old_logprobs_N"] = self._logprobs(self.model, micro["batch"])
        return found

    def _weighed(self, group: Group) -> list[tuple[float, list[bool]]]:
        """Returns each rollout's advantage, and which of its tokens are scored."""
        recipe = self.recipe
        gains = advantages([each.total for each in group.rewards], is_divided=recipe.divides_advantages)
        weights = [1.0] * len(gains)
        if recipe.lgc_weights:
            weights = confidence_weights(
                [rollout.gate.lowest if rollout.gate else None for rollout in group.rollouts],
                [bool(rollout.gate and rollout.gate.is_aborted) for rollout in group.rollouts],
            )
        found: list[tuple[float, list[bool]]] = []
        for rollout, gain, weight in zip(group.rollouts, gains, weights, strict=True):
            is_left_out = rollout.is_cut and recipe.overlong == "mask"
            found.append((gain * weight, [not forced and not is_left_out for forced in rollout.is_forced]))
        return found

    def _batch(self, chunks: Sequence[_Chunk], total: float, num_rollouts: float) -> dict[str, Any]:
        """Packs chunks: a row each, in which the prompt and its clip stand once."""
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
        """Builds what `score` takes."""
        mels = [self.log_mel(samples_S) for samples_S in clips]
        return pack(rows, mels, pad_id=self.run_model.tokenizer.end_of_text_id, is_encoded=False)

    def score(self, model: Any, batch: dict[str, Any]) -> Scores:
        """Scores a batch by a policy, over what the sampler could choose from."""
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
