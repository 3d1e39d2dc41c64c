"""The commands `hyper serve` and `hyper keys`; imports are inside the functions, for a fast `hyper --help`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from server.settings import ENGINES


@click.command()
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Checkpoint directory (HYPER_CHECKPOINT).")
@click.option(
    "--engine",
    type=click.Choice([*ENGINES]),
    help="Engine: vllm, or scripted without a model (HYPER_ENGINE).",
)
@click.option("--host", help="Listening address (HYPER_HOST).")
@click.option("--port", type=int, help="Listening port; 0 selects a free one (HYPER_PORT).")
def serve(**options: Any) -> None:
    """Answer questions about clips over HTTP.

    HYPER_* variables set all other options; docs/operations.md explains them. SIGTERM stops the service after the
    requests in flight, with exit code 0. Exit code 70: the engine cannot be kept running. Exit code 78: the checkpoint
    cannot be served.
    """
    from pydantic import ValidationError

    from server.serving import run
    from server.settings import Settings, platform_variables, unknown_variables

    # Removed here once, so that neither the settings nor the engine's processes read them.
    ignored = platform_variables(os.environ)
    for name in ignored:
        del os.environ[name]
    if unknown := unknown_variables(os.environ):
        raise click.UsageError("\n".join(unknown))
    try:
        settings = Settings(**{name: value for name, value in options.items() if value is not None})
    except ValidationError as error:
        faults = [f"HYPER_{'_'.join(map(str, fault['loc'])).upper()}: {fault['msg']}" for fault in error.errors()]
        raise click.UsageError("\n".join(faults)) from None
    sys.exit(run(settings, ignored))


@click.group()
def keys() -> None:
    """Create, list and revoke the API keys of a service.

    A running service with this HYPER_KEY_FILE applies changes within a second.
    """


KEY_FILE_OPTION = click.option(
    "--file",
    "path",
    type=click.Path(dir_okay=False, path_type=Path),
    envvar="HYPER_KEY_FILE",
    required=True,
    help="Key file (HYPER_KEY_FILE).",
)


@keys.command()
@click.argument("name")
@KEY_FILE_OPTION
@click.option(
    "--scope",
    "scopes",
    type=click.Choice(["ask", "metrics"]),
    multiple=True,
    help="Endpoints of the key: questions or /metrics.  [default: ask]",
)
@click.option(
    "--priority",
    type=click.Choice(["interactive", "batch"]),
    default="interactive",
    show_default=True,
    help="Class of the key's requests; batch requests wait behind interactive ones.",
)
@click.option("--requests-per-minute", type=float, help="Maximum requests per minute; as many may arrive at once.")
@click.option("--concurrent", type=int, help="Maximum requests in flight.")
@click.option("--audio-s-per-day", type=float, help="Maximum seconds of audio per day.")
@click.option("--days", type=click.IntRange(min=1), help="Days until the key expires.")
def add(name: str, path: Path, scopes: tuple[str, ...], days: int | None, **limits: Any) -> None:
    """Create a key for NAME and print it once; the file stores only its hash."""
    from datetime import UTC, datetime, timedelta

    from server import api_keys as keys

    expires = None if days is None else datetime.now(UTC).replace(microsecond=0) + timedelta(days=days)
    click.echo(keys.add(path, name=name, scopes=scopes or ("ask",), expires=expires, **limits))


@keys.command("list")
@KEY_FILE_OPTION
def list_keys(path: Path) -> None:
    """List the keys with their scopes and limits."""
    from server import api_keys as keys

    for key in keys.read(path).keys:
        limits = {
            "requests/min": key.requests_per_minute,
            "in flight": key.concurrent,
            "audio s/day": key.audio_s_per_day,
        }
        bounds = ", ".join(f"{value:g} {name}" for name, value in limits.items() if value is not None)
        end = "expired" if key.is_expired() else f"until {key.expires:%Y-%m-%d}" if key.expires else ""
        facts = [key.starts + "...", "+".join(key.scopes), key.priority, bounds or "no limits", end]
        click.echo(f"{key.name:<20} {'  '.join(filter(None, facts))}")


@keys.command()
@click.argument("name")
@KEY_FILE_OPTION
def revoke(name: str, path: Path) -> None:
    """Revoke the key of NAME."""
    from server import api_keys as keys

    keys.revoke(path, name)
