"""The training side of the `hyper` command: build data, train, export, evaluate.

Everything lives under one work folder: `assets/`, `bank/`, `clips/SPLIT/`, `runs/RECIPE/`. Each step resumes.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import click

SEED = 0

_work = click.option(
    "--work",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("build"),
    show_default=True,
    help="Folder of assets, bank, clips and runs.",
)
_workers = click.option(
    "--workers",
    type=click.IntRange(1),
    default=os.cpu_count() or 1,
    show_default="one a core",
    help="Processes to use.",
)


def _single_threaded() -> None:
    # One thread a process: on shared cores threads inside processes cost several times what they give.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@click.group()
def data() -> None:
    """Build the audio that training and evaluation use."""


@data.command()
@_work
@_workers
def bank(work: Path, workers: int) -> None:
    """Fetch the assets and let every voice speak its lines (about 40 minutes on two cores)."""
    _single_threaded()
    from training.assets import fetch, require_speech_programs
    from training.voices import build_bank

    require_speech_programs()
    fetch(work / "assets")
    build_bank(work / "assets", work / "bank", seed=SEED, num_workers=workers)


@data.command()
@_work
@_workers
@click.option("--shards", type=click.IntRange(1), default=32, show_default=True, help="Shards of 500 clips.")
def scenes(work: Path, workers: int, shards: int) -> None:
    """Mix voices and recordings into scenes and keep the encoder's states of each (about 8 minutes on two cores)."""
    _single_threaded()
    from training.clips import build_clips
    from training.voices import list_voices, missing_rounds

    missing = missing_rounds(work / "bank", list_voices())
    if missing:
        raise click.ClickException(f"the bank lacks {len(missing)} rounds: finish it first (make bank)")
    build_clips(work / "assets", work / "bank", work / "clips/train", "train", num_shards=shards, num_workers=workers)


@data.command()
@_work
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
def samples(work: Path, folder: Path) -> None:
    """Write ten held-out clips in the formats people upload, with question and truth, into FOLDER."""
    from training.assets import SOUNDS_FOLDER
    from training.samples import write_samples
    from training.scenes import SceneBuilder
    from training.voices import Bank, trained_lines

    bank, recordings = Bank(work / "bank", without=trained_lines(seed=SEED)), work / "assets" / SOUNDS_FOLDER
    builders = {n: SceneBuilder(bank, recordings, "test", num_speakers=n, snr_db=(10.0, 20.0)) for n in range(5)}
    rows = write_samples(builders, folder)
    click.echo(f"{len(rows)} clips in {folder}")


@click.command()
@click.argument("recipe", default="mini_sft")
@_work
@_workers
@click.option("--export", "export_to", type=click.Path(file_okay=False, path_type=Path), help="Export here at the end.")
@click.option("--export-only", is_flag=True, help="Export the newest saved state without training on.")
@click.option("--overwrite", is_flag=True, help="Replace a checkpoint that is already there.")
def train(recipe: str, work: Path, workers: int, export_to: Path | None, export_only: bool, overwrite: bool) -> None:
    """Train RECIPE on the clips under WORK, going on where an earlier run stopped, and export the checkpoint."""
    _single_threaded()
    from training.assets import ENCODER_FILE
    from training.export import export_mini
    from training.recipes import RECIPES
    from training.sft import train as run

    if recipe not in RECIPES:
        raise click.BadParameter(f"{recipe!r} is none of {', '.join(RECIPES)}", param_hint="RECIPE")
    run_dir = work / "runs" / recipe
    if not export_only:
        run(RECIPES[recipe](), work / "clips/train", run_dir, num_processes=workers)
    if export_to is not None:
        checkpoint = export_mini(run_dir, work / "assets" / ENCODER_FILE, export_to, overwrite=overwrite)
        click.echo(f"exported {checkpoint.path} (manifest sha256 {checkpoint.manifest_sha256[:12]})")


@click.command()
@click.option(
    "--suite",
    type=click.Choice(["held-out", "validation"]),
    default="held-out",
    show_default=True,
    help="held-out: voices and recordings nothing was trained or tuned on. validation: for choosing settings.",
)
@click.option(
    "--checkpoint",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("checkpoints/hyper-mini"),
    show_default=True,
    help="The checkpoint to measure.",
)
@click.option("--items", type=click.IntRange(20), default=1_400, show_default=True, help="Questions to ask.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line instead of a table.")
@_work
@_workers
def evaluate(suite: str, checkpoint: Path, items: int, as_json: bool, work: Path, workers: int) -> None:
    """Measure a checkpoint on synthetic scenes, through vLLM; builds the test voices first if they are missing."""
    from hyper_model.checkpoint import open_checkpoint

    opened = open_checkpoint(checkpoint)
    from training.assets import SOUNDS_FOLDER, fetch, require_speech_programs
    from training.evaluate import evaluate as run
    from training.voices import Bank, build_bank, list_voices, missing_rounds, trained_lines

    split = "test" if suite == "held-out" else "validation"
    fetch(work / "assets")
    voices = [voice for voice in list_voices() if voice.split == split]
    if missing_rounds(work / "bank", voices):
        require_speech_programs()
        build_bank(work / "assets", work / "bank", seed=SEED, num_workers=workers, voices=voices)
    result = run(
        opened,
        # A sentence that some training voice spoke word for word would measure memory.
        Bank(work / "bank", without=trained_lines(seed=SEED)),
        work / "assets" / SOUNDS_FOLDER,
        split=split,
        num_items=items,
        use_tqdm=not as_json,
    )
    result["checkpoint"] = opened.manifest.name
    result["manifest_sha256"] = opened.manifest_sha256
    if as_json:
        click.echo(json.dumps(result))
        return
    for name, value in result.items():
        if isinstance(value, float):
            low, high = result["interval_95"].get(name, (None, None))
            click.echo(f"{name:32} {value:7.3f}" + (f"   [{low:.3f}, {high:.3f}]" if low is not None else ""))
    for name in ("choice_accuracy_by_kind", "environment_accuracy_by_class", "speaker_count_accuracy_by_count"):
        click.echo(f"{name}: " + "  ".join(f"{key} {value:.2f}" for key, value in result[name].items()))
