"""Webhooks of jobs: signatures of deliveries, and the secrets behind them."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import ClassVar
from urllib.parse import quote

import httpx

from hyper.errors import UnexpectedReplyError, WebhookVerificationError
from hyper.protocol import SECRETS_PATH, parse, parse_json, read_reply
from server.api.job_types import SecretList, SecretReply, WebhookEvent

__all__ = ["SecretList", "SecretReply", "WebhookEvent", "verify_webhook"]

SECRET_PREFIX = "whsec_"
TOLERANCE_S = 300.0


def verify_webhook(
    body: bytes | str, headers: Mapping[str, str], secret: str, *, tolerance_s: float = TOLERANCE_S
) -> WebhookEvent:
    """Verify a delivery by the rules of Standard Webhooks, and return its event.

    A receiver calls it with the unchanged body, before any use of it. Signatures are compared in constant time.

    Args:
        body: Body of the delivery, as received.
        headers: Headers of the delivery; the case of their names is free.
        secret: Secret of the API key, `whsec_...`.
        tolerance_s: Largest difference in seconds between the delivery's time and this machine's.

    Raises:
        WebhookVerificationError: A header is absent or malformed, the time is outside the tolerance, or no
            signature fits.
        UnexpectedReplyError: The signed body is not an event of a job.
        ValueError: The secret is not base64.
    """
    key = _key_of(secret)
    data = body.encode(errors="surrogatepass") if isinstance(body, str) else body
    given = {name.lower(): value for name, value in headers.items()}
    event_id, moment, signatures = (_header(given, f"webhook-{name}") for name in ("id", "timestamp", "signature"))
    if not (moment.isascii() and moment.isdecimal() and len(moment) <= 12):
        raise WebhookVerificationError(f"webhook-timestamp is {moment[:40]!r}, not a number of seconds.")
    offset_s = time.time() - int(moment)
    if abs(offset_s) > tolerance_s:
        side = "old" if offset_s > 0 else "early"
        message = f"the delivery is {abs(offset_s):.0f} s too {side} for the tolerance of {tolerance_s:g} s."
        raise WebhookVerificationError(f"{message} Check the clock of this machine.")
    signed = b".".join((event_id.encode(errors="surrogatepass"), moment.encode(), data))
    expected = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest())
    found = [each.removeprefix("v1,") for each in signatures.split() if each.startswith("v1,")]
    # Each signature is compared, whether or not an earlier one fits.
    fits = [hmac.compare_digest(each.encode(errors="surrogatepass"), expected) for each in found]
    if not any(fits):
        message = f"none of the {len(found)} signatures of the delivery fits the body and the secret."
        raise WebhookVerificationError(f"{message} Pass the body unchanged, and the secret of the job's API key.")
    try:
        return parse(WebhookEvent, parse_json(data.decode()))
    except UnicodeDecodeError as error:
        raise UnexpectedReplyError("the delivery is not JSON.") from error


def _header(headers: Mapping[str, str], name: str) -> str:
    if not headers.get(name):
        raise WebhookVerificationError(f"the delivery has no header {name}.")
    return headers[name]


def _key_of(secret: str) -> bytes:
    try:
        key = base64.b64decode(secret.removeprefix(SECRET_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if not key:
        # The message does not repeat the secret.
        raise ValueError(f"the secret is not valid: it needs {SECRET_PREFIX} and base64.")
    return key


class Secrets:
    """The webhook secrets of the caller's key; `Client.webhooks.secrets`. Errors are those of `Client.ask`."""

    def __init__(self, call: Callable[..., httpx.Response], url: str) -> None:
        self._call = call
        self._url = url

    def create(self) -> SecretReply:
        """Create a secret; only this reply contains it. The one before signs too for a day.

        The request is sent once: a second one would end the secret before.
        """
        return read_reply(self._call("POST", SECRETS_PATH, once=True), SecretReply, self._url)

    def list(self) -> SecretList:
        """List the valid secrets without their values, the newest first."""
        return read_reply(self._call("GET", SECRETS_PATH), SecretList, self._url)

    def delete(self, secret_id: str) -> None:
        """End a secret at once."""
        self._call("DELETE", path_of(secret_id))


class AsyncSecrets:
    """The webhook secrets of the caller's key; `AsyncClient.webhooks.secrets`. See `Secrets`."""

    def __init__(self, call: Callable[..., Awaitable[httpx.Response]], url: str) -> None:
        self._call = call
        self._url = url

    async def create(self) -> SecretReply:
        """Create a secret; see `Secrets.create`."""
        return read_reply(await self._call("POST", SECRETS_PATH, once=True), SecretReply, self._url)

    async def list(self) -> SecretList:
        """List the valid secrets; see `Secrets.list`."""
        return read_reply(await self._call("GET", SECRETS_PATH), SecretList, self._url)

    async def delete(self, secret_id: str) -> None:
        """End a secret at once."""
        await self._call("DELETE", path_of(secret_id))


class Webhooks:
    """`Client.webhooks`: the secrets, and `verify`, which sends no request."""

    verify: ClassVar = staticmethod(verify_webhook)

    def __init__(self, call: Callable[..., httpx.Response], url: str) -> None:
        self.secrets = Secrets(call, url)


class AsyncWebhooks:
    """`AsyncClient.webhooks`: the secrets, and `verify`, which sends no request."""

    verify: ClassVar = staticmethod(verify_webhook)

    def __init__(self, call: Callable[..., Awaitable[httpx.Response]], url: str) -> None:
        self.secrets = AsyncSecrets(call, url)


def path_of(secret_id: str) -> str:
    """Return the path of a secret; an id cannot lead to another path."""
    return f"{SECRETS_PATH}/{quote(secret_id, safe='')}"
