"""`hyper checkpoint alignment` and `parts`: figures and trained parts of a run of small_sft."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from training.cli.data import work_option

if TYPE_CHECKING:
    from training.evaluation.alignment import Figure


@click.command()
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path))
@work_option
@click.option(
    "--run",
    "run_dir",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Measure the last whole checkpoint of this run, which began from DIRECTORY with adapters.",
)
@click.option("--projector", is_flag=True, help="Measure the projector alone, as its CTC pretraining left it in --run.")
@click.option("--sets", default="human,voices,talk", show_default=True, help="Sets of speech, with commas between.")
@click.option("--no-reading", is_flag=True, help="Leave the hand-written questions out.")
@click.option("--examples", type=click.IntRange(0), default=0, help="Print so many transcripts of each set.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def alignment(
    directory: Path,
    work: Path,
    run_dir: Path | None,
    projector: bool,
    sets: str,
    no_reading: bool,
    examples: int,
    as_json: bool,
) -> None:
    """Measure the checkpoint in DIRECTORY on held-out speech and hand-written questions.

    Prints word error on recorded human clips, on held-out voices and on noisy talk, and the share of right choices on
    questions about a written perception, with intervals of 95 %. Two controls take the perception away or swap it.
    """
    import torch

    torch.set_num_threads(1)
    from training.evaluation import alignment as measures

    names = [name.strip() for name in sets.split(",") if name.strip()]
    unknown = set(names) - set(measures.SETS)
    if unknown:
        raise click.BadParameter(f"{min(unknown)!r}: one of {', '.join(measures.SETS)} is wanted", param_hint="--sets")
    if projector and run_dir is None:
        raise click.UsageError("--projector measures a run: name it with --run")
    model, step = _load(directory, run_dir, is_projector=projector)
    probe = measures.AlignmentProbe(model.core, model.tokenizer)
    transcribe: Any = probe.transcribe
    if projector:
        assert run_dir is not None
        transcribe = measures.spell(model.core, model.tokenizer, probe, run_dir / "spelling.safetensors")
    found: dict[str, Figure] = {}
    for name in names:
        items = list(measures.spoken_items(name, work / "assets"))  # pyright: ignore[reportArgumentType]
        texts = [transcribe(item.samples_S) for item in items]
        found[f"wer_{name}"] = measures.word_error(items, texts)
        for item, text in list(zip(items, texts, strict=True))[:examples]:
            click.echo(f"{name}: {item.transcript}\n   -> {text}", err=True)
    if not no_reading and not projector:
        questions = measures.reading_items()
        for control in ("given", "blank", "swapped"):
            asked = measures.controlled(questions, control)
            found[f"reading_{control}"] = measures.accuracy(asked, [probe.choose(item) for item in asked])
        for part in ("trained", "held_out"):
            asked = measures.drawn_items(work / "assets", held_out=part == "held_out")
            found[f"wordings_{part}"] = measures.accuracy(asked, [probe.choose(item) for item in asked])
    if as_json:
        click.echo(json.dumps({"step": step} | {name: asdict(each) for name, each in found.items()}))
        return
    click.echo(f"{directory}" if step is None else f"{run_dir}, {step} steps")
    for name, each in found.items():
        click.echo(f"  {name:16} {each}")


def _load(directory: Path, run_dir: Path | None, *, is_projector: bool) -> tuple[Any, int | None]:
    """Open a checkpoint, with the adapters of a run on it."""
    import torch

    from hyper_model.engine_environment import native_dtype
    from training.export import model_of_checkpoint
    from training.recipes import Lora
    from training.trainer import last_checkpoint, read_recipe

    dtype = getattr(torch, native_dtype())
    step = None
    if run_dir is None or is_projector:
        model = model_of_checkpoint(directory, dtype=dtype)
    else:
        saved = last_checkpoint(run_dir)
        if saved is None:
            raise click.ClickException(f"{run_dir} holds no whole checkpoint")
        lora = read_recipe(run_dir)["lora"]
        model = model_of_checkpoint(directory, dtype=dtype, lora=Lora(**(lora | {"targets": tuple(lora["targets"])})))
        model.load(saved)
        step = int(saved.name.rpartition("-")[2])
    model.policy.eval()
    return model, step


@click.command()
@click.argument("run_dir", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("destination", type=click.Path(file_okay=False, path_type=Path))
@click.option("--name", default="hyper-small", show_default=True, help="The composed checkpoint's name.")
@click.option(
    "--base",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    required=True,
    help="The checkpoint that the run began from.",
)
def parts(run_dir: Path, destination: Path, name: str, base: Path) -> None:
    """Write the trained parts of the run in RUN_DIR to DESTINATION, from its last whole checkpoint.

    `hyper checkpoint compose` makes a checkpoint of them, and `hyper train small_sft --parts` goes on from them.
    """
    from safetensors.torch import load_file

    from hyper_model.audio_rows import audio_layers, audio_stack
    from hyper_model.compose import parts_of_adapter, write_parts
    from training.export import ADAPTER
    from training.trainer import last_checkpoint, read_recipe

    saved = last_checkpoint(run_dir)
    if saved is None:
        raise click.ClickException(f"{run_dir} holds no whole checkpoint")
    recipe = read_recipe(run_dir)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    adapter = load_file(saved / ADAPTER / "adapter_model.safetensors")
    recipe["trained_steps"] = int(saved.name.rpartition("-")[2])
    made = write_parts(
        destination,
        parts_of_adapter(adapter),
        name=name,
        audio_stack=audio_stack(config),
        audio_layers=audio_layers(config),
        lora_scale=recipe["lora"]["alpha"] / recipe["lora"]["rank"],
        recipe=json.dumps(recipe, sort_keys=True),
        data_card="README.md",
    )
    num_bytes = (destination / "parts.safetensors").stat().st_size
    click.echo(f"{destination}: step {recipe['trained_steps']}, {num_bytes / 1e6:.1f} MB, sha256 {made.sha256[:12]}")
