"""Webhooks in the format of Standard Webhooks: signature, one attempt, and the times of the next ones."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import secrets
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import httpx

from server.jobs.address_guard import ForbiddenAddressError, Target, resolve
from server.jobs.records import Job

SECRET_PREFIX = "whsec_"
NUM_SECRET_BYTES = 32
ATTEMPT_TIMEOUT_S = 10.0
GONE = 410


def new_secret() -> str:
    """Return a new secret: `whsec_` and 32 random bytes as base64."""
    return SECRET_PREFIX + base64.b64encode(secrets.token_bytes(NUM_SECRET_BYTES)).decode()


def sign(secret: str, event_id: str, timestamp: int, body: bytes) -> str:
    """Return the signature `v1,...` of a delivery."""
    key = base64.b64decode(secret.removeprefix(SECRET_PREFIX))
    signed = b".".join((event_id.encode(), str(timestamp).encode(), body))
    return "v1," + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()


def signed_headers(signing_secrets: Sequence[str], event_id: str, body: bytes) -> dict[str, str]:
    """Return the headers of a delivery, with one signature per valid secret."""
    timestamp = int(time.time())
    return {
        "content-type": "application/json",
        "webhook-id": event_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(sign(secret, event_id, timestamp, body) for secret in signing_secrets),
    }


def event_body(job: Job, event_id: str, type_: str) -> bytes:
    """Write the body: id and status of the job, and no content of the answer."""
    ended_s = job.ended_s or job.created_s
    data: dict[str, Any] = {
        "id": event_id,
        "object": "event",
        "type": type_,
        "created_at": int(ended_s),
        "timestamp": datetime.fromtimestamp(ended_s, UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        "data": {"id": job.id, "status": job.status},
    }
    return json.dumps(data, separators=(",", ":")).encode()


@dataclass(frozen=True)
class Attempt:
    """Result of one attempt.

    Attributes:
        status_code: Status of the reply; None without a reply.
        error: Reason of a failure; None after a success.
        is_final: Whether no further attempt is useful: success, 410, or a forbidden address.
    """

    status_code: int | None
    error: str | None
    is_final: bool


async def attempt(url: str, headers: dict[str, str], body: bytes, allowed_hosts: Collection[str]) -> Attempt:
    """Send a delivery once, without following redirects or reading the reply's body."""
    try:
        async with asyncio.timeout(ATTEMPT_TIMEOUT_S):
            target = await resolve(url, allowed_hosts)
            status_code = await post(target, headers, body)
    except ForbiddenAddressError as error:
        return Attempt(None, error.message, is_final=True)
    except TimeoutError:
        return Attempt(None, f"no reply within {ATTEMPT_TIMEOUT_S:g} s", is_final=False)
    except (httpx.HTTPError, OSError) as error:
        return Attempt(None, f"no reply: {type(error).__name__}", is_final=False)
    if 200 <= status_code < 300:
        return Attempt(status_code, None, is_final=True)
    if status_code == GONE:
        return Attempt(status_code, "the receiver replied 410 Gone", is_final=True)
    if 300 <= status_code < 400:
        return Attempt(status_code, "the receiver replied with a redirect, which is not followed", is_final=False)
    return Attempt(status_code, f"the receiver replied {status_code}", is_final=False)


async def post(target: Target, headers: dict[str, str], body: bytes) -> int:
    """Post to the checked address and return the reply's status; TLS checks the host's name."""
    address = f"[{target.address}]" if ":" in target.address else target.address
    # No proxy from the environment: it would resolve the name again.
    async with httpx.AsyncClient(timeout=ATTEMPT_TIMEOUT_S, trust_env=False, follow_redirects=False) as client:
        request = client.build_request(
            "POST",
            f"{target.scheme}://{address}:{target.port}{target.path}",
            content=body,
            headers={**headers, "host": target.authority, "user-agent": "hyper-webhooks"},
            extensions={"sni_hostname": target.host},
        )
        response = await client.send(request, stream=True)
        await response.aclose()
        return response.status_code
