"""The command line: `python -m loadtests run`, `dashboard`, `bench` and `stress`. Knows only its own package."""

from __future__ import annotations

import contextlib
import json
import sys
from datetime import datetime
from pathlib import Path
from typing import Literal

import click

from loadtests.scenarios import SCENARIOS


@click.group()
def main() -> None:
    """Measures the service: a running one over HTTP, or one of its own beside its peers."""


CLIPS_OPTION = click.option(
    "--clips",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=Path("tests/assets/clips"),
    show_default=True,
    help="Folder of good clips, which are asked about as they are, cut to other lengths, or broken.",
)
SEED_OPTION = click.option(
    "--seed", type=int, default=20261125, show_default=True, help="Everything that is drawn follows from it."
)


@main.command()
@click.argument("name", metavar="SCENARIO", type=click.Choice(list(SCENARIOS)))
@click.option("--url", help="A running service.  [default: starts `hyper serve` and ends it afterwards]")
@click.option("--key", envvar="HYPER_KEY", help="An API key (HYPER_KEY), where the service asks for one.")
@click.option("--metrics-url", help="Where /metrics is, if on a port of its own (HYPER_METRICS_PORT).")
@click.option(
    "--serve",
    "variables",
    multiple=True,
    metavar="HYPER_NAME=VALUE",
    help="A setting of the service that is started, such as HYPER_ENGINE=scripted; may be given several times.",
)
@CLIPS_OPTION
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Where the results go.")
@click.option("--peak", type=click.FloatRange(min=0, min_open=True), help="Answers a second; else it is looked for.")
@click.option("--slo", "slo_s", type=float, help="Seconds within which an answer is good.  [default: the scenario's]")
@click.option("--scale", type=click.FloatRange(min=0, min_open=True), default=1.0, help="Makes every period longer.")
@SEED_OPTION
@click.option(
    "--log",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where a service that is started here writes its messages.  [default: OUT/service.log]",
)
def run(
    name: str,
    url: str | None,
    key: str | None,
    metrics_url: str | None,
    variables: tuple[str, ...],
    clips: Path,
    out: Path,
    peak: float | None,
    slo_s: float | None,
    scale: float,
    seed: int,
    log: Path | None,
) -> None:
    """Offers load to the service and measures it.

    Requests arrive as a Poisson process at rates that do not depend on the answers, and latency counts from when a
    request was due. Ends with a table and one line of JSON; OUT gets all figures as JSON and a picture. Exits with 1
    where a figure misses its aim or requests fail, and with 3 where the driver itself was too slow to tell.

    \b
    smoke     two questions a second for 15 s; all must be answered
    capacity  growing rates: the peak, and latency by stage over the offered load
    overload  0.8 and 3 times the peak: goodput, latency of what is admitted, refusals
    soak      11,000 requests at 0.7 of the peak: memory, and every request accounted for
    chaos     clients that leave, an engine that is killed and one that hangs, SIGTERM with 50 in flight
    """
    from loadtests.driver import DriverLateError
    from loadtests.experiment import Experiment, write
    from loadtests.report import table
    from loadtests.scenarios import figures_table
    from loadtests.target import target_of
    from loadtests.workload import Clips

    scenario = SCENARIOS[name].scaled(scale, slo_s)
    try:
        held = Clips(clips)
        settings = dict(variable.split("=", 1) for variable in variables)
    except (FileNotFoundError, ValueError) as error:
        raise click.UsageError(str(error)) from error
    out.mkdir(parents=True, exist_ok=True)
    with target_of(
        url,
        key=key,
        metrics_url=metrics_url,
        settings={**scenario.environment, **settings},
        log=log or out / "service.log",
    ) as target:
        experiment = Experiment(target, held, seed, lambda text: click.echo(text, err=True), peak)
        try:
            figures = experiment.carry_out(scenario)
        except DriverLateError as error:
            click.echo(table(experiment.reports), err=True)
            click.echo(f"No result: {error}", err=True)
            sys.exit(3)
        result = experiment.result(name, figures)
    write(out, result, experiment.reports)
    if experiment.reports:
        click.echo(table(experiment.reports))
    click.echo(figures_table(figures))
    click.echo(json.dumps({each.name: each.value for each in figures}))
    sys.exit(0 if result["is_met"] else 1)


@main.command()
@click.option(
    "--checkpoint",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=Path("checkpoints/hyper-mini"),
    show_default=True,
    help="The checkpoint that all of them serve.",
)
@CLIPS_OPTION
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True, help="How often the sides take turns.")
@click.option(
    "--part",
    "parts",
    type=click.Choice(["engine", "throughput"]),
    multiple=True,
    help="Measure this part only.  [default: both]",
)
@click.option(
    "--log",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("build/bench.log"),
    show_default=True,
    help="Where the measured processes write their messages.",
)
def bench(checkpoint: Path, clips: Path, rounds: int, parts: tuple[str, ...], log: Path) -> None:
    """Measures the service beside vLLM's own server, bare engines and transformers (about 12 minutes on two cores).

    They take turns in one run; every figure is a ratio within it. Ends with one JSON line.
    """
    from loadtests.bench import Bench, Figure, measure_engine, measure_throughput, table

    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("")
    setup = Bench(checkpoint, clips, rounds, log, say=lambda text: click.echo(text, err=True))
    measures = {"engine": measure_engine, "throughput": measure_throughput}
    figures: list[Figure] = []
    for name, measure in measures.items():
        if name in (parts or measures):
            found = measure(setup)
            figures += found
            # At once: the other part may fail.
            click.echo(table(found))
    click.echo(json.dumps({figure.name: round(figure.value, 8) for figure in figures}))


@main.command()
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("build/stress"),
    show_default=True,
    help="Where results are kept; a part whose result is there is not carried out again.",
)
@CLIPS_OPTION
@click.option("--files", "num_files", type=click.IntRange(1), help="Hostile files to send.  [default: 10000]")
@click.option("--requests", "num_requests", type=click.IntRange(4), help="Requests to generate.  [default: 2000]")
@click.option("--part", "parts", metavar="PART", multiple=True, help="Only this part; may be given several times.")
@click.option("--quick", "is_quick", is_flag=True, help="Some minutes: few of everything, no soak, no vLLM.")
@click.option(
    "--overload-engine",
    type=click.Choice(["scripted", "vllm"]),
    default="scripted",
    show_default=True,
    help="What is overloaded and soaked.",
)
@SEED_OPTION
def stress(
    out: Path,
    clips: Path,
    num_files: int | None,
    num_requests: int | None,
    parts: tuple[str, ...],
    is_quick: bool,
    overload_engine: Literal["scripted", "vllm"],
    seed: int,
) -> None:
    """Does to the service all that it promises to withstand (twenty minutes on two cores).

    Ends with a table and one line of JSON; OUT keeps all figures. Exits with 1 where a figure misses its aim, and with
    3 where a part came to no result; the next run takes that up again.

    \b
    sandbox   clips decoded in the sandbox and beside it
    auth     every address and method without a key
    requests  requests generated from the service's own description
    files     hostile files: broken ones, bombs, liars, traps that call a port or read a file
    overload  0.8 and 3 times the peak
    soak      11,000 requests at 0.7 of the peak
    chaos     clients that leave, an engine that is killed and one that hangs, SIGTERM with 50 in flight
    """
    from loadtests.scenarios import figures_json, figures_table
    from loadtests.stress import PARTS, StressRun, run

    if unknown := set(parts) - set(PARTS):
        raise click.BadParameter(
            f"there is no {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}", param_hint="--part"
        )
    setup = StressRun(
        out=out,
        clips=clips,
        num_files=num_files or (300 if is_quick else 10_000),
        num_requests=num_requests or (100 if is_quick else 2_000),
        seed=seed,
        is_quick=is_quick,
        overload_engine=overload_engine,
        say=lambda text: click.echo(text, err=True),
    )
    figures, failures = run(setup, parts or list(PARTS))
    click.echo(figures_table(figures))
    for part, reason in failures.items():
        click.echo(f"{part}: no result: {reason}", err=True)
    (out / "stress.json").write_text(json.dumps(figures_json(figures), indent=1) + "\n")
    click.echo(json.dumps({each.name: each.value for each in figures}))
    is_met = all(each.is_met for each in figures)
    sys.exit(3 if failures else int(not is_met))


@main.command()
@click.option("--prometheus", "url", required=True, metavar="URL", help="A Prometheus that scrapes the service.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="The PNG to write.")
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), default=60, show_default=True, help="How long.")
@click.option(
    "--until", type=click.DateTime(), metavar="UTC", help="When it ends: 2026-11-25T23:00:00.  [default: now]"
)
@click.option("--instance", default=".*", show_default=True, help="Instances, as a regular expression.")
@click.option("--rate", "rate_interval", default="1m", show_default=True, help="Rates are taken over this long.")
@click.option(
    "--dashboard",
    "file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    default=Path("deploy/grafana/dashboards/hyper.json"),
    show_default=True,
    help="The Grafana dashboard to draw.",
)
def dashboard(
    url: str, out: Path, minutes: float, until: datetime | None, instance: str, rate_interval: str, file: Path
) -> None:
    """Draws the Grafana dashboard as a PNG, for those who have a Prometheus and no Grafana."""
    from loadtests.dashboard import Prometheus, draw, window_of

    window = window_of(minutes, until, instance, rate_interval)
    with contextlib.closing(Prometheus(url)) as prometheus:
        num_with_data = draw(file, prometheus, window, out)
    click.echo(f"{out}: {num_with_data} panels have data")


if __name__ == "__main__":
    main()
