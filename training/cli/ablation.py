"""`hyper ablation`: trains and compares the arms of `training.ablation`."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import click

from hyper_model.errors import HyperError
from training.ablation.arms import ARMS, SUITES, Base, Plan, check_settings, run_arms
from training.cli.data import work_option


@click.command()
@click.argument("run_dir", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--base",
    "base_dir",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="The Stage I checkpoint that every arm begins from, calibrated.",
)
@work_option
@click.option("--steps", type=click.IntRange(1), default=300, show_default=True, help="Steps of Stage II.")
@click.option("--sft-steps", type=click.IntRange(1), default=400, show_default=True, help="Steps of Stage I before it.")
@click.option(
    "--items",
    type=click.IntRange(6),
    default=1_200,
    show_default=True,
    help=f"Questions to each arm, over {', '.join(SUITES)}.",
)
@click.option("--seeds", type=click.IntRange(1), default=1, show_default=True, help="How often each arm is trained.")
@click.option(
    "--arm",
    "names",
    multiple=True,
    type=click.Choice([arm.name for arm in ARMS]),
    help="Make this one; may be given more than once.  [default: all]",
)
@click.option("--section", "sections", multiple=True, help="A section that may pause.  [default: the base's]")
@click.option(
    "--wanted-aborts",
    type=click.FloatRange(0.0, 1.0),
    help="The most given up, as a share, that gates are calibrated for.  [default: as the base's]",
)
@click.option("--sft-set", multiple=True, metavar="NAME=VALUE", help="Change a setting of every arm's Stage I.")
@click.option("--grpo-set", multiple=True, metavar="NAME=VALUE", help="Change a setting of every arm's Stage II.")
@click.option("--report", "only_reports", is_flag=True, help="Write the report of what is there, and nothing else.")
def ablation(
    run_dir: Path,
    base_dir: Path | None,
    work: Path,
    steps: int,
    sft_steps: int,
    items: int,
    seeds: int,
    names: tuple[str, ...],
    sections: tuple[str, ...],
    wanted_aborts: float | None,
    sft_set: tuple[str, ...],
    grpo_set: tuple[str, ...],
    only_reports: bool,
) -> None:
    """Train variants of the embedded model from one base, ask all of them the same, and compare them in RUN_DIR.

    What is there already is not made again: the same command goes on where it stopped. Several may share RUN_DIR, each
    with arms of its own. RUN_DIR gets ablation.md, ablation.json and ablation.png.
    """
    from training.ablation.report import write_report

    if only_reports:
        click.echo(write_report(run_dir))
        return
    if base_dir is None:
        raise click.UsageError("name the checkpoint that every arm begins from with --base")
    chosen = [arm for arm in ARMS if not names or arm.name in names]
    base = Base.read(base_dir)
    if base.wanted is None and any(arm.max_pauses for arm in chosen):
        raise click.UsageError(
            f"{base_dir} has no calibrated gate: `hyper checkpoint calibrate {base_dir} --max-pauses 3` gives it one"
        )
    plan = Plan(steps, sft_steps, items, sections, wanted_aborts, sft_set, grpo_set)
    check_settings(run_dir, plan.said(base))
    # So that whoever ends this process ends the command that it waits for, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    failed = run_arms(chosen, plan=plan, base=base, run_dir=run_dir, work=work, num_seeds=seeds)
    click.echo(write_report(run_dir))
    if failed:
        raise HyperError("; ".join(f"{name}: {why}" for name, why in failed.items()))
