"""The commands `hyper serve`, `hyper fleet` and `hyper keys`; imports are inside them, for a fast `hyper --help`."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from server.settings import ENGINES

if TYPE_CHECKING:
    from server.settings import Settings


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
    from server.serving import run

    settings, ignored = read_settings(options)
    sys.exit(run(settings, ignored))


def read_settings(options: Mapping[str, Any]) -> tuple[Settings, list[str]]:
    """Read the settings from the environment and a command's options.

    Returns:
        The settings, and the ignored variables of Kubernetes or Docker.

    Raises:
        click.UsageError: If a variable is unknown or a value is invalid.
    """
    from pydantic import ValidationError

    from server.settings import Settings, platform_variables, unknown_variables

    # Removed here once, so that neither the settings nor the engine's processes read them.
    ignored = platform_variables(os.environ)
    for name in ignored:
        del os.environ[name]
    if unknown := unknown_variables(os.environ):
        raise click.UsageError("\n".join(unknown))
    try:
        return Settings(**{name: value for name, value in options.items() if value is not None}), ignored
    except ValidationError as error:
        faults = [f"HYPER_{'_'.join(map(str, fault['loc'])).upper()}: {fault['msg']}" for fault in error.errors()]
        raise click.UsageError("\n".join(faults)) from None


@click.command()
@click.option("--replicas", type=click.IntRange(min=1), default=2, show_default=True, help="Number of replicas.")
@click.option(
    "--max-replicas", type=click.IntRange(min=1), help="Largest number, for autoscaling.  [default: --replicas]"
)
@click.option("--cpus", type=float, default=1.0, show_default=True, help="Cores reserved per replica.")
@click.option("--gpus", type=float, default=0.0, show_default=True, help="GPUs reserved per replica.")
@click.option("--address", help="Address of a running Ray cluster.  [default: start one on this machine]")
@click.option("--scale-up-after", type=float, default=10.0, show_default=True, help="Seconds of waits above 2 s.")
@click.option("--scale-down-after", type=float, default=600.0, show_default=True, help="Seconds without waits.")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Checkpoint directory (HYPER_CHECKPOINT).")
@click.option("--engine", type=click.Choice([*ENGINES]), help="Engine of every replica (HYPER_ENGINE).")
@click.option("--host", help="Listening address (HYPER_HOST).")
@click.option("--port", type=click.IntRange(1, 65535), help="Listening port (HYPER_PORT).")
def fleet(
    replicas: int,
    max_replicas: int | None,
    cpus: float,
    gpus: float,
    address: str | None,
    scale_up_after: float,
    scale_down_after: float,
    **options: Any,
) -> None:
    """Answer questions with several replicas of the service on Ray Serve.

    Needs the extra `fleet`. HYPER_* variables set all other options, as for `hyper serve`; docs/fleet.md explains
    routing, quotas, scaling and the proxy in front. SIGTERM stops the fleet after the requests in flight.
    """
    from server.fleet import Fleet, run

    settings, _ = read_settings(options)
    size = Fleet(
        num_replicas=replicas,
        max_replicas=max(replicas, max_replicas or replicas),
        num_cpus=cpus,
        num_gpus=gpus,
        address=address,
        scale_up_after_s=scale_up_after,
        scale_down_after_s=scale_down_after,
    )
    sys.exit(run(settings, size))


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
