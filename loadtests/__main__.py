"""The command line: `python -m loadtests smoke` and `bench`. Knows only its own package."""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import asdict
from pathlib import Path

import click

from loadtests.driver import find_clips, run_closed_loop
from loadtests.report import summarize, table


@click.group()
def main() -> None:
    """Measures the service: a running one over HTTP, or one of its own beside its peers."""


@main.command()
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="Where the service listens.")
@click.option(
    "--clips",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    required=True,
    help="Folder of audio files.",
)
@click.option("--clients", type=click.IntRange(min=1), default=4, show_default=True, help="Requests at a time.")
@click.option("--requests", type=click.IntRange(min=1), default=20, show_default=True, help="Requests in all.")
@click.option(
    "--timeout", type=float, default=120.0, show_default=True, help="Seconds without a byte before giving up."
)
def smoke(url: str, clips: Path, clients: int, requests: int, timeout: float) -> None:
    """Asks questions about the clips, prints a table and one JSON line; exits 1 when any request failed."""
    try:
        paths = find_clips(clips)
    except FileNotFoundError as error:
        raise click.UsageError(str(error)) from error
    outcomes = asyncio.run(run_closed_loop(url, paths, num_clients=clients, num_requests=requests, timeout_s=timeout))
    report = summarize(outcomes)
    click.echo(table(report))
    click.echo(json.dumps(asdict(report)))
    sys.exit(1 if report.errors else 0)


@main.command()
@click.option(
    "--checkpoint",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=Path("checkpoints/hyper-mini"),
    show_default=True,
    help="The checkpoint that all of them serve.",
)
@click.option(
    "--clips",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=Path("tests/assets/clips"),
    show_default=True,
    help="Recordings that fresh clips are cut from.",
)
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


if __name__ == "__main__":
    main()
