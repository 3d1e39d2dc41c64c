"""The training side of the `hyper` command: build data, calibrate, evaluate.

Everything lives under one work folder: `assets/`, `bank/`, `clips/SPLIT/`, `runs/RECIPE/`. Each step resumes.
"""

from __future__ import annotations

import os
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from training.cli.evaluate import SEED, bank_of

if TYPE_CHECKING:
    from hyper_model.checkpoint import Checkpoint
    from training.data.examples import Format
    from training.data.sources.voices import Split
    from training.rl.rollout import Prompt

work_option = click.option(
    "--work",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("build"),
    show_default=True,
    help="Folder of assets, bank and built clips.",
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
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--format",
    "format_",
    type=click.Choice(["paqa", "sharegpt", "avqa", "mmau", "mmar", "csv", "plain"]),
    help="What the file is.  [default: told from its name and first row]",
)
@click.option(
    "--audio-root",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Where relative audio paths start.  [default: the file's folder]",
)
def check(file: Path, format_: Format | None, audio_root: Path | None) -> None:
    """Read a data set of questions about clips, count what it holds and name every row that cannot be used.

    Reads PAQA and LLaMA-Factory's alpaca and ShareGPT forms, R1-AQA's AVQA lines, MMAU, MMAR, CSV (columns audio,
    question, answer; optionally choices separated by |) and a JSON list of objects with file and question. Exits 1
    when there is a bad row.
    """
    from training.data.examples import check_examples

    found = check_examples(file, format=format_, audio_root=audio_root)
    click.echo(f"{file}: {found.format}, {found.num_examples} examples, {found.num_with_choices} with choices")
    for category, number in found.by_category.items():
        click.echo(f"  {category}: {number}")
    if found.num_missing_audio:
        click.echo(f"{found.num_missing_audio} audio files are not there")
    for fault in found.faults:
        click.echo(str(fault), err=True)
    if found.faults:
        raise click.ClickException(f"{len(found.faults)} rows cannot be used")


@data.command()
@work_option
@_workers
@click.option(
    "--split",
    type=click.Choice(["train", "validation", "test"]),
    help="Let only the voices of this split speak.  [default: all]",
)
def bank(work: Path, workers: int, split: Split | None) -> None:
    """Fetch the assets and let every voice speak its lines (52,000; an hour of CPU time)."""
    _single_threaded()
    from training.data.sources.downloads import fetch, require_speech_programs
    from training.data.sources.voices import build_bank, list_voices

    require_speech_programs()
    fetch(work / "assets")
    voices = [voice for voice in list_voices() if split in (None, voice.split)]
    build_bank(work / "assets", work / "bank", seed=SEED, num_workers=workers, voices=voices)


_noise = click.option(
    "--noise",
    multiple=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Take backgrounds from this folder of MUSAN or FSD50K, as it unpacks. May be given several times.",
)


@data.command()
@work_option
@_workers
@click.option("--shards", type=click.IntRange(0), default=32, show_default=True, help="Shards of 500 scenes.")
@click.option(
    "--speech-shards",
    type=click.IntRange(0),
    default=120,
    show_default=True,
    help="Shards of 500 short clips of one voice and open text.",
)
@_noise
@click.option(
    "--noise-shards", type=click.IntRange(0), default=32, show_default=True, help="Shards of 500 scenes over --noise."
)
def scenes(
    work: Path, workers: int, shards: int, speech_shards: int, noise: tuple[Path, ...], noise_shards: int
) -> None:
    """Build the training clips: render them and keep the encoder's states of each.

    A shard takes half a minute of one core. Shards that are there stay; a build that stopped goes on. All kinds of
    clips lie in WORK/clips/train; what the files of --noise ask for is listed there in noise-licences.json.
    """
    _single_threaded()
    from training.data.clips import ClipKind, build_clips
    from training.data.sources.voices import list_voices, missing_rounds

    missing = missing_rounds(work / "bank", [voice for voice in list_voices() if voice.split == "train"])
    if missing:
        raise click.ClickException(f"the bank lacks {len(missing)} rounds: finish it first (make bank)")
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
@click.option("--items", type=click.IntRange(1), default=1_000, show_default=True, help="Questions, one a clip.")
@click.option(
    "--split",
    type=click.Choice(["train", "validation", "test"]),
    default="train",
    show_default=True,
    help="Whose voices and recordings to use.",
)
@click.option(
    "--suite",
    help="Export a hard set: hard-multi-speaker, snr-20, snr-15, snr-10, snr-5, snr-0, overlap or "
    "contradicting-background.  [default: the usual mixture]",
)
@_noise
@click.option("--audio", type=click.Choice(["flac", "wav"]), default="flac", show_default=True, help="Kind of file.")
@click.option("--parts", is_flag=True, help="Also write each clip's speech and background apart.")
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
    """Write scenes into FOLDER as a data set that others can train on.

    FOLDER gets audio/, a JSON Lines file in PAQA's form (instruction, output, audios; `hyper data check` reads it) with
    what is true of each clip, and LICENCES.json with what the sources of the sound ask for. An export that stopped goes
    on; finished files are not made again.
    """
    _single_threaded()
    from training.data.export import ExportPlan, export_scenes
    from training.data.hard_sets import HARD_SETS
    from training.data.sources.downloads import SOUNDS_FOLDER

    if suite is not None and suite not in HARD_SETS:
        raise click.BadParameter(f"{suite!r} is none of {', '.join(HARD_SETS)}", param_hint="--suite")
    if suite is not None and noise:
        raise click.UsageError("--suite has backgrounds of its own: leave --noise out")
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
    """Write ten held-out clips in the formats people upload, with question and truth, into FOLDER."""
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
    help="Questions and clips of your own, in any format that `hyper data check` reads.  "
    "[default: synthetic scenes of the validation voices]",
)
@click.option(
    "--audio-root",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Where relative audio paths of --examples start.  [default: the file's folder]",
)
@click.option("--items", type=click.IntRange(10), default=300, show_default=True, help="Questions to ask.")
@click.option(
    "--wanted",
    type=(float, float),
    default=(0.45, 1.0),
    show_default=True,
    help="The least and the most pauses a completion.",
)
@click.option(
    "--wanted-aborts",
    type=float,
    default=0.01,
    show_default=True,
    help="The most completions given up (too unsure throughout, or repeating themselves), as a share.",
)
@click.option(
    "--max-pauses", type=click.IntRange(1, 16), help="Pauses a completion may have.  [default: the manifest's]"
)
@click.option(
    "--window-tokens",
    type=click.IntRange(1),
    help="Tokens whose mean confidence is compared with the threshold.  [default: the manifest's]",
)
@click.option(
    "--rest-tokens",
    type=click.IntRange(0),
    help="Tokens that must be written between two pauses.  [default: the manifest's]",
)
@click.option("--latent-tokens", type=click.IntRange(1), help="Tokens of a pause.  [default: the manifest's]")
@click.option(
    "--section",
    "sections",
    multiple=True,
    metavar="NAME",
    help="A section that may pause: ENV, SPEAKER, ASR, DESCRIPTION, REASONING, SUMMARY or REFLECT; may be given "
    "several times.  [default: the manifest's]",
)
@click.option("--png", type=click.Path(dir_okay=False, path_type=Path), help="Draw the curve there.")
@work_option
@_workers
def calibrate(
    checkpoint: Path,
    examples: Path | None,
    audio_root: Path | None,
    items: int,
    wanted: tuple[float, float],
    wanted_aborts: float,
    sections: tuple[str, ...],
    png: Path | None,
    work: Path,
    workers: int,
    **fields: int | None,
) -> None:
    """Set the thresholds at which CHECKPOINT pauses, from how sure it is of a validation set.

    The manifest gets the thresholds and the curve they were read from. Weights are not touched. Where no threshold
    gives as many pauses as wanted and as few given up, the command says what it measured and changes nothing: then
    another rate, other sections or a higher --wanted-aborts may be what this checkpoint can do.
    """
    from hyper_model.checkpoint import open_checkpoint
    from training.evaluation.calibrate import Wanted, draw_curve
    from training.evaluation.calibrate import calibrate as run

    if not 0 <= wanted[0] < wanted[1]:
        raise click.BadParameter("the least must be below the most", param_hint="--wanted")
    if png is not None:
        # What draws the curve is missed before the work, and not after it.
        import_module("matplotlib")
    changes: dict[str, Any] = {name: value for name, value in fields.items() if value is not None}
    if sections:
        changes["sections"] = _gated(sections)
    opened = open_checkpoint(checkpoint)
    if examples is None:
        prompts = _prompts_of_scenes(opened, items, work, workers)
    else:
        prompts = _prompts_of(opened, examples, audio_root, items)
    source = (
        f"{len(prompts)} synthetic scenes of the validation voices"
        if examples is None
        else f"{len(prompts)} questions of {examples.name}"
    )
    updated, calibration = run(opened, prompts, source=source, wanted=Wanted(wanted, wanted_aborts), fields=changes)
    pause = updated.manifest.pause
    click.echo(f"tau_pause {pause.tau_pause:.4f}, tau_abort {pause.tau_abort:.4f}, budget {pause.max_pauses}")
    click.echo(f"{calibration.pauses:.2f} pauses a completion, {calibration.abort_rate:.1%} given up, on {source}")
    if png is not None:
        draw_curve(calibration, pause.tau_pause, png)


def _gated(sections: tuple[str, ...]) -> list[str]:
    from hyper_model.manifest import GATED_SECTIONS

    names, known = [section.upper() for section in sections], [section.value for section in GATED_SECTIONS]
    for name in names:
        if name not in known:
            raise click.BadParameter(f"{name!r} is none of {', '.join(known)}", param_hint="--section")
    return names


def _prompts_of_scenes(checkpoint: Checkpoint, num_items: int, work: Path, workers: int) -> list[Prompt]:
    """Ask questions about scenes of the validation voices."""
    from hyper_model.trace import build_prompt
    from training.data.clips import SEED_STRIDE
    from training.data.scenes import SceneBuilder
    from training.data.sources.downloads import SOUNDS_FOLDER
    from training.evaluation.suites import draw_items
    from training.rl.rollout import Prompt

    bank = bank_of("validation", work, workers)
    builder = SceneBuilder(bank, work / "assets" / SOUNDS_FOLDER, "validation")
    return [
        Prompt(
            build_prompt(checkpoint.tokenizer, item.truth.question, item.truth.choices),
            item.load(),
            item.truth.choices,
        )
        for item in draw_items(builder, num_items=num_items, first_seed=SEED_STRIDE["validation"])
    ]


def _prompts_of(checkpoint: Checkpoint, path: Path, audio_root: Path | None, num_items: int) -> list[Prompt]:
    """Read questions and clips of one's own, in any of the formats of data sets."""
    from hyper_model.errors import HyperError
    from hyper_model.trace import build_prompt
    from training.data.examples import ExampleError, read_clip, read_examples
    from training.rl.rollout import Prompt

    faults: list[ExampleError] = []
    prompts: list[Prompt] = []
    for example in islice(read_examples(path, audio_root=audio_root, on_fault=faults.append), num_items):
        try:
            samples_S = read_clip(example).samples_S
        except HyperError as error:
            raise click.ClickException(str(error)) from error
        token_ids = build_prompt(checkpoint.tokenizer, example.question, example.choices)
        prompts.append(Prompt(token_ids, samples_S, example.choices))
    if faults:
        click.echo(f"{len(faults)} rows left out, the first: {faults[0]}", err=True)
    if not prompts:
        raise click.ClickException(f"{path}: no row can be used")
    return prompts
