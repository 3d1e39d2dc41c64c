"""Several replicas of the service on Ray Serve, each with its own engine.

Ray starts, routes to, scales and restarts the replicas; the application is the one of `hyper serve`. A replica counts
as started when its engine is ready. Requests with the same `x-hyper-clip` header go to the same replica, so its
engine's cache is used. This is the only module that imports Ray, and only inside functions.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import secrets
import signal
import socket
import threading
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import click
import uvicorn
from fastapi import FastAPI
from starlette.datastructures import MutableHeaders
from starlette.types import Message, Receive, Scope, Send

from hyper_model.errors import HyperError
from server.app import create_app
from server.service import Service
from server.serving import CLOSE_TIMEOUT_S, MAX_HEAD_BYTES, bind
from server.settings import PREFIX, Settings
from server.telemetry import logs

logger = logging.getLogger("hyper.server")

APPLICATION = "hyper"
ROUTING_HEADER = "x-hyper-clip"
EXPECTED_WAIT = "expected_wait_s"
"""Name of the autoscaling statistic; the metric `hyper_expected_wait_seconds` has the same value."""

NUM_METRICS_PORTS = 100
READY_INTERVAL_S = 0.1
STOP_TIMEOUT_S = 15.0
"""Time for closing connections and stopping the engine, after the drain."""

SCALE_UP_WAIT_S = 2.0
SCALE_UP_AFTER_S = 10.0
SCALE_DOWN_WAIT_S = 0.2
SCALE_DOWN_AFTER_S = 600.0
HEALTH_INTERVAL_S = 2.0

RAY_VARIABLES = {
    "RAY_SERVE_SESSION_ID_HEADER_KEY": ROUTING_HEADER,
    "RAY_USAGE_STATS_ENABLED": "0",
    # The custom router and Ray's own HAProxy exclude each other.
    "RAY_SERVE_ENABLE_HA_PROXY": "0",
    # A program that reaches Ray's ports can run code there, so they require a token.
    "RAY_AUTH_MODE": "token",
}
"""Variables for every process of the cluster; Ray reads them when it is imported."""

OWN_CLUSTER_VARIABLES = {
    # Ray replaces a loopback address by an outside one, unless clusters of several machines are off.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}
"""Further variables of a cluster that this command starts: it has one machine, so its ports are bound to loopback."""


@dataclass(frozen=True)
class Fleet:
    """Size and resources of a fleet.

    Attributes:
        num_replicas: Number of replicas; with autoscaling the smallest number.
        max_replicas: Largest number; equal to `num_replicas` without autoscaling.
        num_cpus, num_gpus: Resources reserved per replica.
        address: Address of a running Ray cluster; None starts one on this machine.
        scale_up_after_s, scale_down_after_s: Time that a wait must last before the number changes.
    """

    num_replicas: int
    max_replicas: int
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    address: str | None = None
    scale_up_after_s: float = SCALE_UP_AFTER_S
    scale_down_after_s: float = SCALE_DOWN_AFTER_S


class ReplicaApp:
    """ASGI application of one replica: the service, started when its engine is ready.

    Attributes:
        app: The application of `hyper serve`.
        service: Its service.
        metrics_listener: The replica's own port for /metrics and the probes; None without HYPER_METRICS_PORT.
    """

    def __init__(self, settings: Settings) -> None:
        self.metrics_listener = open_metrics_port(settings)
        if self.metrics_listener is not None:
            port = self.metrics_listener.getsockname()[1]
            settings = settings.model_copy(update={"metrics_port": port})
        self.settings = settings
        self.app: FastAPI = create_app(settings)
        self.service: Service = self.app.state.service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application; its request id is left to Ray's proxy, which sends the same one."""
        if scope["type"] == "lifespan":
            await self.live(receive, send)
            return

        async def send_without_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                del MutableHeaders(scope=message)["x-request-id"]
            await send(message)

        await self.app(scope, receive, send_without_id)

    async def live(self, receive: Receive, send: Send) -> None:
        """Handle the lifespan: start the service and wait for its engine, and stop it at the end."""
        await receive()
        try:
            async with self.app.router.lifespan_context(self.app), self.serving_metrics():
                await self.wait_until_ready()
                await send({"type": "lifespan.startup.complete"})
                await receive()
                # Ray has waited for the requests in flight; a drain here would find none.
        except HyperError as error:
            await send({"type": "lifespan.startup.failed", "message": error.message})
            return
        await send({"type": "lifespan.shutdown.complete"})

    async def wait_until_ready(self) -> None:
        """Wait for the engine.

        Raises:
            HyperError: If it cannot be started.
        """
        while self.service.state != "ready":
            if self.service.failure is not None:
                raise HyperError(f"the replica's engine did not start: {self.service.failure}")
            await asyncio.sleep(READY_INTERVAL_S)

    @contextlib.asynccontextmanager
    async def serving_metrics(self) -> AsyncGenerator[None]:
        """Serve the metrics port during the block: Ray's port leads to any replica, so it cannot serve metrics."""
        if self.metrics_listener is None:
            yield
            return
        config = uvicorn.Config(
            self.app,
            lifespan="off",
            http="h11",
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=CLOSE_TIMEOUT_S,
        )
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve(sockets=[self.metrics_listener]))
        try:
            yield
        finally:
            server.should_exit = True
            await asyncio.gather(serving, return_exceptions=True)

    def reasons_unhealthy(self) -> list[str]:
        """Return the reasons of /readyz to replace this replica; a full or restarting one is not replaced."""
        return [reason for reason in self.service.reasons_not_ready() if reason not in ("overloaded", "shutting_down")]

    def expected_wait_s(self) -> float:
        """Return the expected wait for the engine of a request that arrives now."""
        return self.service.limiter.wait_s(self.service.num_in_flight)


def open_metrics_port(settings: Settings) -> socket.socket | None:
    """Open the first free port from HYPER_METRICS_PORT on, because replicas of one machine need different ones.

    Raises:
        HyperError: If none of a hundred is free.
    """
    if settings.metrics_port is None:
        return None
    for port in range(settings.metrics_port, settings.metrics_port + NUM_METRICS_PORTS):
        with contextlib.suppress(HyperError):
            return bind(settings.metrics_host, port)
    raise HyperError(
        f"HYPER_METRICS_PORT={settings.metrics_port}: none of {NUM_METRICS_PORTS} ports from there is free"
    )


def build_replica_app() -> ReplicaApp:
    """Build the application of a replica from its process's environment."""
    settings = Settings()
    logs.configure(settings.log_level)
    return ReplicaApp(settings)


def wanted_replicas(context: Any) -> tuple[int, dict[str, Any]]:
    """Return one replica more if a request waits too long anywhere, one less if none waits; Ray adds the delays.

    Args:
        context: Ray's `AutoscalingContext`, with the statistic of each replica.
    """
    statistics: dict[str, dict[Any, float]] = context.aggregated_metrics or {}
    waits_s = statistics.get(EXPECTED_WAIT, {})
    longest_s = max(waits_s.values(), default=0.0)
    num = context.current_num_replicas
    if longest_s > SCALE_UP_WAIT_S:
        return num + 1, {}
    if longest_s < SCALE_DOWN_WAIT_S and waits_s:
        return num - 1, {}
    return num, {}


def deployment(settings: Settings, fleet: Fleet, variables: Mapping[str, str]) -> Any:
    """Return the Ray Serve application of a fleet.

    Args:
        settings: Settings of every replica.
        variables: `HYPER_*` variables of every replica.
    """
    serve: Any = import_module("ray.serve")

    @serve.ingress(build_replica_app)
    class Replica:
        """One replica; Ray calls its methods."""

        app: ReplicaApp

        async def check_health(self) -> None:
            """Raise if /readyz has a reason to replace the replica."""
            if reasons := self.app.reasons_unhealthy():
                raise RuntimeError(f"not ready: {', '.join(reasons)}")

        async def record_autoscaling_stats(self) -> dict[str, float]:
            """Return the statistic of `wanted_replicas`."""
            return {EXPECTED_WAIT: self.app.expected_wait_s()}

    size: dict[str, Any] = {"num_replicas": fleet.num_replicas}
    if fleet.max_replicas > fleet.num_replicas:
        size = {
            "autoscaling_config": {
                "min_replicas": fleet.num_replicas,
                "max_replicas": fleet.max_replicas,
                "upscale_delay_s": fleet.scale_up_after_s,
                "downscale_delay_s": fleet.scale_down_after_s,
                "metrics_interval_s": 1.0,
                "look_back_period_s": 2.0,
                "policy": {"policy_function": wanted_replicas},
            }
        }
    options: dict[str, Any] = {
        "name": "replica",
        **size,
        # A full replica's next request goes to its successor on the ring, instead of a 503 of the replica.
        "max_ongoing_requests": settings.max_in_flight,
        "max_queued_requests": settings.max_in_flight,
        "graceful_shutdown_timeout_s": settings.drain_timeout_s + STOP_TIMEOUT_S,
        "graceful_shutdown_wait_loop_s": 0.5,
        "health_check_period_s": HEALTH_INTERVAL_S,
        # The supervisor restarts an engine by itself; Ray replaces a replica that stays down for longer.
        "health_check_timeout_s": 60.0,
        "ray_actor_options": {
            "num_cpus": fleet.num_cpus,
            "num_gpus": fleet.num_gpus,
            "runtime_env": {"env_vars": dict(variables)},
        },
        "request_router_config": {
            "request_router_class": "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter",
        },
    }
    return serve.deployment(Replica, **options).bind()


def prepare_environment(fleet: Fleet) -> None:
    """Set Ray's variables before Ray is imported; a cluster of its own gets a new token and ports on loopback.

    Raises:
        HyperError: If a running cluster is named without its token.
    """
    variables = RAY_VARIABLES if fleet.address is not None else RAY_VARIABLES | OWN_CLUSTER_VARIABLES
    os.environ.update({name: value for name, value in variables.items() if name not in os.environ})
    if "RAY_AUTH_TOKEN" not in os.environ and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        if fleet.address is not None and os.environ["RAY_AUTH_MODE"] == "token":
            raise HyperError("RAY_AUTH_TOKEN_PATH is not set: name the file with the token of the Ray cluster")
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def replica_variables(settings: Settings, fleet: Fleet) -> dict[str, str]:
    """Return the `HYPER_*` variables of every replica: this process's, and the options of the command."""
    inherited = {name: value for name, value in os.environ.items() if name.upper().startswith(PREFIX)}
    options = {"HYPER_HOST": settings.host, "HYPER_ENGINE": settings.engine}
    if settings.checkpoint is not None:
        options["HYPER_CHECKPOINT"] = str(settings.checkpoint.resolve())
    if "HYPER_QUOTA_REPLICAS" not in inherited:
        options["HYPER_QUOTA_REPLICAS"] = str(fleet.max_replicas)
    return {**inherited, **options}


def run(settings: Settings, fleet: Fleet) -> int:
    """Run a fleet until SIGTERM or SIGINT, drain it, and return the exit code.

    Raises:
        HyperError: If Ray is not installed, or a replica cannot be started.
    """
    logs.configure(settings.log_level)
    prepare_environment(fleet)
    try:
        ray: Any = import_module("ray")
        serve: Any = import_module("ray.serve")
    except ImportError as error:
        raise HyperError(f"hyper fleet needs Ray Serve ({error.name} is missing): install the extra `fleet`") from None
    num_cpus = math.ceil(fleet.num_cpus * fleet.max_replicas)
    # `local` starts a new cluster; without an address Ray joins the last one of this machine, even if it has ended.
    local: dict[str, Any] = {"address": "local", "_node_ip_address": "127.0.0.1", "num_cpus": num_cpus}
    cluster = {"address": fleet.address} if fleet.address else local
    ray.init(**cluster, include_dashboard=False, log_to_driver=True, logging_level=logging.WARNING, namespace="serve")
    try:
        serve.start(
            proxy_location="EveryNode",
            http_options={
                "host": settings.host,
                "port": settings.port,
                "keep_alive_timeout_s": int(settings.keep_alive_s),
                "request_timeout_s": settings.max_timeout_ms / 1000 + settings.upload_timeout_s,
            },
        )
        application = deployment(settings, fleet, replica_variables(settings, fleet))
        try:
            serve.run(application, name=APPLICATION, route_prefix="/", blocking=False)
        except RuntimeError as error:
            raise HyperError(f"the fleet did not start: {error}") from None
        is_over = threading.Event()

        def stop(number: int, frame: object) -> None:
            is_over.set()

        # Only now: `ray.init` installs its own handlers, which end the process at once.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        click.echo(f"ready: http://{settings.host}:{settings.port}  {fleet.num_replicas} replicas")
        is_over.wait()
        logger.info("draining the fleet")
        # Ray waits for the requests in flight of each replica; new ones get 404 from its proxy.
        serve.delete(APPLICATION)
        serve.shutdown()
    finally:
        ray.shutdown()
    return 0


def build(arguments: dict[str, str]) -> Any:
    """Return the Ray Serve application for a Serve configuration file, such as the one of deploy/kuberay.yaml.

    Args:
        arguments: Fields of `Fleet` as text; settings come from the `HYPER_*` variables of the head.
    """
    settings = Settings()
    num_replicas = int(arguments.get("num_replicas", "2"))
    fleet = Fleet(
        num_replicas=num_replicas,
        max_replicas=int(arguments.get("max_replicas", num_replicas)),
        num_cpus=float(arguments.get("num_cpus", "1")),
        num_gpus=float(arguments.get("num_gpus", "0")),
    )
    return deployment(settings, fleet, replica_variables(settings, fleet))
