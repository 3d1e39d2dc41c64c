"""`hyper ablation`: train and compare the arms of `training.ablation`."""

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
    help="Calibrated Stage I checkpoint, the start of every arm.",
)
@work_option
@click.option("--steps", type=click.IntRange(1), default=300, show_default=True, help="Number of Stage II steps.")
@click.option(
    "--sft-steps",
    type=click.IntRange(1),
    default=400,
    show_default=True,
    help="Number of Stage I steps before Stage II.",
)
@click.option(
    "--items",
    type=click.IntRange(6),
    default=1_200,
    show_default=True,
    help=f"Number of questions per arm, over {', '.join(SUITES)}.",
)
@click.option("--seeds", type=click.IntRange(1), default=1, show_default=True, help="Number of training seeds per arm.")
@click.option(
    "--arm",
    "names",
    multiple=True,
    type=click.Choice([arm.name for arm in ARMS]),
    help="Run only this arm. Repeatable.  [default: all]",
)
@click.option("--section", "sections", multiple=True, help="Section with pauses. Repeatable.  [default: the base's]")
@click.option(
    "--wanted-aborts",
    type=click.FloatRange(0.0, 1.0),
    help="Maximum share of aborted completions for calibration.  [default: the base's]",
)
@click.option("--sft-set", multiple=True, metavar="NAME=VALUE", help="Change a Stage I setting of every arm.")
@click.option("--grpo-set", multiple=True, metavar="NAME=VALUE", help="Change a Stage II setting of every arm.")
@click.option("--report", "only_reports", is_flag=True, help="Only write the report of the existing results.")
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
    """Train variants of the embedded model from one base and compare them on the same questions.

    Existing results are kept, so the same command resumes an interrupted run. Several runs with different arms may
    share RUN_DIR. RUN_DIR gets ablation.md, ablation.json and ablation.png.
    """
    from training.ablation.report import write_report

    if only_reports:
        click.echo(write_report(run_dir))
        return
    if base_dir is None:
        raise click.UsageError("an ablation starts from a calibrated checkpoint: set --base")
    chosen = [arm for arm in ARMS if not names or arm.name in names]
    base = Base.read(base_dir)
    if base.wanted is None and any(arm.max_pauses for arm in chosen):
        raise click.UsageError(
            f"{base_dir} has no calibrated gate: run `hyper checkpoint calibrate {base_dir} --max-pauses 3`"
        )
    plan = Plan(steps, sft_steps, items, sections, wanted_aborts, sft_set, grpo_set)
    check_settings(run_dir, plan.said(base))
    # Ending this process must also end its current command.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    failed = run_arms(chosen, plan=plan, base=base, run_dir=run_dir, work=work, num_seeds=seeds)
    click.echo(write_report(run_dir))
    if failed:
        raise HyperError("; ".join(f"{name}: {why}" for name, why in failed.items()))
