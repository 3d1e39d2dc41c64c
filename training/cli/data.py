"""Commands of `hyper` for building data and calibration.

Everything is in one work folder: `assets/`, `bank/`, `clips/SPLIT/`, `runs/RECIPE/`. Each step resumes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from training.cli.evaluate import SEED, bank_of
from training.cli.registry_option import Described, RegistryOption

if TYPE_CHECKING:
    from hyper_model.checkpoint import Checkpoint
    from hyper_model.manifest import ConfidenceFields
    from training.data.sources.voices import Split
    from training.data.truth import Truth
    from training.rl.rollout import Prompt

work_option = click.option(
    "--work",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("build"),
    show_default=True,
    help="Folder of assets, voices and built clips.",
)
_workers = click.option(
    "--workers",
    type=click.IntRange(1),
    default=os.cpu_count() or 1,
    show_default="one per core",
    help="Number of processes.",
)


def _single_threaded() -> None:
    # One thread per process: on shared cores, several threads inside a process cost several times their gain.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@click.group()
def data() -> None:
    """Build and check the data of training and evaluation."""


def _formats() -> Mapping[str, Described]:
    from training.data.formats import FORMATS

    return FORMATS


def _hard_sets() -> Mapping[str, Described]:
    from training.data.hard_sets import HARD_SETS
    from training.evaluation.suites import SUITES

    return {name: SUITES[name] for name in HARD_SETS}


@data.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--format",
    "format_",
    cls=RegistryOption,
    registry=_formats,
    help="Format of the file. {described}  [default: detected from its name and first row]",
)
@click.option(
    "--audio-root",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of relative audio paths.  [default: the file's folder]",
)
@click.option("--decode/--no-decode", "decodes", default=True, show_default=True, help="Also decode every clip.")
def check(file: Path, format_: str | None, audio_root: Path | None, decodes: bool) -> None:
    """Read a data set of questions about clips, count its rows and report every unusable row and clip.

    Exits with 1 if a row is unusable, or a clip is missing, damaged or too long.
    """
    from training.data.examples import check_examples

    found = check_examples(file, format=format_, audio_root=audio_root, decodes=decodes)
    click.echo(f"{file}: {found.format}, {found.num_examples} examples, {found.num_with_choices} with choices")
    for category, number in found.by_category.items():
        click.echo(f"  {category}: {number}")
    for warning in found.warnings:
        click.echo(f"warning: {warning}", err=True)
    for fault in (*found.faults, *found.bad_audio):
        click.echo(str(fault), err=True)
    problems: list[str] = []
    if found.faults:
        problems.append(f"{len(found.faults)} unusable rows; correct or remove them")
    if found.bad_audio:
        advice = "set the folder of relative paths with --audio-root, or train with --skip-bad-rows"
        problems.append(f"{len(found.bad_audio)} missing or unusable audio files; {advice}")
    if problems:
        raise click.ClickException(". ".join(problems))


@data.command()
@work_option
@_workers
@click.option(
    "--split",
    type=click.Choice(["train", "validation", "test"]),
    help="Synthesize only the voices of this split.  [default: all]",
)
def bank(work: Path, workers: int, split: Split | None) -> None:
    """Download the assets and synthesize the lines of every voice (52,000 lines; one hour of CPU time)."""
    _single_threaded()
    from training.data.sources.downloads import fetch, require_speech_programs
    from training.data.sources.voices import build_bank, list_voices

    require_speech_programs()
    fetch(work / "assets")
    voices = [voice for voice in list_voices() if split in (None, voice.split)]
    build_bank(work / "assets", work / "bank", seed=SEED, num_workers=workers, voices=voices)


@data.command()
@work_option
@click.option("--shards", type=click.IntRange(1), default=8, show_default=True, help="Number of shards of 500 clips.")
@click.option("--first", type=click.IntRange(0), default=0, show_default=True, help="Number of the first shard.")
@click.option("--scenes", "is_scenes", is_flag=True, help="Build scenes from the voices in WORK/bank instead of talk.")
def talk(work: Path, shards: int, first: int, is_scenes: bool) -> None:
    """Build the clips of hyper-small, with Whisper base's states of each: talk, or scenes.

    Fast synthesizers speak the lines of talk, so talk needs no bank; a bank in WORK/bank adds its training voices. A
    shard takes one to two minutes on one core. Existing shards are kept, so an interrupted build resumes.
    """
    _single_threaded()
    from training.data.clips import build_base_clips
    from training.data.sources.downloads import MissingDataError, fetch, require_speech_programs
    from training.data.sources.voices import Bank

    require_speech_programs()
    fetch(work / "assets")
    bank = Bank(work / "bank") if any((work / "bank").glob("*.json")) else None
    try:
        build_base_clips(
            work / "assets",
            work / "clips/train",
            "train",
            kind="base-scene" if is_scenes else "talk",
            shards=range(first, first + shards),
            bank=bank,
        )
    except MissingDataError as error:
        raise click.ClickException(str(error)) from error


_noise = click.option(
    "--noise",
    multiple=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Unpacked folder of MUSAN or FSD50K for background noise. Repeatable.",
)


@data.command()
@work_option
@_workers
@click.option("--shards", type=click.IntRange(0), default=32, show_default=True, help="Number of shards of 500 scenes.")
@click.option(
    "--speech-shards",
    type=click.IntRange(0),
    default=120,
    show_default=True,
    help="Number of shards of 500 short clips with one voice and open text.",
)
@_noise
@click.option(
    "--noise-shards",
    type=click.IntRange(0),
    default=32,
    show_default=True,
    help="Number of shards of 500 scenes with --noise.",
)
def scenes(
    work: Path, workers: int, shards: int, speech_shards: int, noise: tuple[Path, ...], noise_shards: int
) -> None:
    """Build the training clips and their encoder states.

    One shard takes half a minute on one core. Existing shards are kept, so an interrupted build resumes. All kinds of
    clips are in WORK/clips/train, with the licence terms of --noise files in noise-licences.json.
    """
    _single_threaded()
    from training.data.clips import ClipKind, build_clips
    from training.data.sources.voices import list_voices, missing_rounds

    missing = missing_rounds(work / "bank", [voice for voice in list_voices() if voice.split == "train"])
    if missing:
        raise click.ClickException(f"{len(missing)} rounds of voices are missing; run `make bank` first")
    wanted: dict[ClipKind, int] = {"speech": speech_shards, "scene": shards, "noise": noise_shards if noise else 0}
    for kind, number in wanted.items():
        if number:
            build_clips(
                work / "assets",
                work / "bank",
                work / "clips/train",
                "train",
                kind=kind,
                num_shards=number,
                num_workers=workers,
                noise=noise,
            )


@data.command()
@work_option
@_workers
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--items", type=click.IntRange(1), default=1_000, show_default=True, help="Number of questions, one per clip."
)
@click.option(
    "--split",
    type=click.Choice(["train", "validation", "test"]),
    default="train",
    show_default=True,
    help="Split of the voices and recordings.",
)
@click.option(
    "--suite",
    cls=RegistryOption,
    registry=_hard_sets,
    help="Export a hard set. {described}  [default: the usual mixture]",
)
@_noise
@click.option(
    "--audio", type=click.Choice(["flac", "wav"]), default="flac", show_default=True, help="Audio file format."
)
@click.option("--parts", is_flag=True, help="Also write speech and background of each clip as separate files.")
def export(
    work: Path,
    workers: int,
    folder: Path,
    items: int,
    split: Split,
    suite: str | None,
    noise: tuple[Path, ...],
    audio: Literal["flac", "wav"],
    parts: bool,
) -> None:
    """Write synthetic scenes into FOLDER as a data set.

    FOLDER gets audio/, a JSON Lines file in PAQA's format with the truth of each clip, and LICENCES.json with the terms
    of the audio sources. `hyper data check` reads it. An interrupted export resumes.
    """
    _single_threaded()
    from training.data.export import ExportPlan, export_scenes
    from training.data.sources.downloads import SOUNDS_FOLDER

    if suite is not None and noise:
        raise click.UsageError("--suite defines its own backgrounds; omit --noise")
    plan = ExportPlan(
        work / "bank",
        work / "assets" / SOUNDS_FOLDER,
        split,
        items,
        suite=suite,
        noise=noise,
        audio=audio,
        with_parts=parts,
        seed=SEED,
    )
    rows = export_scenes(plan, folder, num_workers=workers)
    click.echo(f"{items} items in {rows}")


@data.command()
@work_option
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
def samples(work: Path, folder: Path) -> None:
    """Write ten held-out clips in common audio formats into FOLDER, with question and truth."""
    from training.data.samples import write_samples
    from training.data.scenes import SceneBuilder
    from training.data.sources.downloads import SOUNDS_FOLDER
    from training.data.sources.voices import Bank, trained_lines

    bank, recordings = Bank(work / "bank", without=trained_lines(seed=SEED)), work / "assets" / SOUNDS_FOLDER
    builders = {n: SceneBuilder(bank, recordings, "test", num_speakers=n, snr_db=(10.0, 20.0)) for n in range(5)}
    rows = write_samples(builders, folder)
    click.echo(f"{len(rows)} clips in {folder}")


@click.command()
@click.argument("checkpoint", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--examples",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Your own questions and clips, in any format of `hyper data check`.  "
    "[default: synthetic scenes of the validation voices]",
)
@click.option(
    "--audio-root",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of relative audio paths in --examples.  [default: the file's folder]",
)
@click.option("--items", type=click.IntRange(10), default=300, show_default=True, help="Number of questions.")
@click.option(
    "--wanted",
    type=(float, float),
    default=(0.45, 1.0),
    show_default=True,
    help="Minimum and maximum pauses per completion.",
)
@click.option(
    "--wanted-aborts",
    type=float,
    default=0.005,
    show_default=True,
    help="Maximum share of aborted completions (low confidence throughout, or repetitions).",
)
@click.option(
    "--wanted-wrong",
    type=click.FloatRange(0, 1),
    default=0.9,
    show_default=True,
    help="Minimum share of wrong answers, without a pause, among completions aborted for low confidence. If no "
    "threshold reaches it, low confidence aborts nothing.",
)
@click.option(
    "--confidence-only",
    is_flag=True,
    help="Calibrate only the confidence of answers, and leave the gate as it is.",
)
@click.option(
    "--max-pauses", type=click.IntRange(1, 16), help="Maximum pauses per completion.  [default: the manifest's]"
)
@click.option(
    "--window-tokens",
    type=click.IntRange(1),
    help="Tokens of the confidence window.  [default: the manifest's]",
)
@click.option(
    "--rest-tokens",
    type=click.IntRange(0),
    help="Minimum tokens between two pauses.  [default: the manifest's]",
)
@click.option(
    "--max-closed-loops",
    type=click.IntRange(0, 16),
    default=8,
    show_default=True,
    help="Repetitions per completion that only end their section; a further one aborts the completion.",
)
@click.option("--latent-tokens", type=click.IntRange(1), help="Latent tokens per pause.  [default: the manifest's]")
@click.option(
    "--section",
    "sections",
    multiple=True,
    metavar="NAME",
    help="Section with pauses: ENV, SPEAKER, ASR, DESCRIPTION, REASONING, SUMMARY or REFLECT. Repeatable.  "
    "[default: the manifest's]",
)
@click.option(
    "--png", type=click.Path(dir_okay=False, path_type=Path), help="File for a plot of the calibration curve."
)
@work_option
@_workers
def calibrate(
    checkpoint: Path,
    examples: Path | None,
    audio_root: Path | None,
    items: int,
    wanted: tuple[float, float],
    wanted_aborts: float,
    wanted_wrong: float,
    confidence_only: bool,
    sections: tuple[str, ...],
    png: Path | None,
    work: Path,
    workers: int,
    **fields: int | None,
) -> None:
    """Calibrate the pause thresholds and the confidence of CHECKPOINT on a validation set.

    The manifest gets the thresholds and their curve, and a temperature per kind of question. The weights stay
    unchanged. If no threshold reaches both the pause rate and the abort rate, the command reports its measurements and
    changes nothing. Then try another rate, other sections or a higher --wanted-aborts.
    """
    from hyper_model.checkpoint import open_checkpoint
    from training.evaluation.calibrate import Wanted, calibrate_confidence, draw_curve
    from training.evaluation.calibrate import calibrate as run

    if not 0 <= wanted[0] < wanted[1]:
        raise click.BadParameter("the minimum must be below the maximum", param_hint="--wanted")
    if png is not None:
        # Import the plotting library first, so that a missing one fails before the work.
        import_module("matplotlib")
    changes: dict[str, Any] = {name: value for name, value in fields.items() if value is not None}
    if sections:
        changes["sections"] = _gated(sections)
    opened = open_checkpoint(checkpoint)
    if examples is None:
        prompts, truths = _prompts_of_scenes(opened, items, work, workers)
    else:
        prompts, truths = _prompts_of(opened, examples, audio_root, items)
    source = (
        f"{len(prompts)} synthetic scenes of the validation voices"
        if examples is None
        else f"{len(prompts)} questions of {examples.name}"
    )
    if confidence_only:
        _report_confidence(calibrate_confidence(opened, prompts, truths, source=source).manifest.confidence)
        return
    updated, calibration = run(
        opened,
        prompts,
        truths,
        source=source,
        wanted=Wanted(wanted, wanted_aborts, wanted_wrong),
        fields=changes,
    )
    pause = updated.manifest.pause
    click.echo(f"tau_pause {pause.tau_pause:.4f}, tau_abort {pause.tau_abort:.4f}, budget {pause.max_pauses}")
    click.echo(f"{calibration.pauses:.2f} pauses per completion, {calibration.abort_rate:.1%} aborted, on {source}")
    _report_confidence(updated.manifest.confidence)
    if png is not None:
        draw_curve(calibration, pause.tau_pause, png)


def _report_confidence(fields: ConfidenceFields | None) -> None:
    """Print the temperature and the calibration error of each kind of question."""
    for name, kind in (
        ("questions with choices", fields and fields.choices),
        ("open questions", fields and fields.open),
    ):
        if kind is None:
            click.echo(f"confidence of {name}: not calibrated, too few right or wrong answers")
        else:
            click.echo(
                f"confidence of {name}: temperature {kind.temperature:g}, calibration error {kind.ece_before:.3f} "
                f"before and {kind.ece_after:.3f} after, on {kind.num_answers} answers of {fields and fields.source}"
            )


def _gated(sections: tuple[str, ...]) -> list[str]:
    from hyper_model.manifest import GATED_SECTIONS

    names, known = [section.upper() for section in sections], [section.value for section in GATED_SECTIONS]
    for name in names:
        if name not in known:
            raise click.BadParameter(f"{name!r} is none of {', '.join(known)}", param_hint="--section")
    return names


def _prompts_of_scenes(
    checkpoint: Checkpoint, num_items: int, work: Path, workers: int
) -> tuple[list[Prompt], list[Truth]]:
    """Draw questions about scenes of the validation voices, and their truths."""
    from hyper_model.trace import build_prompt
    from training.data.clips import SEED_STRIDE
    from training.data.scenes import SceneBuilder
    from training.data.sources.downloads import SOUNDS_FOLDER
    from training.evaluation.suites.scenes import draw_items
    from training.rl.rollout import Prompt

    bank = bank_of("validation", work, workers)
    builder = SceneBuilder(bank, work / "assets" / SOUNDS_FOLDER, "validation")
    items = draw_items(builder, num_items=num_items, first_seed=SEED_STRIDE["validation"])
    prompts = [
        Prompt(
            build_prompt(checkpoint.tokenizer, item.truth.question, item.truth.choices),
            item.load(),
            item.truth.choices,
        )
        for item in items
    ]
    return prompts, [item.truth for item in items]


def _prompts_of(
    checkpoint: Checkpoint, path: Path, audio_root: Path | None, num_items: int
) -> tuple[list[Prompt], list[Truth]]:
    """Read questions, clips and truths of a user's data set, in any supported format."""
    from hyper_model.errors import HyperError
    from hyper_model.trace import build_prompt
    from training.data.examples import ExampleError, read_clip, read_examples
    from training.data.truth import Truth
    from training.rl.rollout import Prompt

    faults: list[ExampleError] = []
    prompts: list[Prompt] = []
    truths: list[Truth] = []
    for example in islice(read_examples(path, audio_root=audio_root, on_fault=faults.append), num_items):
        try:
            samples_S = read_clip(example).samples_S
        except HyperError as error:
            raise click.ClickException(str(error)) from error
        token_ids = build_prompt(checkpoint.tokenizer, example.question, example.choices)
        prompts.append(Prompt(token_ids, samples_S, example.choices))
        truths.append(example.truth if example.answer else Truth(example.question, ""))
    if faults:
        click.echo(f"{len(faults)} rows left out, the first: {faults[0]}", err=True)
    if not prompts:
        raise click.ClickException(f"{path}: no row can be used")
    return prompts, truths
