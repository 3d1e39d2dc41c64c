"""`hyper train`: run a recipe into a run directory, on one process or several."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from training.cli.data import work_option

_MAX_NAMED = 20

if TYPE_CHECKING:
    from collections.abc import Sequence

    from accelerate import PartialState

    from training.data.clips import Clip
    from training.data.examples import Example
    from training.export import RunModel
    from training.recipes import GrpoRecipe, SftRecipe, Spelling
    from training.trainer import PolicyTrainer

SEED = 0
_NUM_READ_TEXTS = 20_000
"""Lines of open text in scenes that are only read."""


@click.command()
@click.argument("recipe")
@click.argument("run_dir", type=click.Path(file_okay=False, path_type=Path))
@click.option("--resume", is_flag=True, help="Resume the run in RUN_DIR from its last complete checkpoint.")
@click.option(
    "--base",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="HyPeR checkpoint to start from. Recipes with their own decoder start from its decoder, which must have the "
    "same shape; the vocabulary may differ.",
)
@click.option(
    "--parts",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Trained parts of hyper-small to continue from, with a fresh optimizer. The CTC stage is then skipped, unless "
    "--base reads other layers of the audio tower.",
)
@click.option(
    "--data",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Questions and clips, in any format of `hyper data check`; Stage I needs gold completions (PAQA, ShareGPT). "
    "Required for qwen2_audio_7b_sft and mini_finetune.  [default: synthetic scenes under --work]",
)
@click.option(
    "--audio-root",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of relative audio paths in --data.  [default: its folder]",
)
@work_option
@click.option(
    "--export", "export_to", type=click.Path(file_okay=False, path_type=Path), help="Folder of the exported checkpoint."
)
@click.option(
    "--export-only",
    is_flag=True,
    help="Report on the run in RUN_DIR, also while it runs; with --export, export its last checkpoint. Uses the "
    "settings from the run's start; repeat its --base and --data.",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing checkpoint at --export.")
@click.option("--name", help="Name of the exported checkpoint.  [default: name of its folder]")
@click.option(
    "--processes",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Ranks on this machine, each with one thread on a CPU. On several machines, start this command with torchrun.",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="Change a recipe setting; values other than text are JSON. Repeatable. training/recipes.py documents the "
    "settings.",
)
@click.option(
    "--skip-bad-rows",
    is_flag=True,
    help="Decode all clips of --data first, and leave out rows with a missing, unreadable or too long clip. The run "
    "directory lists all rows left out.",
)
@click.option(
    "--loader-workers", type=click.IntRange(0), default=0, show_default=True, help="Number of data loader processes."
)
def train(
    recipe: str,
    run_dir: Path,
    resume: bool,
    base: Path | None,
    parts: Path | None,
    data: Path | None,
    audio_root: Path | None,
    work: Path,
    export_to: Path | None,
    export_only: bool,
    overwrite: bool,
    name: str | None,
    processes: int,
    settings: tuple[str, ...],
    skip_bad_rows: bool,
    loader_workers: int,
) -> None:
    """Train RECIPE into RUN_DIR.

    Stage I trains on perceptual traces: mini_sft (the embedded checkpoint, from built clips), mini_finetune (a small
    checkpoint, on your data), qwen2_audio_7b_sft (sharded over GPUs). Stage II trains with rewards on the model's own
    traces: mini_grpo, qwen2_audio_7b_grpo. debug and debug_grpo run a few steps of a tiny model.

    RUN_DIR gets the last two checkpoints, log.jsonl and TensorBoard files; at the end also curves.png and report.md.
    --resume continues bit for bit on CPU. --export writes a checkpoint to serve.
    """
    if processes > 1 and "RANK" not in os.environ:
        _launch(processes)
        return
    # One thread per process: on shared cores, several threads inside a process cost several times their gain.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from hyper_model.files import sha256_of
    from hyper_model.manifest import name_of
    from training.recipes import RECIPES

    if recipe not in RECIPES:
        raise click.BadParameter(f"{recipe!r} is none of {', '.join(RECIPES)}", param_hint="RECIPE")
    if name is not None and name != name_of(Path(name)):
        raise click.BadParameter(f"{name!r}: letters, digits, dots, dashes and underscores", param_hint="--name")
    chosen: Any = _started_recipe(recipe, run_dir, settings) if export_only else _changed_recipe(recipe, settings)
    is_writer = _is_writer()
    from training.trainer import check_run, last_checkpoint, prepare_run_dir

    origin = {
        "base": None if base is None else sha256_of(base / "hyper.json"),
        "data": None if data is None else sha256_of(data),
    }
    if parts is not None:
        if getattr(chosen, "talk", None) is None:
            raise click.UsageError(
                f"{recipe} has no trained parts to go on from: --parts is for small_sft and small_traces"
            )
        origin["parts"] = sha256_of(parts / "parts.safetensors")
        if base is not None and _fit_the_base(parts, base):
            # The parts hold an aligned projector.
            chosen = dataclasses.replace(chosen, spelling=None)
    checkpoint = last_checkpoint(run_dir)
    if export_only:
        if checkpoint is None:
            raise click.ClickException(f"{run_dir} has no complete checkpoint to export")
        # A running training there may be writing its next checkpoint, so nothing is removed.
        check_run(run_dir, chosen, origin)
    else:
        _check_recipe(chosen)
        if is_writer:
            checkpoint = prepare_run_dir(run_dir, chosen, is_resumed=resume, origin=origin)
    is_over = checkpoint is not None and _step_of(checkpoint) >= chosen.num_steps
    if is_over and not export_only and export_to is not None and _is_exported(export_to, chosen):
        # It may have been calibrated since.
        click.echo(f"{run_dir} is finished and exported to {export_to}; export again with --export-only --overwrite")
        return
    if export_only or is_over:
        model = None
    else:
        model = _fit(
            chosen,
            run_dir,
            checkpoint,
            base=base,
            parts=parts,
            data=data,
            audio_root=audio_root,
            work=work,
            is_resumed=resume,
            skip_bad_rows=skip_bad_rows,
            loader_workers=loader_workers,
        )
    if is_writer:
        saved = last_checkpoint(run_dir)
        assert saved is not None
        if export_to is not None:
            model = model or _model(chosen, run_dir, base, work)
            model.manifest |= {"name": name or name_of(export_to), "data_card": "README.md"}
            _export(model, chosen, run_dir, saved, export_to, data, overwrite=overwrite)
        _report(chosen, run_dir, saved)


def _is_writer() -> bool:
    """Return True for the first rank, the only one that writes."""
    return os.environ.get("RANK", "0") == "0"


def _fit(
    chosen: Any,
    run_dir: Path,
    checkpoint: Path | None,
    *,
    base: Path | None,
    parts: Path | None,
    data: Path | None,
    audio_root: Path | None,
    work: Path,
    is_resumed: bool,
    skip_bad_rows: bool,
    loader_workers: int,
) -> RunModel | None:
    """Run the remaining steps of a recipe; return the whole model of the first rank.

    Args:
        checkpoint: Checkpoint to continue from; None starts anew.
    """
    from training.recipes import GrpoRecipe
    from training.trainer import leave_run_dir

    is_writer = _is_writer()
    try:
        examples = (
            None if data is None else usable_examples(data, audio_root, chosen, run_dir, skips_bad_clips=skip_bad_rows)
        )
        if isinstance(chosen, GrpoRecipe):
            trainer = _grpo(chosen, run_dir, base, examples, work)
        else:
            trainer = _sft(chosen, run_dir, base, parts, examples, work, loader_workers)
    except BaseException:
        if is_writer and not is_resumed:
            leave_run_dir(run_dir)
        raise
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    # Shards are gathered by all ranks at once; only this rank reads their saved files.
    return trainer.run_model if is_writer and not chosen.fsdp else None


def _started_recipe(recipe: str, run_dir: Path, settings: tuple[str, ...]) -> Any:
    """Return the recipe that started the run in a directory."""
    from training.recipes import RECIPES
    from training.trainer import read_recipe, started_recipe

    if settings:
        raise click.UsageError("--export-only uses the settings from the run's start; omit --set")
    name = read_recipe(run_dir)["name"]
    if name != recipe:
        raise click.BadParameter(f"{run_dir} is a run of recipe {name}", param_hint="RECIPE")
    return started_recipe(run_dir, type(RECIPES[recipe]()))


def _changed_recipe(recipe: str, settings: tuple[str, ...]) -> Any:
    """Return a recipe with the settings of `--set`."""
    from training.recipes import RECIPES, RecipeError, with_settings

    try:
        return with_settings(RECIPES[recipe](), settings)
    except RecipeError as error:
        raise click.BadParameter(str(error), param_hint="--set") from error


def _is_exported(directory: Path, recipe: Any) -> bool:
    """Return True if a folder holds this recipe's finished checkpoint."""
    import json

    from hyper_model.manifest import MANIFEST_FILE, read_manifest
    from training.recipes import RecipeError, recipe_from_dict

    if not (directory / MANIFEST_FILE).exists():
        return False
    values = json.loads(read_manifest((directory / MANIFEST_FILE).read_bytes()).recipe or "{}")
    num_steps = values.pop("trained_steps", None)
    try:
        return num_steps == recipe.num_steps and recipe_from_dict(type(recipe), values) == recipe
    except RecipeError:
        return False


def _check_recipe(recipe: Any) -> None:
    """Refuse invalid recipes: sharding over one process, and adapters on a decoder from scratch."""
    if recipe.lora is not None and getattr(recipe, "decoder", None) is not None:
        raise click.UsageError(
            f"{recipe.name} trains a new decoder without lora; use lora with recipes that train a --base"
        )
    if recipe.fsdp and "RANK" not in os.environ:
        raise click.UsageError(
            f"{recipe.name} shards the model over several processes: start it with --processes N or torchrun, or turn "
            "sharding off with `--set fsdp=`"
        )


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _launch(processes: int) -> None:
    """Start this command again, once per rank."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # A failed rank ends the others, without a restart: the run resumes from its last checkpoint.
    ranks = ["--standalone", "--nproc-per-node", str(processes), "--max-restarts", "0"]
    try:
        main([*ranks, "-m", "hyper_model.cli", *sys.argv[1:]])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise click.ClickException(
            f"rank {rank} failed with exit code {failure.exitcode} and stopped the others; see its messages above. "
            "--resume continues from the last checkpoint"
        ) from error


def usable_examples(
    data: Path, audio_root: Path | None, recipe: SftRecipe | GrpoRecipe, run_dir: Path, *, skips_bad_clips: bool
) -> list[Example]:
    """Read the usable rows of a stage, and record the others in the run directory.

    Raises:
        ClickException: Clips are missing or unusable, and `skips_bad_clips` is False; the message names them.
    """
    from hyper_model.errors import HyperError
    from training.data.examples import ExampleError, audio_problem, read_clip, read_examples
    from training.recipes import GrpoRecipe
    from training.trainer import write_left_out

    faults: list[ExampleError] = []
    examples = list(read_examples(data, audio_root=audio_root, on_fault=faults.append))
    left_out = {fault.source: fault.message.removeprefix(f"{fault.source}: ") for fault in faults}
    wants_answer = isinstance(recipe, GrpoRecipe)
    lacking = "no answer for the reward" if wants_answer else "no gold completion"
    usable: list[Example] = []
    bad_clips: dict[str, str] = {}
    for example in examples:
        if not (example.answer if wants_answer else example.completion):
            left_out[example.source] = lacking
        elif (problem := audio_problem(example.audio)) is not None:
            bad_clips[example.source] = f"{example.audio} {problem}"
        else:
            usable.append(example)
    # A clip is otherwise opened on use, possibly hours later.
    if skips_bad_clips:
        decoded: list[Example] = []
        for example in usable:
            try:
                read_clip(example)
                decoded.append(example)
            except HyperError as error:
                bad_clips[example.source] = error.message.removeprefix(f"{example.source}: ")
        usable, left_out = decoded, left_out | bad_clips
    elif bad_clips:
        named = "; ".join(f"{row}: {problem}" for row, problem in list(bad_clips.items())[:_MAX_NAMED])
        more = f"; and {len(bad_clips) - _MAX_NAMED} more" if len(bad_clips) > _MAX_NAMED else ""
        raise click.ClickException(
            f"{len(bad_clips)} of {len(usable) + len(bad_clips)} clips are missing or unusable: {named}{more}. "
            "Set the folder of relative paths with --audio-root, or leave these rows out with --skip-bad-rows"
        )
    if os.environ.get("RANK", "0") == "0":
        write_left_out(run_dir, left_out)
        for row, reason in list(left_out.items())[:_MAX_NAMED]:
            click.echo(f"left out: {row}: {reason}", err=True)
        if left_out:
            click.echo(
                f"{len(left_out)} of {len(left_out) + len(usable)} rows left out; RUN_DIR has the list", err=True
            )
    if bad_clips and not usable:
        raise click.ClickException(f"{data}: none of {len(left_out)} rows can be used; see `hyper data check {data}`")
    return usable


def _model(recipe: Any, run_dir: Path, base: Path | None, work: Path) -> RunModel:
    """Return the initial model of a run."""
    import torch

    from training.data.sources.downloads import ENCODER_FILE
    from training.export import model_from_scratch, model_of_checkpoint

    torch.manual_seed(recipe.seed)
    dtype = getattr(torch, recipe.dtype)
    decoder = getattr(recipe, "decoder", None)
    if decoder is not None:
        encoder_file = work / "assets" / ENCODER_FILE
        return model_from_scratch(
            decoder,
            run_dir / "tokenizer.json",
            encoder_file,
            dtype=dtype,
            base=base,
            pause_mode=recipe.pause_mode,
        )
    if base is None:
        raise click.UsageError(f"{recipe.name} needs a checkpoint: set --base")
    return model_of_checkpoint(base, dtype=dtype, lora=recipe.lora)


def _ranks() -> PartialState:
    """Join the other ranks, if any."""
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available())


def _fit_the_base(parts: Path, base: Path) -> bool:
    """Return whether trained parts project the same layers of the audio tower as a base checkpoint."""
    import json

    from hyper_model.audio_rows import audio_layers
    from hyper_model.compose import read_parts

    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    return read_parts(parts).fields.audio_layers == audio_layers(config)


def _sft(
    recipe: SftRecipe,
    run_dir: Path,
    base: Path | None,
    parts: Path | None,
    examples: list[Example] | None,
    work: Path,
    num_workers: int,
) -> PolicyTrainer:
    from hyper_model.audio_encoder import LogMel
    from hyper_model.trace import PauseMode
    from training.data.sources.downloads import TEXTS_FOLDER
    from training.data.sources.open_text import iter_texts
    from training.data.sources.voices import held_out_lines
    from training.data.text_scenes import SceneWriter
    from training.sft.trainer import ClipSequences, ExampleSequences, SftTrainer, read_clips, train_tokenizer_on

    if recipe.decoder is not None:
        if examples is not None:
            raise click.UsageError(f"{recipe.name} trains a new decoder on scenes; omit --data")
        folder = work / "clips/train"
        scenes, speech = read_clips(folder, "scene", "noise"), read_clips(folder, "speech")
        # Include open texts if speech clips use them; a vocabulary from scenes alone would split other words into
        # pieces.
        texts = iter_texts(work / "assets" / TEXTS_FOLDER) if speech else ()
        with _ranks().main_process_first():
            if recipe.decoder.vocab_size:
                train_tokenizer_on([*scenes, *speech], recipe, run_dir / "tokenizer.json", texts)
            elif base is not None:
                shutil.copyfile(base / "tokenizer.json", run_dir / "tokenizer.json")
            else:
                raise click.UsageError("vocab_size 0 uses the vocabulary of a checkpoint: set --base")
        model = _model(recipe, run_dir, base, work)
        if recipe.spelling is not None:
            _align(recipe.spelling, run_dir, model, speech or scenes, seed=recipe.seed)
        writer = None
        if recipe.read_size:
            turns = (turn for clip in (*scenes, *speech) for turn in clip.scene.turns)
            open_texts = dict.fromkeys(turn.line.text for turn in turns if turn.line.is_open)
            writer = SceneWriter([*open_texts], held_out_lines(seed=SEED))
        sequences: Any = ClipSequences(scenes, speech, model.tokenizer, recipe, writer)
    elif recipe.talk is not None:
        model = _model(recipe, run_dir, base, work)
        if parts is not None:
            from hyper_model.compose import read_parts

            model.load_parts(read_parts(parts))
        if recipe.spelling is not None:
            _align(
                recipe.spelling,
                run_dir,
                model,
                _aligned_clips(recipe.spelling, work / "clips/train"),
                seed=recipe.seed,
                keeps_scale=parts is not None,
            )
        sequences = _talk(recipe, model, work)
    else:
        if examples is None:
            raise click.UsageError(f"{recipe.name} needs a data set: set --data")
        model = _model(recipe, run_dir, base, work)
        sequences = ExampleSequences(
            examples,
            model.tokenizer,
            recipe,
            latent_tokens=model.manifest["pause"]["latent_tokens"],
            pause_mode=PauseMode(model.manifest["pause"]["mode"]),
            answers_by_letter=model.manifest["trace"]["answer_style"] == "letter",
            max_model_len=model.manifest["max_model_len"],
            log_mel=LogMel(model.config["audio_config"]["num_mel_bins"]),
        )
    return SftTrainer(model, recipe, run_dir, sequences, num_workers=num_workers)


def _align(
    spelling: Spelling, run_dir: Path, model: RunModel, clips: Sequence[Clip], *, seed: int, keeps_scale: bool = False
) -> None:
    """Pretrain the projector by CTC and print its accuracy.

    Args:
        keeps_scale: As in `projector_ctc.teach_spelling`.
    """
    from training.sft.projector_ctc import teach_spelling

    file = run_dir / "spelling.safetensors"
    # Only the first rank trains it; the others receive its weights when the trainer wraps the policy.
    with _ranks().main_process_first():
        spelled = teach_spelling(model.core, model.tokenizer, clips, spelling, file, seed=seed, keeps_scale=keeps_scale)
    if spelled is not None:
        click.echo(f"projector pre-training: word error {spelled.word_error:.3f} on {spelled.num_clips} clips")
        if spelled.sound_accuracy is not None:
            click.echo(f"it names the background of {spelled.sound_accuracy:.3f} of them")


def _aligned_clips(spelling: Spelling, folder: Path) -> list[Clip]:
    """Open the clips of the projector's pretraining; scenes have more kinds of background than talk."""
    from training.data.clips import BASE_ENCODER_WIDTH, open_clips

    clips = [*open_clips(folder, BASE_ENCODER_WIDTH, kind="talk")]
    if spelling.sound_weight:
        clips += open_clips(folder, BASE_ENCODER_WIDTH, kind="base-scene")
    return clips


def _talk(recipe: SftRecipe, model: RunModel, work: Path) -> Any:
    """Return the sequences of a pretrained decoder behind Whisper base."""
    import random

    import torch

    from training.data.clips import BASE_LAYERS
    from training.data.encoder import ClipEncoder, load_base_encoder
    from training.data.reading import Reader
    from training.data.scenes import SceneBuilder
    from training.data.sources.downloads import SOUNDS_FOLDER, TEXTS_FOLDER
    from training.data.sources.open_text import draw_text
    from training.data.sources.voices import Bank, held_out_lines
    from training.data.talk import TalkBuilder
    from training.data.text_scenes import SceneWriter
    from training.sft.talk import ClipsByIndex, TalkSequences

    assets, folder = work / "assets", work / "clips/train"
    if not torch.cuda.is_available():
        # On CPU the fused attention's backward pass takes three times as long as plain products (docs/LOG.md). No row
        # of these sequences has branches, whose mask plain attention would not take.
        core: Any = model.core
        core.model.language_model.set_attn_implementation("eager")
    rng = random.Random(f"{recipe.seed}/texts")
    open_texts = [draw_text(rng, "train", assets / TEXTS_FOLDER) for _ in range(_NUM_READ_TEXTS)]
    encode = ClipEncoder(load_base_encoder(), getattr(torch, recipe.dtype), BASE_LAYERS)
    bank = Bank(work / "bank") if any((work / "bank").glob("*.json")) else None
    scenes = None
    if recipe.talk is not None and recipe.talk.scene_share:
        if bank is None:
            raise click.UsageError(f"{recipe.name} mixes scenes from {work / 'bank'}: build the bank first (make bank)")
        draw = SceneBuilder(bank, assets / SOUNDS_FOLDER, "train").draw
        scenes = ClipsByIndex(folder, "base-scene", draw, encode)
    return TalkSequences(
        ClipsByIndex(folder, "talk", TalkBuilder(assets, "train", bank=bank).draw, encode),
        model.tokenizer,
        recipe,
        Reader(SceneWriter(open_texts, held_out_lines(seed=SEED))),
        scenes=scenes,
        stack=model.core.stack,
        latent_tokens=model.manifest["pause"]["latent_tokens"],
    )


def _grpo(
    recipe: GrpoRecipe, run_dir: Path, base: Path | None, examples: list[Example] | None, work: Path
) -> PolicyTrainer:
    import torch

    from hyper_model.checkpoint import open_checkpoint
    from hyper_model.pause import GateSettings
    from training.data.scenes import SceneBuilder
    from training.data.sources.downloads import SOUNDS_FOLDER
    from training.data.sources.voices import Bank
    from training.rl.rollout import VllmBackend
    from training.rl.rollout_transformers import TransformersBackend
    from training.rl.tasks import ExampleTasks, SceneTasks
    from training.rl.trainer import GrpoTrainer

    if "RANK" in os.environ:
        # This comes before the engine, since the engine would create a process group of one rank.
        _ranks()
    model = _model(recipe, run_dir, base, work)
    assert base is not None
    checkpoint = open_checkpoint(base, verify=False)
    gate = GateSettings.of(checkpoint.manifest, checkpoint.tokenizer) if recipe.max_pauses else None
    if recipe.max_pauses and gate is None:
        raise click.UsageError(
            f"{base} has no calibrated gate: run `hyper checkpoint calibrate {base} --max-pauses {recipe.max_pauses}`, "
            "or train without pauses with `--set max_pauses=0`"
        )
    if gate is not None and gate.max_pauses < recipe.max_pauses:
        click.echo(f"{base} allows {gate.max_pauses} pauses, fewer than the recipe's {recipe.max_pauses}", err=True)
    gate = None if gate is None else gate.with_budget(recipe.max_pauses)
    if examples is not None:
        tasks: Any = ExampleTasks(examples, model.tokenizer, seed=recipe.seed)
    else:
        builder = SceneBuilder(Bank(work / "bank"), work / "assets" / SOUNDS_FOLDER, "train")
        tasks = SceneTasks(builder, model.tokenizer, seed=recipe.seed)
    num_rollouts = recipe.batch_size * recipe.group_size
    if recipe.backend == "vllm":
        backend: Any = VllmBackend(
            checkpoint,
            # The policy's dtype, so that both agree; under autocast, the dtype of its computation.
            dtype=recipe.export_dtype if recipe.autocast else recipe.dtype,
            max_num_seqs=min(256, num_rollouts),
            is_sampler=True,
            # The trainer's weights, gradients and optimizer share the device with the engine.
            gpu_memory_utilization=recipe.gpu_memory_utilization if torch.cuda.is_available() else None,
        )
    else:
        backend = TransformersBackend(model, rows_at_once=recipe.rows_at_once)
    return GrpoTrainer(model, recipe, run_dir, tasks, backend, gate=gate)


def _export(
    model: RunModel,
    recipe: Any,
    run_dir: Path,
    saved: Path,
    export_to: Path,
    data: Path | None,
    *,
    overwrite: bool,
) -> None:
    """Export the last checkpoint of a run, with a model card."""
    import torch

    from training.run_report import write_card

    num_steps, state = _step_of(saved), _state_of(saved)
    model.load(saved)
    pause = model.manifest["pause"]
    # Without a gate there is no moved threshold.
    if "tau" in state and recipe.max_pauses:
        pause["tau_pause"] = max(state["tau"]["tau"], pause["tau_abort"])
    dtype = getattr(torch, recipe.export_dtype)
    checkpoint = model.export(export_to, recipe=recipe, num_steps=num_steps, dtype=dtype, overwrite=overwrite)
    click.echo(f"exported {checkpoint.path} (manifest sha256 {checkpoint.manifest_sha256[:12]})")
    write_card(run_dir, checkpoint.path, num_steps=num_steps, data=None if data is None else data.name)
    budget = "" if checkpoint.manifest.pause.max_pauses else " --max-pauses 3"
    click.echo(
        f"calibrate the gate of these weights next: hyper checkpoint calibrate {export_to}{budget} "
        "(docs/training.md, Calibration, has the settings for small models)"
    )


def _report(recipe: Any, run_dir: Path, saved: Path) -> None:
    """Report on a run, possibly a running one."""
    from training.run_report import write_report

    stopped = _state_of(saved).get("stopped")
    outcome = f"At step {_step_of(saved)} of {recipe.num_steps}" + (f": {stopped}." if stopped else ".")
    click.echo(f"{outcome} {write_report(run_dir, outcome=outcome)}")


def _state_of(checkpoint: Path) -> dict[str, Any]:
    import json

    return json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
