"""What an operator may set, read once from `HYPER_*` environment variables and passed in from there.

Facts about a model (its window, its pause budget, its longest context) travel in the checkpoint's manifest and are not
settings. This module knows neither HTTP nor the engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from ipaddress import ip_address
from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

MEBIBYTE = 1024 * 1024
PREFIX = "HYPER_"
NOT_OURS = frozenset({"HYPER_URL", "HYPER_KEY"})  # `hyper ask` reads them.


class Settings(BaseSettings):
    """Holds the service's configuration; every field reads from `HYPER_<NAME>`, where empty means unset."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, frozen=True, extra="forbid")

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    key_file: Path | None = Field(default=None, description="API keys, written by `hyper keys`; none: see open_to_all.")
    open_to_all: bool = Field(
        default=False, description="Serve everybody who can connect. Without keys that is else done on 127.0.0.1 alone."
    )
    metrics_host: str = "127.0.0.1"
    metrics_port: int | None = Field(
        default=None, ge=1, le=65535, description="A second port, for probes and /metrics alone, which asks for no key."
    )

    metrics_by_key: bool = Field(
        default=False, description="Count seconds of audio by key too, under the first digits of its name's SHA-256."
    )

    checkpoint: Path | None = None
    verify_checkpoint: bool = True
    engine: Literal["vllm", "scripted"] = "vllm"
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        default="auto", description="auto is bfloat16, and float32 on a processor without instructions for that."
    )
    kv_cache_gib: int = Field(default=1, ge=1, description="CPU only: memory for the key-value cache.")
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1, description="GPU only: share of the card to use.")
    max_num_seqs: int = Field(default=16, ge=1, description="Requests that the engine decodes together.")
    scripted_token_interval_s: float = Field(
        default=0.0, ge=0, description="Scripted engine only: pace of its tokens, to rehearse a slow model."
    )

    hang_timeout_s: float = Field(
        default=20.0, gt=0, description="Silence of an engine that was asked for a token, after which it is killed."
    )
    max_engine_restarts: int = Field(default=5, ge=0, description="In ten minutes; one more ends the service.")

    max_audio_bytes: int = Field(default=25 * MEBIBYTE, ge=1)
    max_audio_s: float = Field(default=600.0, gt=0, description="Decoded seconds; counted, headers are not trusted.")
    decode_timeout_s: float = Field(default=10.0, gt=0)
    decode_workers: int = Field(default=2, ge=1, description="Clips that are decoded at the same time.")
    decode_memory_mib: int = Field(default=256, ge=96, description="What decoding one clip may take, code included.")
    decode_sandbox: Literal["auto", "require"] = Field(
        default="auto",
        description="auto goes without where the kernel has none, on 127.0.0.1 alone; require never does.",
    )
    max_connections: int = Field(default=4000, ge=1, description="Open connections; more are closed as they come.")
    head_timeout_s: float = Field(default=10.0, gt=0, description="From connecting to the last header.")
    upload_timeout_s: float = Field(default=60.0, gt=0)
    upload_idle_timeout_s: float = Field(default=10.0, gt=0)

    # One and a half times the engine's places: full, a request waits for half a round of answers, and the slowest
    # take less than twice as long as at 0.8 of the peak (docs/LOG.md).
    max_in_flight: int = Field(default=24, ge=1, description="Admitted requests, uploads included; more get a 503.")
    max_batch_share: float = Field(
        default=0.5, gt=0, le=1, description="Share of these places that requests of the class `batch` may take."
    )
    max_queue_wait_s: float = Field(
        default=60.0, gt=0, description="Expected wait for the engine beyond which requests get a 503."
    )
    default_max_tokens: int = Field(default=1024, ge=1)
    max_tokens: int = Field(default=4096, ge=1)
    default_timeout_ms: int = Field(default=120_000, ge=1)
    max_timeout_ms: int = Field(default=600_000, ge=1)
    ping_interval_s: float = Field(default=5.0, gt=0, le=10)
    drain_timeout_s: float = Field(default=30.0, ge=0)

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the service."""
        if self.host == "localhost":
            return True
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def max_body_bytes(self) -> int:
        """The largest request body: the largest clip as base64, and room for the words around it."""
        return self.max_audio_bytes * 4 // 3 + MEBIBYTE


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """Says for each `HYPER_*` variable that no setting reads that it is none, and which one may be meant.

    pydantic-settings looks up the names it knows and never sees the others, so a misspelt limit would not be one.
    """
    known = [f"{PREFIX}{name}".upper() for name in Settings.model_fields]
    found: list[str] = []
    for name, value in sorted(environment.items()):
        upper = name.upper()
        if value and upper.startswith(PREFIX) and upper not in known and upper not in NOT_OURS:
            meant = get_close_matches(upper, known, n=1)
            found.append(f"{name}: there is no such setting" + (f"; {meant[0]}?" if meant else ""))
    return found
