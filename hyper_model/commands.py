"""The commands of `hyper checkpoint`: verify, describe and adopt checkpoints.

`calibrate` needs an engine and clips, so `training` provides it through the entry point group of `_Group`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import click

from hyper_model.cli import CommandGroup

_DIRECTORY = click.Path(path_type=Path)


class _Group(CommandGroup):
    entry_point_group = "hyper.checkpoint.commands"


@click.group(cls=_Group)
def checkpoint() -> None:
    """Verify, adopt, compose, quantize and calibrate checkpoints."""


@checkpoint.command()
@click.argument("directory", type=_DIRECTORY)
def verify(directory: Path) -> None:
    """Verify DIRECTORY: checksums, names, tokens, and the absence of executable code."""
    from hyper_model.checkpoint import open_checkpoint

    opened = open_checkpoint(directory)
    click.echo(f"{opened.manifest.name}: {len(opened.manifest.files)} files are complete and can be served")
    click.echo(f"manifest sha256 {opened.manifest_sha256}")


@checkpoint.command()
@click.argument("directory", type=_DIRECTORY)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def info(directory: Path, as_json: bool) -> None:
    """Describe the checkpoint in DIRECTORY without verifying checksums (see verify)."""
    from hyper_model import int8, weights
    from hyper_model.checkpoint import open_checkpoint

    opened = open_checkpoint(directory, verify=False)
    manifest = opened.manifest
    entries = weights.read_entries(weights.weight_files(directory))
    scales = {int8.scale_name(name) for name in entries}
    num_parameters = sum(math.prod(entry.shape) for name, entry in entries.items() if name not in scales)
    num_bytes = sum((directory / name).stat().st_size for name in manifest.files)
    names = weights.DTYPES | {weights.INT8: "int8"}
    dtypes = sorted({names[entry.dtype] for entry in entries.values()})
    if as_json:
        facts = {"manifest_sha256": opened.manifest_sha256, "num_parameters": num_parameters, "num_bytes": num_bytes}
        click.echo(json.dumps(facts | {"dtypes": dtypes, "manifest": manifest.model_dump(mode="json")}, indent=2))
        return
    pause = manifest.pause
    pauses = f"at most {pause.max_pauses} of {pause.latent_tokens} tokens, {pause.mode}" if pause.max_pauses else "off"
    if pause.position_ids:
        pauses += ", each position with a token of its own"
    gate = f"pauses at {pause.tau_pause:g}, gives up at {pause.tau_abort:g} over {pause.window_tokens} tokens"
    calibration = pause.calibration
    if pause.max_closed_loops:
        gate += f", ends {pause.max_closed_loops} repetitions"
    confidence = manifest.confidence
    kinds = {"choices": confidence.choices, "open": confidence.open} if confidence else {}
    temperatures = ", ".join(
        f"temperature {kind.temperature:g} ({name}, calibration error {kind.ece_after:.3f})"
        for name, kind in kinds.items()
        if kind is not None
    )
    measured = (
        f"{calibration.pauses:g} pauses a completion, {calibration.abort_rate:.1%} given up, on {calibration.source}"
        if calibration
        else "no (hyper checkpoint calibrate)"
    )
    for label, value in (
        ("name", manifest.name),
        ("manifest sha256", opened.manifest_sha256),
        ("weights", f"int8 ({manifest.quantization})" if manifest.quantization else "float"),
        ("parameters", f"{num_parameters:,} in {', '.join(dtypes)}, {num_bytes / 1e6:,.1f} MB on disk"),
        ("base model", manifest.base_model or "not said"),
        ("recipe", manifest.recipe or "not said"),
        ("data card", manifest.data_card or "not said"),
        ("trace", f"tags as {manifest.trace.tag_style.value}, choices by {manifest.trace.answer_style}"),
        ("pauses", pauses),
        ("gate", gate),
        ("calibrated", measured),
        ("confidence", temperatures or "the model's own (hyper checkpoint calibrate)"),
        ("longest sequence", f"{manifest.max_model_len} tokens"),
        ("window", f"{manifest.audio.window_s:g} s"),
        ("environment", ", ".join(manifest.environment_labels) or "open vocabulary"),
    ):
        click.echo(f"{label + ':':<18}{value}")


@checkpoint.command()
@click.argument("source", type=_DIRECTORY)
@click.argument("destination", type=_DIRECTORY)
@click.option("--name", help="Name of the checkpoint.  [default: name of the SOURCE directory]")
@click.option(
    "--tag-style",
    type=click.Choice(["token", "text"]),
    help="Form of the tags; token adds them to the tokenizer.  "
    "[default: token if the tokenizer has all of them, else text]",
)
@click.option(
    "--tag-names",
    type=click.Choice(["hyper", "r1"]),
    help="Names of the tags: those of published HyPeR models, or <think> and <answer>.  "
    "[default: hyper if the tokenizer has any of its tokens, else r1]",
)
@click.option(
    "--answer-style",
    type=click.Choice(["letter", "text"]),
    help="Form of answers to multiple-choice questions: a letter, or the text of the choice.  "
    "[default: letter for hyper, text for r1]",
)
@click.option("--base-model", help="Name of the source in the manifest.  [default: name of the SOURCE directory]")
def adopt(
    source: Path,
    destination: Path,
    name: str | None,
    tag_style: str | None,
    tag_names: str | None,
    answer_style: str | None,
    base_model: str | None,
) -> None:
    """Convert a Qwen2-Audio model into a checkpoint at DESTINATION.

    SOURCE is a directory in transformers' format, with config.json, tokenizer.json and safetensors files. A published
    HyPeR model with Qwen's own tokenizer cannot be detected: use --tag-names hyper.
    """
    from typing import cast

    from hyper_model import adopt as adoption
    from hyper_model.trace import TagStyle

    adopted = adoption.adopt(
        source,
        destination,
        name=name,
        tag_style=TagStyle(tag_style) if tag_style else None,
        tag_names=cast("adoption.TagNames | None", tag_names),
        answer_style=cast("adoption.AnswerStyle | None", answer_style),
        base_model=base_model,
    )
    manifest = adopted.checkpoint.manifest
    click.echo(f"{manifest.name}: written to {destination}")
    click.echo(
        f"tags: {manifest.trace.tag_style.value}, spelled as {adopted.tag_names}; "
        f"choices by {manifest.trace.answer_style}"
    )
    rows = f"{adopted.num_rows} embedding rows (were {adopted.num_rows_before})"
    click.echo(f"tokens added: {', '.join(adopted.added_tokens) or 'none'}; {rows}")
    if not manifest.pause.max_pauses:
        is_text = manifest.trace.tag_style is TagStyle.TEXT
        click.echo(f"pauses: off, because {'its tags are plain text' if is_text else 'this model never saw them'}")


@checkpoint.command()
@click.argument("source", type=_DIRECTORY)
@click.argument("destination", type=_DIRECTORY)
def positions(source: Path, destination: Path) -> None:
    """Add one token per position of SOURCE's parallel pauses; write the checkpoint to DESTINATION.

    The tokens start as copies of the pause token, so outputs stay the same until training changes them.
    """
    from hyper_model.positions import give_positions

    made = give_positions(source, destination)
    click.echo(f"{made.manifest.name}: written to {destination}, pauses of {made.manifest.pause.latent_tokens} tokens")


@checkpoint.command()
@click.argument("source", type=_DIRECTORY)
@click.argument("destination", type=_DIRECTORY)
@click.option("--overwrite", is_flag=True, help="Replace a checkpoint at DESTINATION.")
def quantize(source: Path, destination: Path, overwrite: bool) -> None:
    """Write the int8 form of SOURCE to DESTINATION, for faster answers on a CPU.

    Weights of the decoder and its head become int8, one scale per output channel; activations become int8 in the
    engine. The audio tower stays as it is. The gate's thresholds are kept: `hyper checkpoint calibrate` renews them.
    """
    from hyper_model import weights
    from hyper_model.quantize import quantize as convert

    made = convert(source, destination, overwrite=overwrite)
    before, after = (sum(path.stat().st_size for path in weights.weight_files(root)) for root in (source, destination))
    click.echo(f"{made.manifest.name}: written to {destination}, {made.manifest.quantization}")
    click.echo(f"weights: {after / 1e6:,.1f} MB (were {before / 1e6:,.1f} MB)")
    if made.manifest.pause.calibration is not None:
        click.echo("gate: thresholds of the float weights are kept; hyper checkpoint calibrate renews them")


@checkpoint.command()
@click.argument("parts", type=click.Path(exists=True, file_okay=False, path_type=Path), required=False)
@click.option(
    "--to",
    "destination",
    type=_DIRECTORY,
    help="The directory to write.  [default: one in the cache, $HYPER_CACHE or ~/.cache/hyper]",
)
@click.option("--overwrite", is_flag=True, help="Replace a checkpoint at --to.")
@click.option("--untrained", is_flag=True, help="Compose a base to train on, without PARTS; it needs --to.")
@click.option(
    "--audio-stack",
    type=click.IntRange(1, 8),
    default=2,
    show_default=True,
    help="Encoder rows of 40 ms per audio token, with --untrained.",
)
@click.option(
    "--audio-layers",
    default="1",
    show_default=True,
    help="Encoder layers joined to the last one, with commas between; empty joins none. With --untrained.",
)
def compose(
    parts: Path | None,
    destination: Path | None,
    overwrite: bool,
    untrained: bool,
    audio_stack: int,
    audio_layers: str,
) -> None:
    """Compose hyper-small from pinned packages and the trained parts in PARTS.

    The packages of `requirements/small.txt` hold Whisper base and SmolLM2-135M-Instruct. Their files are checked by
    sum. A composed checkpoint in the cache is verified and kept; one at --to is written anew.
    """
    from hyper_model import compose as composing

    if untrained == (parts is not None):
        raise click.UsageError("give either PARTS or --untrained")
    if untrained and destination is None:
        raise click.UsageError("--untrained needs --to")
    try:
        layers = [int(number) for number in audio_layers.split(",") if number.strip()]
    except ValueError:
        raise click.BadParameter(
            f"{audio_layers!r}: numbers with commas are wanted", param_hint="--audio-layers"
        ) from None
    if parts is not None:
        found = composing.read_parts(parts)
    else:
        found = composing.untrained("hyper-small-base", audio_stack, layers)
    if destination is None:
        made = composing.compose_once(found, report=click.echo)
    else:
        made = composing.compose(found, destination, report=click.echo, overwrite=overwrite)
    click.echo(f"{made.manifest.name}: {made.path} (manifest sha256 {made.manifest_sha256[:12]})")
