"""Common base of Stage I and Stage II: transformers' Trainer with our own loss, saving, resuming and run log.

A run directory holds `recipe.json`, `log.jsonl`, TensorBoard's event files and `checkpoint-STEP/`; at the end also
`curves.png` and `report.md`. A checkpoint has `model/` (a HyPeR checkpoint) or `adapter/` (LoRA weights). It also has
the library's optimizer, schedule and random states, and our `state.json`. The file `complete` marks a whole checkpoint,
so a run never resumes from half-written files after a full disk or a kill.

Four functions of the library are replaced, since they fail silently for this architecture:

- Loading a checkpoint loads none of its weights.
- Saving names the weights wrongly.
- The loss is divided wrongly over accumulated batches.
- The log shows an average in place of a non-finite loss.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments

from hyper_model.errors import HyperError
from training.recipes import R, Recipe, RecipeError, recipe_from_dict

if TYPE_CHECKING:
    from training.export import RunModel

COMPLETE = "complete"
LOG_FILE = "log.jsonl"
RECIPE_FILE = "recipe.json"
LEFT_OUT_FILE = "left_out.jsonl"
"""Rows of the data excluded from a run, each with its place and the reason."""


class TrainingError(HyperError):
    """A run cannot start, continue or save; the message gives the reason. The last whole checkpoint stays."""


class MasterAdamW(torch.optim.AdamW):
    """AdamW on float32 copies of parameters of another dtype; the parameters receive the rounded result.

    bfloat16 parameters stop moving once a step is below their last bit. With float32 copies, forward and backward run
    in bfloat16 without this loss. The optimizer steps on the copies, with gradients from the parameters.
    """

    def __init__(self, groups: list[dict[str, Any]], **options: Any) -> None:
        self.working = [parameter for group in groups for parameter in group["params"]]
        copies = iter([p.detach().clone().float().requires_grad_() for p in self.working])
        super().__init__([group | {"params": [next(copies) for _ in group["params"]]} for group in groups], **options)
        self.masters = [parameter for group in self.param_groups for parameter in group["params"]]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take a step on the copies and round the parameters."""
        for working, master in zip(self.working, self.masters, strict=True):
            master.grad = None if working.grad is None else working.grad.float()
        loss = super().step(closure)
        self._round()
        return loss

    @torch.no_grad()
    def _round(self) -> None:
        for working, master in zip(self.working, self.masters, strict=True):
            working.copy_(master)

    def state_dict(self) -> dict[str, Any]:
        """Return the moments and the float32 copies."""
        return super().state_dict() | {"masters": [master.detach() for master in self.masters]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore moments and copies, and round the parameters."""
        for master, saved in zip(self.masters, state_dict["masters"], strict=True):
            master.copy_(saved)
        super().load_state_dict({name: value for name, value in state_dict.items() if name != "masters"})
        self._round()


class _Steps(IterableDataset[Any]):
    """The steps of a run as a data set: step s is `make(s)`, in any process and at any time."""

    def __init__(self, make: Callable[[int], Any], first: Callable[[], int]) -> None:
        self.make, self.first = make, first

    def __iter__(self) -> Iterator[Any]:
        # With workers, the loader takes one batch of each worker in turn, so this gives the steps in order.
        worker = get_worker_info()
        step, stride = self.first(), 1
        if worker is not None:
            step, stride = step + worker.id, worker.num_workers
        while True:
            yield self.make(step)
            step += stride


class PolicyTrainer(Trainer, ABC):
    """Trainer of a policy by the loss of a subclass.

    Subclasses define a step with three methods. `make_step` prepares it, possibly in a loader's worker. `micro_batches`
    splits it into batches small enough for the memory. The sum of `micro_loss` over all batches and ranks is the step's
    loss.

    Args:
        model: The trained model with its export.
        run_dir: The run directory (see the module's docstring).
        num_workers: Processes for preparing steps ahead.
    """

    def __init__(self, model: RunModel, recipe: Recipe, run_dir: Path, *, num_workers: int = 0) -> None:
        self.run_model, self.recipe, self.run_dir, self.num_workers = model, recipe, run_dir, num_workers
        self.measured: defaultdict[str, list[float]] = defaultdict(list)
        self.started_s = time.monotonic()
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(run_dir / "tensorboard")
        arguments = TrainingArguments(
            output_dir=str(run_dir),
            max_steps=recipe.num_steps,
            per_device_train_batch_size=1,
            learning_rate=recipe.learning_rate,
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr": recipe.min_learning_rate},
            warmup_steps=recipe.warmup_steps,
            max_grad_norm=recipe.max_grad_norm,
            logging_steps=recipe.log_every_steps,
            save_steps=recipe.save_every_steps,
            save_total_limit=2,
            seed=recipe.seed,
            # Set explicitly: without it, ranks on CPU do not connect, and each trains alone.
            use_cpu=not torch.cuda.is_available(),
            ddp_find_unused_parameters=False,
            bf16=recipe.autocast,
            gradient_checkpointing=recipe.gradient_checkpointing,
            ignore_data_skip=True,
            remove_unused_columns=False,
            disable_tqdm=True,
            report_to=["tensorboard"],
            logging_nan_inf_filter=False,
            fsdp=recipe.fsdp or None,
            fsdp_config={"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["Qwen2DecoderLayer"]}
            if recipe.fsdp
            else None,
        )
        if arguments.n_gpu > 1:
            raise TrainingError(
                f"{arguments.n_gpu} GPUs are visible to one process: start one each with --processes, or show it one "
                "with CUDA_VISIBLE_DEVICES"
            )
        if recipe.batch_size % arguments.world_size:
            raise TrainingError(
                f"batch_size {recipe.batch_size} must be a multiple of the {arguments.world_size} ranks"
            )
        if recipe.fsdp and (recipe.dtype != "float32" or recipe.lora is not None):
            raise TrainingError("fsdp takes whole float32 weights (autocast runs them in bfloat16), and no adapters")
        if arguments.world_size != int(os.environ.get("WORLD_SIZE", "1")):
            raise TrainingError(
                f"{os.environ['WORLD_SIZE']} ranks were started, and the trainer sees {arguments.world_size} of them"
            )
        super().__init__(model=model.policy, args=arguments, train_dataset=_Steps(self.make_step, self._next_step))
        # The library's callback prints dictionaries; ours writes a file and shows a bar.
        for callback in [c for c in self.callback_handler.callbacks if type(c).__name__ == "PrinterCallback"]:
            self.remove_callback(callback)
        self.add_callback(_Records(self))

    @abstractmethod
    def make_step(self, step: int) -> Any:
        """Prepare a step; a pure function of step and rank."""

    @abstractmethod
    def micro_batches(self, prepared: Any) -> list[dict[str, Any]]:
        """Split a step into batches, each with all inputs of its share of the loss."""

    @abstractmethod
    def micro_loss(self, model: Any, micro: dict[str, Any]) -> torch.Tensor:
        """Return a batch's share of the step's loss."""

    def own_state(self) -> dict[str, Any]:
        """Return further state for resuming, as JSON."""
        return {}

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        """Restore the state of `own_state`."""

    def record(self, **figures: float) -> None:
        """Record figures of this step; the next line of the log has their mean."""
        for name, value in figures.items():
            self.measured[name].append(float(value))

    def _next_step(self) -> int:
        return self.state.global_step

    # The following methods replace those of the library.

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return a loader of whole steps; every rank prepares its own share, so the loader splits nothing."""
        dataset: Any = self.train_dataset
        return DataLoader(dataset, batch_size=None, num_workers=self.num_workers)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Create AdamW without decay on vectors; policies of another dtype than float32 get float32 copies."""
        if self.optimizer is None:
            parameters = [p for p in (model or self.model).parameters() if p.requires_grad]  # pyright: ignore[reportOptionalMemberAccess]
            groups: list[dict[str, Any]] = [
                {"params": [p for p in parameters if p.dim() > 1], "weight_decay": self.recipe.weight_decay},
                {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
            ]
            is_whole = all(p.dtype == torch.float32 for p in parameters)
            kind = torch.optim.AdamW if is_whole else MasterAdamW
            self.optimizer = kind(groups, lr=self.recipe.learning_rate, betas=(0.9, self.recipe.adam_beta2), fused=True)
        return self.optimizer

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Run forward and backward over the batches of a step; gradients synchronise in the last batch."""
        model.train()
        started_s = time.monotonic()
        micros = self.micro_batches(inputs)
        total = torch.zeros((), device=self.args.device)
        for index, micro in enumerate(micros):
            # Shards are reduced at once; otherwise every rank would hold the gradients of all shards.
            is_synced = index == len(micros) - 1 or self.is_fsdp_enabled
            with contextlib.nullcontext() if is_synced else self.accelerator.no_sync(model):
                with self.compute_loss_context_manager():
                    loss = self.micro_loss(model, self._prepare_inputs(micro))
                # Gradients are averaged over ranks, but the loss is their sum.
                self.accelerator.backward(loss * self.args.world_size)
            total += loss.detach()
        if not math.isfinite(float(total)):
            raise TrainingError(f"step {self.state.global_step + 1}: the loss is {float(total)}")
        self.record(step_s=time.monotonic() - started_s)
        return total * self.args.world_size

    def sum_over_ranks(self, value: float) -> float:
        """Return the sum of a number over all ranks."""
        if self.args.world_size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=self.args.device)
        torch.distributed.all_reduce(tensor)
        return float(tensor)

    def _get_num_items_in_batch(self, batch_samples: Any, device: Any) -> None:
        # The subclasses count their own tokens.
        return None

    def max_over_ranks(self, value: float) -> float:
        """Return the maximum of a number over all ranks."""
        if self.args.world_size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=self.args.device)
        torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX)
        return float(tensor)

    def floating_point_ops(self, inputs: Any) -> int:
        """Return 0; the library counts by `input_ids`, absent here."""
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the means of the figures recorded since the last line."""
        means = {name: sum(values) / len(values) for name, values in self.measured.items() if values}
        self.measured.clear()
        super().log(logs | means, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        assert output_dir is not None
        # The library gathers only shards; an unsharded policy is saved from its own parameters.
        self.run_model.save(Path(output_dir), state_dict if self.is_fsdp_enabled else None)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = self.run_dir / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                (folder / "state.json").write_text(json.dumps(self.own_state()), encoding="utf-8")
                (folder / COMPLETE).touch()
        except (OSError, RuntimeError, SafetensorError) as error:
            # For a full disk, torch and safetensors raise errors of their own with unclear messages.
            kept = last_checkpoint(self.run_dir)
            raise TrainingError(
                f"step {self.state.global_step} cannot be saved: {error}; "
                f"{f'{kept} is whole: --resume goes on from it' if kept else 'nothing was saved before'}"
            ) from error

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        self.run_model.load(folder, model)
        self.load_own_state(json.loads((folder / "state.json").read_text(encoding="utf-8")))


class _Records(TrainerCallback):
    """Writer of `log.jsonl` and a progress bar, on the first rank only."""

    def __init__(self, trainer: PolicyTrainer) -> None:
        self.trainer, self.bar = trainer, None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Open the bar, and drop log lines of repeated steps."""
        if not state.is_world_process_zero:
            return
        path = self.trainer.run_dir / LOG_FILE
        if path.exists():
            rows = read_log(self.trainer.run_dir)
            rows_before = [row for row in rows if row["step"] <= state.global_step]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows_before), encoding="utf-8")
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc=self.trainer.recipe.name, unit="step", smoothing=0.1
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Advance the bar."""
        if self.bar is not None:
            self.bar.update()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Write a log line; the library's final summary has no step and is skipped."""
        if self.bar is None or not logs or "train_runtime" in logs:
            return
        row = {"step": state.global_step} | {name: value for name, value in logs.items() if name != "epoch"}
        with (self.trainer.run_dir / LOG_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        shown = {name: f"{logs[name]:.3g}" for name in self.trainer.recipe.shown if name in logs}
        self.bar.set_postfix(shown)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()


def read_log(run_dir: Path) -> list[dict[str, Any]]:
    """Read the lines of a run's log, except an incomplete last line."""
    rows: list[dict[str, Any]] = []
    file = run_dir / LOG_FILE
    for line in file.read_text(encoding="utf-8").rstrip("\n").split("\n") if file.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def read_recipe(run_dir: Path) -> dict[str, Any]:
    """Read the initial recipe of a run as JSON, with the sums of its base and its data as `origin`.

    Raises:
        TrainingError: The folder holds no run.
    """
    try:
        return json.loads((run_dir / RECIPE_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise TrainingError(f"{run_dir} holds no run") from error


def started_recipe(run_dir: Path, kind: type[R]) -> R:
    """Return the initial recipe of a run; newer settings have their defaults.

    Raises:
        TrainingError: There is no run, or its recipe is of another kind.
    """
    values = {name: value for name, value in read_recipe(run_dir).items() if name != "origin"}
    try:
        return recipe_from_dict(kind, values)
    except RecipeError as error:
        raise TrainingError(f"{run_dir / RECIPE_FILE}: {error}; use a new RUN_DIR") from error


def last_checkpoint(run_dir: Path) -> Path | None:
    """Return the newest whole checkpoint of a run, or None."""
    whole = [path.parent for path in run_dir.glob(f"checkpoint-*/{COMPLETE}")]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], inside: str = "") -> list[str]:
    """List the different values, those of nested settings by their full name."""
    differences: list[str] = []
    for name in sorted({*before, *now}):
        one, other = before.get(name), now.get(name)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            differences += _differences(one, other, f"{inside}{name}.")
        elif one != other:
            differences.append(f"{inside}{name} {json.dumps(one)}, now {json.dumps(other)}")
    return differences


def check_run(run_dir: Path, recipe: Recipe, origin: Mapping[str, str | None]) -> None:
    """Check the recipe, base and data of a run against its recorded values.

    Raises:
        TrainingError: They differ; the message names the differences.
    """
    name = read_recipe(run_dir)["name"]
    if name != recipe.name:
        raise TrainingError(f"{run_dir} holds a run of {name}, not of {recipe.name}. Use a new RUN_DIR.")
    before = asdict(started_recipe(run_dir, type(recipe))) | {"origin": read_recipe(run_dir).get("origin")}
    now = asdict(recipe) | {"origin": dict(origin)}
    changed = _differences(before, now)
    if changed:
        raise TrainingError(
            f"{run_dir} was started with {'; '.join(changed)}. Use the original values or a new RUN_DIR."
        )


def prepare_run_dir(
    run_dir: Path, recipe: Recipe, *, is_resumed: bool, origin: Mapping[str, str | None] | None = None
) -> Path | None:
    """Create a run directory, or check an existing one; return the checkpoint to resume from.

    Half-written checkpoints of a resumed run are removed. A run without any output may resume with another recipe.

    Args:
        origin: Sums of the run's base and data.

    Raises:
        TrainingError: The directory holds a run and `is_resumed` is False, or its recipe, base or data differ.
    """
    origin, file = origin or {}, run_dir / RECIPE_FILE
    if file.exists() and not is_resumed:
        raise TrainingError(f"{run_dir} holds a run already: --resume goes on with it, or choose another folder")
    if file.exists() and not _is_bare(run_dir):
        check_run(run_dir, recipe, origin)
        for folder in run_dir.glob("checkpoint-*"):
            if not (folder / COMPLETE).exists():
                shutil.rmtree(folder)
        return last_checkpoint(run_dir)
    if is_resumed and not file.exists():
        raise TrainingError(f"{run_dir} holds no run to resume")
    run_dir.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(asdict(recipe) | {"origin": dict(origin)}, indent=2) + "\n", encoding="utf-8")
    return None


def write_left_out(run_dir: Path, reasons: Mapping[str, str]) -> None:
    """Record the rows excluded from a run, as place -> reason."""
    lines = [json.dumps({"row": row, "reason": reason}) for row, reason in reasons.items()]
    (run_dir / LEFT_OUT_FILE).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def read_left_out(run_dir: Path) -> dict[str, str]:
    """Return the rows excluded from a run, as place -> reason."""
    file = run_dir / LEFT_OUT_FILE
    if not file.exists():
        return {}
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    return {row["row"]: row["reason"] for row in rows}


def leave_run_dir(run_dir: Path) -> None:
    """Remove the files of `prepare_run_dir` after a failed start, so that another run can use the directory."""
    if _is_bare(run_dir):
        for name in (RECIPE_FILE, LEFT_OUT_FILE):
            (run_dir / name).unlink(missing_ok=True)


def _is_bare(run_dir: Path) -> bool:
    return all(path.name in (RECIPE_FILE, LEFT_OUT_FILE) for path in run_dir.iterdir())
