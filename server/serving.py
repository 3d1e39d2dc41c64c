"""Runs the application in uvicorn: the announcement when it is ready, draining at SIGTERM, and the exit code."""

from __future__ import annotations

import asyncio
import resource
import socket
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

EXIT_ENGINE_FAILED = 70  # EX_SOFTWARE
CLOSE_TIMEOUT_S = 5
MAX_HEAD_BYTES = 16 * 1024
NUM_OTHER_DESCRIPTORS = 1000


def run(settings: Settings) -> int:
    """Serves until a signal or the engine's death, and returns the exit code.

    Raises:
        CheckpointError: The checkpoint cannot be served.
        HyperError: The keys cannot be read, or a port cannot be opened.
    """
    logs.configure(settings.log_level)
    app = create_app(settings)
    config = uvicorn_config(app, settings)
    raise_descriptor_limit(settings.max_connections)
    # Before the model loads: a port that is taken should not take a minute to find out.
    listener = config.bind_socket()
    listeners = [listener]
    if settings.metrics_port is not None:
        listeners.append(bind(settings.metrics_host, settings.metrics_port))
    host, port = listener.getsockname()[:2]
    server = DrainingServer(config, app.state.service, url_of(host, port))
    server.run(sockets=listeners)
    return EXIT_ENGINE_FAILED if server.service.failure is not None else 0


def raise_descriptor_limit(num_connections: int) -> None:
    """Makes room for that many connections, as far as this process may: the usual soft limit is 1024 descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = num_connections + NUM_OTHER_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


def bind(host: str, port: int) -> socket.socket:
    """Opens a second port for the same application; the edge tells by the port what may be asked there.

    Raises:
        HyperError: It is taken, or not ours.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise HyperError(f"HYPER_METRICS_PORT={port} on {host}: {error.strerror}") from None


def url_of(host: str, port: int) -> str:
    """Writes an address as a URL; the colons of IPv6 stand in brackets."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def uvicorn_config(app: FastAPI, settings: Settings) -> uvicorn.Config:
    """Says how uvicorn is to run the application."""
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        # Not httptools, the default, which accepts headers without a bound.
        http=connection_type(settings, app.state.service.metrics),
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=5,
        # Draining has waited for the answers by then; this is for connections that hang.
        timeout_graceful_shutdown=CLOSE_TIMEOUT_S,
    )


class DrainingServer(uvicorn.Server):
    """A uvicorn server that answers what is in flight before it closes, and that ends when the engine has died."""

    def __init__(self, config: uvicorn.Config, service: Service, url: str) -> None:
        super().__init__(config)
        self.service = service
        self.url = url
        self.is_announced = False
        self.draining: asyncio.Task[None] | None = None
        self.loop: asyncio.AbstractEventLoop | None = None

    async def on_tick(self, counter: int) -> bool:
        """Looks ten times a second whether there is something to say or a reason to end."""
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
        """Begins to drain at the first signal and closes at once at the second.

        The signal is not kept: uvicorn would raise it again after a clean end, and the exit code would tell of a kill.
        """
        if self.loop is None:
            self.should_exit = True
        elif self.draining is None:
            self.loop.call_soon_threadsafe(self.begin_drain)
        else:
            self.should_exit = self.force_exit = True

    def begin_drain(self) -> None:
        """Starts the drain once."""
        if self.draining is None:
            self.draining = asyncio.get_running_loop().create_task(self.drain())

    async def drain(self) -> None:
        """Lets the service finish, then ends the main loop."""
        await self.service.drain()
        self.should_exit = True
