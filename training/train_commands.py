"""`hyper train`: runs a recipe into a run directory, on one process or several."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from training.examples import Example
    from training.export import RunModel
    from training.recipes import GrpoRecipe, SftRecipe
    from training.trainer import PolicyTrainer

SEED = 0


@click.command()
@click.argument("recipe")
@click.argument("run_dir", type=click.Path(file_okay=False, path_type=Path))
@click.option("--resume", is_flag=True, help="Go on with the run in RUN_DIR from its last whole checkpoint.")
@click.option(
    "--base",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="The HyPeR checkpoint to train on; recipes that make a decoder of their own take none.",
)
@click.option(
    "--data",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Questions and clips, in any format that `hyper data check` reads.  [default: synthetic scenes under --work]",
)
@click.option(
    "--audio-root",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Where relative audio paths of --data start.  [default: its folder]",
)
@click.option(
    "--work",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("build"),
    show_default=True,
    help="Folder of assets, bank and built clips.",
)
@click.option("--export", "export_to", type=click.Path(file_okay=False, path_type=Path), help="Export here at the end.")
@click.option("--export-only", is_flag=True, help="Export the run's last checkpoint without training on.")
@click.option("--overwrite", is_flag=True, help="Replace a checkpoint that is at --export already.")
@click.option(
    "--processes",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Ranks on this machine, each with one thread on CPU. Across machines, start this command with torchrun.",
)
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="Change a setting of the recipe.")
@click.option(
    "--loader-workers", type=click.IntRange(0), default=0, show_default=True, help="Processes that read ahead."
)
def train(
    recipe: str,
    run_dir: Path,
    resume: bool,
    base: Path | None,
    data: Path | None,
    audio_root: Path | None,
    work: Path,
    export_to: Path | None,
    export_only: bool,
    overwrite: bool,
    processes: int,
    settings: tuple[str, ...],
    loader_workers: int,
) -> None:
    """Train RECIPE into RUN_DIR: Stage I (mini_sft, qwen2_audio_7b_sft) or Stage II (mini_grpo, qwen2_audio_7b_grpo).

    RUN_DIR gets checkpoints that --resume goes on from bit for bit, log.jsonl, TensorBoard files, and at the end
    curves.png, report.md and, with --export, a checkpoint to serve.
    """
    if processes > 1 and "RANK" not in os.environ:
        _launch(processes)
        return
    # One thread a process: on shared cores threads inside processes cost several times what they give.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from training.recipes import RECIPES, GrpoRecipe

    if recipe not in RECIPES:
        raise click.BadParameter(f"{recipe!r} is none of {', '.join(RECIPES)}", param_hint="RECIPE")
    chosen: Any = _changed(RECIPES[recipe](), settings)
    is_writer = os.environ.get("RANK", "0") == "0"
    from training.trainer import last_checkpoint, prepare_run_dir

    if export_only:
        if last_checkpoint(run_dir) is None:
            raise click.ClickException(f"{run_dir} holds no whole checkpoint to export")
        resume = True
    checkpoint = prepare_run_dir(run_dir, chosen, is_resumed=resume) if is_writer else last_checkpoint(run_dir)
    examples = None if data is None else _examples(data, audio_root)
    if isinstance(chosen, GrpoRecipe):
        trainer = _grpo(chosen, run_dir, base, examples, work)
    else:
        trainer = _sft(chosen, run_dir, base, examples, work, loader_workers)
    if export_only:
        assert checkpoint is not None
        trainer.run_model.load(checkpoint)
        num_steps = int(checkpoint.name.rpartition("-")[2])
    else:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        num_steps = trainer.state.global_step
    if is_writer:
        _finish(trainer, run_dir, num_steps, export_to, overwrite=overwrite)


def _launch(processes: int) -> None:
    """Starts this command again, once a rank."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Who dies takes the others along, and none is started again: the run is resumed from its last checkpoint.
    ranks = ["--standalone", "--nproc-per-node", str(processes), "--max-restarts", "0"]
    try:
        main([*ranks, "-m", "hyper_model.cli", *sys.argv[1:]])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise click.ClickException(
            f"rank {rank} ended with exit code {failure.exitcode}, and the others with it; what it said stands above, "
            "and --resume goes on from the last checkpoint"
        ) from error


def _changed(recipe: Any, settings: tuple[str, ...]) -> Any:
    """Returns the recipe with settings changed; each is read as the type that it has."""
    import dataclasses
    import json

    from training.recipes import Lora
    from training.rewards import Weights

    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or name not in {field.name for field in dataclasses.fields(recipe)}:
            raise click.BadParameter(f"{setting!r}: NAME must be a setting of the recipe", param_hint="--set")
        before = getattr(recipe, name)
        try:
            value = text if isinstance(before, str) else json.loads(text)
        except ValueError as error:
            raise click.BadParameter(f"{setting!r}: {text!r} is no JSON value", param_hint="--set") from error
        if isinstance(before, tuple) and isinstance(value, list):
            value = tuple(value)
        try:
            if isinstance(before, Weights) and isinstance(value, dict):
                value = dataclasses.replace(before, **value)
            if name == "lora" and isinstance(value, dict):
                before = value = Lora(**value)
        except TypeError as error:
            raise click.BadParameter(f"{setting!r}: {error}", param_hint="--set") from error
        numbers = (int, float)
        if type(value) is not type(before) and not (isinstance(before, numbers) and isinstance(value, numbers)):
            raise click.BadParameter(f"{setting!r}: a {type(before).__name__} is wanted", param_hint="--set")
        recipe = dataclasses.replace(recipe, **{name: value})
    return recipe


def _examples(data: Path, audio_root: Path | None) -> list[Example]:
    from training.examples import ExampleError, read_examples

    faults: list[ExampleError] = []
    examples = list(read_examples(data, audio_root=audio_root, on_fault=faults.append))
    if faults:
        click.echo(f"{len(faults)} rows left out, the first: {faults[0]}", err=True)
    return examples


def _base(base: Path | None, recipe: Any) -> RunModel:
    import torch

    from training.export import model_of_checkpoint

    if base is None:
        raise click.UsageError(f"{recipe.name} trains a checkpoint: name it with --base")
    return model_of_checkpoint(base, dtype=getattr(torch, recipe.dtype), lora=recipe.lora)


def _sft(
    recipe: SftRecipe, run_dir: Path, base: Path | None, examples: list[Example] | None, work: Path, num_workers: int
) -> PolicyTrainer:
    import torch

    from hyper_model.audio_encoder import LogMel
    from training.assets import ENCODER_FILE, TEXTS_FOLDER
    from training.export import model_from_scratch
    from training.sft import ClipSequences, ExampleSequences, SftTrainer, read_clips, train_tokenizer_on
    from training.texts import iter_texts

    torch.manual_seed(recipe.seed)
    if recipe.decoder is not None:
        if base is not None or examples is not None:
            raise click.UsageError(
                f"{recipe.name} makes a decoder of its own, on scenes: --base and --data are not for it"
            )
        folder = work / "clips/train"
        scenes, speech = read_clips(folder, "scene", "noise"), read_clips(folder, "speech")
        # Open texts too, where speech was built from them: a vocabulary of scenes alone would spell other words out.
        texts = iter_texts(work / "assets" / TEXTS_FOLDER) if speech else ()
        train_tokenizer_on([*scenes, *speech], recipe, run_dir / "tokenizer.json", texts)
        dtype = getattr(torch, recipe.dtype)
        model = model_from_scratch(
            recipe.decoder, run_dir / "tokenizer.json", work / "assets" / ENCODER_FILE, dtype=dtype
        )
        sequences: Any = ClipSequences(scenes, speech, model.tokenizer, recipe)
    else:
        if examples is None:
            raise click.UsageError(f"{recipe.name} trains on a data set: name it with --data")
        model = _base(base, recipe)
        pause = model.manifest["pause"]
        sequences = ExampleSequences(
            [example for example in examples if example.completion],
            model.tokenizer,
            recipe,
            latent_tokens=pause["latent_tokens"],
            answers_by_letter=model.manifest["trace"]["answer_style"] == "letter",
            log_mel=LogMel(model.config["audio_config"]["num_mel_bins"]),
        )
    return SftTrainer(model, recipe, run_dir, sequences, num_workers=num_workers)


def _grpo(
    recipe: GrpoRecipe, run_dir: Path, base: Path | None, examples: list[Example] | None, work: Path
) -> PolicyTrainer:
    import torch

    from hyper_model.checkpoint import open_checkpoint
    from hyper_model.pause import GateSettings
    from training.assets import SOUNDS_FOLDER
    from training.grpo import GrpoTrainer
    from training.rollout import VllmBackend
    from training.rollout_transformers import TransformersBackend
    from training.scenes import SceneBuilder
    from training.tasks import ExampleTasks, SceneTasks
    from training.voices import Bank

    torch.manual_seed(recipe.seed)
    if "RANK" in os.environ:
        from accelerate import PartialState

        # Before the engine, which would make a process group of one rank.
        PartialState(cpu=not torch.cuda.is_available())
    model = _base(base, recipe)
    assert base is not None
    checkpoint = open_checkpoint(base, verify=False)
    gate = GateSettings.of(checkpoint.manifest, checkpoint.tokenizer) if recipe.max_pauses else None
    if recipe.max_pauses and gate is None:
        raise click.UsageError(
            f"{base} has no gate to pause by: `hyper checkpoint calibrate {base} --max-pauses {recipe.max_pauses}` "
            "gives it one, and `--set max_pauses=0` trains without"
        )
    gate = None if gate is None else gate.lowered(recipe.max_pauses)
    if examples is not None:
        tasks: Any = ExampleTasks(examples, model.tokenizer, seed=recipe.seed)
    else:
        tasks = SceneTasks(SceneBuilder(Bank(work / "bank"), work / "assets" / SOUNDS_FOLDER, "train"), model.tokenizer)
    num_rollouts = recipe.batch_size * recipe.group_size
    if recipe.backend == "vllm":
        backend: Any = VllmBackend(
            checkpoint,
            dtype=recipe.export_dtype,
            max_num_seqs=min(256, num_rollouts),
            is_sampler=True,
            # The trainer's weights, gradients and optimizer share the device with the engine.
            gpu_memory_utilization=0.3 if torch.cuda.is_available() else None,
        )
    else:
        backend = TransformersBackend(model, rows_at_once=recipe.rows_at_once)
    return GrpoTrainer(model, recipe, run_dir, tasks, backend, gate=gate)


def _finish(trainer: PolicyTrainer, run_dir: Path, num_steps: int, export_to: Path | None, *, overwrite: bool) -> None:
    import torch

    from training.run_report import write_report

    stopped = trainer.own_state().get("stopped")
    outcome = f"Ended at step {num_steps} of {trainer.recipe.num_steps}" + (f": {stopped}." if stopped else ".")
    click.echo(f"{outcome} {write_report(run_dir, outcome=outcome)}")
    if export_to is not None:
        dtype = getattr(torch, trainer.recipe.export_dtype)
        checkpoint = trainer.run_model.export(
            export_to, recipe=trainer.recipe, num_steps=num_steps, dtype=dtype, overwrite=overwrite
        )
        click.echo(f"exported {checkpoint.path} (manifest sha256 {checkpoint.manifest_sha256[:12]})")
