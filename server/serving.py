"""The service process in uvicorn: start-up line, draining at SIGTERM, and exit code."""

from __future__ import annotations

import asyncio
import logging
import math
import resource
import socket
from collections.abc import Sequence
from types import FrameType

import click
import uvicorn
from fastapi import FastAPI

from hyper_model.errors import HyperError
from server.app import create_app
from server.connection import connection_type
from server.service import Service
from server.settings import Settings
from server.telemetry import logs

logger = logging.getLogger("hyper.server")

EXIT_ENGINE_FAILED = 70  # EX_SOFTWARE
CLOSE_TIMEOUT_S = 5
MAX_HEAD_BYTES = 16 * 1024
NUM_OTHER_DESCRIPTORS = 1000


def run(settings: Settings, ignored_variables: Sequence[str] = ()) -> int:
    """Run the service until a signal or the engine's failure, and return the exit code.

    Args:
        settings: Configuration of the service.
        ignored_variables: Names of `HYPER_*` variables of the platform, for the log.

    Raises:
        CheckpointError: If the checkpoint cannot be served.
        HyperError: If the keys cannot be read or a port cannot be opened.
    """
    logs.configure(settings.log_level)
    if ignored_variables:
        logger.warning(
            "ignoring variables that Kubernetes or Docker set for a service of this name, not settings: %s",
            ", ".join(ignored_variables),
        )
    app = create_app(settings)
    config = uvicorn_config(app, settings)
    raise_descriptor_limit(settings.max_connections)
    # Before the model loads, so that an occupied port is reported at once.
    listener = config.bind_socket()
    listeners = [listener]
    if settings.metrics_port is not None:
        listeners.append(bind(settings.metrics_host, settings.metrics_port))
    host, port = listener.getsockname()[:2]
    server = DrainingServer(config, app.state.service, url_of(host, port))
    server.run(sockets=listeners)
    return EXIT_ENGINE_FAILED if server.service.failure is not None else 0


def raise_descriptor_limit(num_connections: int) -> None:
    """Raise the descriptor limit for the connections, as far as permitted; the usual soft limit is 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = num_connections + NUM_OTHER_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


def bind(host: str, port: int) -> socket.socket:
    """Open a second port for the same application; the middleware restricts its paths.

    Raises:
        HyperError: If it is occupied or not permitted.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise HyperError(f"HYPER_METRICS_PORT={port} on {host}: {error.strerror}") from None


def url_of(host: str, port: int) -> str:
    """Return the URL of an address, with brackets around IPv6."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def uvicorn_config(app: FastAPI, settings: Settings) -> uvicorn.Config:
    """Return uvicorn's configuration for the application."""
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        # Not httptools, the default: it accepts headers of any size.
        http=connection_type(settings, app.state.service.metrics),
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=math.ceil(settings.keep_alive_s),
        proxy_headers=bool(settings.forwarded_allow_ips),
        forwarded_allow_ips=settings.forwarded_allow_ips or None,
        # By then draining has waited for the answers; this timeout is for stuck connections.
        timeout_graceful_shutdown=CLOSE_TIMEOUT_S,
    )


class DrainingServer(uvicorn.Server):
    """Uvicorn server with draining: it completes requests in flight, then closes; it exits after an engine failure."""

    def __init__(self, config: uvicorn.Config, service: Service, url: str) -> None:
        super().__init__(config)
        self.service = service
        self.url = url
        self.is_announced = False
        self.draining: asyncio.Task[None] | None = None
        self.loop: asyncio.AbstractEventLoop | None = None

    async def on_tick(self, counter: int) -> bool:
        """Announce readiness and check for an engine failure, ten times per second."""
        self.loop = asyncio.get_running_loop()
        if self.service.state == "ready" and not self.is_announced:
            self.is_announced = True
            click.echo(
                f"ready: {self.url}  try: curl -F file=@clip.wav -F question='What is heard?' {self.url}/v1/audio/qa"
            )
        if self.service.failure is not None:
            return True
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Start draining at the first signal, and close at once at the second.

        The signal is not stored: uvicorn would raise it again after a clean shutdown, and the exit code would report a
        kill.
        """
        if self.loop is None:
            self.should_exit = True
        elif self.draining is None:
            self.loop.call_soon_threadsafe(self.begin_drain)
        else:
            self.should_exit = self.force_exit = True

    def begin_drain(self) -> None:
        """Start draining once."""
        if self.draining is None:
            self.draining = asyncio.get_running_loop().create_task(self.drain())

    async def drain(self) -> None:
        """Wait for the service to finish, then end the main loop."""
        await self.service.drain()
        self.should_exit = True
