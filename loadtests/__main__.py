"""The command line: `python -m loadtests smoke --url URL --clips DIR`. Knows only its own package and HTTP."""

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
    """Measures a running service over HTTP."""


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


if __name__ == "__main__":
    main()
