"""Command line of the load tests: `python -m loadtests`, with one command per kind of measurement."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Literal

import click

from loadtests.scenarios import SCENARIOS, Figure


@click.group()
def main() -> None:
    """Measure the service: load, stress, benchmark and rehearsal."""


CLIPS_OPTION = click.option(
    "--clips",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=Path("tests/assets/clips"),
    show_default=True,
    help="Folder of valid clips. They are sent unchanged, cut to other lengths, or broken.",
)
SEED_OPTION = click.option("--seed", type=int, default=20261125, show_default=True, help="Seed of all random choices.")


@main.command()
@click.argument("name", metavar="SCENARIO", type=click.Choice(list(SCENARIOS)))
@click.option("--url", help="Address of a running service.  [default: start `hyper serve` and stop it afterwards]")
@click.option("--key", envvar="HYPER_KEY", help="API key (HYPER_KEY), if the service requires one.")
@click.option("--metrics-url", help="Address of /metrics, if it has its own port (HYPER_METRICS_PORT).")
@click.option(
    "--serve",
    "variables",
    multiple=True,
    metavar="HYPER_NAME=VALUE",
    help="Setting of the started service, such as HYPER_ENGINE=scripted. Repeatable.",
)
@CLIPS_OPTION
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder of the results.")
@click.option(
    "--peak", type=click.FloatRange(min=0, min_open=True), help="Peak in answers per second.  [default: measured]"
)
@click.option("--slo", "slo_s", type=float, help="Latency objective in seconds.  [default: the scenario's]")
@click.option(
    "--scale", type=click.FloatRange(min=0, min_open=True), default=1.0, help="Factor for the length of every period."
)
@SEED_OPTION
@click.option(
    "--log",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Log file of the started service.  [default: OUT/service.log]",
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
    """Send load to the service and measure it.

    Requests arrive as a Poisson process, independent of the answers, and latency counts from the planned time of a
    request. Prints a table and one line of JSON; OUT gets all figures as JSON and a picture. Exits with 1 if a figure
    misses its target or requests fail, and with 3 if the driver itself was too slow.

    \b
    smoke     two questions per second for 15 s; all must be answered
    capacity  growing rates: the peak, and latency by stage over the offered load
    overload  0.8 and 3 times the peak: goodput, latency of admitted requests, refusals
    soak      11,000 requests at 0.7 of the peak: memory, and a count of all outcomes
    chaos     disconnecting clients, a killed and a hung engine, SIGTERM with 50 in flight
    """
    from loadtests.driver import DriverLateError
    from loadtests.experiment import Experiment, write
    from loadtests.report import table
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
    echo_figures(figures)
    sys.exit(0 if result["is_met"] else 1)


def echo_figures(figures: Sequence[Figure]) -> None:
    """Print figures as a table and as one line of JSON."""
    from loadtests.scenarios import figures_table

    click.echo(figures_table(figures))
    click.echo(json.dumps({figure.name: figure.value for figure in figures}))


@main.command()
@click.option(
    "--checkpoint",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=Path("checkpoints/hyper-mini"),
    show_default=True,
    help="Checkpoint of all measured systems.",
)
@CLIPS_OPTION
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True, help="Number of alternating rounds.")
@click.option(
    "--part",
    "parts",
    type=click.Choice(["engine", "throughput", "chat", "drafts", "cpu"]),
    multiple=True,
    help="Measure only this part. Repeatable; cpu compares int8, compilation and llama.cpp.  [default: all]",
)
@click.option(
    "--log",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("build/bench.log"),
    show_default=True,
    help="Log file of the measured processes.",
)
def bench(checkpoint: Path, clips: Path, rounds: int, parts: tuple[str, ...], log: Path) -> None:
    """Compare the service with vLLM's own server, bare engines, transformers and llama.cpp (20 minutes on two cores).

    The systems alternate in one run; every figure is a ratio within it. The last line is JSON.
    """
    from loadtests.bench import (
        Bench,
        measure_chat,
        measure_cpu,
        measure_drafts,
        measure_engine,
        measure_throughput,
        table,
    )
    from loadtests.bench import Figure as Ratio

    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("")
    setup = Bench(checkpoint, clips, rounds, log, say=lambda text: click.echo(text, err=True))
    measures = {
        "engine": measure_engine,
        "throughput": measure_throughput,
        "chat": measure_chat,
        "drafts": measure_drafts,
        "cpu": measure_cpu,
    }
    figures: list[Ratio] = []
    for name, measure in measures.items():
        if name in (parts or measures):
            found = measure(setup)
            figures += found
            # Print at once, since another part may fail.
            click.echo(table(found))
    click.echo(json.dumps({figure.name: round(figure.value, 8) for figure in figures}))


@main.command()
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("build/stress"),
    show_default=True,
    help="Folder of the results; finished parts are not repeated.",
)
@CLIPS_OPTION
@click.option("--files", "num_files", type=click.IntRange(1), help="Number of hostile files.  [default: 10000]")
@click.option(
    "--requests", "num_requests", type=click.IntRange(4), help="Number of generated requests.  [default: 2000]"
)
@click.option("--part", "parts", metavar="PART", multiple=True, help="Run only this part. Repeatable.")
@click.option("--quick", "is_quick", is_flag=True, help="Run for some minutes: small numbers, no soak, no vLLM.")
@click.option(
    "--overload-engine",
    type=click.Choice(["scripted", "vllm"]),
    default="scripted",
    show_default=True,
    help="Engine of the overload and soak parts.",
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
    """Measure the documented limits under hostile input, overload and faults (twenty minutes on two cores).

    Prints a table and one line of JSON; OUT keeps all figures. Exits with 1 if a figure misses its target, and with 3
    if a part has no result; the next run repeats that part.

    \b
    sandbox   clips decoded inside and outside the sandbox
    odd_files ordinary but odd files, compared with an ffmpeg program
    auth      every address and method without a key
    requests  requests generated from /openapi.json
    files     hostile files: broken files, bombs, wrong headers, traps that call a port or read a file
    quotas    two replicas share a key's quota; their store is killed under load
    fleet     one of two replicas is killed, and one taken away, with open streams
    jobs      a service with jobs is killed 20 times; their webhooks' receiver comes and goes
    overload  0.8 and 3 times the peak
    soak      11,000 requests at 0.7 of the peak
    chaos     disconnecting clients, a killed and a hung engine, SIGTERM with 50 in flight
    """
    from loadtests.scenarios import figures_json, figures_table
    from loadtests.stress import PARTS, StressRun, run

    if unknown := set(parts) - set(PARTS):
        raise click.BadParameter(
            f"unknown part {', '.join(sorted(unknown))}; choose from {', '.join(PARTS)}", param_hint="--part"
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
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object only.")
@click.option("--layers", type=click.IntRange(1), default=32, show_default=True, help="Decoder layers of the model.")
@click.option(
    "--scale", type=click.Choice(["full", "tiny"]), default="full", show_default=True, help="Widths; tiny is a test."
)
@click.option(
    "--work",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("build/rehearse"),
    show_default=True,
    help="Folder of models, runs and the log.",
)
@CLIPS_OPTION
@click.option(
    "--vocabulary",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Vocabulary in tiktoken's form.  [default: Qwen's, in the package dashscope]",
)
@click.option("--no-training", is_flag=True, help="Leave out the training steps.")
def rehearse(
    as_json: bool,
    layers: int,
    scale: str,
    work: Path,
    clips: Path,
    vocabulary: Path | None,
    no_training: bool,
) -> None:
    """Serve and train Qwen2-Audio-7B's shapes with random weights (18 GiB of memory, 36 GiB of disk).

    The answers are random; the figures show whether all parts fit together and how much memory they take. Exits with
    1 if a question is not answered.
    """
    from loadtests.rehearse import Rehearsal, run

    setup = Rehearsal(
        layers=layers,
        scale=scale,
        clips=clips,
        work=work.resolve(),
        vocabulary=vocabulary,
        trains=not no_training,
        say=lambda text: click.echo(text, err=True),
    )
    figures = run(setup)
    if not as_json:
        for name, value in figures.items():
            if name != "replies":
                click.echo(f"{name:<20}{value}")
    click.echo(json.dumps(figures))
    sys.exit(int(figures["answered"] != figures["questions"]))


@main.command()
@click.option("--url", required=True, help="Address of a running service.")
@click.option("--key", envvar="HYPER_KEY", help="API key (HYPER_KEY), if the service requires one.")
@click.option(
    "--clip",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="WAV file for the calls of the client.  [default: a second of tone]",
)
@click.option(
    "--requests",
    "num_requests",
    type=click.IntRange(0),
    default=2_000,
    show_default=True,
    help="Number of generated requests.",
)
@SEED_OPTION
def conformance(url: str, key: str | None, clip: Path | None, num_requests: int, seed: int) -> None:
    """Check a service with the official openai client, and with requests generated for every endpoint.

    Prints one line of JSON: the passed calls of the client (openai_calls of openai_calls_total), the replies that
    /openapi.json does not allow (schema_violations), and 5xx replies (http_5xx). Exits with 1 if a check fails.
    """
    from loadtests.conformance import check

    data = None if clip is None else clip.read_bytes()
    result = check(
        url.rstrip("/"), key, num=num_requests, seed=seed, clip=data, say=lambda text: click.echo(text, err=True)
    )
    click.echo(json.dumps(result.as_json()))
    sys.exit(0 if result.is_met else 1)


@main.command()
@CLIPS_OPTION
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("build/fleet"),
    show_default=True,
    help="Folder of the results: fleet.json and fleet.png.",
)
@click.option(
    "--requests", "num_requests", type=click.IntRange(20), default=200, show_default=True, help="Requests per load."
)
@click.option("--max-replicas", type=click.IntRange(1, 500), default=500, show_default=True, help="Largest fleet.")
@SEED_OPTION
@click.option("--json", "is_json", is_flag=True, help="Print all figures as one line of JSON.")
def fleet(clips: Path, out: Path, num_requests: int, max_replicas: int, seed: int, is_json: bool) -> None:
    """Measure two scripted replicas, and simulate fleets of up to 500 at their pace (eight minutes).

    Compares simulation and real run at three loads first. Exits with 1 if they differ by more than 15 %, and with 3 if
    the driver itself was too slow. The policies are random, two_choices, hash and bounded.
    """
    from loadtests.driver import DriverLateError
    from loadtests.fleet import SIZES, draw, measure
    from loadtests.workload import Clips

    out.mkdir(parents=True, exist_ok=True)
    sizes = [size for size in SIZES if size <= max_replicas]
    try:
        held = Clips(clips)
        result = measure(held, out / "service.log", sizes, num_requests, seed, lambda text: click.echo(text, err=True))
    except FileNotFoundError as error:
        raise click.UsageError(str(error)) from error
    except DriverLateError as error:
        click.echo(f"No result: {error}", err=True)
        sys.exit(3)
    (out / "fleet.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(result["simulated"], out / "fleet.png")
    if is_json:
        click.echo(json.dumps(result))
    else:
        for row in result["agreement"] + result["simulated"]:
            click.echo("  ".join(f"{name} {value}" for name, value in row.items()))
    sys.exit(0 if result["is_believed"] else 1)


@main.command()
@click.option(
    "--prometheus", "url", required=True, metavar="URL", help="Address of a Prometheus that scrapes the service."
)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="PNG file to write.")
@click.option(
    "--minutes",
    type=click.FloatRange(min=0, min_open=True),
    default=60,
    show_default=True,
    help="Length of the shown period.",
)
@click.option(
    "--until",
    type=click.DateTime(),
    metavar="UTC",
    help="End of the shown period, such as 2026-11-25T23:00:00.  [default: now]",
)
@click.option("--instance", default=".*", show_default=True, help="Regular expression of the instances.")
@click.option("--rate", "rate_interval", default="1m", show_default=True, help="Window of rates.")
@click.option(
    "--dashboard",
    "file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    default=Path("deploy/grafana/dashboards/hyper.json"),
    show_default=True,
    help="Grafana dashboard to draw.",
)
def dashboard(
    url: str, out: Path, minutes: float, until: datetime | None, instance: str, rate_interval: str, file: Path
) -> None:
    """Draw the Grafana dashboard as a PNG from Prometheus, without Grafana."""
    from loadtests.dashboard import Prometheus, draw, window_of

    window = window_of(minutes, until, instance, rate_interval)
    with contextlib.closing(Prometheus(url)) as prometheus:
        num_with_data = draw(file, prometheus, window, out)
    click.echo(f"{out}: {num_with_data} panels have data")


if __name__ == "__main__":
    main()
