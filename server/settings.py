"""Operator settings, read once from `HYPER_*` environment variables and then passed as arguments.

Facts about a model (its window, its pause budget, its longest context) are in the checkpoint's manifest, not here. The
module is independent of HTTP and engines.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from difflib import get_close_matches
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

MEBIBYTE = 1024 * 1024
DAY_S = 86_400
PREFIX = "HYPER_"
_STORE_SCHEMES = frozenset({"redis", "rediss", "unix"})
_ORIGIN = re.compile(r"https?://[A-Za-z0-9.\-\[\]:]+/?")
# The first three are for the client and `hyper ask`, the last for the folder of composed and int8 checkpoints.
NOT_OURS = frozenset({"HYPER_URL", "HYPER_API_KEY", "HYPER_KEY", "HYPER_CACHE"})


ENGINES: Mapping[str, str] = {"vllm": "server.engines.vllm", "scripted": "server.engines.scripted"}
"""Module of every engine by its name. Its `build(settings, checkpoint)` returns the engine; it is imported on use."""


def _known_engine(name: str) -> str:
    if name not in ENGINES:
        raise ValueError(f"unknown engine; the engines are {', '.join(ENGINES)}")
    return name


class Settings(BaseSettings):
    """Configuration of the service; every field is read from `HYPER_<NAME>`, and an empty value means unset."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, frozen=True, extra="forbid")

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    key_file: Path | None = Field(
        default=None, description="File of API keys, written by `hyper keys`; for none see open_to_all."
    )
    open_to_all: bool = Field(
        default=False, description="Serve without keys on any address; otherwise a key file or 127.0.0.1 is required."
    )
    metrics_host: str = "127.0.0.1"
    metrics_port: int | None = Field(
        default=None, ge=1, le=65535, description="Second port, for probes and /metrics only, without authentication."
    )

    metrics_by_key: bool = Field(
        default=False, description="Also count seconds of audio per key, under the first digits of its name's SHA-256."
    )

    quota_url: str | None = Field(
        default=None,
        description="Redis or Valkey server for the quotas of several replicas, such as redis://10.0.0.7:6379/0.",
    )
    quota_password_file: Path | None = Field(default=None, description="File with the password of the quota store.")
    quota_replicas: int = Field(
        default=1, ge=1, description="Number of replicas that share each limit, until the quota store has counted them."
    )

    checkpoint: Path | None = None
    verify_checkpoint: bool = True
    engine: Annotated[str, AfterValidator(_known_engine)] = "vllm"
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        default="auto", description="auto is bfloat16, or float32 on a processor without native bfloat16."
    )
    compile: Literal["auto", "on", "off"] = Field(
        default="off",
        description="CPU: compile the model; faster answers, slower first start. auto: if a C++ compiler is found.",
    )
    quantize: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="Serve int8 weights from the cache folder. auto: if accuracy was compared and this CPU gains.",
    )
    kv_cache_gib: int = Field(default=1, ge=1, description="CPU only: memory of the key-value cache.")
    gpu_memory_utilization: float = Field(
        default=0.9, gt=0, le=1, description="GPU only: share of the GPU's memory to use."
    )
    max_num_seqs: int = Field(
        default=16, ge=1, description="Maximum number of requests decoded together by the engine."
    )
    drafts: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="CPU only: check drafted tokens, several per step; auto does so in small batches.",
    )
    scripted_token_interval_s: float = Field(
        default=0.0, ge=0, description="Scripted engine only: time per token, to simulate a slow model."
    )

    hang_timeout_s: float = Field(
        default=20.0, gt=0, description="Silence of the engine after a ping, before it is killed."
    )
    max_engine_restarts: int = Field(default=5, ge=0, description="Maximum in ten minutes; one more ends the service.")

    state_dir: Path | None = Field(
        default=None,
        description="Folder of what survives a restart, such as stored files; by default hyper in $XDG_STATE_HOME.",
    )
    files_max_bytes: int = Field(
        default=200 * MEBIBYTE, ge=1, description="Maximum of one stored file; a clip also has max_audio_bytes."
    )
    files_tenant_bytes: int = Field(default=4096 * MEBIBYTE, ge=1, description="Maximum of stored bytes per key.")
    files_tenant_count: int = Field(default=1000, ge=1, description="Maximum number of stored files per key.")
    files_default_lifetime_s: int = Field(
        default=7 * DAY_S, ge=1, description="Lifetime of a stored file without `expires_after`."
    )
    files_max_lifetime_s: int = Field(default=30 * DAY_S, ge=1, description="Maximum of `expires_after`.")

    max_audio_bytes: int = Field(default=25 * MEBIBYTE, ge=1)
    max_audio_s: float = Field(
        default=600.0, gt=0, description="Maximum decoded seconds; counted, because headers are not trusted."
    )
    decode_timeout_s: float = Field(default=10.0, gt=0)
    max_recording_s: float = Field(
        default=3600.0, gt=0, description="Maximum decoded seconds with `long_audio` window or chunk."
    )
    recording_decode_timeout_s: float = Field(
        default=60.0, gt=0, description="Maximum time to decode a recording, block by block."
    )
    sync_windows: int = Field(
        default=5, ge=1, description="Maximum number of windows of a recording outside a job; more get a 422."
    )
    recording_cuts: Literal["quietest", "fixed"] = Field(
        default="quietest", description="fixed cuts each 30 s, in the middle of words too; for comparisons only."
    )
    recording_cache_mib: int = Field(
        default=64, ge=0, description="Maximum memory of the perceptions of recordings' windows."
    )
    recording_ttl_s: float = Field(
        default=3600.0, gt=0, description="Time until a recording's perceptions are dropped, from their last use."
    )
    decode_workers: int = Field(default=2, ge=1, description="Maximum number of clips decoded at the same time.")
    decode_memory_mib: int = Field(default=256, ge=96, description="Maximum memory to decode one clip, code included.")
    trim_silence: bool = Field(
        default=True,
        description="Leave out silence of a second and more, and add quiet to clips below a second, for the model.",
    )
    decode_sandbox: Literal["auto", "require"] = Field(
        default="auto",
        description="auto runs without a sandbox on 127.0.0.1 if the kernel has none; require never does.",
    )
    max_connections: int = Field(
        default=4000, ge=1, description="Maximum number of open connections; further ones are closed at once."
    )
    head_timeout_s: float = Field(
        default=10.0, gt=0, description="From the start of the connection to the last header."
    )
    keep_alive_s: float = Field(
        default=300.0,
        ge=1,
        le=3600,
        description="Idle connections stay open for this long. Keep it above the idle time of a proxy in front.",
    )
    forwarded_allow_ips: str = Field(
        default="",
        description="Addresses of proxies, with commas, whose X-Forwarded-For and X-Forwarded-Proto are trusted.",
    )
    cors_origins: str = Field(
        default="", description="Origins, with commas, whose web pages may call the service; none by default."
    )
    upload_timeout_s: float = Field(default=60.0, gt=0)
    upload_idle_timeout_s: float = Field(default=10.0, gt=0)

    # One and a half times the engine's places. At this load a request waits for half a round of answers. The slowest
    # requests then take less than twice as long as at 0.8 of the peak (docs/LOG.md).
    max_in_flight: int = Field(
        default=24, ge=1, description="Maximum of admitted requests, uploads included; others get a 503."
    )
    max_batch_share: float = Field(
        default=0.5, gt=0, le=1, description="Maximum share of these places for requests of the class `batch`."
    )
    max_queue_wait_s: float = Field(
        default=60.0, gt=0, description="Maximum expected wait for the engine; beyond it requests get a 503."
    )
    max_questions: int = Field(default=16, ge=1, description="Maximum number of questions about one clip in a request.")
    default_max_tokens: int = Field(default=1024, ge=1)
    max_tokens: int = Field(default=4096, ge=1)
    default_timeout_ms: int = Field(default=120_000, ge=1)
    max_timeout_ms: int = Field(default=600_000, ge=1)
    ping_interval_s: float = Field(default=5.0, gt=0, le=10)
    drain_timeout_s: float = Field(default=30.0, ge=0)

    jobs: bool = Field(default=True, description="Take and run jobs and batches; their state is in HYPER_STATE_DIR.")
    jobs_database_url: str | None = Field(
        default=None, description="PostgreSQL for jobs, as postgresql://user:password@host/database; else SQLite."
    )
    jobs_runner_id: str = Field(
        default="jobs-0",
        pattern=r"^[A-Za-z0-9._-]{1,64}$",
        description="Fixed id of this process as a runner of jobs. After a crash, only a process with this id resumes.",
    )
    jobs_concurrency: int = Field(default=4, ge=1, description="Maximum number of steps of jobs at the same time.")
    jobs_max_active: int = Field(default=10_000, ge=1, description="Maximum number of unfinished jobs per API key.")
    jobs_max_age_s: float = Field(
        default=86_400.0, gt=0, description="Time from taking a job to its end; a later one is expired."
    )
    jobs_keep_s: float = Field(
        default=7 * 86_400.0, ge=60, description="Time to keep a job and its result after its end."
    )
    webhook_allowed_hosts: str = Field(
        default="",
        description="Host names, with commas, that webhooks may reach over http and at private addresses.",
    )
    webhook_retry_delays_s: str = Field(
        default="5,300,1800,7200,18000,36000,36000",
        description="Seconds between the attempts to deliver a webhook, with commas; by default over a day.",
    )

    @property
    def webhook_allowed_host_list(self) -> frozenset[str]:
        """Return the hosts of `webhook_allowed_hosts`."""
        return frozenset(filter(None, (host.strip().lower() for host in self.webhook_allowed_hosts.split(","))))

    @property
    def webhook_retry_delays(self) -> tuple[float, ...]:
        """Return the delays of `webhook_retry_delays_s`."""
        return tuple(float(part) for part in self.webhook_retry_delays_s.split(",") if part.strip())

    @field_validator("webhook_retry_delays_s")
    @classmethod
    def check_delays(cls, text: str) -> str:
        """Refuse a delay that is not a number of seconds."""
        for part in filter(None, map(str.strip, text.split(","))):
            if not re.fullmatch(r"\d{1,7}(\.\d{1,3})?", part):
                raise ValueError(f"{part!r} is no number of seconds; write 5,300,1800")
        return text

    @property
    def is_local(self) -> bool:
        """Return whether the service is reachable from this machine only."""
        if self.host == "localhost":
            return True
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def cors_origin_list(self) -> tuple[str, ...]:
        """Return the origins of `cors_origins`."""
        return tuple(filter(None, (origin.strip().rstrip("/") for origin in self.cors_origins.split(","))))

    @field_validator("quota_url")
    @classmethod
    def check_quota_url(cls, url: str | None) -> str | None:
        """Refuse an address that is none of a store; an error never repeats it, because it may hold a password."""
        if url is not None:
            try:
                parts = urlsplit(url)
                is_address = parts.scheme in _STORE_SCHEMES and bool(parts.hostname or parts.path) and parts.port != 0
            except ValueError:
                is_address = False
            if not is_address:
                raise ValueError(
                    "no address of a store; write redis://HOST:6379/0, rediss://HOST:6379/0 or unix://PATH"
                )
        return url

    @field_validator("cors_origins")
    @classmethod
    def check_origins(cls, text: str) -> str:
        """Refuse an origin without a scheme, or with a path: no browser sends one."""
        for origin in filter(None, map(str.strip, text.split(","))):
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ValueError(f"{origin!r} is no origin; write https://app.example.com, or * for all")
        return text

    @field_validator("forwarded_allow_ips")
    @classmethod
    def check_proxies(cls, text: str) -> str:
        """Refuse host names, which uvicorn would compare as text, and *, which would let every client forge."""
        for address in filter(None, map(str.strip, text.split(","))):
            try:
                ip_network(address)
            except ValueError:
                raise ValueError(f"{address!r} is no address or network, such as 10.0.0.7 or 10.0.0.0/8") from None
        return text

    @property
    def state_path(self) -> Path:
        """Return the folder of what survives a restart."""
        if self.state_dir is not None:
            return self.state_dir
        return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "hyper"

    @property
    def max_upload_bytes(self) -> int:
        """Return the maximum size of the body of a file's upload."""
        return self.files_max_bytes + MEBIBYTE

    @property
    def max_body_bytes(self) -> int:
        """Return the maximum size of a request body: the largest clip as base64, and room for the other fields."""
        return self.max_audio_bytes * 4 // 3 + MEBIBYTE


_PORT_NAME = re.compile(r"_PORT(?:_\d+_(?:TCP|UDP|SCTP)(?:_(?:START|END|PROTO|PORT|ADDR))?|_(?:START|END))?")
_PORT_ADDRESS = re.compile(r"(?:tcp|udp|sctp)://\S+")


def platform_variables(environment: Mapping[str, str]) -> list[str]:
    """Return the `HYPER_*` variables that Kubernetes or Docker set for a service or link, and nobody meant as settings.

    A Kubernetes service named `hyper` or `hyper-redis` puts `HYPER_PORT=tcp://...`, `HYPER_SERVICE_HOST`,
    `HYPER_REDIS_PORT_6379_TCP_ADDR` and others into every container of its namespace. A Docker link named `hyper` adds
    `HYPER_NAME` and `HYPER_ENV_*`.
    """
    upper = {name.upper(): value for name, value in environment.items()}
    names = [name for name in upper if name.startswith(PREFIX)]
    # HYPER or HYPER_REDIS: named by a port with an address, or by the pair that Kubernetes sets for each service.
    prefixes = {name.removesuffix("_PORT") for name in names if name.endswith("_PORT") and _is_address(upper[name])}
    prefixes |= {
        name.removesuffix("_SERVICE_HOST")
        for name in names
        if name.endswith("_SERVICE_HOST") and f"{name.removesuffix('_HOST')}_PORT" in upper
    }

    def is_set_by_platform(name: str) -> bool:
        for prefix in prefixes:
            rest = name.removeprefix(prefix)
            if rest == name or not rest.startswith("_"):
                continue
            if rest in ("_SERVICE_HOST", "_SERVICE_PORT") or rest.startswith("_SERVICE_PORT_"):
                return True
            # A port that the operator set himself, as a number, is a setting.
            if _PORT_NAME.fullmatch(rest) and (rest != "_PORT" or _is_address(upper[name])):
                return True
            if rest == "_NAME" and upper[name].startswith("/"):
                return True
            if rest.startswith("_ENV_") and upper.get(f"{prefix}_NAME", "").startswith("/"):
                return True
        return False

    return sorted(name for name in environment if is_set_by_platform(name.upper()))


def _is_address(value: str) -> bool:
    return _PORT_ADDRESS.fullmatch(value) is not None


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """Return a message for each `HYPER_*` variable without a setting, with the closest known name.

    pydantic-settings ignores unknown variables, so without this check a misspelt limit would have no effect.
    """
    known = [f"{PREFIX}{name}".upper() for name in Settings.model_fields]
    messages: list[str] = []
    for name, value in sorted(environment.items()):
        upper = name.upper()
        if value and upper.startswith(PREFIX) and upper not in known and upper not in NOT_OURS:
            similar = get_close_matches(upper, known, n=1)
            messages.append(f"{name}: unknown setting" + (f"; did you mean {similar[0]}?" if similar else ""))
    return messages
